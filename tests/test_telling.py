"""What became of a lock is told by signals, by events and in the log, and telling it harms nobody."""

import json
import socket
import threading
import time
from contextlib import ExitStack
from urllib.parse import urlsplit, urlunsplit

import pytest
from celery import Celery, states, uuid
from celery.events.state import TASK_EVENT_TO_STATE, State
from celery.exceptions import SoftTimeLimitExceeded
from django.conf import settings

from celery_pglock import LockNotAcquired, events, signals
from celery_pglock.tasks import prioritize_critical_tasks
from tests.celery_app import app
from tests.conftest import ADVISORY_HERE, running_worker, wait_until
from tests.losing_tasks import is_only_warned
from tests.models import Entry
from tests.told_tasks import (
    calls_itself,
    does_not_take_its_lock,
    gets_through,
    is_in_the_way_once,
    meets_its_time_limit_in_a_receiver,
    sends_no_events,
)
from tests.worker_tasks import acks_late, raises, retries, retries_itself, skips, waits

pytestmark = pytest.mark.long

END_ITS_SESSION = f"SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE {ADVISORY_HERE}"
END_WAITING = f"{END_ITS_SESSION} AND NOT granted"


class Listener:
    """What a monitor hears, and what it believes of tasks and workers."""

    def __init__(self):
        self.heard, self.state, self._receiver = [], State(), None
        self._thread = threading.Thread(target=self._listen)

    def __enter__(self):
        self._thread.start()
        wait_until(lambda: self._receiver is not None, "the monitor listens")
        return self

    def __exit__(self, *_):
        self._receiver.should_stop = True
        self._thread.join()

    def _listen(self):
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": self._hear})
            for _ in receiver.itercapture(limit=None, timeout=None, wakeup=False):
                self._receiver = receiver

    def _hear(self, event):
        self.state.event(event)
        self.heard.append(event)

    def of(self, task_id):
        """The events of a task that are ours, in the order in which they came."""
        return [
            event
            for event in list(self.heard)
            if event.get("uuid") == task_id and event["type"].startswith("pglock-")
        ]

    def kinds(self, task_id):
        return [event["type"] for event in self.of(task_id)]


@pytest.fixture(scope="module")
def _told_worker(django_db_setup, django_db_blocker, tmp_path_factory):
    told = tmp_path_factory.mktemp("told") / "told"
    told.touch()
    with django_db_blocker.unblock(), ExitStack() as stack:
        app.control.purge()
        monitor = stack.enter_context(Listener())
        variables = {"TASKS": "told_tasks", "TOLD": str(told)}
        worker = stack.enter_context(
            running_worker("celery", "-E", "-l", "DEBUG", concurrency=4, **variables)
        )
        worker.told, worker.monitor = told, monitor
        yield worker


@pytest.fixture
def worker(_told_worker, transactional_db):
    """A worker that was started with -E, and in which every signal has a receiver that fails."""
    return _told_worker


@pytest.fixture
def muted_broker(broker):
    """The tests' Redis for one who is answered NOPERM for events, which are published on a channel."""
    there = urlsplit(settings.CELERY_BROKER_URL)
    name = f"mute-{there.path.strip('/')}"
    url = urlunsplit(there._replace(netloc=f"{name}:mute@{there.hostname}:{there.port}"))
    broker.settings = {"BROKER_OF_ALL_TESTS": url, "CELERY_BROKER_URL": url, "PYTEST_XDIST_WORKER": ""}
    # Of results and of remote control.
    channels = ("&celery-task-meta-*", f"&{there.path}.celery.pidbox")
    user = ("ACL", "SETUSER", name)
    broker.execute_command(*user, "reset", "on", ">mute", "~*", "+@all", "resetchannels", *channels)
    broker.may_not_speak = lambda: broker.execute_command(*user, "resetchannels", *channels)
    broker.may_speak = lambda: broker.execute_command(*user, "allchannels")
    yield broker
    broker.execute_command("ACL", "DELUSER", name)


def told(worker, result):
    lines = map(json.loads, worker.told.read_text().splitlines())
    return [line for line in lines if line["id"] == result.id]


def logged(worker, result):
    lines = [line for line in worker.log.splitlines() if line.startswith("{") and '"pglock"' in line]
    records = [record for record in map(json.loads, lines) if "pglock" in record]
    return [record for record in records if record["pglock"]["task_id"] == result.id]


