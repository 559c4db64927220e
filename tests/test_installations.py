"""Tasks that somebody else wrote are locked by rules and by annotations."""

import pickle
import subprocess
import sys
from functools import partial, wraps
from pathlib import Path

import pytest
from celery import Celery, Task, _state, chord, states
from celery.signals import worker_init
from django.db import connection

from celery_pglock import (
    AdvisoryTask,
    LockMisuse,
    LockNotAcquired,
    Raise,
    Skip,
    advisory,
    install,
    lock_for,
    signals,
)
from celery_pglock.installations import heed, in_vain
from celery_pglock.task_classes import LockedTask
from celery_pglock.tasks import report_locks
from celery_pglock.testing import held_elsewhere
from tests.celery_app import app as tests_app
from tests.conftest import PATIENCE, running_worker, wait_until
from tests.models import Entry, most_at_once

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.long]

ROOT = Path(__file__).parent.parent


@pytest.fixture
def app(monkeypatch):
    # A shared task is one of every app that is finalized from then on, and so of other tests.
    monkeypatch.setattr(_state, "_on_app_finalizers", set(_state._on_app_finalizers))
    with Celery("installed", set_as_current=False, broker="memory://", backend="cache+memory://") as app:
        yield app


def add(a, b=2):
    return a + b


class TestRules:
    def test_a_rule_locks_the_tasks_that_it_matches_alone(self, app, rival):
        install(app, {"third.*": {"lock_by": ("a",), "lock_side_effect": Skip("skipped")}})
        third, other = app.task(name="third.add")(add), app.task(name="other.add")(add)
        with held_elsewhere("third.add(a=1)"):
            assert third.apply([1]).get() == "skipped"
            assert third.apply([2]).get() == 4
            assert other.apply([1]).get() == 3
        assert third.apply(kwargs={"a": 1}).get() == 3
        assert rival.sees_advisory_locks() == 0

    def test_later_rules_add_and_override(self, app):
        install(app, {"*": {"lock_timeout": 1, "lock_key": "any"}, "third.*": {"lock_timeout": 2}})
        third, other = app.task(name="third.add")(add), app.task(name="other.add")(add)
        assert third.lock_for(1) == advisory("any", timeout=2)
        assert other.lock_for(1) == advisory("any", timeout=1)

    @pytest.mark.parametrize("base", [Task, AdvisoryTask])
    def test_a_later_key_overrides_an_earlier_one_in_whichever_way_it_is_named(self, app, base):
        own = {"lock_by": ("b",)} if base is AdvisoryTask else {}
        install(app, {"*": {"lock_by": ("b",)}, "third.*": {"lock_key": "{a}"}, "*.by": {"lock_by": ("a",)}})
        by_text = app.task(name="third.add", base=base, **own)(add)
        by_argument = app.task(name="third.by", base=base, **own)(add)
        assert lock_for(by_text, 1).name == "1"
        assert lock_for(by_argument, 1).name == "third.by(a=1)"

    def test_a_rule_that_names_the_key_twice_is_refused(self, app):
        install(app, {"third.*": {"lock_by": ("a",), "lock_key": "k"}})
        with pytest.raises(LockMisuse, match="lock_key and lock_by both name the key"):
            app.task(name="third.add")(add).apply([1])

    def test_a_rule_of_none_leaves_a_task_out(self, app):
        app.conf.task_annotations = {"third.out": {"lock_shared": True}}
        install(app, {"third.*": {"lock_key": "k"}, "third.out": None, "third.o*": {"lock_limit": 2}})
        assert lock_for(app.task(name="third.in")(add), 1) == advisory("k", timeout=0)
        out = app.task(name="third.out")(add)
        assert lock_for(out, 1) == advisory("third.out", timeout=0, limit=2)
        install(app, {"third.o*": None})
        with pytest.raises(LockMisuse, match=r"third.out is not locked: .* nor task_annotations name it"):
            lock_for(out, 1)

    def test_a_name_is_no_task(self):
        with pytest.raises(
            LockMisuse, match=r"lock_for\(\) takes a task, and not its name: app.tasks\['a'\]"
        ):
            lock_for("a")

    def test_tasks_that_are_bound_already_are_locked_too(self, app):
        early = app.task(name="third.add")(add)
        before = early.apply([1])
        assert before.get() == 3
        install(app, {"third.*": {"lock_key": "k", "lock_side_effect": Raise()}})
        with held_elsewhere("k"), pytest.raises(LockNotAcquired):
            early.apply([1]).get()

    @pytest.mark.parametrize("bound_before", [False, True])
    def test_installed_twice_and_over_our_own_base_class_it_locks_once(self, app, rival, bound_before):
        told = []

        def note(lock, **_):
            told.append((lock, rival.sees_advisory_locks()))

        rules = {"third.*": {"lock_key": "k", "lock_timeout": 1}}
        if not bound_before:
            install(app, rules)
            install(app, rules)
        tasks = [
            app.task(name="third.plain")(add),
            app.task(name="third.ours", base=AdvisoryTask, lock_key="mine")(add),
            app.task(name="third.annotated", base=AdvisoryTask)(add),
        ]
        assert all(task.name for task in tasks)
        install(app, rules)
        install(app, {"third.*": {"lock_timeout": 2}})
        signals.lock_acquired.connect(note)
        try:
            for task in tasks:
                assert task.apply([1]).get() == 3
        finally:
            signals.lock_acquired.disconnect(note)
        assert told == 3 * [(advisory("k", timeout=2), 1)]

    def test_over_a_wrapper_that_an_annotation_put_there_both_count(self, app, rival):
        def twice(call):
            return lambda *args, **kwargs: 2 * call(*args, **kwargs)

        app.conf.task_annotations = {"third.add": {"@__call__": twice, "lock_key": "k", "rate_limit": "1/s"}}
        install(app, {"third.*": {"lock_side_effect": Skip("skipped")}})
        third = app.task(name="third.add")(add)
        assert third.apply([1]).get() == 6
        assert third.rate_limit == "1/s"
        with held_elsewhere("k"):
            assert third.apply([1]).get() == "skipped"

    def test_what_the_tasks_class_calls_its_own_stays_what_it_was(self, app):
        class Theirs(Task):
            lock = "theirs"
            lock_timeout = "theirs, too"

            @classmethod
            def on_bound(cls, app):
                cls.is_theirs = True

            def __call__(self, *args, **kwargs):
                return [type(self).__name__, super().__call__(*args, **kwargs)]

        app.conf.task_annotations = {"third.tells": {"lock_timeout": 1}}
        install(app, {"third.*": {"lock_key": "k"}})

        @app.task(name="third.tells", base=Theirs, bind=True)
        def tells(self):
            assert self.is_theirs
            return self.lock, self.lock_timeout, self.lock_for().is_held(), lock_for(self).name

        assert tells.apply().get() == ["tells", ("theirs", "theirs, too", True, "k")]

    def test_what_its_body_sets_is_its_own_too(self, app):
        class Theirs(Task):
            name = "third.sets"

            def run(self):
                before, self.lock = self.lock.name, "theirs"
                return before, self.lock, lock_for(self).is_held()

        install(app, {"third.*": {"lock_key": "k"}})
        assert app.register_task(Theirs()).apply().get() == ("k", "theirs", True)

    def test_a_subclass_of_a_locked_class_has_rules_of_its_own(self, app):
        class Parent(Task):
            name = "third.parent"

            def run(self):
                return "parent"

        class Child(Parent):
            name = "other.child"

        install(app, {"third.*": {"lock_key": "k", "lock_side_effect": Skip("skipped")}})
        parent, child = app.register_task(Parent()), app.register_task(Child())
        with held_elsewhere("k"):
            assert parent.apply().get() == "skipped"
            assert child.apply().get() == "parent"

    @pytest.mark.parametrize("base", [Task, AdvisoryTask])
    def test_a_class_that_is_named_by_being_registered_is_locked(self, app, base):
        class Closing(base):
            def run(self):
                return "closed"

        install(app, {"*.Closing": {"lock_side_effect": Skip("skipped")}})
        closing = app.register_task(Closing())
        with held_elsewhere("tests.test_installations.Closing"):
            assert closing.apply().get() == "skipped"
        assert closing.apply().get() == "closed"

    def test_it_may_be_transaction_level_and_called_directly(self, app):
        install(app, {"third.*": {"lock_xact": True, "lock_on_direct_call": True}})

        @app.task(name="third.tells", bind=True)
        def tells(self):
            return str(self.lock), connection.in_atomic_block

        assert tells.apply().get() == tells() == ("third.tells", True)

    def test_a_decorated_function_keeps_its_decorator_and_its_signature(self, app):
        @wraps(add)
        def doubled(*args, **kwargs):
            return 2 * add(*args, **kwargs)

        install(app, {"third.*": {"lock_key": "{b}"}})
        third = app.task(name="third.add")(doubled)
        assert third.apply([1]).get() == 6
        assert lock_for(third, 1) == advisory("2", timeout=0)

    def test_a_locked_task_can_be_pickled(self, app):
        install(tests_app, {"third.pickled": {"lock_key": "k"}})
        try:
            third = tests_app.task(name="third.pickled")(add)
            again = pickle.loads(pickle.dumps(third))  # noqa: S301 - it is our own
            assert again.lock_for(1).name == "k"
        finally:
            tests_app.tasks.pop("third.pickled")
            heed(tests_app).rules.pop()

    def test_a_copy_of_the_app_in_another_process_has_its_rules(self):
        begin = """
import pickle, sys
from celery import Celery, shared_task; from celery.signals import worker_init
from django.conf import settings; settings.configure()
"""
        gives = f"""{begin}from celery_pglock import install
app = Celery("project")
install(app, {{"third.*": {{"lock_key": "k"}}}})
worker_init.send(sender=type("Worker", (), {{"app": app, "task_events": False}}))
sys.stdout.buffer.write(pickle.dumps(app))
"""
        takes = f"""{begin}
@shared_task(name="third.add")
def add(a): pass
app = pickle.load(sys.stdin.buffer)
app.finalize()
print(type(app.tasks["third.add"]).__mro__[1].__name__)
"""
        run = partial(subprocess.run, cwd=ROOT, check=True, stdout=subprocess.PIPE)
        copied = run([sys.executable, "-c", gives]).stdout
        assert run([sys.executable, "-c", takes], input=copied).stdout == b"InstalledTask\n"

    def test_celerys_own_tasks_are_reached_by_their_own_pattern_alone(self, app):
        # The app has the shared tasks of other tests, too, and no option for all must be in their way.
        app.conf.task_annotations = {"*": {"lock_on_direct_call": True}}
        install(app, {"c*": {"lock_key": "k"}, "celery.chunks": {"lock_key": "chunks"}})
        assert lock_for(app.tasks["celery.chunks"]).name == "chunks"
        with pytest.raises(LockMisuse, match=r"celery.map is not locked"):
            lock_for(app.tasks["celery.map"])
        reports = app.tasks[report_locks.name]
        assert lock_for(reports).name == "celery_pglock.report_locks(using=default)"
        assert not reports.lock_options().on_direct_call


