"""What Django's admin shows of locks, and of what was done to their holders."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.core.exceptions import ObjectDoesNotExist, PermissionDenied
from django.db.models import DateTimeField, F, Func, Max, Min, Q, Value
from django.template.response import TemplateResponse
from django.utils import timezone
from django.utils.html import format_html, format_html_join

from celery_pglock import inquiries, wordings
from celery_pglock.admin_filters import (
    ActionFilter,
    DatabaseFilter,
    GrantedFilter,
    KindFilter,
    OlderFilter,
    OutcomeFilter,
    PeriodFilter,
    PidFilter,
    RefreshFilter,
    TaskFilter,
    ThroughFilter,
    alias_of,
    aliases,
    pid_in,
)
from celery_pglock.admin_pages import (
    CANCEL,
    TERMINATE,
    Page,
    StoppingPage,
    length,
    may,
    may_see_queries,
    moment,
)
from celery_pglock.charts import chart
from celery_pglock.confirmations import fingerprint
from celery_pglock.looks import looking
from celery_pglock.models import Act, BlockedPGLock, LockReport, Outcome, PGLock
from celery_pglock.orders import targets
from celery_pglock.printed_texts import cut, one_line

LONGEST_QUERY = 80

# Of a long queue each is behind all before it.
MOST_BLOCKERS = 10
MOST_TREES = 100

# As many as can be told apart on a screen.
POINTS = 200
SHORTEST_PERIOD = timedelta(minutes=10)


@admin.register(PGLock)
class PGLockAdmin(StoppingPage):
    """Locks, those that are waited for first, and the newest first of each."""

    actions: Any = (CANCEL, TERMINATE)
    ordering = ("granted", F("since").desc(nulls_last=True), "pk")
    search_fields = ("name", "task_name", "task_id", "worker", "rel_name", "activity__id")
    search_help_text = "Key, task, task id, worker, table or pid"
    list_filter = (
        KindFilter,
        GrantedFilter,
        TaskFilter,
        OlderFilter,
        PidFilter,
        DatabaseFilter,
        RefreshFilter,
    )

    def get_queryset(self, request: Any) -> Any:
        return inquiries.all_locks(alias_of(request))

    def get_list_display(self, request: Any) -> Any:
        columns = ["lock", "task", "state", "age", "blocked_by", "backend", "mode", "taken"]
        return [*columns, "query"] if may_see_queries(request) else columns

    def read(self, changelist: Any, request: Any) -> None:
        waiting = [row.activity_id for row in changelist.result_list if not row.granted]
        blockers = inquiries.blockers_of(filter(None, waiting), alias_of(request))
        changelist.has_unreadable = False
        for row in changelist.result_list:
            changelist.has_unreadable |= (
                row.activity is not None and row.activity.query == wordings.UNREADABLE
            )
            row.blockers = [] if row.granted else blockers.get(row.activity_id, [])

    def response_action(self, request: Any, queryset: Any, *_: Any, **options: Any) -> Any:
        """The page that asks, for what was chosen in the list as far as it still is what was shown."""
        action = next(filter(None, request.POST.getlist("action")), "")
        if not action:
            self.message_user(request, "No action selected.", messages.WARNING)
            return None
        with looking(alias_of(request)):
            if request.POST.get("select_across") == "1":
                chosen = list(queryset)
                gone = 0
            else:
                values = request.POST.getlist(ACTION_CHECKBOX_NAME)
                shown = {row: seen for row, _, seen in (value.rpartition("|") for value in values)}
                found = self.get_queryset(request).filter(pk__in=shown)
                chosen = [row for row in found if fingerprint(row.activity) == shown[row.pk]]
                gone = len(shown) - len(chosen)
        prepared = sum(row.activity_id is None for row in chosen)
        return self.question(request, action, targets(chosen, "activity"), gone, prepared)

    @admin.action(description="Cancel what their backends run …", permissions=["cancel"])
    def cancel(self, request: Any, queryset: Any) -> None:
        """Only its name is of use: the choice is read by ``response_action``."""

    @admin.action(description="Terminate their backends …", permissions=["terminate"])
    def terminate(self, request: Any, queryset: Any) -> None:
        """Only its name is of use: the choice is read by ``response_action``."""

    def action_checkbox(self, obj: Any) -> Any:
        return format_html(
            '<input type="checkbox" name="{}" value="{}|{}" class="action-select" aria-label="{}">',
            ACTION_CHECKBOX_NAME,
            obj.pk,
            fingerprint(obj.activity),
            f"Select {obj}",
        )

    @admin.display(description="lock", ordering="name")
    def lock(self, row: Any) -> Any:
        return format_html(
            '<strong class="pglock-name">{}</strong> <span class="quiet">{}</span>',
            wordings.subject(row) or "-",
            row.type.lower(),
        )

    @admin.display(description="task", ordering="task_name")
    def task(self, row: Any) -> Any:
        parts = (row.task_name, row.task_id and f"[{row.task_id}]", row.worker and f"on {row.worker}")
        told = [(part,) for part in parts if part]
        return format_html_join(" ", '<span class="pglock-name">{}</span>', told) or "-"

    @admin.display(description="mode", ordering="mode")
    def mode(self, row: Any) -> str:
        return str(row.mode)

    @admin.display(description="granted", ordering="granted")
    def state(self, row: Any) -> Any:
        return "held" if row.granted else format_html("<strong>{}</strong>", "waiting")

    @admin.display(description="since", ordering="since")
    def taken(self, row: Any) -> Any:
        return moment(row.since)

    @admin.display(description="age")
    def age(self, row: Any) -> str:
        return length(row.age)

    @admin.display(description="backend", ordering="activity_id")
    def backend(self, row: Any) -> Any:
        activity = row.activity
        told = (wordings.session(activity), activity.state) if activity else ()
        words = ", ".join(one_line(word) for word in told if word)
        link = self.pid_link(row.activity_id, row._state.db)
        return format_html('{} <span class="quiet pglock-name">{}</span>', link, words)

    @admin.display(description="blocked by")
    def blocked_by(self, row: Any) -> Any:
        links = [(self.pid_link(pid, row._state.db),) for pid in row.blockers[:MOST_BLOCKERS]]
        more = len(row.blockers) - len(links)
        return format_html(
            "{}{}", format_html_join(", ", "{}", links) or "-", f" and {more} more" if more else ""
        )

    @admin.display(description="query")
    def query(self, row: Any) -> Any:
        text = cut(one_line(row.activity.query), LONGEST_QUERY) if row.activity else ""
        return format_html('<code class="pglock-query">{}</code>', text) if text else "-"


@admin.register(BlockedPGLock)
class BlockedPGLockAdmin(StoppingPage):
    """Who waits for whom, root blockers on top."""

    list_filter = (DatabaseFilter, RefreshFilter)
    actions: Any = (CANCEL, TERMINATE)
    list_display = ("pk",)

    @admin.action(permissions=["cancel"])
    def cancel(self, request: Any, queryset: Any) -> None:
        """Only its permission is of use."""

    @admin.action(permissions=["terminate"])
    def terminate(self, request: Any, queryset: Any) -> None:
        """Only its permission is of use."""

    def list_view(self, request: Any, context: Any) -> Any:
        if request.method == "POST":
            return self._ask_about_one(request)
        alias = alias_of(request)
        chosen = inquiries.asked(None, {"database": alias, "limit": MOST_TREES})
        forest = inquiries.forest(chosen)
        ways = [action for action in (CANCEL, TERMINATE) if may(request, action)]
        shown = self._context(
            request,
            **context,
            forest=forest,
            steps=self._steps(forest, request, alias),
            ways=ways,
            databases=aliases() if len(aliases()) > 1 else [],
            alias=alias,
            periods=[("", "off"), *RefreshFilter.known],
        )
        return TemplateResponse(request, "admin/celery_pglock/blockedpglock/change_list.html", shown)

    def _ask_about_one(self, request: Any) -> Any:
        action = next((name for name in self.get_actions(request) if name in request.POST), "")
        if not action:
            raise PermissionDenied
        text, _, seen = request.POST[action].partition("|")
        pid = pid_in(text)
        found = inquiries.all_waits(alias_of(request))
        with looking(alias_of(request)):
            rows = list(found.filter(Q(activity_id=pid) | Q(blocking_activity_id=pid))) if pid else []
        own = [row for row in rows if row.activity_id == pid]
        chosen = targets(own, "activity") if own else targets(rows, "blocking_activity")
        kept = [target for target in chosen if fingerprint(target.activity) == seen]
        return self.question(request, action, kept, gone=len(chosen) - len(kept))

    def _steps(self, forest: Any, request: Any, alias: str) -> Iterator[dict[str, Any]]:
        """What the tree is built of, without recursion: a chain may be longer than Python's stack."""
        sees_queries = may_see_queries(request)
        sees_locks = request.user.has_perm("celery_pglock.view_pglock")

        def link(pid: int) -> Any:
            return self.pid_link(pid, alias) if sees_locks else str(pid)

        left: list[Any] = [*reversed(forest.trees)]
        while left:
            tree = left.pop()
            if tree is None:
                yield {"closes": True}
                continue
            backend = tree.backend
            activity = backend.activity
            yield {
                "pid": str(backend.pid),
                "words": str(backend).removeprefix(f"{backend.pid} "),
                "link": link(backend.pid) if backend.pid is not None else "",
                "wait": tree.wait and f"{length(tree.wait.wait_duration)} for {wordings.lock(tree.wait)}",
                "query": cut(one_line(activity.query), LONGEST_QUERY) if sees_queries and activity else "",
                "value": f"{backend.pid}|{fingerprint(activity)}" if activity else "",
                "repeated": [link(row.activity_id) for row in tree.repeated[:MOST_BLOCKERS]],
                "more": max(len(tree.repeated) - MOST_BLOCKERS, 0),
                "opens": bool(tree.waiters),
            }
            if tree.waiters:
                left += [None, *reversed(tree.waiters)]