def begins(key):
    wait_until(lambda: Entry.objects.filter(key=key, what="begins").exists(), "the body begins")


class TestSignals:
    def test_a_run_tells_of_its_lock_before_and_after_the_body(self, worker, rival):
        result = skips.delay("k", 0.2)
        assert result.get(timeout=10) == "done"
        acquired, released = told(worker, result)
        identity = {"id": result.id, "name": skips.name, "lock": "k"}
        waited = acquired.pop("waited")
        assert acquired == {"signal": "lock_acquired", **identity, "attempt": 1, "delayed": 0.0}
        assert 0 <= waited < 0.2
        assert 0.2 <= released.pop("held") < 2
        assert released == {"signal": "lock_released", **identity}
        assert not rival.sees_held("k")

    def test_seconds_that_were_waited_in_place_are_told(self, worker, rival):
        rival.take("k")
        result = waits.delay("k")
        wait_until(lambda: rival.sees_held("k", granted=False))
        time.sleep(0.2)
        rival.give_back("k")
        assert result.get(timeout=10) == "done"
        acquired, _ = told(worker, result)
        assert 0.2 <= acquired["waited"] < 10
        assert acquired["delayed"] == 0

    def test_a_retry_tells_each_attempt_and_how_long_it_was_delayed(self, worker, rival):
        rival.take("k")
        result = retries.delay("k")
        wait_until(lambda: len(told(worker, result)) >= 2)
        rival.give_back("k")
        assert result.get(timeout=10) == 0
        *conflicts, acquired, _ = told(worker, result)
        assert {one["signal"] for one in conflicts} == {"lock_conflict"}
        assert {one["outcome"] for one in conflicts} == {"retried"}
        assert [one["attempt"] for one in conflicts] == list(range(1, len(conflicts) + 1))
        assert {one["holders"] for one in conflicts} == {1}
        assert acquired["attempt"] == len(conflicts) + 1
        assert 0.1 <= acquired["delayed"] < 10

    def test_a_skip_tells_of_itself_and_of_its_conflict(self, worker, rival):
        rival.take("k")
        result = skips.delay("k")
        assert result.get(timeout=10) == "skipped"
        skipped, conflict = told(worker, result)
        assert (skipped["signal"], skipped["attempt"], skipped["holders"]) == ("lock_skipped", 1, 1)
        assert (conflict["signal"], conflict["outcome"]) == ("lock_conflict", "skipped")

    def test_a_task_that_fails_for_its_lock_tells_that_it_raised(self, worker, rival):
        rival.take("k")
        result = raises.delay("k")
        with pytest.raises(LockNotAcquired):
            result.get(timeout=10)
        (conflict,) = told(worker, result)
        assert (conflict["signal"], conflict["outcome"]) == ("lock_conflict", "raised")

    def test_a_copy_of_the_message_that_holds_the_lock_tells_that_it_was_redelivered(self, worker, rival):
        result = acks_late.delay("copied", 1)
        begins("copied")
        acks_late.apply_async(["copied", 1], task_id=result.id)
        assert result.get(timeout=10) == "done"
        wait_until(lambda: "an earlier delivery of this message has succeeded" in worker.log)
        conflicts = [one for one in told(worker, result) if one["signal"] == "lock_conflict"]
        assert {one["outcome"] for one in conflicts} == {"redelivered"}
        assert [one["signal"] for one in told(worker, result) if one not in conflicts] == [
            "lock_acquired",
            "lock_released",
        ]

    def test_a_task_whose_retry_the_broker_refuses_tells_that_it_waits(self, worker, rival, broker):
        rival.take("k")
        result = retries.apply_async(["k"], countdown=1)
        with broker.refuses_messages():
            outcomes = wait_until(lambda: [one.get("outcome") for one in told(worker, result)])
            rival.give_back("k")
            assert result.get(timeout=20) == 0
        assert outcomes[0] == "waits"

    def test_a_loss_tells_its_reason_and_how_long_the_lock_was_held(self, worker, rival):
        result = is_only_warned.delay("k", 0.5)
        begins("k")
        rival.ask(END_ITS_SESSION)
        assert result.get(timeout=10) == "done"
        _, lost = told(worker, result)
        assert (lost["signal"], lost["lock"]) == ("lock_lost", "k")
        assert "the server ended it" in lost["reason"]
        assert 0.4 <= lost["held"] < 5

    def test_a_time_limit_that_hits_a_receiver_before_the_body_ends_the_task(self, worker, rival):
        result = meets_its_time_limit_in_a_receiver.delay("k")
        with pytest.raises(SoftTimeLimitExceeded):
            result.get(timeout=10)
        assert not Entry.objects.filter(key="k").exists()
        assert not rival.sees_held("k")

    def test_a_time_limit_that_hits_a_receiver_while_the_task_waits_for_the_broker_ends_it(
        self, worker, rival, broker
    ):
        rival.take("k")
        result = meets_its_time_limit_in_a_receiver.apply_async(["k"], countdown=1)
        with broker.refuses_messages(), pytest.raises(SoftTimeLimitExceeded):
            result.get(timeout=10)


