"""A good history passes each checker, and a bad one is found."""

from itertools import count

import pytest

from tests.faults import checkers, histories, nemeses
from tests.faults.histories import Event, Journal, Tail
from tests.faults.reports import report

A, B, C = 101, 102, 103
NAMES = {A: "a", B: "b", C: "c"}


def effect(what, process, at, *, asked=0.0, token=None, key="k"):
    """Asked at the same time, if not said otherwise; None does not ask."""
    asked = at if asked == 0.0 else asked
    details = {"attempt": NAMES[process], "key": key, "asked": asked}
    if what == "attempt":
        details |= {"task": f"task {NAMES[process]}", "token": token, "seconds": 1}
    return Event(what, at, process, details)


def arrives(process, at, **details):
    """Its first effect, and nothing yet that would tell when it reached the file at the latest."""
    return effect("attempt", process, at, **details)


def begins(process, at, *, token=None, **details):
    """The first effect, and a step right after it."""
    return [arrives(process, at, token=token, **details), effect("step", process, at + 0.01, **details)]


def steps(process, *stamps, **details):
    return [effect("step", process, at, **details) for at in stamps]


def ends(process, at, how="done"):
    return Event("ended", at, process, {"attempt": NAMES[process], "key": "k", "how": how})


_numbers = count()


def fault(since, until, process, does="", name="a fault", backend=7):
    number = next(_numbers)
    holder = {"key": "k", "attempt": NAMES[process], "process": process, "backend": backend}
    details = {"number": number, "name": name, "group": number, "group_name": name, "does": does}
    return (
        Event("fault begins", since, 1, {**details, "holders": [holder]}),
        Event("fault ends", until, 1, {"number": number}),
    )


def one(what, at, **details):
    return Event(what, at, 1, details)


def history(*events):
    """In the order given."""
    flat = [inner for event in events for inner in (event if isinstance(event, list | tuple) else [event])]
    return histories.arranged(flat)


class TestHistories:
    def test_what_was_written_is_read_in_its_order_with_bounds(self, tmp_path):
        journal = Journal(tmp_path / "history")
        first = journal.write("sent", task="t")
        second = journal.write("held", key="k")
        one, two = histories.read(journal.path)
        assert (one.what, one["task"], two["key"]) == ("sent", "t", "k")
        assert first == one.reached <= one.settled == second

    def test_a_line_that_a_killed_process_left_is_passed_over(self, tmp_path):
        journal = Journal(tmp_path / "history")
        with journal.path.open("ab") as file:
            file.write(b'\n{"what": "st')
        journal.write("sent", task="t")
        assert [event.what for event in histories.read(journal.path)] == ["sent"]

    def test_a_tail_gives_each_event_once(self, tmp_path):
        journal = Journal(tmp_path / "history")
        tail = Tail(journal.path)
        journal.write("one")
        assert [event.what for event in tail.events()] == ["one"]
        journal.write("two")
        assert [event.what for event in tail.events()] == ["two"]
        tail.close()

    def test_a_process_that_paused_before_it_wrote_has_reached_the_file_late(self):
        late = history(one("x", 1.0), Event("y", 5.0, 2), Event("z", 1.1, 3))[-1]
        assert late.reached == 5.0

    def test_an_event_is_settled_as_soon_as_anybody_below_it_has_gone_on(self):
        # Its own process writes its next line much later.
        first, *_ = history(Event("x", 1.0, 2), Event("y", 1.1, 3), Event("y", 1.2, 3), Event("x", 9.0, 2))
        assert first.settled == 1.2


