"""What the lists of the admin can be narrowed by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any, ClassVar
from urllib.parse import parse_qs

from django.contrib.admin import SimpleListFilter
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.models.functions import Now

from celery_pglock import config, inquiries
from celery_pglock.backends import EXPLANATIONS
from celery_pglock.models import Act
from celery_pglock.querysets import ENDLESS_PID, MOST_DIGITS

DATABASE = "database"
REFRESH = "refresh"

EVERY_KIND = "every"

# Which doors there are nobody knows but the audit, and of that only the newest end is read.
ACTS_READ = 1000

Choices = Iterable[tuple[str, str]]


def aliases() -> list[str]:
    """The aliases of PostgreSQL databases."""
    found = []
    for alias in connections:
        # An alias whose driver is missing is none of ours.
        with suppress(ImproperlyConfigured, ImportError):
            if connections[alias].vendor == "postgresql":
                found.append(alias)
    return found


def alias_of(request: Any) -> str:
    """The alias that a page is about; pages below a list are told the list's."""
    above = parse_qs(request.GET.get("_changelist_filters", "")).get(DATABASE, [""])[-1]
    asked = request.GET.get(DATABASE, above)
    return asked if asked in aliases() else config.current().USING


def seconds_of_refresh(request: Any) -> str:
    """After how many seconds the page is to be shown anew; empty for never."""
    asked: str = request.GET.get(REFRESH, "")
    return asked if asked in dict(RefreshFilter.known) else ""


def pid_in(text: str) -> int | None:
    """The pid that a text has; ``None`` if it has none."""
    is_number = text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS
    return int(text) if is_number and 0 < int(text) < ENDLESS_PID else None


class Choice(SimpleListFilter):
    """A filter with choices that are known; anything else that is asked for is as none."""

    parameter_name = ""
    known: ClassVar[Choices] = ()
    none = "All"

    def lookups(self, request: Any, model_admin: Any) -> list[tuple[str, str]]:
        return list(self.known)

    def value(self) -> str | None:
        asked = super().value()
        return asked if asked in dict(self.lookup_choices) else None

    def choices(self, changelist: Any) -> Iterator[Any]:
        first, *others = super().choices(changelist)
        yield {**first, "display": self.none}
        yield from others

    def queryset(self, request: Any, queryset: Any) -> Any:
        value = self.value()
        return queryset if value is None else self.chosen(queryset, value)

    def chosen(self, queryset: Any, value: str) -> Any:
        """What is left of it with this choice."""
        return queryset


class DatabaseFilter(Choice):
    title = "database"
    parameter_name = DATABASE

    def lookups(self, request: Any, model_admin: Any) -> list[tuple[str, str]]:
        found = aliases()
        return [(alias, alias) for alias in found] if len(found) > 1 else []

    def choices(self, changelist: Any) -> Iterator[Any]:
        now = alias_of(self.request)
        for alias, display in self.lookup_choices:
            query = changelist.get_query_string({DATABASE: alias})
            yield {"selected": alias == now, "query_string": query, "display": display}


class RefreshFilter(Choice):
    title = "refresh"
    parameter_name = REFRESH
    known = (("5", "every 5 seconds"), ("30", "every 30 seconds"))
    none = "Off"


class KindFilter(Choice):
    title = "kind"
    parameter_name = "kind"
    known = (
        ("ADVISORY", "advisory only"),
        ("RELATION", "tables"),
        ("TUPLE", "rows"),
        ("TRANSACTIONID", "transactions"),
        ("VIRTUALXID", "virtual transactions"),
        ("OBJECT", "other objects"),
        (EVERY_KIND, "all, with each transaction's own"),
    )
    none = "All that matter"

    def queryset(self, request: Any, queryset: Any) -> Any:
        value = self.value()
        if value == EVERY_KIND or (value is None and PidFilter.parameter_name in request.GET):
            return queryset
        if value in ("TRANSACTIONID", "VIRTUALXID"):
            return queryset.filter(type=value)
        queryset = queryset.exclude(inquiries.NOT_WAITED_FOR)
        return queryset if value is None else queryset.filter(type=value)


class GrantedFilter(Choice):
    title = "granted"
    parameter_name = "granted"
    known = (("no", "waiting"), ("yes", "held"))

    def chosen(self, queryset: Any, value: str) -> Any:
        return queryset.filter(granted=value == "yes")


class OlderFilter(Choice):
    title = "older than"
    parameter_name = "older"
    known = (
        ("60", "1 minute"),
        ("300", "5 minutes"),
        ("3600", "1 hour"),
        ("86400", "1 day"),
    )

    def chosen(self, queryset: Any, value: str) -> Any:
        return queryset.filter(since__lte=Now() - timedelta(seconds=int(value)))


class TaskFilter(Choice):
    title = "task"
    parameter_name = "task"

    def lookups(self, request: Any, model_admin: Any) -> list[tuple[str, str]]:
        names = inquiries.task_names(alias_of(request))
        asked = self.used_parameters.get("task")
        if asked and asked not in names:
            names = [asked, *names]
        return [(name, name) for name in names]

    def chosen(self, queryset: Any, value: str) -> Any:
        return queryset.filter(task_name=value)


class PidFilter(Choice):
    """Shown only when a link has chosen a backend."""

    title = "backend"
    parameter_name = "pid"

    def lookups(self, request: Any, model_admin: Any) -> list[tuple[str, str]]:
        asked = str(self.used_parameters.get("pid", ""))
        return [(asked, asked)] if pid_in(asked) else []

    def chosen(self, queryset: Any, value: str) -> Any:
        return queryset.pid(value)


class PeriodFilter(Choice):
    title = "period"
    parameter_name = "period"
    known = (("7", "last 7 days"), ("30", "last 30 days"))
    none = "Last 24 hours"

    def queryset(self, request: Any, queryset: Any) -> Any:
        return queryset.filter(at__gte=Now() - self.length)

    @property
    def length(self) -> timedelta:
        return timedelta(days=int(self.value() or 1))


class ActionFilter(Choice):
    title = "action"
    parameter_name = "action"
    known = (("cancel", "cancel"), ("terminate", "terminate"))

    def chosen(self, queryset: Any, value: str) -> Any:
        return queryset.filter(action=value)


class ThroughFilter(Choice):
    title = "through"
    parameter_name = "through"

    def lookups(self, request: Any, model_admin: Any) -> list[tuple[str, str]]:
        newest = Act.objects.using(alias_of(request)).order_by("-pk").values("through")[:ACTS_READ]
        doors = {act["through"] for act in newest}
        return [(door, door) for door in sorted(doors)]

    def chosen(self, queryset: Any, value: str) -> Any:
        return queryset.filter(through=value)


class OutcomeFilter(Choice):
    title = "outcome"
    parameter_name = "outcome"
    known = (*((outcome, outcome) for outcome in EXPLANATIONS), ("none", "none"))

    def chosen(self, queryset: Any, value: str) -> Any:
        return queryset.filter(outcome=None) if value == "none" else queryset.filter(outcome__outcome=value)
