"""Orders to stop backends that wait for the yes of the person who gave them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from django.core import signing

from celery_pglock import backends
from celery_pglock.audits import acting
from celery_pglock.backends import Stop, Victim
from celery_pglock.orders import Target

ACTS: Final[Mapping[str, Callable[..., tuple[Stop, ...]]]] = {
    "cancel": backends.cancel,
    "terminate": backends.terminate,
}

# In seconds: whom it names are read again anyway, but the person should still know what he saw.
LONGEST_THOUGHT = 600

# Any row that is still there is enough for a backend to be hit, and the form is to stay small.
MOST_ROWS = 50

SALT = "celery_pglock.confirmations"


class NotConfirmed(Exception):
    """What came back is no order of this person's, or too old."""


@dataclass(frozen=True, slots=True)
class Confirmation:
    """An order as it goes through a form, signed: those who are named are those who are stopped.

    ``view`` is the one in which the victims' rows are, ``user`` who may say yes, ``back`` where it came from.
    """

    action: str
    view: str
    alias: str
    user: str
    back: str
    victims: tuple[Victim, ...]

    def signed(self) -> str:
        found = asdict(self)
        for victim in found["victims"]:
            victim["backend_start"] = victim["backend_start"] and victim["backend_start"].isoformat()
        return signing.dumps(found, salt=SALT, compress=True)

    def carry_out(self, door: str, by: str) -> tuple[Stop, ...]:
        """Stop each that is still what was named, and say what became of it."""
        with acting(door, by):
            return ACTS[self.action](self.victims, self.view, self.alias)


def confirmation(
    action: str, view: str, alias: str, user: str, back: str, targets: Iterable[Target]
) -> Confirmation:
    """What this person is to say yes to."""
    victims = []
    for target in targets:
        victim = target.victim
        victims.append(
            Victim(victim.pid, victim.backend_start, victim.application_name, victim.rows[:MOST_ROWS])
        )
    return Confirmation(action, view, alias, user, back, tuple(victims))


def confirmed(text: str, user: str) -> Confirmation:
    """The order in a form that came back; raises ``NotConfirmed``."""
    try:
        found = signing.loads(text, salt=SALT, max_age=LONGEST_THOUGHT)
    except signing.SignatureExpired:
        raise NotConfirmed("it was asked for more than 10 minutes ago: choose again") from None
    except signing.BadSignature:
        raise NotConfirmed("what came back is not what was asked") from None
    if found["user"] != user:
        raise NotConfirmed("somebody else was asked")
    found["victims"] = tuple(
        Victim(
            victim["pid"],
            victim["backend_start"] and datetime.fromisoformat(victim["backend_start"]),
            victim["application_name"],
            tuple(victim["rows"]),
        )
        for victim in found["victims"]
    )
    return Confirmation(**found)


def fingerprint(activity: Any) -> str:
    """What tells the session of a backend from the next one with its pid, and from its own next task."""
    if activity is None:
        return ""
    text = f"{activity.backend_start} {activity.application_name}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