class TestOverlaps:
    def test_one_after_the_other_is_none(self):
        assert not checkers.overlaps(
            history(
                begins(A, 1), steps(A, 1.1, 1.2), ends(A, 1.3), begins(B, 1.4), steps(B, 1.5), begins(C, 2)
            )
        )

    def test_two_keys_do_not_concern_each_other(self):
        assert not checkers.overlaps(
            history(begins(A, 1), begins(B, 1.1, key="other"), steps(A, 1.2), steps(B, 1.3, key="other"))
        )

    def test_a_step_after_the_next_has_begun_is_found_with_how_late(self):
        (found,) = checkers.overlaps(
            history(begins(A, 1), begins(B, 2), steps(B, 2.1), steps(A, 2.5, 2.75), steps(B, 3))
        )
        assert (found.attempt, found.next_attempt, found.effects) == ("a", "b", 2)
        assert not found.had_asked
        assert not found.was_cut_off
        assert found.late == pytest.approx(0.74)

    def test_the_order_of_the_lines_counts_and_not_their_stamps(self):
        # Stamped before the next began, and written after it: by then it was somebody else's.
        (found,) = checkers.overlaps(
            history(begins(A, 1, asked=None), begins(B, 2, asked=None), steps(A, 1.9, asked=None))
        )
        assert not found.had_asked

    def test_who_asked_before_the_next_began_and_paused_then_is_told_apart(self):
        (found,) = checkers.overlaps(
            history(begins(A, 1), begins(B, 2), steps(B, 3, 4), steps(A, 1.9, asked=1.8), steps(B, 4.1))
        )
        assert found.had_asked
        assert found.pause == pytest.approx(2.2)

    def test_who_pauses_before_the_first_effect_is_not_taken_for_the_next_holder(self):
        # B had the lock before C did, and came to its first line when C held it.
        late = history(
            begins(A, 1), begins(C, 5), steps(C, 5.1, 5.2), arrives(B, 1.6, asked=1.5), steps(C, 5.3, 5.4)
        )
        assert not checkers.overlaps(late)

    def test_a_stopped_process_is_not_blamed_for_the_time_in_which_it_did_not_run(self):
        stop_begins, stop_ends = fault(1.5, 5.0, A, "stopped")
        (found,) = checkers.overlaps(
            history(begins(A, 1), stop_begins, begins(B, 2), steps(B, 2.1), stop_ends, steps(A, 5.1))
        )
        assert found.late == pytest.approx(0.1, abs=0.01)

    def test_a_holder_stopped_after_its_first_line_hides_nobody(self):
        (found,) = checkers.overlaps(
            history(begins(A, 1), arrives(B, 2), steps(A, 2.2, 2.4, 2.6), begins(C, 3), steps(B, 9))
        )[:1]
        assert (found.attempt, found.effects) == ("a", 3)
        assert not found.had_asked
        assert found.late == pytest.approx(0.2)

    def test_who_relies_on_being_interrupted_and_was_not_is_found(self):
        (found,) = checkers.overlaps(
            history(begins(A, 1), begins(B, 2), steps(A, 2.1, asked=None), steps(B, 2.2))
        )
        assert not found.asks
        assert not found.had_asked

    def test_who_pauses_and_never_asks_again_is_not_taken_for_the_next_holder(self):
        late = [arrives(B, 1.6, asked=1.5), *steps(B, 5.25, asked=None)]
        assert not checkers.overlaps(
            history(begins(A, 1), begins(C, 5), steps(C, 5.1, 5.2), late, steps(C, 6))
        )

    def test_who_was_cut_off_is_told_apart(self):
        hole_begins, hole_ends = fault(1.5, 5.0, A, "cuts off")
        (found,) = checkers.overlaps(
            history(begins(A, 1), hole_begins, begins(B, 2), steps(B, 2.1), steps(A, 3), hole_ends)
        )
        assert found.was_cut_off

    def test_what_held_everybody_up_is_nobodys_lateness(self):
        (found,) = checkers.overlaps(
            history(begins(A, 1), begins(B, 2), steps(B, 2.0), one("stall", 3.0, seconds=0.9), steps(A, 3.05))
        )
        assert found.late == pytest.approx(0.15)


