"""Pages of the admin on which nothing is changed, and whose backends can be stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, ClassVar

from django.contrib import admin, messages
from django.contrib.admin.options import ShowFacets
from django.contrib.admin.views.main import ChangeList
from django.core.exceptions import PermissionDenied
from django.http import HttpResponseNotAllowed, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.utils import timezone
from django.utils.html import format_html

from celery_pglock.admin_filters import DATABASE, REFRESH, alias_of, aliases, seconds_of_refresh
from celery_pglock.confirmations import LONGEST_THOUGHT, NotConfirmed, confirmation, confirmed
from celery_pglock.consequences import is_of_task
from celery_pglock.looks import FAILURES, looking
from celery_pglock.model_locks import model
from celery_pglock.modes import ACCESS_SHARE
from celery_pglock.orders import Target
from celery_pglock.printed_texts import one_line
from celery_pglock.side_effects import Raise

APP = "celery_pglock"
CANCEL = "cancel"
TERMINATE = "terminate"

# More than anybody reads before he says yes.
MOST_VICTIMS = 100


def may(request: Any, action: str) -> bool:
    """Whether this person may stop backends in this way."""
    return bool(request.user.has_perm(f"{APP}.{action}_pgactivity"))


def may_see_queries(request: Any) -> bool:
    return bool(request.user.has_perm(f"{APP}.view_pgactivity_query"))


def moment(at: datetime | None) -> Any:
    if at is None:
        return "-"
    local = timezone.localtime(at) if timezone.is_aware(at) else at
    return format_html(
        '<time class="pglock-time" datetime="{}">{}</time>', at.isoformat(), f"{local:%Y-%m-%d %H:%M:%S}"
    )


def length(duration: timedelta | None) -> str:
    """A duration as text; what another clock puts into the future has only begun."""
    return one_line(None if duration is None else max(duration, timedelta()))


def of_database(error: Exception) -> str:
    """The first line of an error."""
    first, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(first)


class Page(admin.ModelAdmin):  # type: ignore[type-arg] # generic in the stubs
    """Rows of one database, which the page does not wait for and nobody changes."""

    actions: Any = None
    list_display_links: Any = None
    list_max_show_all = 100
    show_full_result_count = False
    show_facets = ShowFacets.NEVER
    pages: ClassVar[Sequence[str]] = ("changelist",)
    tables: ClassVar[Sequence[Any]] = ()

    class Media:
        css: ClassVar[Any] = {"all": ["celery_pglock/admin.css"]}

    def has_add_permission(self, request: Any) -> bool:
        return False

    def has_change_permission(self, request: Any, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: Any, obj: Any = None) -> bool:
        return False

    def lookup_allowed(self, lookup: str, value: Any, request: Any = None) -> bool:
        """Only what the filters offer: a lookup of Django's would tell what the page does not show."""
        filters: Any = self.get_list_filter(request)
        return lookup in [one.parameter_name for one in filters]

    def get_urls(self) -> list[Any]:
        names = [f"{APP}_{self.opts.model_name}_{page}" for page in self.pages]
        return [url for url in super().get_urls() if url.name in names]

    def get_queryset(self, request: Any) -> Any:
        return self.model.objects.using(alias_of(request))

    def get_changelist(self, request: Any, **options: Any) -> Any:
        return PageOfList

    def get_changelist_instance(self, request: Any) -> Any:
        with self.reading(alias_of(request)):
            return super().get_changelist_instance(request)

    def get_object(self, request: Any, *arguments: Any) -> Any:
        with self.reading(alias_of(request)):
            return super().get_object(request, *arguments)

    @contextmanager
    def reading(self, alias: str) -> Iterator[None]:
        """A look in which nothing is waited for: a table that somebody keeps for himself is an error."""
        with looking(alias):
            if self.tables:
                model(*self.tables, mode=ACCESS_SHARE, timeout=0, using=alias, side_effect=Raise())
            yield

    def read(self, changelist: Any, request: Any) -> None:
        """Read what its rows are shown with."""

    def changelist_view(self, request: Any, extra_context: Any = None) -> Any:
        self._check_may_view(request)
        if request.method not in ("GET", "HEAD") and not self.get_actions(request):
            raise PermissionDenied
        try:
            title = str(self.opts.verbose_name_plural).capitalize()
            context = {"title": title, "refresh": seconds_of_refresh(request), **(extra_context or {})}
            return self.list_view(request, context)
        except FAILURES as error:
            return self._unreadable(request, error)

    def list_view(self, request: Any, context: Any) -> Any:
        """The list, or what is to be done to what was chosen there."""
        return super().changelist_view(request, context)

    def change_view(self, request: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return super().change_view(request, *arguments, **options)
        except FAILURES as error:
            return self._unreadable(request, error)

    def list_url(self, model_name: str = "") -> str:
        """Where a list is; without a name, this one."""
        name = f"admin:{APP}_{model_name or self.opts.model_name}_changelist"
        return reverse(name, current_app=self.admin_site.name)

    def pid_link(self, pid: int | None, alias: str) -> Any:
        """A backend by its pid, with a link to its locks."""
        if pid is None:
            return "prepared transaction"
        database = f"&{DATABASE}={alias}" if len(aliases()) > 1 else ""
        return format_html('<a href="{}?pid={}{}">{}</a>', self.list_url("pglock"), pid, database, pid)

    def _check_may_view(self, request: Any) -> None:
        if not self.has_view_permission(request):
            raise PermissionDenied

    def _context(self, request: Any, title: str, **more: Any) -> dict[str, Any]:
        return {
            **self.admin_site.each_context(request),
            "title": title,
            "opts": self.opts,
            "media": self.media,
            "list_url": self.list_url(),
            **more,
        }

    def _unreadable(self, request: Any, error: Exception) -> Any:
        context = self._context(
            request,
            "Could not be read",
            error=of_database(error),
            again=request.get_full_path(),
            refresh=seconds_of_refresh(request) if request.method == "GET" else "",
        )
        return TemplateResponse(request, f"admin/{APP}/unreadable.html", context)


class PageOfList(ChangeList):
    """A page of a list, read when it is made: what shows it asks nothing more."""

    def get_results(self, request: Any) -> None:
        super().get_results(request)
        self.result_list: Any = list(self.result_list[: self.list_per_page])
        page: Any = self.model_admin
        page.read(self, request)


class StoppingPage(Page):
    """A page on which backends are chosen, named, and stopped after a yes."""

    def has_cancel_permission(self, request: Any) -> bool:
        return may(request, CANCEL)

    def has_terminate_permission(self, request: Any) -> bool:
        return may(request, TERMINATE)

    def get_urls(self) -> list[Any]:
        stop = self.admin_site.admin_view(self.stop_view)
        return [path("stop/", stop, name=f"{APP}_{self.opts.model_name}_stop"), *super().get_urls()]

    def question(
        self, request: Any, action: str, targets: Sequence[Target], gone: int = 0, prepared: int = 0
    ) -> Any:
        """The page that names whom an action would stop, and asks."""
        if action not in (CANCEL, TERMINATE) or not may(request, action):
            raise PermissionDenied
        if len(targets) > MOST_VICTIMS:
            words = f"these are {len(targets)} backends, and one page names {MOST_VICTIMS} at most"
            return self._back(request, [(messages.ERROR, f"Nothing was done: {words}.")])
        if not targets:
            words = "a prepared transaction has no backend" if prepared else "nobody is left of those"
            return self._back(request, [(messages.WARNING, f"Nothing was done: {words}.")])
        alias = alias_of(request)
        # A page that is shown anew would take away what is told on it.
        kept = request.GET.copy()
        kept.pop(REFRESH, None)
        back = f"{request.path}?{kept.urlencode()}" if kept else request.path
        user = str(request.user.pk)
        order = confirmation(action, self.opts.db_table, alias, user, back, targets)
        context = self._context(
            request,
            f"{action.capitalize()} {_counted(len(targets), 'backend')}?",
            action=action,
            alias=alias if len(aliases()) > 1 else "",
            targets=[
                {
                    "words": target.words,
                    "query": target.query if may_see_queries(request) else "",
                    "consequence": target.consequence(terminates=action == TERMINATE),
                }
                for target in targets
            ],
            of_tasks=sum(is_of_task(target.activity) for target in targets),
            gone=gone,
            prepared=prepared,
            order=order.signed(),
            minutes=LONGEST_THOUGHT // 60,
            stop_url=reverse(f"admin:{APP}_{self.opts.model_name}_stop", current_app=self.admin_site.name),
            back=back,
        )
        return TemplateResponse(request, f"admin/{APP}/confirmation.html", context)

    def stop_view(self, request: Any) -> Any:
        """Stop those whom the confirmation has named, if this person may."""
        self._check_may_view(request)
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        try:
            order = confirmed(request.POST.get("order", ""), str(request.user.pk))
        except NotConfirmed as refused:
            return self._back(request, [(messages.ERROR, f"Nothing was done: {refused}.")], self.list_url())
        if not may(request, order.action):
            raise PermissionDenied
        try:
            stops = order.carry_out("admin", request.user.get_username())
        except FAILURES as error:
            words = f"Not everybody was stopped: {of_database(error)}. The audit has those who were."
            return self._back(request, [(messages.ERROR, words)], order.back)
        told = [(messages.SUCCESS if stop.is_done else messages.WARNING, str(stop)) for stop in stops]
        return self._back(request, told, order.back)

    def _back(self, request: Any, told: Iterable[tuple[int, str]], to: str = "") -> Any:
        for level, text in told:
            self.message_user(request, text, level)
        return HttpResponseRedirect(to or request.get_full_path())


def _counted(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"
