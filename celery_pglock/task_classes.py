"""The base classes of locked tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar

from celery import Task
from celery.contrib.django.task import DjangoTask

from celery_pglock import hooks, runs
from celery_pglock.conflicts import without_our_headers
from celery_pglock.durations import UNSET
from celery_pglock.errors import LockMisuse, LockNotAcquired
from celery_pglock.held_locks import HeldLock, lock_of
from celery_pglock.locks import advisory
from celery_pglock.task_options import TaskOptions, options_of, options_on, states_an_option

if TYPE_CHECKING:
    # Generic in the stubs alone.
    PlainTask = Task[..., Any]
    PlainDjangoTask = DjangoTask[..., Any]
else:
    PlainTask, PlainDjangoTask = Task, DjangoTask

_is_refused_later = ContextVar("_is_refused_later", default=False)


@contextmanager
def refusing_later() -> Iterator[None]:
    """Tasks are bound whose options cannot work: ``lock_options()`` refuses them, and so does each call."""
    token = _is_refused_later.set(True)
    try:
        yield
    finally:
        _is_refused_later.reset(token)


class LockedTask(PlainTask):
    """What a task with a lock does otherwise than one without, before any other base class."""

    name: str
    throws: tuple[type[Exception], ...]

    _lock_options: ClassVar[Any] = UNSET
    _next_call_is_celerys: ClassVar[bool] = True

    @classmethod
    def on_bound(cls, app: Any) -> None:
        super().on_bound(app)
        cls.name = registered_name(cls, app)
        cls.take_locks()

    @classmethod
    def take_locks(cls) -> None:
        """Check the options; ``LockMisuse`` says what cannot work."""
        hooks.connect()
        cls._lock_options = UNSET
        after_ours = cls.__mro__[cls.__mro__.index(LockedTask) + 1 :]
        cls._next_call_is_celerys = next(base for base in after_ours if "__call__" in vars(base)) is Task
        # An expected outcome: logged in a line, without a traceback.
        throws = cls.throws if isinstance(cls.throws, tuple) else (cls.throws,)
        cls.throws = (*(error for error in throws if error is not LockNotAcquired), LockNotAcquired)
        # Celery leaves its app half finalized behind an error from here.
        with suppress(LockMisuse) if _is_refused_later.get() else nullcontext():
            cls.lock_options()

    @classmethod
    def lock_options(cls) -> TaskOptions | None:
        """The options as they were checked; ``None`` for a task of Celery's own that states none.

        Celery takes a task for bound even if its binding failed: what cannot work is refused each time.
        """
        if cls._lock_options is UNSET:
            given = cls.stated_options()
            cls._lock_options = None if given is None else options_of(cls, given)
        options: TaskOptions | None = cls._lock_options
        return options

    @classmethod
    def stated_options(cls) -> Mapping[str, Any] | None:
        """What was said about the lock; ``None`` for a task that takes none."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        options, request = self.lock_options(), self.request
        # A task called inside of its own body is given a copy of its request.
        is_direct_call = request.called_directly or runs.held_back_by(request) is not None
        # Celery's own __call__ would push a copy of the request, in which what the body sets there is lost.
        body = self.run if self._next_call_is_celerys and not is_direct_call else super().__call__
        if options is None or (is_direct_call and not options.on_direct_call):
            return body(*args, **kwargs)
        return runs.run(self, options, body, args, kwargs, is_direct_call=is_direct_call)

    @property
    def lock(self) -> HeldLock:
        """The lock under which the body runs; ``LockMisuse`` outside of it."""
        return lock_of(self.name)

    def lock_for(self, *args: Any, **kwargs: Any) -> advisory:
        """The lock of a call with these arguments, to be asked or taken: it is a value, and takes nothing."""
        return lock_for(self, *args, **kwargs)

    def signature_from_request(
        self, request: Any = None, args: Any = None, kwargs: Any = None, queue: Any = None, **options: Any
    ) -> Any:
        request = self.request if request is None else request
        held_back = runs.held_back_by(request)
        if held_back is None:
            return super().signature_from_request(request, args, kwargs, queue, **options)
        # The lock was obtained, so the next conflict is the first again.
        options["headers"] = without_our_headers(options.get("headers", request.headers))
        signature = super().signature_from_request(request, args, kwargs, queue, **options)
        if not request.is_eager:
            # Sent now, it could meet the lock of the very run that sends it.
            held_back.divert(signature)
        return signature

    def on_replace(self, sig: Any) -> Any:
        held_back = runs.held_back_by(self.request)
        if held_back is None:
            return super().on_replace(sig)
        if self.request.is_eager:
            raise runs.ReplacedEagerly(sig)
        send = sig.delay
        sig.delay = lambda: held_back.send_later(send)
        return super().on_replace(sig)