class TestWhatCeleryDoesNotAskAbout:
    """Celery asks for annotations once for each class, but not for one that inherits from a bound one."""

    @pytest.fixture
    def app(self, app):
        install(app, {"third.*": {"lock_key": "k", "lock_side_effect": Skip("skipped")}})
        return app

    @pytest.mark.parametrize("parent", ["third.parent", "other.parent"])
    def test_a_class_that_inherits_from_a_registered_one_is_locked(self, app, parent):
        class Parent(Task):
            name = parent

            def run(self):
                return "done"

        class Child(Parent):
            name = "third.child"

        app.register_task(Parent())
        child = app.register_task(Child())
        with held_elsewhere("k"):
            assert child.apply().get() == "skipped"
        assert child.apply().get() == "done"

    def test_what_inherits_from_a_registered_task_of_ours_has_rules_of_its_own(self, app):
        class Parent(AdvisoryTask):
            name = "other.parent"

            def run(self):
                return "done"

        class Child(Parent):
            name = "third.child"

        parent, child = app.register_task(Parent()), app.register_task(Child())
        assert lock_for(parent).name == "other.parent"
        assert lock_for(child).name == "k"

    def test_what_inherits_from_a_locked_task_and_is_not_named_takes_no_lock(self, app):
        third = app.task(name="third.add")(add)
        other = app.task(name="other.add", base=type(app.tasks[third.name]))(add)
        with held_elsewhere("k", "other.add"):
            assert other.apply([1]).get() == 3
        with pytest.raises(LockMisuse, match=r"other.add is not locked"):
            lock_for(other, 1)

    def test_each_object_of_a_class_has_the_rules_of_its_own_name(self, app):
        class Export(Task):
            def __init__(self, name):
                self.name = name

            def run(self):
                return self.name

        install(app, {"third.b": {"lock_key": "b"}})
        other, a, b = (app.register_task(Export(name)) for name in ("other.a", "third.a", "third.b"))
        with held_elsewhere("k"):
            assert other.apply().get() == "other.a"
            assert a.apply().get() == "skipped"
            assert b.apply().get() == "third.b"
        with held_elsewhere("b"):
            assert b.apply().get() == "skipped"

    def test_a_class_that_another_app_has_bound_is_locked_in_this_one(self, app):
        class Closing(Task):
            name = "third.closing"

            def run(self):
                return "closed"

        with Celery("elsewhere", set_as_current=False) as elsewhere:
            install(elsewhere, {"fourth.*": {"lock_key": "k"}})
            there, here = elsewhere.register_task(Closing()), app.register_task(Closing())
            with held_elsewhere("k"):
                assert here.apply().get() == "skipped"
            assert not isinstance(there, LockedTask)

    @pytest.mark.parametrize("when", ["before install()", "after it"])
    def test_a_base_class_may_be_bound_before_its_tasks(self, when):
        with Celery("bound", set_as_current=False, backend="cache+memory://") as app:
            if when == "before install()":
                assert app.Task.app is app
            install(app, {"third.*": {"lock_key": "k", "lock_side_effect": Skip("skipped")}})
            assert app.Task.app is app
            third = app.task(name="third.add", shared=False)(add)
            app.finalize()
            with held_elsewhere("k"):
                assert third.apply([1]).get() == "skipped"

    def test_a_worker_refuses_annotations_whose_error_finalizing_loses(self, app):
        class Failing:
            def annotate(self, task):
                if task.name == "third.add":
                    raise AttributeError("lost in maybe_evaluate()")

        third = app.task(name="third.add", shared=False)(add)
        app.conf.task_annotations = Failing()
        app.finalize()
        assert not isinstance(app.tasks[third.name], LockedTask)
        with pytest.raises(SystemExit, match=r"It is not known which tasks .*lost in maybe_evaluate"):
            worker_init.send(sender=type("Worker", (), {"app": app}))

    def test_its_hook_may_be_a_static_method(self, app):
        told = []

        class Theirs(Task):
            on_bound = staticmethod(told.append)

        third = app.task(name="third.add", base=Theirs)(add)
        with held_elsewhere("k"):
            assert third.apply([1]).get() == "skipped"
        assert set(told) == {app}

    def test_annotations_reach_a_class_that_is_named_by_being_registered(self, app):
        class Closing(Task):
            def run(self):
                return "closed"

        name = f"{__name__}.Closing"
        app.conf.task_annotations = {name: {"lock_key": "k", "lock_side_effect": Skip("skipped")}}
        closing = app.register_task(Closing())
        with held_elsewhere("k"):
            assert closing.apply().get() == "skipped"