class TestEvents:
    def test_a_run_sends_when_it_has_the_lock_and_when_it_gave_it_back(self, worker, rival):
        result = skips.delay("k", 0.2)
        assert result.get(timeout=10) == "done"
        wait_until(lambda: len(worker.monitor.of(result.id)) == 2)
        acquired, released = worker.monitor.of(result.id)
        assert (acquired["type"], released["type"]) == ("pglock-acquired", "pglock-released")
        for event in acquired, released:
            assert (event["name"], event["key"], event["hostname"]) == (skips.name, "k", "celery@test")
        assert (acquired["attempt"], acquired["delayed"]) == (1, 0)
        assert acquired["waited"] < 0.2 <= released["held"]
        assert released["timestamp"] - acquired["timestamp"] >= 0.2

    def test_a_conflict_sends_who_holds_the_lock(self, worker, rival):
        holder = skips.delay("k", 1)
        begins("k")
        result = skips.delay("k")
        assert result.get(timeout=10) == "skipped"
        wait_until(lambda: len(worker.monitor.of(result.id)) == 2)
        skipped, conflict = worker.monitor.of(result.id)
        assert (skipped["type"], conflict["type"]) == ("pglock-skipped", "pglock-conflict")
        assert (conflict["outcome"], conflict["attempt"]) == ("skipped", 1)
        assert skipped["waited"] == conflict["waited"] < 1
        (one,) = conflict["holders"]
        assert (one["task_name"], one["task_id"], one["worker"]) == (skips.name, holder.id, "celery@test")
        assert one["backend_pid"] > 0
        assert one["since"].startswith("20")
        holder.get(timeout=10)

    def test_a_loss_sends_its_reason(self, worker, rival):
        result = is_only_warned.delay("k", 0.5)
        begins("k")
        rival.ask(END_ITS_SESSION)
        assert result.get(timeout=10) == "done"
        wait_until(lambda: len(worker.monitor.of(result.id)) == 2)
        assert worker.monitor.kinds(result.id) == ["pglock-acquired", "pglock-lost"]
        assert "the server ended it" in worker.monitor.of(result.id)[1]["reason"]

    def test_monitors_keep_the_states_of_tasks(self, worker, rival):
        rival.take("taken")
        ended = {
            skips.delay("taken").id: states.SUCCESS,
            raises.delay("taken").id: states.FAILURE,
            retries.delay("taken").id: states.RETRY,
            skips.delay("free").id: states.SUCCESS,
        }
        state = worker.monitor.state
        wait_until(lambda: all(worker.monitor.of(one) for one in ended))
        wait_until(lambda: [state.tasks[one].state for one in ended] == list(ended.values()))
        for task_id in ended:
            for event in worker.monitor.of(task_id):
                # However late it comes.
                state.event(event)
        assert [state.tasks[one].state for one in ended] == list(ended.values())
        # Any other event of this group would set a state of its own.
        of_tasks = {kind for event in worker.monitor.heard if (kind := event["type"]).startswith("task-")}
        assert of_tasks <= {f"task-{kind}" for kind in TASK_EVENT_TO_STATE}
        rival.give_back("taken")

    def test_a_direct_call_inside_of_a_body_sends_nothing(self, worker, rival):
        result = calls_itself.delay("k")
        assert result.get(timeout=10) == "done"
        wait_until(lambda: "pglock-released" in worker.monitor.kinds(result.id))
        assert [event["key"] for event in worker.monitor.of(result.id)] == ["k", "k"]
        assert [one["lock"] for one in told(worker, result)] == ["k", "k, called", "k, called", "k"]

    def test_a_task_may_send_none(self, worker, rival):
        silent, loud = sends_no_events.delay("k"), None
        assert silent.get(timeout=10) == "done"
        loud = skips.delay("k")
        wait_until(lambda: len(worker.monitor.of(loud.id)) == 2)
        assert told(worker, silent)
        assert not worker.monitor.of(silent.id)

    def test_a_broker_that_never_answers_holds_nobody_up(self, caplog):
        with socket.create_server(("127.0.0.1", 0)) as never_answers:
            port = never_answers.getsockname()[1]
            once = {"max_retries": 1, "interval_start": 0, "socket_timeout": 3}
            elsewhere = Celery(broker=f"redis://127.0.0.1:{port}", broker_transport_options=once)
            outbox = events.Outbox(elsewhere)
            before = time.monotonic()
            for _ in range(events.MOST_THAT_WAIT + 500):
                outbox.put("here", "pglock-acquired", {"uuid": "1"})
            assert time.monotonic() - before < 2
        (complaint,) = [line for line in caplog.messages if "was not sent" in line]
        assert "others wait for the broker" in complaint

    def test_an_eager_task_sends_none(self, rival):
        app.conf.worker_send_task_events = True
        events.follow_child(app)
        try:
            assert skips.apply(["k"]).get() == "done"
        finally:
            app.conf.worker_send_task_events = False
            for kind in ("acquired", "conflict", "skipped", "released", "lost"):
                signal = getattr(signals, f"lock_{kind}")
                assert signal.disconnect(dispatch_uid=f"celery_pglock.events_{kind}")
        assert app not in events._outboxes

    def test_the_setting_turns_them_on_and_a_child_that_ends_sends_its_last(self, rival):
        options = ["--max-tasks-per-child", "1"]
        # Where children are not forked they know of the settings, and not of -E.
        variables = {"TASK_EVENTS": "1", "START_METHOD": "spawn", "SLOW_EVENTS": "1", "TASKS": "told_tasks"}
        with (
            Listener() as monitor,
            running_worker(f"events-{uuid()}", *options, concurrency=1, **variables) as worker,
        ):
            result = skips.apply_async(["k"], queue=worker.queue)
            wait_until(lambda: monitor.kinds(result.id) == ["pglock-acquired", "pglock-released"])

    def test_a_broker_that_refuses_them_is_named_once_and_harms_no_task(self, rival, muted_broker):
        variables = {"TASK_EVENTS": "1", **muted_broker.settings}
        with Listener() as monitor, running_worker(f"muted-{uuid()}", concurrency=1, **variables) as worker:
            results = [skips.apply_async(["k"], queue=worker.queue) for _ in range(3)]
            assert [result.get(timeout=10) for result in results] == ["done"] * 3
            wait_until(lambda: "nor are more until the broker takes them" in worker.log)
            muted_broker.may_speak()
            again = skips.apply_async(["k"], queue=worker.queue)
            wait_until(lambda: monitor.kinds(again.id) == ["pglock-acquired", "pglock-released"])
            assert worker.log.count("nor are more until the broker takes them") == 1
            muted_broker.may_not_speak()
            assert skips.apply_async(["k"], queue=worker.queue).get(timeout=10) == "done"
            wait_until(lambda: worker.log.count("nor are more until the broker takes them") == 2)

    def test_a_worker_that_was_told_to_send_none_sends_none(self, rival):
        with Listener() as monitor, running_worker(f"events-{uuid()}", concurrency=1) as worker:
            results = [skips.apply_async(["k"], queue=worker.queue) for _ in range(2)]
            assert [result.get(timeout=10) for result in results] == ["done"] * 2
            app.control.ping(timeout=0.5)
        assert not [event for event in monitor.heard if event["type"].startswith("pglock-")]


