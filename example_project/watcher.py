"""Following the journal, line by line."""

from __future__ import annotations

from datetime import timedelta

from example_project import display
from example_project.shop.models import ClockTimestamp, Entry

# Entries are committed one by one: an older one may show up a moment after a younger one.
SETTLED = timedelta(seconds=0.2)

# Seconds; taking a free lock takes a few milliseconds.
NOTICEABLE = 0.1

ENDS = ("success", "failure")


class Watcher:
    """Shows what is new in the journal, each time that it looks."""

    def __init__(self) -> None:
        self.last = 0

    def look(self) -> None:
        news = Entry.objects.filter(id__gt=self.last).annotate(now=ClockTimestamp())
        for entry in news.order_by("id"):
            if entry.now - entry.at < SETTLED:
                return
            self.last = entry.id
            self._show(entry)

    def _show(self, entry: Entry) -> None:
        lock = f'"{entry.lock}"'
        match entry.what:
            case "holds":
                remark = f"{lock} after waiting {entry.seconds:.1f} s" if entry.seconds > NOTICEABLE else lock
            case "frees":
                remark = f"{lock} after {entry.seconds:.1f} s"
            case "waits" | "retries" | "skips":
                remark = f"{lock} {entry.remark}"
            case "stopped" | "stops" | "reports":
                remark = entry.remark
            case "failure":
                display.happened(entry.at, entry.worker, str(entry), "fails", entry.remark)
                return
            case _:
                return
        display.happened(entry.at, entry.worker, str(entry), entry.what, remark)


def ready_workers() -> int:
    return Entry.objects.filter(what="ready").count()


def everything_has_ended() -> bool:
    """Whether every task that was sent, or met by a worker, has come to its end."""
    ended = Entry.objects.filter(what__in=ENDS).values("task_id")
    return not Entry.objects.exclude(task_id="").exclude(task_id__in=ended).exists()
