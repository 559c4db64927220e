"""What becomes of locked tasks in a real prefork worker with a real broker."""

import os
import random
from collections import Counter

import pytest
from celery import chain, chord, group, states
from celery.exceptions import TaskRevokedError

from celery_pglock import LockNotAcquired, advisory
from tests.conftest import wait_until
from tests.models import Entry, most_at_once
from tests.worker_tasks import (
    at_most_three,
    calls_and_retries_itself,
    collect,
    decides_itself,
    fails,
    gives_up,
    gives_up_in_time,
    in_transaction,
    note_error,
    plain,
    raises,
    raises_and_retries_anything,
    replaces_itself,
    retries,
    retries_itself,
    retries_itself_without_throwing,
    skips,
    skips_and_stops,
    tells_application_name,
    tells_application_names,
    tells_conflicts,
    waits,
)


def retried(worker, result):
    """How often the worker's log tells that this task was retried."""
    return worker.log.count(f"[{result.id}] retry: ")


def count(key, what="begins"):
    return Entry.objects.filter(key=key, what=what).count()


pytestmark = [pytest.mark.usefixtures("worker"), pytest.mark.long]

# How many of all kinds; `TASKS_AT_ONCE=2000` takes half a minute.
TASKS = int(os.environ.get("TASKS_AT_ONCE", "800"))


