"""The keys of a task's lock, as they follow from the arguments of a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from string import Formatter
from typing import Any, Final

from celery_pglock.argument_texts import MEMORY_ADDRESS, UnstableText, canonical_text, plain
from celery_pglock.durations import UNSET
from celery_pglock.errors import LockMisuse, did_you_mean
from celery_pglock.locks import advisory


class _Arguments(Enum):
    ALL_ARGUMENTS = "all arguments"

    def __repr__(self) -> str:
        return self.name


MOST_TEMPLATES: Final = 256

ALL_ARGUMENTS: Final = _Arguments.ALL_ARGUMENTS
"""For ``lock_by``: the values of all parameters make the key."""


@dataclass(frozen=True)
class TaskKey:
    """What a task says about its key, checked against its signature."""

    task_name: str
    signature: inspect.Signature
    key: Any
    by: tuple[str, ...] | _Arguments | None

    def identifiers(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The ids of one call's keys; raises TypeError for arguments that the task does not take."""
        if self.by is not None:
            return [self._text_of_arguments(self._bound(args, kwargs))]
        if callable(self.key):
            identifiers = _several(self.key(*args, **kwargs))
            for identifier in identifiers:
                if isinstance(identifier, str) and MEMORY_ADDRESS.search(identifier):
                    raise LockMisuse(
                        f"The lock_key of {self.task_name} gave a text that holds a memory address, which is "
                        f"another one in every process: {identifier}"
                    )
        elif any(_fields(identifier) for identifier in self.key):
            arguments = self._bound(args, kwargs)
            identifiers = [self._rendered(identifier, arguments) for identifier in self.key]
        else:
            identifiers = [self._rendered(identifier, {}) for identifier in self.key]
        if not identifiers:
            raise LockMisuse(f"The lock_key of {self.task_name} gave no key at all; one is needed.")
        return identifiers

    @cached_property
    def _positional(self) -> tuple[str, ...]:
        """The names of the parameters, where a tuple of arguments can only mean each of them in its turn."""
        kinds = {parameter.kind for parameter in self.signature.parameters.values()}
        return tuple(self.signature.parameters) if kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD} else ()

    def _bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if args and not kwargs and len(args) == len(self._positional):
            return dict(zip(self._positional, args, strict=True))
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name)
        return arguments

    def _text_of_arguments(self, arguments: dict[str, Any]) -> str:
        names = sorted(arguments) if self.by is ALL_ARGUMENTS else sorted(self.by or ())
        texts = [f"{name}={self._stable(canonical_text, name, arguments)}" for name in names]
        return f"{self.task_name}({', '.join(texts)})"

    def _rendered(self, identifier: Any, arguments: dict[str, Any]) -> Any:
        if not isinstance(identifier, str):
            return identifier
        values = {name: self._stable(plain, name, arguments) for name in _fields(identifier)}
        try:
            return identifier.format_map(values)
        except (ValueError, TypeError) as error:
            raise LockMisuse(
                f"The lock_key {identifier!r} of {self.task_name} cannot be filled: {error}"
            ) from None

    def _stable(self, text_of: Callable[[Any], Any], name: str, arguments: dict[str, Any]) -> Any:
        if name not in arguments:
            raise LockMisuse(
                f"The lock key of {self.task_name} needs the argument {name!r}, and it is missing."
            )
        try:
            return text_of(arguments[name])
        except UnstableText as unstable:
            raise LockMisuse(
                f"The argument {name!r} of {self.task_name} cannot be part of a lock key: {unstable}. Pass "
                f"something with a text of its own, such as a primary key, or use a callable lock_key."
            ) from None


def task_key(task: type[Any], key: Any, by: Any) -> TaskKey:
    """The key of a task class by two of its options; ``LockMisuse`` says what cannot work."""
    if key is not UNSET and by is not UNSET:
        raise _wrong(task, "lock_key and lock_by both name the key: use one of them.")
    signature = _signature(task)
    return TaskKey(task.name, signature, _key(task, key, signature), _by(task, by, signature))


def _wrong(task: type[Any], why: str) -> LockMisuse:
    return LockMisuse(f"Task {task.name}: {why}")


def _signature(task: type[Any]) -> inspect.Signature:
    signature = inspect.signature(task.run)
    if isinstance(inspect.getattr_static(task, "run"), staticmethod):
        return signature
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _accepts(signature: inspect.Signature, name: str) -> bool:
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    return name in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds


def _key(task: type[Any], key: Any, signature: inspect.Signature) -> Any:
    if key is UNSET:
        # Not a template, even if a name holds braces.
        return [task.name.replace("{", "{{").replace("}", "}}")]
    if callable(key):
        return key
    keys = _several(key)
    if not keys:
        raise _wrong(task, "lock_key is empty; name at least one key.")
    for one in keys:
        try:
            fields = _fields(one)
            # Numbers are checked as keys; a template can only be checked for its fields.
            if not fields:
                advisory(one.format() if isinstance(one, str) else one)
        except ValueError as error:
            raise _wrong(task, f"lock_key {one!r} cannot be used: {error}") from None
        for name in fields:
            if not _accepts(signature, name):
                hint = did_you_mean(name, signature.parameters)
                raise _wrong(task, f"lock_key {one!r} uses {name!r}, which is not an argument of it.{hint}")
    return keys


def _by(task: type[Any], by: Any, signature: inspect.Signature) -> tuple[str, ...] | _Arguments | None:
    if by is UNSET:
        return None
    if by is ALL_ARGUMENTS:
        everything: _Arguments = by
        return everything
    if isinstance(by, str) or not isinstance(by, list | tuple) or not by:
        raise _wrong(
            task,
            f'lock_by is a tuple of parameter names such as ("account_id",), or ALL_ARGUMENTS, not {by!r}.',
        )
    for name in by:
        if not isinstance(name, str) or not _accepts(signature, name):
            hint = did_you_mean(str(name), signature.parameters)
            raise _wrong(task, f"lock_by names {name!r}, which is not an argument of it.{hint}")
    return tuple(by)


def _fields(identifier: Any) -> tuple[str, ...]:
    """The names of the arguments in a template; ValueError where it is none that can be filled."""
    return _fields_of_text(identifier) if isinstance(identifier, str) else ()


@lru_cache(MOST_TEMPLATES)
def _fields_of_text(template: str) -> tuple[str, ...]:
    names = []
    for _, name, spec, _ in Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier():
            raise ValueError(f"in a template {{{name}}} must be the name of an argument, and nothing else")
        if spec and "{" in spec:
            raise ValueError("a template cannot have fields inside of a field's format")
        names.append(name)
    return tuple(names)


def _several(key: Any) -> list[Any]:
    is_pair = (
        isinstance(key, tuple)
        and len(key) == 2
        and all(isinstance(half, int) and not isinstance(half, bool) for half in key)
    )
    return list(key) if isinstance(key, list | tuple) and not is_pair else [key]