class TestAnnotations:
    def test_lock_options_in_annotations_lock_any_task(self, app):
        app.conf.task_annotations = {"third.add": {"lock_by": ("a",), "lock_side_effect": Skip("skipped")}}
        heed(app)
        third = app.task(name="third.add")(add)
        with held_elsewhere("third.add(a=1)"):
            assert third.apply([1]).get() == "skipped"

    def test_those_for_all_tasks_too(self, app):
        app.conf.task_annotations = [{"*": {"lock_side_effect": Skip("skipped")}}]
        heed(app)
        third = app.task(name="third.add")(add)
        with held_elsewhere("third.add"):
            assert third.apply([1]).get() == "skipped"

    def test_with_the_app_installed_an_app_that_is_finalized_heeds_them(self, app):
        app.conf.task_annotations = {"third.add": {"lock_key": "k"}}
        third = app.task(name="third.add")(add)
        app.finalize()
        assert third.lock_for(1).name == "k"

    def test_of_several_apps_that_were_finalized_before_django_started_each_heeds_its_own(self):
        code = """
from celery import Celery; from django.conf import settings
settings.configure(INSTALLED_APPS=["celery_pglock"])
def add(a): pass
first, second = Celery("first"), Celery("second")
for app in (first, second):
    app.conf.task_annotations = {"third.add": {"lock_key": app.main}}
    app.task(name="third.add", shared=False)(add)
    app.finalize()
import django; django.setup()
print(*(app.tasks["third.add"].lock_for(1).name for app in (first, second)))
"""
        told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert told.stdout == "first second\n", told.stderr

    def test_annotations_without_lock_options_are_celerys_business(self, app):
        app.conf.task_annotations = {"third.add": {"rate_limit": "1/s"}, "*": {"time_limit": 7}}
        heed(app)
        third = app.task(name="third.add")(add)
        assert (third.rate_limit, third.time_limit) == ("1/s", 7)
        assert not isinstance(third, LockedTask)