class TestFencedWrites:
    def test_writes_of_the_newest_pass(self):
        assert not checkers.stale_writes(
            history(
                one("given", 9, key="k", token=[1, 1], committed_at=1.0),
                one("given", 9, key="k", token=[1, 2], committed_at=2.0),
                one("committed", 9, key="k", token=[1, 1], committed_at=1.5),
                one("committed", 9, key="k", token=[1, 2], committed_at=2.5),
            )
        )

    def test_a_write_after_a_newer_token_was_given_out_is_found(self):
        (found,) = checkers.stale_writes(
            history(
                one("given", 9, key="k", token=[1, 10], committed_at=1.0),
                one("given", 9, key="k", token=[2, 9], committed_at=2.0),
                one("committed", 9, key="k", token=[1, 10], committed_at=2.5),
            )
        )
        assert (found.token, found.newer, found.late) == ((1, 10), (2, 9), 0.5)

    def test_a_write_over_a_newer_one_is_found_whatever_the_clock_says(self):
        (found,) = checkers.stale_writes(
            history(
                one("committed", 9, key="k", token=[1, 2], committed_at=5.0),
                one("committed", 9, key="k", token=[1, 1], committed_at=4.0),
            )
        )
        assert (found.token, found.newer) == ((1, 1), (1, 2))

    def test_a_fence_that_broke_within_a_transaction_is_found(self):
        assert checkers.broken_fences(history(one("fence broken", 1, attempt="a"))) == ["a"]


class TestTokens:
    def test_rising_ones_pass_over_a_failover(self):
        assert not checkers.inversions(
            history(begins(A, 1, token=[1, 100]), begins(B, 2, token=[2, 3]), begins(C, 3, token=[2, 4]))
        )

    def test_one_that_goes_back_is_found(self):
        (found,) = checkers.inversions(history(begins(A, 1, token=[1, 7]), begins(B, 2, token=[1, 6])))
        assert (found.attempt, found.token, found.before) == ("b", (1, 6), (1, 7))

    def test_one_that_comes_twice_is_found(self):
        (found,) = checkers.inversions(history(begins(A, 1, token=[1, 7]), begins(B, 2, token=[1, 7])))
        assert found.attempt == "b"

    def test_who_paused_after_taking_the_lock_has_a_lower_one_rightly(self):
        assert not checkers.inversions(
            history(begins(B, 2, token=[1, 7]), steps(B, 2.5), arrives(A, 1.6, asked=1.5, token=[1, 6]))
        )


class TestAccounts:
    def test_every_message_is_accounted_for(self):
        found = checkers.accounts(
            history(
                *(one("sent", 1, task=f"task {name}") for name in "abcd"),
                begins(A, 2),
                ends(A, 3),
                one("outcome", 9, task="task a", outcome="done"),
                one("outcome", 9, task="task b", outcome="skipped"),
                one("outcome", 9, task="task c", outcome="failed"),
                one("outcome", 9, task="task d", outcome="queued"),
            )
        )
        assert (found.sent, found.done, found.skipped, found.failed, found.queued) == (4, 1, 1, 1, 1)
        assert not found.lost + found.imagined + found.skipped_by_themselves

    def test_a_message_that_is_nowhere_is_lost(self):
        found = checkers.accounts(
            history(one("sent", 1, task="t"), one("outcome", 9, task="t", outcome="lost"))
        )
        assert found.lost == ("t",)

    def test_one_on_its_way_into_a_worker_that_hung_is_told_apart(self):
        found = checkers.accounts(
            history(
                one("sent", 1, task="t"),
                one("lost with a worker", 2, tasks=["t"]),
                one("outcome", 9, task="t", outcome="lost"),
            )
        )
        assert (found.lost, found.lost_with_a_worker) == ((), ("t",))

    def test_done_without_a_body_that_came_to_its_end_is_imagined(self):
        found = checkers.accounts(
            history(
                one("sent", 1, task="task a"),
                begins(A, 2),
                ends(A, 3, "LockLost"),
                one("outcome", 9, task="task a", outcome="done"),
            )
        )
        assert found.imagined == ("task a",)

    def test_a_copy_that_was_skipped_because_of_its_original_is_found(self):
        skipped = one("skipped", 2, task="t", holders=["other", "t"])
        assert checkers.accounts(history(skipped)).skipped_by_themselves == ("t",)