class AdvisoryTask(LockedTask, PlainDjangoTask):
    """A task that holds a PostgreSQL advisory lock while it runs.

    Its options are class attributes: given to ``@app.task(base=AdvisoryTask, ...)``, to a base class, or
    through ``task_annotations``. They are checked when the task is bound; ``LockMisuse`` says what cannot
    work. Callables are called with the task's arguments, without the task.
    """

    lock_key: ClassVar[Any] = UNSET
    """One key (text, int or pair of ints) or a list of them; text may be a template over the arguments;
    a callable returns any of these, taken literally. Unset: the task's name."""
    lock_by: ClassVar[Any] = UNSET
    """Names of the parameters whose values make the key, or ``ALL_ARGUMENTS``; instead of ``lock_key``."""
    lock_shared: ClassVar[bool] = False
    """Whether holders of this kind run together; an exclusive one still runs alone."""
    lock_xact: ClassVar[bool] = False
    """Whether the lock is transaction-level, and the body runs inside of ``atomic(durable=True)``."""
    lock_limit: ClassVar[Any] = 1
    """How many may hold the key at once; a callable computes it from the arguments."""
    lock_timeout: ClassVar[Any] = UNSET
    """Seconds to wait in place, over all keys together. Unset: ``CELERY_PGLOCK["TIMEOUT"]``, which is 0."""
    lock_side_effect: ClassVar[Any] = UNSET
    """What happens when the lock is not obtained. Unset: ``CELERY_PGLOCK["SIDE_EFFECT"]``: ``Retry()``."""
    lock_using: ClassVar[Any] = UNSET
    """Alias whose server keeps the lock. Unset: ``CELERY_PGLOCK["USING"]``, which is ``"default"``."""
    lock_on_direct_call: ClassVar[bool] = False
    """Whether calling the task like a function takes the lock, too."""
    lock_on_lost: ClassVar[Any] = UNSET
    """What happens when the lock's session is lost during the body: ``"interrupt"`` raises ``LockLost`` in it
    where that is safe (prefork and solo, on Linux), ``"fail"`` fails the task at its end, ``"warn"`` only
    tells. Unset: ``CELERY_PGLOCK["ON_LOST"]``, which is ``"interrupt"``."""
    lock_strict: ClassVar[Any] = UNSET
    """Whether the lock comes with a fencing token, and stays with nobody for a while after a holder that did
    not leave in order. Unset: ``CELERY_PGLOCK["STRICT"]``, which is ``False``."""

    lock_priority: ClassVar[int] = 0
    """Above 0 the task is critical: its backends are marked, and ``prioritize_critical_tasks`` stops those of
    less priority that block it."""

    @classmethod
    def stated_options(cls) -> Mapping[str, Any] | None:
        # With Celery(task_cls=AdvisoryTask), Celery's own tasks stay as they are.
        left_alone = cls.name.startswith("celery.") and not states_an_option(cls)
        return None if left_alone else options_on(cls)


class XactAdvisoryTask(AdvisoryTask):
    """A task that runs in a transaction of its own, and holds a transaction-level lock until its end."""

    lock_xact: ClassVar[bool] = True


def registered_name(task: type[Any], app: Any) -> str:
    """The name of a task class, which may be that of its only object; empty if it has none."""
    return str(task.name or next((one.name for one in objects_of(task, app)), ""))


def objects_of(task: type[Any], app: Any) -> tuple[Any, ...]:
    """The tasks of the app that are of this very class."""
    named = app._tasks.get(task.name)
    if type(named) is task:
        return (named,)
    return tuple(one for one in tuple(app._tasks.values()) if type(one) is task)


def lock_for(task: Any, /, *args: Any, **kwargs: Any) -> advisory:
    """The lock that a call of this task with these arguments takes; it takes nothing."""
    if isinstance(task, str):
        raise LockMisuse(f"lock_for() takes a task, and not its name: app.tasks[{task!r}].")
    options = task.lock_options() if isinstance(task, LockedTask) else None
    if options is None:
        raise LockMisuse(
            f"{task.name} is not locked: its base class is not AdvisoryTask, and neither a rule of install() "
            f"nor task_annotations name it."
        )
    return options.lock(args, kwargs)