class TestNeverTwoHolders:
    @pytest.mark.long
    def test_many_tasks_over_20_keys_in_8_processes(self, rival):
        choose = random.Random(7)
        shares = {skips: 4, raises: 3, waits: 5, retries: 4, at_most_three: 4}
        tasks = {task: share * TASKS // 20 for task, share in shares.items()}
        calls = [task for task, times in tasks.items() for _ in range(times)]
        choose.shuffle(calls)
        sent = []
        for task in calls:
            # A limit is stated by everybody who uses a key: those have keys of their own.
            kind = "limited" if task is at_most_three else "exclusive"
            key = f"{kind} {choose.randrange(4 if task is at_most_three else 16)}"
            sent.append((task, key, task.delay(key, choose.choice([0, 0, 0, 0.02]))))
        ended = Counter()
        for task, _, result in sent:
            answer = result.get(timeout=100, propagate=False, interval=0.05)
            ended[task.name.rpartition(".")[2], result.state, "skipped" if answer == "skipped" else ""] += 1
        assert max(most_at_once(f"exclusive {number}") for number in range(16)) == 1
        assert max(most_at_once(f"limited {number}") for number in range(4)) in (2, 3)
        done = sum(times for (_, state, note), times in ended.items() if state == states.SUCCESS and not note)
        skipped, failed = ended["skips", states.SUCCESS, "skipped"], ended["raises", states.FAILURE, ""]
        assert done + skipped + failed == len(sent), ended
        assert done == Entry.objects.filter(what="ends").count()
        assert skipped
        assert failed
        assert not rival.sees_advisory_locks()


class TestSkip:
    def test_it_is_a_success_with_the_result_and_the_body_does_not_run(self, rival, worker):
        rival.take("k")
        result = skips.delay("k")
        assert result.get(timeout=10) == "skipped"
        assert result.state == states.SUCCESS
        assert count("k") == 0
        pid = rival.ask("SELECT pg_backend_pid()")
        wait_until(lambda: f"[{result.id}] skipped: lock 'k' is held by" in worker.log)
        assert f"(backend {pid}" in worker.log

    def test_a_chain_of_three_with_one_key_runs_all_three(self):
        assert chain(skips.si("k"), skips.si("k"), skips.si("k"))().get(timeout=10) == "done"
        assert count("k") == 3

    def test_links_chains_and_groups_go_on_with_the_result(self, rival):
        rival.take("k")
        assert chain(skips.s("k"), plain.s())().get(timeout=10) == "skipped"
        assert group(skips.s("k"), plain.s(1))().get(timeout=10) == ["skipped", 1]
        skips.apply_async(["k"], link=plain.s(key="linked"))
        wait_until(lambda: count("linked", "ends"))

    def test_a_chord_completes(self, rival):
        rival.take("k")
        assert chord([skips.s("k"), plain.s(1)])(collect.s()).get(timeout=10) == ["skipped", 1]
        assert chord([plain.s(1), plain.s(2)])(skips.si("k")).get(timeout=10) == "skipped"

    def test_stopping_a_chain_revokes_the_rest_of_it(self, rival):
        rival.take("k")
        last = chain(skips_and_stops.s("k"), plain.s(key="rest"), plain.s(key="rest"))()
        with pytest.raises(TaskRevokedError, match="lock 'k' is held by"):
            last.get(timeout=10)
        wait_until(lambda: last.parent.state == last.state == states.REVOKED)
        assert last.parent.parent.get(timeout=10) == "skipped"
        assert count("rest") == 0

    def test_stopping_a_chain_calls_the_links_of_the_task_itself(self, rival):
        rival.take("k")
        skips_and_stops.apply_async(["k"], link=plain.s(key="linked"), chain=[plain.si(key="rest")])
        wait_until(lambda: count("linked", "ends"))
        assert count("rest") == 0

    def test_stopping_a_chain_inside_of_a_chord_does_not_hang_it(self, rival):
        rival.take("k")
        result = chord([chain(skips_and_stops.s("k"), plain.s()), plain.s(1)])(collect.s())
        with pytest.raises(Exception, match="lock 'k' is held by"):
            result.get(timeout=10)

    def test_stopping_a_chain_that_ends_in_a_chord_does_not_hang_it(self, rival):
        rival.take("k")
        result = chain(skips_and_stops.s("k"), group(plain.s(), plain.s()), collect.s())()
        with pytest.raises(TaskRevokedError):
            result.get(timeout=10)


class TestRaise:
    def test_it_is_a_failure_with_the_holder_and_without_a_traceback_in_the_log(self, rival, worker):
        rival.take("k")
        result = raises.delay("k")
        with pytest.raises(LockNotAcquired, match=r"lock 'k' was not acquired without waiting.*\(backend"):
            result.get(timeout=10)
        assert count("k") == 0
        wait_until(lambda: f"[{result.id}] raised expected: LockNotAcquired" in worker.log)

    def test_errbacks_are_called(self, rival):
        rival.take("k")
        raises.apply_async(["k"], link_error=note_error.si("errback"))
        wait_until(lambda: count("errback"))

    def test_autoretry_does_not_retry_it(self, rival):
        rival.take("k")
        result = raises_and_retries_anything.delay("k")
        with pytest.raises(LockNotAcquired):
            result.get(timeout=10)


class TestRetry:
    def test_it_comes_back_and_leaves_the_tasks_own_retries_alone(self, rival):
        rival.take("k")
        result = retries.delay("k")
        wait_until(lambda: result.state == states.RETRY)
        rival.give_back("k")
        assert result.get(timeout=10) == 0, "request.retries"
        assert count("k") == 1

    def test_conflicts_do_not_change_how_often_a_failure_is_retried(self, rival, worker):
        rival.take("k")
        result = fails.delay("k")
        wait_until(lambda: retried(worker, result) > 2)
        rival.give_back("k")
        with pytest.raises(ValueError, match="as always"):
            result.get(timeout=10)
        assert count("k") == 3, "max_retries=2"
        with pytest.raises(ValueError, match="as always"):
            fails.delay("unrelated").get(timeout=10)
        assert count("unrelated") == 3

    def test_it_keeps_its_place_in_chain_group_and_chord(self, rival):
        rival.take("k")
        chained = chain(retries.s("k"), plain.s(), retries.si("k"))()
        grouped = group(retries.s("k"), plain.s(1))()
        header = chord([retries.s("k"), plain.s(1)])(collect.s())
        body = chord([plain.s(1), plain.s(2)])(retries.si("k"))
        wait_until(lambda: body.state == states.RETRY)
        rival.give_back("k")
        assert chained.get(timeout=20) == 0
        assert grouped.get(timeout=20) == [0, 1]
        assert header.get(timeout=20) == [0, 1]
        assert body.get(timeout=20) == 0

    def test_after_so_many_retries_something_else_decides(self, rival):
        rival.take("k")
        assert gives_up.delay("k").get(timeout=10) == "gave up"

    def test_after_the_deadline_something_else_decides(self, rival):
        rival.take("k")
        assert gives_up_in_time.delay("k").get(timeout=10) == "gave up"


class TestOwnRetries:
    def test_a_task_that_retries_itself_at_once_does_not_meet_its_own_lock(self):
        assert retries_itself.delay("k", times=3).get(timeout=10) == "done"
        assert count("k") == 4

    def test_a_retry_that_does_not_throw_is_sent(self):
        assert retries_itself_without_throwing.delay("k").get(timeout=10) == "done"
        wait_until(lambda: count("k") == 2)

    def test_autoretry_does_not_meet_its_own_lock(self):
        result = fails.delay("k")
        with pytest.raises(ValueError, match="as always"):
            result.get(timeout=10)
        assert count("k") == 3

    def test_a_direct_call_inside_of_the_body_changes_nothing_about_them(self, worker):
        result = calls_and_retries_itself.delay("k")
        assert result.get(timeout=10) == "done"
        assert f"[{result.id}] ignored" not in worker.log, "it met the lock of its own first run"
        assert count("k") == 2
        assert count("k, called") == 2

    def test_a_task_that_replaces_itself_does_not_meet_its_own_lock(self):
        assert replaces_itself.delay("k").get(timeout=10) == "done"
        assert count("k") == 2

    def test_the_count_of_conflicts_starts_anew_once_the_lock_was_obtained(self, rival, worker):
        rival.take("k")
        result = tells_conflicts.delay("k")
        wait_until(lambda: retried(worker, result) >= 2)
        rival.give_back("k")
        before, after = result.get(timeout=10)
        assert before >= 2
        assert after is None


class TestTransactionLevel:
    def test_a_return_commits(self):
        assert in_transaction.delay("k").get(timeout=10) == "done"
        assert count("k", "ends") == 1

    def test_a_retry_rolls_back_and_comes_again(self):
        assert in_transaction.delay("k", then="retry").get(timeout=10) == "done"
        assert count("k", "ends") == 1

    def test_an_exception_rolls_back(self):
        with pytest.raises(ValueError, match="as asked"):
            in_transaction.delay("k", then="fail").get(timeout=10)
        assert count("k") == 0

    def test_a_replacement_commits(self):
        assert in_transaction.delay("k", then="replace").get(timeout=10) == "done"
        assert count("k", "ends") == 1
        assert count("k replaced", "ends") == 1

    def test_they_exclude_each_other(self):
        results = [in_transaction.delay("k", 0.05) for _ in range(20)]
        answers = Counter(result.get(timeout=20) for result in results)
        assert answers["skipped"]
        assert most_at_once("k") == 1
        assert count("k") == answers["done"]


class TestNames:
    def test_sessions_and_connections_are_named_after_the_task(self):
        task_id, work_connection, holders = tells_application_names.delay("k").get(timeout=10)
        assert work_connection == f"celery:{task_id}"
        assert len(holders) == 1
        assert holders[0].startswith(
            f"tests.worker_tasks.tells_application_names [{task_id}] on celery@test (backend"
        )

    def test_a_holder_is_told_to_others(self, rival):
        result = skips.delay("k", 1)
        (holder,) = wait_until(advisory("k").holders)
        assert (holder.task_name, holder.task_id) == (skips.name, result.id)
        explanation = skips.lock_for("k").explain()
        assert not explanation.would_run
        name = rival.ask("SELECT application_name FROM pg_stat_activity WHERE pid = %s", holder.pid)
        assert name == f"pglock:{result.id}"
        result.get(timeout=10)
        assert skips.lock_for("k").explain().would_run

    def test_a_later_connection_has_its_own_name_again(self):
        tells_application_names.delay("k").get(timeout=10)
        names = {tells_application_name.delay().get(timeout=10) for _ in range(16)}
        assert not [name for name in names if name.startswith("celery:")]


def test_a_user_written_side_effect_works_in_a_worker(rival):
    rival.take("k")
    result = decides_itself.delay("k")
    assert result.get(timeout=10) == "took attempt 2"
