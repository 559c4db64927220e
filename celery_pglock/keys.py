"""The keys of locks: a name for people, a number for PostgreSQL."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeGuard

from celery_pglock.errors import LockMisuse

Identifier: TypeAlias = str | int | tuple[int, int]
"""Text, one int8, or a pair of int4."""

# pg_locks.objsubid of an advisory lock: which of its two key spaces the key is in.
INT8 = 1
INT4_PAIR = 2

ENDLESS_IDENTIFIER = 2**63
ENDLESS_HALF = 2**31

MOST_KEYS = 256


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """One advisory lock as ``pg_locks`` prints it: ``classid`` and ``objid`` are unsigned 32-bit halves.

    Keys compare by their numbers alone, and their order is the canonical order of taking several.
    """

    objsubid: int
    classid: int
    objid: int
    name: str = field(compare=False)

    def __hash__(self) -> int:
        # The generated one makes a tuple first, and a lock is looked up by its key a dozen times.
        return self.classid << 32 | self.objid

    @property
    def arguments(self) -> tuple[int, ...]:
        """What PostgreSQL's lock functions take: one signed int8, or two signed int4."""
        if self.objsubid == INT8:
            return (_signed((self.classid << 32) | self.objid, 64),)
        return (_signed(self.classid, 32), _signed(self.objid, 32))

    def slots(self, limit: int) -> tuple[Key, ...]:
        """The keys that ``limit`` holders share; the first is this key itself."""
        return (self, *(self._slot(number) for number in range(1, limit)))

    def _slot(self, number: int) -> Key:
        text = f"celery_pglock:slot:{self.objsubid}:{self.classid}:{self.objid}:{number}"
        slot = key(text)
        return Key(slot.objsubid, slot.classid, slot.objid, f"{self.name} (slot {number})")


def key(identifier: Identifier) -> Key:
    """The key of one identifier.

    Text is hashed as django-pglock does it: the first 8 bytes of its SHA-256, little-endian, signed.
    """
    if isinstance(identifier, str) and identifier:
        # A lone surrogate can come out of JSON, and must still have one key.
        digest = hashlib.sha256(identifier.encode("utf-8", "surrogatepass")).digest()
        number = int.from_bytes(digest[:8], "little")
        return Key(INT8, number >> 32, number & 0xFFFFFFFF, identifier)
    if _is_int(identifier):
        if not -ENDLESS_IDENTIFIER <= identifier < ENDLESS_IDENTIFIER:
            raise LockMisuse(f"The lock id {identifier} does not fit into PostgreSQL's int8.")
        number = identifier & (2**64 - 1)
        return Key(INT8, number >> 32, number & 0xFFFFFFFF, str(identifier))
    if isinstance(identifier, tuple) and len(identifier) == 2 and all(map(_is_int, identifier)):
        if not all(-ENDLESS_HALF <= half < ENDLESS_HALF for half in identifier):
            raise LockMisuse(f"The lock id {identifier!r} does not fit into PostgreSQL's (int4, int4).")
        classid, objid = (half & 0xFFFFFFFF for half in identifier)
        return Key(INT4_PAIR, classid, objid, str(identifier))
    raise LockMisuse(
        f"{identifier!r} is not a lock id: use a text that is not empty, an int, or a pair of ints."
    )


def canonical(identifiers: Iterable[Identifier]) -> tuple[Key, ...]:
    """The keys of several identifiers, each once, in the one order in which everybody takes them."""
    return tuple(sorted(in_order(identifiers)))


def in_order(identifiers: Iterable[Identifier]) -> tuple[Key, ...]:
    """The keys of several identifiers, each once, in the order given."""
    return tuple(dict.fromkeys(map(key, identifiers)))


def refuse_too_many(keys: Sequence[Key]) -> None:
    """Refuse more keys than one statement should take."""
    if len(keys) > MOST_KEYS:
        raise LockMisuse(f"{len(keys)} lock ids at once are too many: at most {MOST_KEYS} can be taken.")


def advisory_id(identifier: Identifier) -> tuple[int, int]:
    """``(classid, objid)`` of a lock exactly as ``pg_locks`` prints them: two unsigned 32-bit halves."""
    found = key(identifier)
    return found.classid, found.objid


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _signed(number: int, bits: int) -> int:
    return number - (1 << bits) if number >> (bits - 1) else number