class TestWhatCannotWork:
    @pytest.mark.parametrize(
        ("rules", "told"),
        [
            ({"third.*": {"lock_kye": "k"}}, "rule 'third.*': there is no option 'lock_kye'.*'lock_key'"),
            ({"third.*": {"rate_limit": "1/s"}}, "'rate_limit' is no lock option, .* task_annotations takes"),
            ([("third.*", {"lock_key": "k"})], "rules are a dict of options by names or patterns"),
            ({"third.*": {}}, "a dict of lock options"),
            ({"third.*": Skip()}, "a dict of lock options"),
            ({"": {"lock_key": "k"}}, "a rule is for the name of a task or a pattern, not for ''"),
        ],
    )
    def test_a_rule_is_checked_when_it_is_installed(self, app, rules, told):
        with pytest.raises(LockMisuse, match=told):
            install(app, rules)
        assert not heed(app).rules

    def test_an_option_that_does_not_fit_the_task_is_refused_each_time(self, app):
        install(app, {"third.*": {"lock_by": ("c",)}})
        third = app.task(name="third.add")(add)
        with pytest.raises(LockMisuse, match=r"Task third.add: lock_by names 'c'"):
            third.apply([1])
        with pytest.raises(LockMisuse, match=r"Task third.add: lock_by names 'c'"):
            third.apply([1]).get()

    def test_a_misspelt_annotation_is_refused(self, app):
        app.conf.task_annotations = {"third.add": {"lock_kye": "k"}}
        heed(app)
        third = app.task(name="third.add")(add)
        with pytest.raises(LockMisuse, match=r"Task third.add: there is no option 'lock_kye'.*'lock_key'"):
            third.apply([1])

    def test_a_task_that_runs_in_this_worker_already_is_not_locked_silently(self, app):
        third = app.task(name="third.add")(add)
        third.__trace__ = print
        with pytest.raises(LockMisuse, match=r"call install.. where the app is made"):
            install(app, {"third.*": {"lock_key": "k"}})

    def test_what_matches_nothing_is_told(self, app):
        app.conf.task_annotations = {"thrd.add": {"lock_key": "k"}, "gone": {"rate_limit": "1/s"}}
        install(app, {"third.*": {"lock_key": "k"}, "thrid.add": {"lock_shared": True}})
        third = app.task(name="third.add")(add)
        assert third.name
        guess = " Did you mean 'third.add'?"
        assert in_vain(app) == [
            ("install()", f"The rule 'thrid.add' of install() matches no task.{guess}"),
            (
                "task_annotations",
                f"task_annotations has lock options for 'thrd.add', which is no task.{guess}",
            ),
        ]