class TestLogRecords:
    def test_a_skip_names_the_holder(self, worker, rival):
        holder = skips.delay("k", 1)
        begins("k")
        result = skips.delay("k")
        assert result.get(timeout=10) == "skipped"
        (record,) = logged(worker, result)
        facts = record["pglock"]
        assert (record["levelname"], facts["what"], facts["outcome"]) == ("INFO", "conflict", "skipped")
        assert (facts["lock"], facts["task_name"], facts["attempt"]) == ("k", skips.name, 1)
        assert 0 <= facts["waited"] < 1
        (one,) = facts["holders"]
        pid = rival.ask(f"SELECT pid FROM pg_locks WHERE {ADVISORY_HERE}")
        assert one.pop("since").startswith("20")
        assert one == {
            "task_name": skips.name,
            "task_id": holder.id,
            "worker": "celery@test",
            "backend_pid": pid,
        }
        holder.get(timeout=10)

    @pytest.mark.parametrize(("task", "outcome"), [(raises, "raised"), (retries, "retried")])
    def test_what_celery_logs_in_words_is_there_for_machines_too(self, worker, rival, task, outcome):
        rival.take("k")
        result = task.delay("k")
        record = wait_until(lambda: logged(worker, result))[0]
        facts = record["pglock"]
        assert (record["levelname"], facts["what"], facts["outcome"]) == ("DEBUG", "conflict", outcome)
        (one,) = facts["holders"]
        assert (one["task_name"], one["backend_pid"]) == ("", rival.connection.info.backend_pid)
        rival.give_back("k")

    def test_a_copy_that_comes_back_is_logged(self, worker, rival):
        result = acks_late.delay("copied, and logged", 1)
        begins("copied, and logged")
        acks_late.apply_async(["copied, and logged", 1], task_id=result.id)
        (record,) = wait_until(lambda: logged(worker, result))
        assert record["pglock"]["outcome"] == "redelivered"
        assert record["pglock"]["holders"][0]["task_id"] == result.id
        assert result.get(timeout=10) == "done"

    def test_waiting_for_the_broker_is_logged_with_who_holds_the_lock(self, worker, rival, broker):
        rival.take("k")
        result = retries.apply_async(["k"], countdown=1)
        with broker.refuses_messages():
            record = wait_until(lambda: logged(worker, result))[0]
            rival.give_back("k")
            assert result.get(timeout=20) == 0
        facts = record["pglock"]
        assert (record["levelname"], facts["what"], facts["outcome"]) == ("WARNING", "waits", "waits")
        assert facts["holders"][0]["backend_pid"] == rival.connection.info.backend_pid

    def test_waiting_for_the_broker_with_a_retry_of_its_own_is_logged(self, worker, rival, broker):
        result = retries_itself.apply_async(["k"], countdown=1)
        with broker.refuses_messages():
            record = wait_until(lambda: logged(worker, result))[0]
        assert result.get(timeout=20) == "done"
        assert record["pglock"] == {
            "what": "waits",
            "lock": "k",
            "task_name": retries_itself.name,
            "task_id": result.id,
        }

    def test_a_task_that_comes_back_when_postgresql_can_be_asked_is_logged(self, worker, rival):
        rival.take("k")
        result = waits.delay("k")
        wait_until(lambda: rival.sees_held("k", granted=False))
        rival.ask(END_WAITING)
        (record,) = wait_until(lambda: logged(worker, result))
        facts = record["pglock"]
        assert (record["levelname"], facts["what"], facts["lock"]) == ("WARNING", "outage", "k")
        assert 0 < facts["countdown"] <= 30
        assert "terminating connection due to administrator command" in facts["reason"]
        rival.give_back("k")
        assert result.get(timeout=10) == "done"

    def test_a_task_that_comes_back_after_a_critical_one_is_logged(self, worker, rival):
        result = is_in_the_way_once.delay("k")
        begins("k")
        critical = gets_through.delay("k")
        wait_until(lambda: rival.sees_held("k", granted=False))
        prioritize_critical_tasks(min_wait=0, grace=0)
        assert critical.get(timeout=10) == "through"
        assert result.get(timeout=10) == "done"
        lost, preempted = logged(worker, result)
        assert (lost["pglock"]["what"], preempted["pglock"]["what"]) == ("lost", "preempted")
        assert 0 < preempted["pglock"]["countdown"] <= 30
        assert f"in the way of {gets_through.name} [{critical.id}]" in preempted["pglock"]["reason"]

    def test_a_loss_is_logged(self, worker, rival):
        result = is_only_warned.delay("k", 0.5)
        begins("k")
        rival.ask(END_ITS_SESSION)
        assert result.get(timeout=10) == "done"
        (record,) = logged(worker, result)
        assert (record["levelname"], record["pglock"]["what"]) == ("ERROR", "lost")
        assert 0.4 <= record["pglock"]["held"] < 5
        assert "the server ended it" in record["pglock"]["reason"]

    def test_a_body_that_did_not_take_its_lock_is_logged(self, worker, rival):
        result = does_not_take_its_lock.delay("k")
        assert result.get(timeout=10) == "done"
        (record,) = wait_until(lambda: logged(worker, result))
        assert (record["levelname"], record["pglock"]["what"]) == ("ERROR", "not_locked")
