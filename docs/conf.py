"""How Sphinx builds these documents: `make docs`."""

from pathlib import Path

import django
from django.conf import settings
from pygments.lexers import PostgresLexer
from sphinx.util import logging

import celery_pglock
from celery_pglock import testing

logger = logging.getLogger(__name__)

settings.configure(
    INSTALLED_APPS=["celery_pglock"], DATABASES={"default": {"ENGINE": "django.db.backends.postgresql"}}
)
django.setup()

project = "celery-pglock"
release = celery_pglock.__version__
copyright = "the contributors to celery-pglock, BSD-3-Clause"  # noqa: A001 - Sphinx's name

extensions = ["myst_parser", "sphinx.ext.autodoc", "celery.contrib.sphinx"]
# Every link and every reference has to lead somewhere.
nitpicky = True

myst_enable_extensions = ["deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
# Signatures as they are written: the types are in the source, and in editors.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
# What Celery's extension, which documents tasks, needs of Sphinx 9.
autodoc_use_legacy_class_based = True
add_module_names = False
toc_object_entries = False

html_theme = "furo"
html_title = f"celery-pglock {release}"
html_copy_source = False
html_static_path = ["styles"]
html_css_files = ["site.css"]
# The same text, wherever and whenever it is built.
html_last_updated_fmt = None


def tell_what_is_not_shown(app, env):
    """Of public names and pictures: a warning, as a dead link is one."""
    described = env.domaindata["py"]["objects"]
    public = {f"celery_pglock.{name}" for name in celery_pglock.__all__} - {"celery_pglock.__version__"}
    public |= {f"celery_pglock.testing.{name}" for name in testing.__all__}
    public |= {f"celery_pglock.models.{name}" for name in ("PGLock", "BlockedPGLock", "PGActivity")}
    public |= {f"celery_pglock.tasks.{name}" for name in ("report_locks", "prioritize_critical_tasks")}
    pictures = {f"pictures/{picture.name}" for picture in (Path(app.srcdir) / "pictures").iterdir()}
    for one in sorted(public - described.keys()) + sorted(pictures - env.images.keys()):
        logger.warning("%s is on no page", one)


def setup(app):
    # All SQL here is PostgreSQL's.
    app.add_lexer("sql", PostgresLexer)
    app.connect("env-check-consistency", tell_what_is_not_shown)
