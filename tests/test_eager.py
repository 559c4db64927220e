"""Tasks in eager mode and as direct calls."""

import pytest
from celery import states, uuid
from celery.app.trace import build_tracer
from celery.exceptions import Retry as RetryLater
from django.core.management import call_command
from django.db import connection
from django.test import TestCase

from celery_pglock import (
    AdvisoryTask,
    LockLost,
    LockNotAcquired,
    LockNotHeld,
    Raise,
    Retry,
    SideEffect,
    XactAdvisoryTask,
    advisory,
    signals,
)
from celery_pglock.testing import held_elsewhere
from tests.celery_app import app
from tests.conftest import ADVISORY_HERE, wait_until
from tests.models import Entry
from tests.worker_tasks import (
    fails,
    in_transaction,
    raises,
    replaces_itself,
    retries,
    retries_itself,
    skips,
    tells_application_names,
)


def bodies(key):
    return Entry.objects.filter(key=key, what="begins").count()


class TestInAppsOwnTestCase(TestCase):
    """With Django's TestCase alone, as a project's tests use them."""

    def test_a_free_lock_runs_the_body(self):
        assert skips.apply(["k"]).get() == "done"
        assert bodies("k") == 1

    def test_a_lock_held_elsewhere_is_a_conflict(self):
        with held_elsewhere("k"):
            assert skips.apply(["k"]).get() == "skipped"
        assert bodies("k") == 0
        with held_elsewhere(skips.lock_for("k")):
            assert skips.apply(["k"]).get() == "skipped"

    def test_a_transaction_level_task_runs_in_the_tests_transaction(self):
        assert in_transaction.apply(["k"]).get() == "done"
        with held_elsewhere("other"):
            assert in_transaction.apply(["other"]).get() == "skipped"


