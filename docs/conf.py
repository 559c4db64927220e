"""How Sphinx builds these documents: `make docs`."""

import django
from django.conf import settings
from pygments.lexers import PostgresLexer

import celery_pglock

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


def setup(app):
    # All SQL here is PostgreSQL's.
    app.add_lexer("sql", PostgresLexer)
