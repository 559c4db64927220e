"""Random nested programs of locks, timeouts, transactions, errors and settings, beside an oracle of them."""

import os
from contextlib import suppress
from dataclasses import dataclass, field
from functools import singledispatchmethod
from typing import Any

import pytest
from django.db import Error, connections, transaction
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from psycopg.pq import TransactionStatus

from celery_pglock import (
    EXCLUSIVE,
    SHARE,
    ExclusiveLock,
    LockLost,
    LockMisuse,
    LockNotAcquired,
    Raise,
    ShareLock,
    Skip,
    advisory,
    lock_sequences,
    locks,
    model,
    polls,
    timeout,
)
from celery_pglock.durations import UNSET
from celery_pglock.keys import key
from celery_pglock.pool import close_leftovers, pool
from tests.conftest import PATIENCE, Rival, wait_until
from tests.models import Entry

# How many programs; `PROGRAMS=5000 make test ARGS='-k random_programs'` takes minutes.
PROGRAMS = int(os.environ.get("PROGRAMS", "120"))

pytestmark = [
    pytest.mark.long,
    pytest.mark.django_db(transaction=True, databases=["default", "locks"]),
    pytest.mark.timeout(120 + PROGRAMS // 2),
]

ALIASES = ("default", "locks")
KEYS = ("a", 7, (1, -2))
TABLE = "the table"
SHORT = 0.03
BEARABLE = 100  # ms
SKIPPED = "skipped"


# The programs. A block has a body; where a statement makes no sense, it does nothing.


@dataclass(frozen=True)
class Boom:
    pass


@dataclass(frozen=True)
class SqlError:
    alias: str
    swallowed: bool


@dataclass(frozen=True)
class Set:
    alias: str
    milliseconds: int
    local: bool


@dataclass(frozen=True)
class Close:
    alias: str


@dataclass(frozen=True)
class Terminate:
    """The lock session of the alias; an idle one, if none is leased."""

    alias: str


@dataclass(frozen=True)
class RivalTakes:
    key: Any
    shared: bool


@dataclass(frozen=True)
class RivalGivesBack:
    pass


@dataclass(frozen=True)
class Lock:
    """``way`` is how it is taken: in a block, by hand (until the block's end or the program's), in a call."""

    way: str
    keys: tuple[Any, ...]
    shared: bool
    xact: bool
    alias: str
    timeout: Any
    raises: bool
    body: tuple[Any, ...] = ()


@dataclass(frozen=True)
class GiveBack:
    """What was taken by hand: the latest, or the earliest."""

    latest: bool


@dataclass(frozen=True)
class Sequence:
    keys: tuple[Any, ...]
    shared: bool
    alias: str
    blocking: bool
    body: tuple[Any, ...] = ()


@dataclass(frozen=True)
class LockTable:
    alias: str
    shared: bool
    timeout: Any
    raises: bool


@dataclass(frozen=True)
class Timeout:
    alias: str
    seconds: Any
    decorates: bool
    body: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Atomic:
    alias: str
    durable: bool
    savepoint: bool
    body: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Swallow:
    body: tuple[Any, ...] = ()


# Most happens where two things meet on one alias.
aliases = st.sampled_from([*ALIASES, ALIASES[0]])
several_keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True).map(tuple)
waits = st.sampled_from([SHORT, 0, SHORT, UNSET])
seldom = st.sampled_from([False, False, False, True])


def lock(ways, body):
    return st.builds(
        Lock,
        st.sampled_from(ways),
        several_keys,
        shared=seldom,
        xact=seldom,
        alias=aliases,
        timeout=waits,
        raises=st.booleans(),
        body=body,
    )


rival_takes = st.builds(RivalTakes, st.sampled_from([*KEYS, TABLE]), seldom)
steps = st.one_of(
    st.builds(Boom),
    st.builds(SqlError, aliases, st.booleans()),
    st.builds(SqlError, st.just("default"), st.just(True)),
    st.builds(Set, aliases, st.sampled_from([11000, 12000]), st.booleans()),
    st.builds(Close, aliases),
    st.builds(Terminate, aliases),
    rival_takes,
    st.builds(RivalGivesBack),
    st.builds(GiveBack, st.booleans()),
    lock(["by hand"], st.just(())),
    st.builds(LockTable, aliases, st.booleans(), waits, st.booleans()),
)


