"""The modes of table locks, by PostgreSQL's own words."""

from __future__ import annotations

from typing import Any, Final

from celery_pglock.errors import LockMisuse, did_you_mean

ACCESS_SHARE: Final = "ACCESS SHARE"
ROW_SHARE: Final = "ROW SHARE"
ROW_EXCLUSIVE: Final = "ROW EXCLUSIVE"
SHARE_UPDATE_EXCLUSIVE: Final = "SHARE UPDATE EXCLUSIVE"
SHARE: Final = "SHARE"
SHARE_ROW_EXCLUSIVE: Final = "SHARE ROW EXCLUSIVE"
EXCLUSIVE: Final = "EXCLUSIVE"
ACCESS_EXCLUSIVE: Final = "ACCESS EXCLUSIVE"

# From the weakest to the strongest.
MODES: Final = (
    ACCESS_SHARE,
    ROW_SHARE,
    ROW_EXCLUSIVE,
    SHARE_UPDATE_EXCLUSIVE,
    SHARE,
    SHARE_ROW_EXCLUSIVE,
    EXCLUSIVE,
    ACCESS_EXCLUSIVE,
)


def check_mode(given: Any) -> None:
    """Refuse what is no mode of a table lock."""
    if given not in MODES:
        guess = did_you_mean(str(given).upper().replace("_", " "), MODES)
        raise LockMisuse(f"mode must be one of {', '.join(map(repr, MODES))}, not {given!r}.{guess}")
