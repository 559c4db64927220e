"""The rules by which tasks are locked whatever their base classes are."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from inspect import getattr_static
from types import new_class
from typing import Any, ClassVar, Final, TypeAlias

from celery._state import (  # type: ignore[attr-defined] # the stubs leave one out
    _get_active_apps,
    connect_on_app_finalize,
)
from celery.app.annotations import prepare
from celery.signals import worker_init
from celery.utils.functional import firstmethod

from celery_pglock import hooks
from celery_pglock.durations import UNSET
from celery_pglock.errors import LockMisuse, did_you_mean
from celery_pglock.held_locks import lock_of
from celery_pglock.task_classes import LockedTask, objects_of
from celery_pglock.task_options import check_names

logger = logging.getLogger(__name__)

Options: TypeAlias = Mapping[str, Any] | None

# Celery's tasks and ours, which only a pattern reaches that begins as their names do.
RESERVED: Final = ("celery.", "celery_pglock.")

FOR_ALL: Final = "*"

# The name in the app's settings under which children that are spawned get the rules.
CARRIED: Final = "pglock_rules"

# Of several annotations Celery heeds the first that has an answer.
_specific: Any = firstmethod("annotate")  # type: ignore[arg-type] # the stubs take no name
_for_all: Any = firstmethod("annotate_any")  # type: ignore[arg-type]


def install(app: Any, rules: Mapping[str, Options] | None = None) -> None:
    """Lock the tasks of an app whose names match: ``install(app, {"third.*": {"lock_by": ("pk",)}})``.

    Patterns are those of ``fnmatch``; where several give one option to a task, the last one counts, and
    ``None`` instead of options undoes those before it. Celery's own tasks are reached by ``"celery.…"``
    alone. Call it where the app is made. Without rules the app heeds the lock options in
    ``task_annotations``, as every app does with ``"celery_pglock"`` in ``INSTALLED_APPS``.
    """
    installation = heed(app)
    if not isinstance(rules or {}, Mapping):
        raise LockMisuse(f"install(): rules are a dict of options by names or patterns, not {rules!r}.")
    for pattern, options in (rules or {}).items():
        _check_rule(pattern, options)
    installation.rules += (rules or {}).items()
    installation.lock_what_is_bound()


def heed(app: Any) -> Installation:
    """From now on lock those tasks of the app to which its annotations or rules give lock options."""
    installation = _installation_of(app)
    if installation is None:
        hooks.connect()
        worker_init.connect(_leave_none_without_its_lock, dispatch_uid="celery_pglock.rules")
        installation = Installation(app)
        app.annotations = [installation]
        installation.lock_what_is_bound()
        app.on_after_finalize.connect(installation.lock_what_is_bound, weak=False)
    return installation


def heed_all_apps() -> None:
    """Heed all apps that there are at once, and any other when it is finalized."""
    for app in tuple(_get_active_apps()):
        heed(app)
    connect_on_app_finalize(heed)


class CarriedRules(tuple[tuple[str, Options], ...]):
    """The rules of an app, on their way to the children that a worker spawns: with a copy of its settings."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _have_arrived, (tuple(self),)


def _have_arrived(rules: tuple[tuple[str, Options], ...]) -> CarriedRules:
    # The copy of the app is finalized later.
    connect_on_app_finalize(heed)
    return CarriedRules(rules)


def in_vain(app: Any) -> list[tuple[str, str]]:
    """Of lock options for tasks that the app does not have, where they are stated and a sentence each."""
    installation = _installation_of(app)
    return [] if installation is None else [*installation.in_vain()]


class _Lock:
    """``self.lock`` of a task whose own code may set an attribute of that name, which then counts."""

    def __get__(self, task: Any, owner: type[Any]) -> Any:
        return self if task is None else lock_of(task.name)


class InstalledTask(LockedTask):
    """A task that takes its lock by rules, before any other base class."""

    _installation: ClassVar[Installation]

    lock = _Lock()

    @classmethod
    def stated_options(cls) -> Mapping[str, Any] | None:
        stated = cls._installation.stated(cls)
        check_names(stated, f"Task {cls.name}")
        # A class that inherits from it may be named by no rule.
        return stated or None