class DateBin(Func):
    """The beginning of the stretch of time in which a moment is."""

    function = "date_bin"
    output_field = DateTimeField()


@admin.register(LockReport)
class LockReportAdmin(Page):
    """What reports found, and how many held and waited over time."""

    pages = ("changelist", "change")
    tables = (LockReport,)
    ordering = ("-at", "-pk")
    list_display = ("when", "held", "waiting", "skipped", "held_for", "waited_for", "found")
    list_display_links: Any = ("when",)
    list_filter = (PeriodFilter, DatabaseFilter, RefreshFilter)
    fields = (
        "when",
        "held",
        "waiting",
        "skipped",
        "held_for",
        "waited_for",
        "findings_in_words",
        "not_read",
    )
    readonly_fields = ("when", "held_for", "waited_for", "findings_in_words", "not_read")

    def read(self, changelist: Any, request: Any) -> None:
        period = next(one for one in changelist.filter_specs if isinstance(one, PeriodFilter)).length
        end = timezone.now()
        oldest = changelist.queryset.aggregate(at=Min("at"))["at"] or end
        # The first reports may be of this very moment, or by a clock that is ahead.
        begin = min(max(oldest, end - period), end - SHORTEST_PERIOD)
        bin_ = DateBin(Value((end - begin) / POINTS), F("at"), Value(begin))
        bins = changelist.queryset.order_by().annotate(bin=bin_).values("bin").order_by("bin")
        found = bins.annotate(most_held=Max("held"), most_waiting=Max("waiting"))
        points = [(row["bin"], (row["most_waiting"], row["most_held"])) for row in found]
        changelist.chart = chart(("waits", "holders"), points, begin, end)

    @admin.display(description="at", ordering="at")
    def when(self, report: Any) -> Any:
        return moment(report.at)

    @admin.display(description="longest held", ordering="longest_held")
    def held_for(self, report: Any) -> str:
        return length(report.longest_held)

    @admin.display(description="longest wait", ordering="longest_wait")
    def waited_for(self, report: Any) -> str:
        return length(report.longest_wait)

    @admin.display(description="findings")
    def found(self, report: Any) -> str:
        unread = f", {len(report.unread)} not read" if report.unread else ""
        return f"{len(report.findings)}{unread}"

    @admin.display(description="findings")
    def findings_in_words(self, report: Any) -> Any:
        found = [_finding(one) for one in report.findings]
        html = '<div class="pglock-finding"><strong>{}</strong> {}</div>'
        return format_html_join("", html, found) or "none"

    @admin.display(description="could not be read")
    def not_read(self, report: Any) -> Any:
        return format_html_join("", "<div>{}</div>", ((one_line(what),) for what in report.unread)) or "-"


