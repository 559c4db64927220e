"""What code can be wrapped in, by ``with`` or by decoration."""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

from celery_pglock.errors import LockMisuse

P = ParamSpec("P")
R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True)


class _Entered(threading.local):
    """The blocks that this thread is in, innermost last."""

    def __init__(self) -> None:
        self.stack: list[tuple[Block[Any], AbstractContextManager[Any]]] = []


_entered = _Entered()


class Block(ABC, Generic[T_co]):
    """A value that wraps code, as a context manager or a decorator.

    Nothing about one use is kept on it: it may be shared by threads, and nested in itself.
    """

    @abstractmethod
    def fresh(self) -> AbstractContextManager[T_co]:
        """A context manager for one use, made by ``contextmanager``.

        An interruption in the last moment of entering it is thrown into it, as one of its body would be.
        """

    def __enter__(self) -> T_co:
        block = self.fresh()
        try:
            _entered.stack.append((self, block))
            return block.__enter__()
        except BaseException as error:
            _entered.stack[:] = [one for one in _entered.stack if one[1] is not block]
            block.__exit__(type(error), error, error.__traceback__)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        stack = _entered.stack
        innermost = max(position for position, (block, _) in enumerate(stack) if block is self)
        return stack.pop(innermost)[1].__exit__(kind, error, traceback)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        refuse_what_runs_later(function, f"{type(self).__name__}(...)")

        @wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return wrapped


def refuse_what_runs_later(function: Callable[..., Any], what: str) -> None:
    """Refuse a function whose call does not run its body; ``what`` is what the error calls the wrap."""
    if inspect.isclass(function) or not callable(function):
        raise LockMisuse(f"{what} decorates functions, not {function!r}.")
    inner = inspect.unwrap(function)
    kinds: Sequence[tuple[Callable[[Any], bool], str]] = (
        (inspect.iscoroutinefunction, "a coroutine function"),
        (inspect.isasyncgenfunction, "an asynchronous generator"),
        (inspect.isgeneratorfunction, "a generator"),
    )
    for is_kind, kind in kinds:
        # The call of an object, too, may be one of these.
        if is_kind(inner) or is_kind(getattr(type(inner), "__call__", None)):  # noqa: B004
            name = getattr(function, "__qualname__", repr(function))
            raise LockMisuse(
                f"{name} is {kind}: calling it only creates it, so {what} would be over before its body "
                f"runs. Decorate the function that does the work."
            )


def refuse_bare(arguments: Sequence[object], what: str) -> None:
    """Refuse a function where an argument should be: ``what`` was written over it without parentheses."""
    if len(arguments) == 1 and inspect.isroutine(arguments[0]):
        raise LockMisuse(f"Write @{what}() with parentheses: it takes what comes in them, not the function.")