class Installation:
    """The rules of one app, which stand in the place of its annotations and bring these, too."""

    def __init__(self, app: Any) -> None:
        self.app = app
        # Asking whether it is there does not load the settings, which may be too early.
        self.rules = list(app.conf[CARRIED]) if CARRIED in app.conf else []

    def annotate(self, task: type[Any]) -> dict[str, Any]:
        """What Celery is to set on a task class that it binds."""
        given = {name: value for name, value in self._annotations_of(task).items() if not _is_of_ours(name)}
        if issubclass(task, LockedTask):
            given |= self.stated(next(iter(objects_of(task, self.app)), task))
        return given | {"on_bound": _on_bound(task)}

    def stated(self, task: Any) -> dict[str, Any]:
        """The lock options that annotations and rules give to a task, or to a class that has a name."""
        options = {name: value for name, value in self._annotations_of(task).items() if _is_of_ours(name)}
        for pattern, given in self.rules:
            if _reaches(pattern, task.name or ""):
                options = {} if given is None else options | _with_one_key(given)
        return options

    def lock_what_is_bound(self, **_: Any) -> None:
        """Lock the tasks that Celery does not ask about again, or never has.

        It does not ask about a class that inherits from one that is bound. And an AttributeError that
        somebody's code raises while a task is bound is lost in ``finalize()``, with the answer.
        """
        for task in tuple(self.app._tasks.values()):
            if type(task).__bound__:
                self.lock(task)

    def lock(self, task: Any) -> None:
        """Lock a task of the app, if there are options for it."""
        kind, stated = type(task), self.stated(task)
        if issubclass(kind, InstalledTask):
            kind.take_locks()
        elif stated and issubclass(kind, LockedTask):
            for name, value in stated.items():
                setattr(kind, name, value)
            kind.take_locks()
        elif stated:
            self._change_class(task)
            type(task).take_locks()

    def in_vain(self) -> Iterator[tuple[str, str]]:
        """Of options for tasks that the app does not have, where they are stated and a sentence each."""
        names = self.app.tasks.keys()
        for pattern, _ in self.rules:
            if not any(_reaches(pattern, name) for name in names):
                guess = did_you_mean(pattern, names)
                yield "install()", f"The rule {pattern!r} of install() matches no task.{guess}"
        for by_name in self._annotations:
            # Others are code that answers when it is asked.
            for name, given in by_name.items() if isinstance(by_name, dict) else ():
                if name not in (*names, FOR_ALL) and any(map(_is_of_ours, given)):
                    guess = did_you_mean(name, names)
                    told = f"task_annotations has lock options for {name!r}, which is no task.{guess}"
                    yield "task_annotations", told

    @cached_property
    def _annotations(self) -> list[Any]:
        return list(prepare(self.app.conf.task_annotations))

    def _annotations_of(self, task: Any) -> dict[str, Any]:
        for_all = _for_all(self._annotations) or {}
        if (task.name or "").startswith(RESERVED):
            for_all = {name: value for name, value in for_all.items() if not _is_of_ours(name)}
        return {**(_specific(self._annotations, task) or {}), **for_all}

    def _change_class(self, task: Any) -> None:
        if task.__trace__ is not None:
            raise LockMisuse(
                f"Task {task.name} is in use by this worker already, without a lock: call install() where "
                f"the app is made."
            )
        # Celery has no hook that could refuse to run a task. The object itself stays, because others have it.
        task.__class__ = self._class_for(task)

    def _class_for(self, task: Any) -> type[Any]:
        """The class with a lock around everything that the task's own class does."""
        kind = type(task)

        def fill(names: dict[str, Any]) -> None:
            names.update(
                __module__=kind.__module__,
                __qualname__=kind.__qualname__,
                __doc__=kind.__doc__,
                name=task.name,
                _installation=self,
            )
            # What the task's own code calls by these names stays what it was.
            names.update(
                (name, getattr_static(kind, name)) for name in ("lock", "lock_for") if hasattr(kind, name)
            )

        return new_class(kind.__name__, (InstalledTask, kind), exec_body=fill)


def _on_bound(task: type[Any]) -> Any:
    """What Celery calls when all annotations are set: the class's own, and then the lock.

    Classes that inherit it, objects that are registered later and other apps have rules of their own.
    """
    its_own = getattr_static(task, "on_bound")

    def on_bound(cls: type[Any], app: Any) -> None:
        its_own.__get__(None, cls)(app)
        installation = _installation_of(app)
        if installation is not None and not issubclass(cls, InstalledTask):
            for one in objects_of(cls, app):
                installation.lock(one)

    return classmethod(on_bound)


def _installation_of(app: Any) -> Installation | None:
    # Where there are none, Celery has not yet asked for annotations.
    found = vars(app).get("annotations", ())
    return next((one for one in found if isinstance(one, Installation)), None)


def _reaches(pattern: str, name: str) -> bool:
    is_meant = all(pattern.startswith(prefix) for prefix in RESERVED if name.startswith(prefix))
    return is_meant and fnmatchcase(name, pattern)


def _with_one_key(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, of which one that names the key overrides the other one, too."""
    both = dict.fromkeys(("lock_key", "lock_by"), UNSET)
    return {**both, **options} if both.keys() & options.keys() else dict(options)


def _is_of_ours(name: str) -> bool:
    return name.startswith("lock_")


def _check_rule(pattern: Any, options: Any) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise LockMisuse(f"install(): a rule is for the name of a task or a pattern, not for {pattern!r}.")
    where = f"install(), rule {pattern!r}"
    if options is None:
        return
    if not isinstance(options, Mapping) or not options:
        raise LockMisuse(f'{where}: a dict of lock options such as {{"lock_timeout": 5}}, not {options!r}.')
    for name in options:
        if not _is_of_ours(str(name)):
            raise LockMisuse(
                f"{where}: {name!r} is no lock option, of which each begins with lock_; task_annotations "
                f"takes others."
            )
    check_names(options, where)


def _leave_none_without_its_lock(sender: Any, **__: Any) -> None:
    # SystemExit, because Celery only logs any other exception of a receiver.
    try:
        if (installation := _installation_of(sender.app)) is not None:
            installation.lock_what_is_bound()
            sender.app.conf[CARRIED] = CarriedRules(installation.rules)
    except Exception as error:
        raise SystemExit(f"It is not known which tasks are to take locks: {error!r}") from error
    for _, sentence in in_vain(sender.app):
        logger.warning("%s", sentence)