def blocks(inner):
    body = st.lists(inner, max_size=4).map(tuple)
    return st.one_of(
        st.builds(Atomic, aliases, st.booleans(), st.booleans(), body),
        st.builds(Swallow, body),
        st.builds(Timeout, aliases, st.sampled_from([SHORT, 5, None]), st.booleans(), body),
        lock(["block", "by hand", "call"], body),
        st.builds(Sequence, several_keys, st.booleans(), aliases, st.booleans(), body),
    )


statements = st.lists(st.recursive(steps, blocks, max_leaves=14), min_size=1, max_size=4)
# Without somebody else from the beginning little is refused.
programs = st.builds(lambda taken, program: taken + program, st.lists(rival_takes, max_size=2), statements)


# The oracle: what PostgreSQL and Django do, without a word about how locks and timeouts are made.


@dataclass(eq=False)
class Hold:
    """Keys that a lock session, a transaction or the rival has."""

    owner: Any
    keys: tuple[Any, ...]
    shared: bool

    def keeps_out(self, owner, key, shared):
        return self.owner is not owner and key in self.keys and not (self.shared and shared)


@dataclass(eq=False)
class Session:
    """A lock session, and what is not left yet; all of that is lost once it has ended."""

    ended: bool = False
    holds: list[Hold] = field(default_factory=list)

    def is_last(self, hold):
        """Whether leaving it frees a key, so that PostgreSQL has to be asked."""
        others = [other.keys for other in self.holds if other is not hold and other.shared == hold.shared]
        return any(not any(key in keys for keys in others) for key in hold.keys)


@dataclass(eq=False)
class Line:
    """A Django connection: ``lock_timeout`` in ms (``None``: as connected), and its transaction's locks.

    ``saved`` has what the transaction, and each savepoint in it, goes back to.
    """

    session: int | None = None
    local: int | None = None
    holds: list[Hold] = field(default_factory=list)
    saved: list[Any] = field(default_factory=list)
    closed: int = 0

    @property
    def in_force(self):
        return self.local if self.local is not None else self.session or 0

    def save(self):
        self.saved.append((self.session, self.local, tuple(self.holds)))

    def go_back(self):
        self.session, self.local, holds = self.saved[-1]
        self.holds = list(holds)

    def end(self, *, committed):
        if not committed:
            self.go_back()
        self.saved.pop()
        if not self.saved:
            self.local, self.holds = None, []

    def close(self):
        self.session, self.local, self.holds = None, None, []
        self.saved = [(None, None, ())] * len(self.saved)
        self.closed += 1


class Oracle:
    def __init__(self):
        self.lines = {alias: Line() for alias in ALIASES}
        self.sessions = {alias: Session() for alias in ALIASES}
        self.rivals = []

    def session(self, alias):
        if self.sessions[alias].ended and not self.sessions[alias].holds:
            self.sessions[alias] = Session()
        return self.sessions[alias]

    def is_free_for(self, owner, keys, shared):
        holds = [*self.rivals, *(hold for line in self.lines.values() for hold in line.holds)]
        holds += [hold for one in self.sessions.values() if not one.ended for hold in one.holds]
        return not any(hold.keeps_out(owner, key, shared) for hold in holds for key in keys)


# What can be seen from outside.

LOOK = "SELECT {}, ARRAY(SELECT mode FROM pg_locks WHERE granted AND relation = 'tests_entry'::regclass)"


