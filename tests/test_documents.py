"""The documents: what they show runs as it stands."""

import sys
from types import ModuleType

import celery
import celery._state
import pytest
from celery import Celery

import celery_pglock
from tests import documents
from tests.documents import DOCUMENTS, PAGES, ROOT

CODE = {"python", "pycon", "console", "sql", "json", "text"}

by_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


@by_page
def test_every_block_is_of_a_kind_that_is_known(page):
    kinds = {kind for kind in documents.kinds_of_blocks(page) if not kind.startswith("{")}
    assert kinds - CODE == set()


@pytest.fixture
def names(request, rival, monkeypatch):
    """What a reader has before he begins: an app, all public names, and somebody else on the database."""
    # A shared task of one page is none of the next.
    monkeypatch.setattr("celery._state._on_app_finalizers", set(celery._state._on_app_finalizers))
    app = Celery("proj", set_as_current=False)
    app.config_from_object("django.conf:settings", namespace="CELERY")

    def pretend(module, **attributes):
        """A module of the reader's project."""
        made = ModuleType(module)
        vars(made).update(attributes)
        monkeypatch.setitem(sys.modules, module, made)

    public = {name: getattr(celery_pglock, name) for name in celery_pglock.__all__}
    module = {"__name__": "proj.tasks", "__package__": "proj"}
    yield {**module, **public, "app": app, "rival": rival, "request": request, "pretend": pretend}
    app.close()


@by_page
def test_the_code_runs_as_it_stands(page, transactional_db, names):
    document = DOCUMENTS.parse(page)
    document.namespace.update(names)
    for example in document.examples():
        example.evaluate()
        documents.check_settings(document.namespace)
    document.namespace["app"].finalize()