@pytest.mark.usefixtures("rival")
class TestEager:
    def test_the_lock_is_held_while_the_body_runs(self, rival):
        seen = []

        def look(sender, lock, waited, **_):
            seen.append((sender.name, lock, rival.sees_held("k"), waited >= 0))

        signals.lock_acquired.connect(look)
        skips.apply(["k"])
        signals.lock_acquired.disconnect(look)
        assert seen == [(skips.name, advisory("k", timeout=0), 1, True)]
        assert not rival.sees_held("k")

    def test_a_conflict_under_retry_is_state_retry_without_a_rerun(self):
        with held_elsewhere("k"):
            result = retries.apply(["k"])
        assert result.state == states.RETRY
        assert isinstance(result.result, RetryLater)
        assert bodies("k") == 0

    def test_a_conflict_under_raise_is_a_failure(self):
        with held_elsewhere("k"):
            result = raises.apply(["k"])
        assert result.state == states.FAILURE
        assert isinstance(result.result, LockNotAcquired)

    def test_a_task_that_retries_itself_does_so(self):
        assert retries_itself.apply(["k"], {"times": 2}).get() == "done"
        assert bodies("k") == 3

    def test_autoretry_keeps_its_number(self):
        assert fails.apply(["k"]).state == states.FAILURE
        assert bodies("k") == 3

    def test_a_task_that_replaces_itself_re_enters_its_lock(self):
        assert replaces_itself.apply(["k"]).get() == "done"
        assert bodies("k") == 2

    def test_a_transaction_level_task_is_replaced_after_its_commit(self):
        @app.task(shared=False, base=XactAdvisoryTask, bind=True, lock_key="k")
        def replaced(self):
            return self.replace(in_transaction.s("k"))

        assert replaced.apply().get() == "done"

    def test_a_transaction_level_task_that_loses_its_connection_fails(self):
        @app.task(shared=False, base=XactAdvisoryTask, lock_key="k")
        def closes():
            Entry.objects.create(key="k", task_id="", what="begins")
            connection.close()

        assert isinstance(closes.apply().result, LockLost)
        assert bodies("k") == 0

    def test_the_transaction_of_a_task_is_named_after_it(self, rival):
        @app.task(shared=False, base=XactAdvisoryTask, lock_key="50% */ off")
        def looks():
            (holder,) = looks.lock_for().holders()
            return holder.task_name, holder.task_id, holder.key

        assert looks.apply(task_id="an-id").get() == (looks.name, "an-id", "50% */ off")
        with connection.cursor() as cursor:
            cursor.execute("SHOW application_name")
            assert cursor.fetchone() == ("",)

    def test_looking_again_does_not_wait_again(self, monkeypatch):
        monkeypatch.setattr("celery_pglock.locks.advisory.holders", lambda _: ())

        @app.task(shared=False, base=AdvisoryTask, lock_key="k", lock_timeout=0.5, lock_side_effect=Raise())
        def waits():
            pass

        with held_elsewhere("k"):
            error = waits.apply().result
        assert 0.5 <= error.waited < 1.4

    def test_a_retry_is_never_later_than_a_quarter_of_the_visibility_timeout(self, monkeypatch):
        @app.task(shared=False, base=AdvisoryTask, lock_key="k", lock_side_effect=Retry(60, jitter=False))
        def late():
            pass

        for timeout, expected in ((None, 60), (3600, 60), (8, 2)):
            monkeypatch.setitem(app.conf.broker_transport_options, "visibility_timeout", timeout)
            with held_elsewhere("k"):
                assert late.apply().result.when == expected

    def test_always_eager_works_the_same(self):
        app.conf.task_always_eager = True
        try:
            assert skips.delay("k").get() == "done"
            with held_elsewhere("k"):
                assert skips.delay("k").get() == "skipped"
        finally:
            app.conf.task_always_eager = False

    def test_a_failing_body_frees_the_lock(self, rival):
        result = in_transaction.apply(["k"], {"then": "fail"})
        assert isinstance(result.result, ValueError)
        assert bodies("k") == 0, "it was rolled back"
        assert not rival.sees_held("k")

    def test_the_conflict_tells_everything(self):
        seen = []

        class Note(SideEffect):
            def on_conflict(self, conflict):
                seen.append(conflict)
                return "instead"

        @app.task(
            shared=False,
            base=AdvisoryTask,
            bind=True,
            lock_key="k",
            lock_side_effect=Note(),
            lock_timeout=0.1,
        )
        def never():
            raise AssertionError

        with held_elsewhere("k"):
            assert never.apply(task_id="an-id").get() == "instead"
            (conflict,) = seen
            assert conflict.holders[0].worker == "held_elsewhere"
        assert conflict.task.name == never.name
        assert conflict.request.id == "an-id"
        assert conflict.key == "k"
        assert conflict.attempt == 1
        assert conflict.waited >= 0.1

    def test_a_receiver_that_fails_does_not_harm_the_task(self):
        def fail(**_):
            raise ValueError("as asked")

        signals.lock_acquired.connect(fail)
        try:
            assert skips.apply(["k"]).get() == "done"
        finally:
            signals.lock_acquired.disconnect(fail)

    def test_signals_tell_what_became_of_the_lock(self):
        told = []

        def note(signal, **_):
            told.append(next(name for name, one in vars(signals).items() if one is signal))

        for signal in (
            signals.lock_acquired,
            signals.lock_conflict,
            signals.lock_skipped,
            signals.lock_released,
        ):
            signal.connect(note)
        skips.apply(["k"])
        with held_elsewhere("k"):
            skips.apply(["k"])
        for signal in (
            signals.lock_acquired,
            signals.lock_conflict,
            signals.lock_skipped,
            signals.lock_released,
        ):
            signal.disconnect(note)
        assert told == ["lock_acquired", "lock_released", "lock_skipped", "lock_conflict"]

    def test_what_the_body_sets_on_its_request_stays(self):
        @app.task(shared=False, base=AdvisoryTask, bind=True, lock_key="k")
        def notes(self):
            self.request.foo = 1
            return len(self.request_stack)

        assert notes.apply().get() == 1

    def test_a_body_that_calls_its_own_task_is_nested_in_its_lock(self):
        @app.task(shared=False, base=XactAdvisoryTask, bind=True, lock_key="k")
        def again(self, more=True):
            return connection.in_atomic_block and (again(more=False) if more else "nested")

        assert again.apply().get() == "nested"

    def test_a_lost_lock_is_logged_and_told_and_a_finished_body_stays_finished(self, rival, caplog):
        told = []

        def note(sender, lock, reason, **_):
            told.append((sender.name, lock.name))

        signals.lock_lost.connect(note)

        @app.task(shared=False, base=AdvisoryTask, lock_key="k")
        def loses():
            rival.ask(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE {ADVISORY_HERE}")
            return "finished"

        assert loses.apply().get() == "finished"
        signals.lock_lost.disconnect(note)
        assert told == [(loses.name, "k")]
        assert "lost lock 'k' before it gave it back: the server ended it" in caplog.text

    def test_a_disabled_lock_is_no_conflict(self, pglock_settings):
        told = []

        def note(**_):
            told.append("acquired or released")

        signals.lock_acquired.connect(note)
        signals.lock_released.connect(note)
        pglock_settings(ENABLED=False)
        with held_elsewhere("k"):
            assert skips.apply(["k"]).get() == "done"
            assert in_transaction.apply(["k"]).get() == "done"
        signals.lock_acquired.disconnect(note)
        signals.lock_released.disconnect(note)
        assert not told

    def test_connections_are_not_renamed(self, rival):
        connection.ensure_connection()
        _, name, _ = tells_application_names.apply(["k"]).get()
        assert not name.startswith("celery:")


class TestInTheTracerOfAWorker:
    def trace(self, task, *args):
        task_id = uuid()
        # The id is part of every message's request; Celery 5.4 takes it from nowhere else.
        request = {"id": task_id, "delivery_info": {}, "ignore_result": True}
        return build_tracer(task.name, task, app=app)(task_id, args, {}, request)

    def test_a_lock_of_the_processs_own_outlives_its_tasks(self, rival):
        assert advisory("process").acquire()
        self.trace(skips, "k")
        assert not rival.could_take("process")
        advisory("process").release()

    def test_what_a_task_leaves_behind_is_closed_and_forgotten(self, rival, caplog):
        @app.task(shared=False, base=AdvisoryTask, lock_key="k")
        def leaks():
            advisory("leaked").acquire()

        self.trace(leaks)
        wait_until(lambda: rival.could_take("leaked"))
        assert "ended with locks" in caplog.text
        with pytest.raises(LockNotHeld):
            advisory("leaked").release()

    def test_a_class_that_goes_around_the_lock_is_told(self, rival, caplog):
        class Around(AdvisoryTask):
            def __call__(self, *args, **kwargs):
                return self.run(*args, **kwargs)

        @app.task(shared=False, base=Around, lock_key="k")
        def unlocked():
            pass

        self.trace(unlocked)
        assert "did not take its lock: its class overrides __call__" in caplog.text


@pytest.mark.usefixtures("rival")
class TestDirectCalls:
    def test_inside_of_the_tasks_own_body_they_lock_what_is_not_locked_yet(self, rival):
        @app.task(shared=False, base=AdvisoryTask, lock_key="{number}", lock_on_direct_call=True)
        def calls_itself(number):
            return [bool(rival.sees_held(str(number))), *(calls_itself(number - 1) if number else [])]

        assert calls_itself.apply([2]).get() == [True, True, True]
        assert calls_itself(2) == [True, True, True]

    def test_they_do_not_lock(self):
        @app.task(shared=False, base=AdvisoryTask, lock_key="k")
        def direct():
            return "ran"

        with held_elsewhere("k"):
            assert direct() == "ran"

    @pytest.mark.parametrize("effect", ["skips", "raises", "retries"])
    def test_they_lock_when_asked_to(self, rival, effect):
        like = {"skips": skips, "raises": raises, "retries": retries}[effect]

        @app.task(
            shared=False,
            name=f"direct.{effect}",
            base=AdvisoryTask,
            bind=True,
            lock_key="k",
            lock_on_direct_call=True,
            lock_side_effect=like.lock_options().effect(),
        )
        def direct(self):
            return rival.sees_held("k"), self.request.called_directly

        assert direct() == (1, True)
        with held_elsewhere("k"):
            if effect == "skips":
                assert direct() == "skipped"
            else:
                with pytest.raises(LockNotAcquired):
                    direct()
        assert not rival.sees_held("k")


def test_held_elsewhere_says_if_the_key_is_taken(rival):
    rival.take("k")
    with pytest.raises(LockNotAcquired), held_elsewhere("k"):
        pass


def test_held_elsewhere_holds_shared_and_several(rival):
    with held_elsewhere("a", 5, shared=True):
        assert rival.could_take("a", shared=True)
        assert not rival.could_take(5)
    assert rival.could_take("a")


def test_the_app_has_no_missing_migrations(db):
    call_command("makemigrations", "celery_pglock", "--check", "--dry-run")