def takeable(judge):
    """Of each key and the table: whether the judge could take it shared, and whether alone."""
    calls = []
    for arguments in (key(one).arguments for one in KEYS):
        typed = ", ".join(f"{number}::{'bigint' if len(arguments) == 1 else 'int'}" for number in arguments)
        calls.append(f"ARRAY[pg_try_advisory_xact_lock_shared({typed}), pg_try_advisory_xact_lock({typed})]")
    *answers, modes = judge.connection.execute(LOOK.format(", ".join(calls))).fetchone()
    alone = not {"ShareLock", "ExclusiveLock"} & set(modes)
    return [*map(tuple, answers), ("ExclusiveLock" not in modes, alone)]


def ask(alias, sql):
    """Around Django, which would refuse where it wants a rollback."""
    with connections[alias].connection.cursor() as cursor:
        return cursor.execute(sql).fetchone()[0]


def is_usable(alias, *, to_django=True):
    django = connections[alias]
    if django.connection is None:
        return True
    if django.connection.closed or (to_django and django.needs_rollback):
        return False
    status = django.connection.pgconn.transaction_status
    return status in (TransactionStatus.IDLE, TransactionStatus.INTRANS)


def states():
    """All of Django's connections that locks on sessions of their own must leave alone."""
    return [
        (
            id(django.connection),
            django.connection and django.connection.pgconn.transaction_status,
            django.in_atomic_block,
            django.needs_rollback,
            django.closed_in_transaction,
            tuple(django.savepoint_ids),
        )
        for django in map(connections.__getitem__, ALIASES)
    ]


class BoomError(Exception):
    """A body's own error."""


FORESEEN = (BoomError, Error, LockLost, LockNotAcquired)