@pytest.fixture(scope="module")
def _worker_of_others(django_db_setup, django_db_blocker):
    with (
        django_db_blocker.unblock(),
        running_worker("others", concurrency=3, TASKS="installed_tasks", THIRD_PARTY="yes") as worker,
    ):
        yield worker


@pytest.fixture
def others(_worker_of_others, transactional_db):
    """Sends to a worker whose tasks somebody else wrote."""
    worker = _worker_of_others

    def send(name, *args, **kwargs):
        return tests_app.send_task(name, args, kwargs, queue=worker.queue)

    send.worker = worker
    return send


def an_email(subject, to="somebody@example.org"):
    return {
        "subject": subject,
        "body": "",
        "from_email": "shop@example.org",
        "to": [to],
        "attachments": [],
    }


class TestInAWorker:
    def test_a_packages_task_is_locked_by_annotations_alone(self, others):
        send = partial(others, "djcelery_email_send_multiple")
        with held_elsewhere("mail"):
            assert send([an_email("skipped")]).get(PATIENCE) == "skipped"
        results = [send([an_email("several")]) for _ in range(6)]
        answers = [result.get(PATIENCE) for result in results]
        assert 1 in answers
        assert "skipped" in answers
        assert most_at_once("several") == 1
        assert not Entry.objects.filter(key="skipped").exists()

    def test_its_own_retry_is_sent_when_the_lock_is_free(self, others):
        others("djcelery_email_send_multiple", [an_email("retried", "full@example.org")])
        wait_until(lambda: Entry.objects.filter(key="retried", what="ends").count() == 2)
        assert most_at_once("retried") == 1

    def test_a_shared_task_with_a_decorator_is_locked_by_a_rule(self, others):
        with held_elsewhere("third.by_account(account_id=7)"):
            assert others("third.by_account", 7).get(PATIENCE) == "skipped"
            assert others("third.by_account", account_id=8).get(PATIENCE) == "account 8"
        assert others("third.by_account", 7, amount=1).get(PATIENCE) == "account 7"
        assert Entry.objects.filter(key="noted").count() == 2

    @pytest.mark.parametrize(
        ("name", "result"),
        [
            ("third.accounting", "called: a lock of their own, as they call it"),
            ("third.closing", "called: closed"),
            ("third.closing_late", "called: closed"),
            ("celery.ping", "pong"),
        ],
    )
    def test_a_task_with_another_base_class_is_locked_by_a_rule(self, others, name, result):
        skipped = {"celery.ping": "no pong"}.get(name, "skipped")
        with held_elsewhere({"celery.ping": "ping"}.get(name, name)):
            assert others(name).get(PATIENCE) == skipped
        assert others(name).get(PATIENCE) == result

    def test_the_body_knows_its_lock(self, others):
        assert others("annotated").get(PATIENCE) == "by annotation"

    def test_other_tasks_are_left_alone(self, others):
        assert others("tests.installed_tasks.untouched").get(PATIENCE) == "untouched"
        assert "untouched] skipped" not in others.worker.log

    def test_what_matches_no_task_is_told(self, others):
        assert "The rule 'third.prty.*' of install() matches no task." in others.worker.log
        assert "lock options for 'anotated', which is no task. Did you mean 'annotated'?" in others.worker.log

    def test_rules_reach_children_that_are_spawned(self, transactional_db):
        variables = {"START_METHOD": "spawn", "TASKS": "installed_tasks", "THIRD_PARTY": "yes"}
        with running_worker("spawned", **variables) as worker:
            by_account = tests_app.signature("third.by_account", [7], queue=worker.queue)
            with held_elsewhere("third.by_account(account_id=7)"):
                assert by_account.delay().get(PATIENCE) == "skipped"
            assert by_account.delay().get(PATIENCE) == "account 7"

    def test_all_tasks_of_a_project_are_locked_by_the_apps_class_but_celerys_own(self, transactional_db):
        with running_worker(
            "whole", TASK_CLS="celery_pglock:AdvisoryTask", TASKS="installed_tasks"
        ) as worker:
            untouched = tests_app.signature("tests.installed_tasks.untouched", queue=worker.queue)
            with held_elsewhere("tests.installed_tasks.untouched"):
                result = untouched.delay()
                wait_until(lambda: result.state == states.RETRY)
            assert result.get(PATIENCE) == "untouched"
            with held_elsewhere("celery.group", "celery.chord", "celery.accumulate"):
                gather = tests_app.signature("celery.accumulate", queue=worker.queue)
                assert chord([untouched, untouched], gather).delay().get(PATIENCE) == [2 * ["untouched"]]