@admin.register(Act)
class ActAdmin(Page):
    """The audit: what was done to backends, by whom, and what became of it."""

    ordering = ("-pk",)
    tables = (Act, Outcome)
    list_select_related = ("outcome",)
    list_display = ("when", "action", "pid", "became", "task", "why", "through", "by", "application_name")
    list_filter = (ActionFilter, ThroughFilter, OutcomeFilter, DatabaseFilter, RefreshFilter)
    search_fields = ("by", "task_id", "application_name", "reason", "pid")
    search_help_text = "Who did it, task id, application, lock or pid"

    @admin.display(description="at", ordering="at")
    def when(self, act: Any) -> Any:
        return moment(act.at)

    @admin.display(description="task id", ordering="task_id")
    def task(self, act: Any) -> Any:
        comes_back = " (comes back to its queue)" if act.comes_back else ""
        return format_html('<span class="pglock-name">{}</span>{}', act.task_id or "-", comes_back)

    @admin.display(description="reason")
    def why(self, act: Any) -> Any:
        return format_html('<span class="pglock-name">{}</span>', act.reason or "-")

    @admin.display(description="outcome", ordering="outcome__outcome")
    def became(self, act: Any) -> str:
        try:
            return str(act.outcome)
        except ObjectDoesNotExist:
            return "no outcome: the process did not live to tell"


def _finding(found: Any) -> tuple[str, str]:
    """Its kind and its words, or all that it has if it has no words."""
    if not isinstance(found, dict):
        return "", one_line(found)
    kind = one_line(found.get("kind")).replace("_", " ")
    return kind, one_line(found.get("text") or {name: found[name] for name in found if name != "kind"})
