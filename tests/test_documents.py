"""The documents: what they show runs as it stands."""

import os
import sys
from types import ModuleType

import celery
import celery._state
import pytest
from celery import Celery
from django.conf import settings
from django.test.utils import override_settings

import celery_pglock
from example_project.servers import free_port
from tests import documented_tasks, documents
from tests.celery_app import app
from tests.conftest import running_worker
from tests.documents import PAGES, ROOT

CODE = {"python", "pycon", "console", "sql", "json", "text"}
# Of Sphinx: it refuses what they name and is not there.
DIRECTIVES = {"{eval-rst}", "{glossary}", "{image}", "{include}", "{literalinclude}", "{toctree}"}
# What is drawn.
DRAWINGS = {"{parsed-literal}"}


def by_pages(pages):
    return pytest.mark.parametrize("page", pages, ids=[str(page.relative_to(ROOT)) for page in pages])


by_page = by_pages(PAGES)


@by_page
def test_every_block_is_of_a_kind_that_is_known(page):
    assert {kind.split(" ")[0] for kind in documents.kinds_of_blocks(page)} <= CODE | DIRECTIVES | DRAWINGS


@by_page
def test_no_link_leaves_the_site(page):
    site = ROOT / "docs"
    found = {os.path.normpath(page.parent / link) for link in documents.links(page)}
    if site in page.parents or page.name == "CONTRIBUTING.md":
        assert {link for link in found if not link.startswith(f"{site}/")} == set()
    else:
        assert {link for link in found if not os.path.exists(link)} == set()


@pytest.fixture
def names(request, rival, monkeypatch):
    """What a reader has before he begins: an app, all public names, and somebody else on the database."""
    # A shared task of one page is none of the next.
    monkeypatch.setattr("celery._state._on_app_finalizers", set(celery._state._on_app_finalizers))
    current = celery.current_app._get_current_object()
    tasks = dict(current.tasks)
    app = Celery("proj", set_as_current=False)
    app.config_from_object("django.conf:settings", namespace="CELERY")

    def pretend(module, **attributes):
        """A module of the reader's project."""
        made = ModuleType(module)
        vars(made).update(attributes)
        monkeypatch.setitem(sys.modules, module, made)

    public = {name: getattr(celery_pglock, name) for name in celery_pglock.__all__}
    module = {"__name__": "proj.tasks", "__package__": "proj"}
    # A test without a transaction around it has only the apps whose tables are emptied after it.
    with override_settings(INSTALLED_APPS=settings.INSTALLED_APPS):
        yield {**module, **public, "app": app, "rival": rival, "request": request, "pretend": pretend}
    app.close()
    current.set_current()
    for name in current.tasks.keys() - tasks.keys():
        del current.tasks[name]


@pytest.fixture(scope="module")
def _shop(django_db_setup, django_db_blocker, tmp_path_factory):
    variables = {
        "TASKS": documented_tasks.__name__.removeprefix("tests."),
        "AS_DOCUMENTED": "yes",
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path_factory.mktemp("metrics")),
        "METRICS_PORT": str(free_port()),
    }
    with django_db_blocker.unblock():
        app.control.purge()
        with running_worker("celery", "-E", "-n", "celery@web1", concurrency=4, **variables) as worker:
            worker.metrics = f"http://127.0.0.1:{variables['METRICS_PORT']}/metrics"
            yield worker


@pytest.fixture
def shop(_shop, transactional_db):
    """The worker of the shop; it logs and counts as documents show."""
    return _shop


# A reader in a folder of his own follows the tutorial: tests/test_tutorial.py. The roles of SECURITY.md
# are the whole server's: tests/test_roles.py runs all of its SQL, in a database and for roles of its own.
@by_pages([page for page in PAGES if page.parent.name != "tutorial" and page.name != "SECURITY.md"])
@pytest.mark.long
def test_the_code_runs_as_it_stands(page, transactional_db, names):
    documents.follow(page, names)