class Run:
    """One run of a program, compared with the oracle after each step."""

    def __init__(self, rival, judge):
        self.rival = rival
        self.judge = judge
        self.oracle = Oracle()
        self.by_hand = []
        self.timeouts = []
        self.wrong = []

    def ensure(self, condition, what):
        if not condition:
            # Kept, as an error may be hidden on its way out, which is what this is about.
            self.wrong.append(what)
            raise AssertionError(what)

    def whole(self, program):
        try:
            with suppress(*FORESEEN):
                self.run(program)
            while self.by_hand:
                self.release(self.by_hand[-1][0])
            self.rival_gives_back()
            self.compare()
            left = self.judge.sees_advisory_locks()
            self.ensure(not left, f"{left} advisory locks are left")
            for alias in ALIASES:
                if connections[alias].connection is not None:
                    source = ask(alias, "SELECT source FROM pg_settings WHERE name = 'lock_timeout'")
                    expected = "default" if self.oracle.lines[alias].session is None else "session"
                    self.ensure(source == expected, f"lock_timeout of {alias}: {source}, not {expected}")
        finally:
            self.tidy_up()
            if self.wrong:
                raise AssertionError(self.wrong[0])

    def tidy_up(self):
        if self.wrong:
            close_leftovers("a program that went wrong")
            pool().close_idle()
            locks.forget_what_was_left()
            lock_sequences.forget_what_was_left()
            self.rival_gives_back()
            # What was closed is free as soon as the server has read of it.
            wait_until(lambda: not self.judge.sees_advisory_locks())
        for alias, line in self.oracle.lines.items():
            if self.wrong:
                connections[alias].close()
            elif line.session is not None:
                connections[alias].connection.execute("RESET lock_timeout")

    def run(self, program):
        for step in program:
            self.do(step)
            self.compare()

    @singledispatchmethod
    def do(self, step):
        raise NotImplementedError

    def compare(self):
        names = (*KEYS, TABLE)
        expected = [
            tuple(self.oracle.is_free_for(self.judge, [name], shared) for shared in (True, False))
            for name in names
        ]
        found = takeable(self.judge)
        if any(line.closed for line in self.oracle.lines.values()):
            # What a closed connection had is free as soon as the server has read of it.
            with suppress(AssertionError):
                found = expected if wait_until(lambda: takeable(self.judge) == expected, seconds=1) else found
        self.ensure(found == expected, f"others can take {found} of {names}, not {expected}")
        for alias, line in self.oracle.lines.items():
            if connections[alias].connection is not None and is_usable(alias, to_django=False):
                sql = "SELECT extract(epoch FROM current_setting('lock_timeout')::interval) * 1000"
                milliseconds = int(ask(alias, sql))
                self.ensure(
                    milliseconds == line.in_force,
                    f"lock_timeout of {alias}: {milliseconds} ms, not {line.in_force}",
                )

    # Blocks of ours. ``use`` runs what it is given inside of one.

    def through(self, use, body, *, leaves_django_alone):
        """Run the body in it; what the body raised comes out. Answers its error at leaving, if any."""
        begun, body_error, before = False, None, states()

        def alone(before):
            after = states()
            self.ensure(
                not leaves_django_alone or before == after,
                f"Django's connections: {before} became {after}",
            )
            return after

        def inside(*given):
            nonlocal begun, body_error, before
            alone(before)
            begun = True
            try:
                return body(*given)
            except BaseException as error:
                body_error = error
                raise
            finally:
                before = states()

        leaving = None
        try:
            use(inside)
        except BaseException as error:
            if body_error is not None:
                self.ensure(error is body_error, f"{body_error!r} was hidden by {error!r}")
            if not begun or body_error is not None:
                alone(before)
                self.compare()
                raise
            leaving = error
        else:
            self.ensure(body_error is None, f"{body_error!r} was swallowed")
        alone(before)
        self.compare()
        return leaving

    def expect_loss(self, error, *, lost, certain=True):
        if error is None:
            self.ensure(not (lost and certain), "nobody told of the loss")
        else:
            self.ensure(lost and isinstance(error, LockLost), f"leaving raised {error!r}")
            raise error

    def has_lost(self, hold):
        """Whether leaving it tells of a loss, and whether it must; it is not held any more."""
        certain = hold.owner.is_last(hold)
        hold.owner.holds.remove(hold)
        return {"lost": hold.owner.ended, "certain": certain}

    def bounded(self, timeout, in_force):
        """The timeout of a wait that is in vain: one that would not end is none."""
        return timeout if timeout is not UNSET or 0 < in_force <= BEARABLE else 0

    def innermost_timeout(self, alias):
        return next((int((one or 0) * 1000) for name, one in reversed(self.timeouts) if name == alias), 0)

    @do.register
    def _(self, step: Lock):
        if step.xact:
            if step.way == "by hand":
                self.take_in_transaction(step)
            else:
                self.lock_with_transaction(step)
            return
        session = self.oracle.session(step.alias)
        may_tell_of_loss = session.ended
        free = self.oracle.is_free_for(session, step.keys, step.shared)
        timeout = step.timeout if free else self.bounded(step.timeout, self.innermost_timeout(step.alias))
        value = self.value(step, timeout)
        hold = None

        def took():
            nonlocal hold, session
            if may_tell_of_loss:
                session = self.oracle.sessions[step.alias] = Session()
            hold = Hold(session, step.keys, step.shared)
            session.holds.append(hold)

        if step.way == "by hand":
            self.lock_by_hand(step, value, free, took, may_tell_of_loss, lambda: hold)
            return

        leaving = {"lost": False}

        def body(acquired=True):
            nonlocal leaving
            self.ensure(acquired is free, f"acquired is {acquired}, not {free}")
            if acquired:
                took()
            try:
                self.compare()
                self.run(step.body)
            finally:
                if hold:
                    leaving = self.has_lost(hold)

        self.entering(step, value, body, free, may_tell_of_loss, lambda: leaving, leaves_django_alone=True)

    def value(self, step, timeout):
        effect = None
        if step.way == "call":
            effect = Raise if step.raises else Skip(SKIPPED)
        elif step.raises:
            effect = Raise
        return advisory(
            *step.keys,
            shared=step.shared,
            xact=step.xact,
            using=step.alias,
            timeout=timeout,
            side_effect=effect,
        )

    def entering(self, step, value, body, free, may_tell_of_loss, leaving, *, leaves_django_alone):
        ran = False

        def noted(*given):
            nonlocal ran
            ran = True
            body(*given)

        def use(inside):
            if step.way == "call":
                answer = value(inside)()
                self.ensure((answer == SKIPPED) == (not ran), f"the call gave {answer!r}")
            else:
                with value as acquired:
                    inside(acquired)

        try:
            error = self.through(use, noted, leaves_django_alone=leaves_django_alone)
        except FORESEEN as entering:
            if not ran:
                self.expect_refusal(step, entering, free, may_tell_of_loss)
            raise
        if ran:
            self.expect_loss(error, **leaving())
        else:
            self.ensure(not free and step.way == "call" and not step.raises, "the body did not run")

    def expect_refusal(self, step, error, free, may_tell_of_loss):
        if isinstance(error, LockLost):
            self.ensure(may_tell_of_loss, f"{error!r} of what nobody ended")
            self.oracle.sessions[step.alias] = Session()
        else:
            self.ensure(
                isinstance(error, LockNotAcquired) and getattr(step, "raises", True) and not free,
                f"entering raised {error!r}",
            )

    def lock_by_hand(self, step, value, free, took, may_tell_of_loss, hold):
        before = states()
        try:
            acquired = value.acquire()
        except FORESEEN as error:
            self.expect_refusal(step, error, free, may_tell_of_loss)
            raise
        finally:
            self.ensure(before == states(), "Django's connections were touched")
        self.ensure(acquired is free, f"acquire() gave {acquired}, not {free}")
        if not acquired:
            return
        took()
        self.by_hand.append((value, hold()))
        if not step.body:
            return
        try:
            self.compare()
            self.run(step.body)
        except FORESEEN:
            with suppress(LockLost):
                self.release(value)
            raise
        self.release(value)

    def release(self, value):
        """As with RLocks, of the same lock the latest is given back."""
        places = [place for place, (lock, _) in enumerate(self.by_hand) if lock.is_same_lock(value)]
        if not places:
            return
        leaving = self.has_lost(self.by_hand.pop(places[-1])[1])
        before, error = states(), None
        try:
            value.release()
        except LockLost as lost:
            error = lost
        self.ensure(before == states(), "Django's connections were touched")
        self.compare()
        with suppress(LockLost):
            self.expect_loss(error, **leaving)

    @do.register
    def _(self, step: GiveBack):
        if self.by_hand:
            self.release(self.by_hand[-1 if step.latest else 0][0])

    def take_in_transaction(self, step):
        line = self.oracle.lines[step.alias]
        take = lambda timeout: self.value(step, timeout).acquire()  # noqa: E731
        if not connections[step.alias].in_atomic_block or self.meets_itself(step):
            with pytest.raises(LockMisuse):
                take(step.timeout)
        else:
            self.take_on_line(step, step.keys, line, take)
            self.run(step.body)

    def meets_itself(self, step):
        session = self.oracle.sessions[step.alias]
        holds = () if session.ended else session.holds
        return any(hold.keeps_out(step, key, step.shared) for hold in holds for key in step.keys)

    @do.register
    def _(self, step: LockTable):
        line = self.oracle.lines[step.alias]
        mode = SHARE if step.shared else EXCLUSIVE
        options = {"side_effect": Raise} if step.raises else {}
        take = lambda timeout: model(Entry, mode=mode, using=step.alias, timeout=timeout, **options)  # noqa: E731
        if not connections[step.alias].in_atomic_block:
            with pytest.raises(LockMisuse):
                take(step.timeout)
        else:
            self.take_on_line(step, (TABLE,), line, take)

    def take_on_line(self, step, keys, line, take):
        free = self.oracle.is_free_for(line, keys, step.shared)
        timeout = step.timeout if free else self.bounded(step.timeout, line.in_force)
        usable = is_usable(step.alias)
        before = states()
        try:
            acquired = take(timeout)
        except LockNotAcquired:
            self.ensure(usable and step.raises and not free, "refused what is free")
            raise
        except Error as error:
            self.ensure(not usable, f"taking raised {error!r}")
            raise
        finally:
            self.ensure(before == states(), f"Django's connections: {before} became {states()}")
        self.ensure(usable and acquired is free, f"acquired is {acquired}, not {free}")
        if acquired:
            line.holds.append(Hold(line, keys, step.shared))

    def lock_with_transaction(self, step):
        django, line = connections[step.alias], self.oracle.lines[step.alias]
        if django.in_atomic_block:
            before = states()
            with pytest.raises(LockMisuse):
                self.value(step, step.timeout).__enter__()
            self.ensure(before == states(), "Django's connections were touched")
            return
        if self.meets_itself(step):
            value = self.value(step, step.timeout)
            with pytest.raises(LockMisuse, match="wait for itself"):
                value(states)() if step.way == "call" else value.__enter__()
            return
        free = self.oracle.is_free_for(line, step.keys, step.shared)
        timeout = step.timeout if free else self.bounded(step.timeout, line.in_force)
        leaving = {"lost": False}

        def body(acquired=True):
            self.ensure(acquired is free, f"acquired is {acquired}, not {free}")
            if not acquired:
                self.compare()
                self.run(step.body)
                return
            line.save()
            line.holds.append(Hold(line, step.keys, step.shared))
            committed = False
            try:
                self.compare()
                self.run(step.body)
                committed = is_usable(step.alias)
            finally:
                leaving["lost"] = django.closed_in_transaction
                line.end(committed=committed)

        value = self.value(step, timeout)
        self.entering(step, value, body, free, False, lambda: leaving, leaves_django_alone=False)

    @do.register
    def _(self, step: Sequence):
        session = self.oracle.session(step.alias)
        was_ended = session.ended
        free = self.oracle.is_free_for(session, step.keys, step.shared)
        bounded = self.bounded(UNSET, self.innermost_timeout(step.alias)) is UNSET
        value = (ShareLock if step.shared else ExclusiveLock)(*step.keys, using=step.alias)
        hold = None

        def body():
            nonlocal hold, session
            self.ensure(free and value.locked(), "it is not locked")
            if was_ended:
                session = self.oracle.sessions[step.alias] = Session()
            hold = Hold(session, step.keys, step.shared)
            session.holds.append(hold)
            try:
                self.compare()
                self.run(step.body)
                self.ensure(value.locked() is not hold.owner.ended, "locked() is wrong")
            finally:
                hold.owner.holds.remove(hold)

        def use(inside):
            if step.blocking and (free or bounded):
                with value as given:
                    self.ensure(given is value, f"the block gave {given!r}")
                    inside()
            elif value.acquire(blocking=False):
                try:
                    inside()
                finally:
                    value.release()
            else:
                self.ensure(not free, "refused what is free")

        try:
            error = self.through(use, body, leaves_django_alone=True)
        except FORESEEN as entering:
            if hold is None:
                self.expect_refusal(step, entering, free, was_ended)
            raise
        self.ensure(error is None, f"leaving raised {error!r}")

    @do.register
    def _(self, step: Timeout):
        line = self.oracle.lines[step.alias]
        value = timeout(step.seconds, using=step.alias)
        usable = is_usable(step.alias)

        def body():
            in_transaction, closed = bool(line.saved), line.closed
            before = line.in_force if in_transaction else line.session
            milliseconds = int((step.seconds or 0) * 1000)
            if in_transaction:
                line.local = milliseconds
            else:
                line.session = milliseconds
            self.timeouts.append((step.alias, step.seconds))
            try:
                self.compare()
                self.run(step.body)
            finally:
                self.timeouts.pop()
                if closed != line.closed:
                    pass
                elif not in_transaction:
                    line.session = before
                elif is_usable(step.alias, to_django=False):
                    line.local = before

        def use(inside):
            if step.decorates:
                value(inside)()
            else:
                with value:
                    inside()

        begun = False

        def noted():
            nonlocal begun
            begun = True
            body()

        try:
            error = self.through(use, noted, leaves_django_alone=False)
        except Error as error:
            self.ensure(begun or not usable, f"entering raised {error!r}")
            raise
        self.ensure(error is None, f"leaving raised {error!r}")

    # What is not ours.

    @do.register
    def _(self, step: Boom):
        raise BoomError

    @do.register
    def _(self, step: Swallow):
        with suppress(*FORESEEN):
            self.run(step.body)

    @do.register
    def _(self, step: Atomic):
        django, line = connections[step.alias], self.oracle.lines[step.alias]
        is_outermost = not django.in_atomic_block
        durable = step.durable and is_outermost
        with transaction.atomic(step.alias, durable=durable, savepoint=step.savepoint):
            goes_back = is_outermost or django.savepoint_ids[-1] is not None
            if goes_back:
                line.save()
            committed = False
            try:
                self.compare()
                self.run(step.body)
                committed = is_usable(step.alias)
            finally:
                if goes_back:
                    line.end(committed=committed)

    @do.register
    def _(self, step: SqlError):
        if not is_usable(step.alias):
            return
        try:
            with connections[step.alias].cursor() as cursor:
                cursor.execute("SELECT 1 / 0")
        except Error:
            # PostgreSQL goes back at once, before it is told to.
            if self.oracle.lines[step.alias].saved:
                self.oracle.lines[step.alias].go_back()
            if not step.swallowed:
                raise

    @do.register
    def _(self, step: Set):
        line = self.oracle.lines[step.alias]
        if not is_usable(step.alias) or (step.local and not line.saved):
            return
        with connections[step.alias].cursor() as cursor:
            cursor.execute(f"SET {'LOCAL ' if step.local else ''}lock_timeout = {step.milliseconds}")
        if step.local:
            line.local = step.milliseconds
        else:
            line.session, line.local = step.milliseconds, None

    @do.register
    def _(self, step: Close):
        connections[step.alias].close()
        self.oracle.lines[step.alias].close()

    @do.register
    def _(self, step: Terminate):
        leased = pool().leased.get(step.alias)
        if leased is None:
            self.judge.ask(
                "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE datname ="
                " current_database() AND application_name LIKE 'pglock%%' AND pid <> ALL (%s)",
                [session.backend_pid for session in pool().leased.values()],
            )
        elif not leased.is_closed:
            # The server's own way of waiting for it takes 0.1 s at least.
            self.judge.ask("SELECT pg_terminate_backend(%s)", leased.backend_pid)
            self.ensure(polls.wait({leased.socket: polls.ENDED}, PATIENCE), "the lock session does not end")
            self.oracle.sessions[step.alias].ended = True

    @do.register
    def _(self, step: RivalTakes):
        free = self.oracle.is_free_for(self.rival, [step.key], step.shared)
        if step.key != TABLE:
            self.ensure(self.rival.take(step.key, shared=step.shared) is free, f"the rival took {step.key!r}")
        elif free:
            self.rival.connection.execute("BEGIN")
            self.rival.connection.execute(
                f"LOCK TABLE tests_entry IN {SHARE if step.shared else EXCLUSIVE} MODE"
            )
        if free:
            self.oracle.rivals.append(Hold(self.rival, (step.key,), step.shared))

    @do.register
    def _(self, step: RivalGivesBack):
        self.rival_gives_back()

    def rival_gives_back(self):
        self.rival.connection.execute("ROLLBACK; SELECT pg_advisory_unlock_all()")
        self.oracle.rivals.clear()


@pytest.fixture
def judge(transactional_db):
    somebody = Rival()
    yield somebody
    somebody.connection.close()


# Each program ends with a comparison that all is as it was before, so that they may share the fixtures; and
# how long one takes is how long it waits.
@settings(
    max_examples=PROGRAMS,
    deadline=None,
    database=None,
    print_blob=True,
    # The others take minutes to tell little more.
    phases=[Phase.generate, Phase.shrink],
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(programs)
@pytest.mark.long
def test_random_programs_leave_no_lock_no_setting_and_no_error_hidden(rival, judge, pooled, program):
    Run(rival, judge).whole(program)