def test_what_was_left_behind_is_told():
    assert checkers.leaks(history(one("left behind", 1, text="session 7"))) == ["session 7"]


def test_latencies_count_from_the_fault_for_each_holder_that_it_hit():
    (found,) = checkers.latencies(
        history(
            begins(A, 1),
            fault(2.0, 2.1, A),
            Event("gave up", 2.2, A, {"attempt": "a", "key": "k"}),
            ends(A, 2.3, "LockLost"),
            one("freed", 2.5, key="k", backend=7),
            begins(B, 3),
        )
    )
    assert found.gave_up == pytest.approx((0.2,))
    assert found.freed == pytest.approx((0.5,))
    assert found.taken_again == pytest.approx((1.0,))
    assert (found.gave_up_first, found.both) == (1, 1)


def test_a_fault_that_found_nothing_to_hit_does_not_count():
    begun, _ = fault(1, 2, A)
    missed = one("fault missed", 1.1, number=begun["number"])
    assert not checkers.faults(history(begun, missed))
    assert checkers.faults(history(begun)) == {"a fault": 1}


class TestWhatAModeAdmits:
    @pytest.mark.parametrize(
        ("mode", "seconds", "faults", "admitted"),
        [
            ("default", 0.2, ["ends sessions"], True),
            ("default", 0.4, ["ends sessions"], False),
            ("default", 1.8, ["cuts off", "ends sessions"], True),
            ("default", 2.2, ["cuts off", "ends sessions"], False),
            # Silent for too long: such a holder gives up first.
            ("default", 0.4, ["cuts off"], False),
            ("strict", 0.1, ["ends sessions"], False),
            ("strict", 0.1, ["cuts off", "ends sessions"], False),
        ],
    )
    def test_of_a_holder_that_goes_on(self, mode, seconds, faults, admitted):
        lasting = [fault(1.5, 5.0, A, does) for does in faults]
        begin, end = [first for first, _ in lasting], [last for _, last in lasting]
        overlap = [*begins(B, 2), *steps(A, 2.02 + seconds)]
        found = report(history(begins(A, 1), begin, overlap, end), mode, lease=3)
        assert len(found.unsafe) == 1
        assert (not found.violations) is admitted
        assert "unsafe" in found.table()

    def test_the_control_has_to_be_found_out(self):
        good = history(begins(A, 1, asked=None), ends(A, 2), begins(B, 3, asked=None))
        bad = history(begins(A, 1, asked=None), begins(B, 2, asked=None), steps(A, 3, asked=None))
        assert report(good, "naive", lease=3).violations
        assert not report(bad, "naive", lease=3).violations


class TestSchedules:
    def planned(self, seed, mode="strict", seconds=600):
        return [
            (round(one.at, 6), one.fault.name, round(one.seconds, 6))
            for one in nemeses.schedule(seed, mode, seconds, 3.0)
        ]

    def test_the_same_seed_gives_the_same(self):
        assert self.planned(7) == self.planned(7)
        assert self.planned(7) != self.planned(8)

    def test_a_long_one_has_every_fault_and_pairs(self):
        assert {name for _, name, _ in self.planned(7)} == {fault.name for fault in nemeses.ALL}
        groups = [one.group_name for one in nemeses.schedule(7, "strict", 600, 3.0)]
        assert "black hole + terminate a session" in groups

    def test_a_brief_one_has_the_hole_of_a_lease(self):
        groups = [one.group_name for one in nemeses.schedule(7, "default", 12, 3.0)]
        assert "black hole + terminate a session" in groups
