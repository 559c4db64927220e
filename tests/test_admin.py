"""The pages of the admin, and the backends that are stopped there."""

import html
import re

import pytest
from django.conf import settings
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import get_resolver
from django.utils import timezone

from celery_pglock import confirmations
from celery_pglock.models import Act, LockReport, PGActivity, PGLock
from tests.bystanders import bystanders
from tests.conftest import wait_until

pytestmark = pytest.mark.django_db(
    transaction=True, available_apps=settings.INSTALLED_APPS, databases=["default", "locks"]
)

CANARY = "canary-of-a-query"
VIEW = ("view_pglock", "view_blockedpglock", "view_lockreport", "view_act")
PEOPLE = {
    "anonymous": None,
    "staff": (),
    "viewer": VIEW,
    "canceller": (*VIEW, "cancel_pgactivity"),
    "terminator": (*VIEW, "terminate_pgactivity"),
    "superuser": "all",
}
LOCKS = "/admin/celery_pglock/pglock/"
WAITS = "/admin/celery_pglock/blockedpglock/"
REPORTS = "/admin/celery_pglock/lockreport/"
AUDIT = "/admin/celery_pglock/act/"
LISTS = (LOCKS, WAITS, REPORTS, AUDIT)


@pytest.fixture
def session(transactional_db):
    with bystanders() as one:
        yield one


def client_of(name, *more, **options):
    """A browser of somebody with these permissions."""
    client = Client(**options)
    granted = PEOPLE[name]
    if granted is None:
        return client
    user, _ = User.objects.get_or_create(username=name, is_staff=True, is_superuser=granted == "all")
    if granted != "all":
        found = Permission.objects.filter(codename__in=(*granted, *more))
        assert len(found) == len({*granted, *more})
        user.user_permissions.set(found)
    client.force_login(user)
    return client


def text_of(response):
    assert response.status_code == 200
    return response.content.decode()


def words_of(response):
    """What is to be read there, without the tags."""
    visible = re.sub(r"<(script|style|select|nav).*?</\1>", " ", text_of(response), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", visible)).split())


def is_alive(somebody):
    return PGActivity.objects.filter(id=somebody.pid).exists()


def holder_of(session, number, name="", query=""):
    somebody = session()
    somebody.does(f"SET application_name = '{name}'", f"SELECT pg_advisory_lock({number}){query}")
    return somebody


def rows_of(response):
    body = text_of(response).partition('id="result_list"')[2].partition("</table>")[0]
    return re.findall(r"<tr>(.*?)</tr>", body.partition("<tbody>")[2], re.DOTALL)


def checkbox(response, pid):
    """What the list has for the only lock of this backend."""
    (value,) = {
        html.unescape(found)
        for found in re.findall(r'name="_selected_action" value="([^"]*)"', text_of(response))
        if f":{pid}:" in found
    }
    return value


def choose(client, action, *values, **more):
    return client.post(LOCKS, {"action": action, "index": "0", "_selected_action": values, **more})


def order_in(response):
    return html.unescape(re.search(r'name="order" value="([^"]*)"', text_of(response))[1])


def ask(client, action, somebody):
    """The page that asks, after the lock of somebody was chosen in the list."""
    value = checkbox(client.get(LOCKS, {"pid": somebody.pid, "kind": "ADVISORY"}), somebody.pid)
    return choose(client, action, value)


def say_yes(client, asked, page=LOCKS):
    return client.post(f"{page}stop/", {"order": order_in(asked)}, follow=True)


# Who may what


def urls_of_the_app():
    """Every address of the app's pages, from the resolver."""
    found = {}
    for name, entry in get_resolver().namespace_dict["admin"][1].reverse_dict.items():
        if isinstance(name, str) and name.startswith("celery_pglock_"):
            ((pattern, arguments),) = entry[0][:1]
            found[name] = "/admin/" + pattern % dict.fromkeys(arguments, "1")
    return found


EXPECTED_URLS = {
    "celery_pglock_pglock_changelist": LOCKS,
    "celery_pglock_pglock_stop": f"{LOCKS}stop/",
    "celery_pglock_blockedpglock_changelist": WAITS,
    "celery_pglock_blockedpglock_stop": f"{WAITS}stop/",
    "celery_pglock_lockreport_changelist": REPORTS,
    "celery_pglock_lockreport_change": f"{REPORTS}1/change/",
    "celery_pglock_act_changelist": AUDIT,
}

LOGIN, FORBIDDEN, PAGE, BACK, NOT_ALLOWED = "login", 403, 200, 302, 405

# By the end of the URL's name: what GET, POST and POST without token answer.
ANSWERS = {
    "anonymous": dict.fromkeys(["changelist", "stop", "change"], (LOGIN, LOGIN, FORBIDDEN)),
    "staff": dict.fromkeys(["changelist", "stop", "change"], (FORBIDDEN, FORBIDDEN, FORBIDDEN)),
    "viewer": {
        "changelist": (PAGE, FORBIDDEN, FORBIDDEN),
        "stop": (NOT_ALLOWED, BACK, FORBIDDEN),
        "change": (PAGE, FORBIDDEN, FORBIDDEN),
    },
}


def answer(response):
    if response.status_code == 302 and response["Location"].startswith("/admin/login/"):
        return LOGIN
    return response.status_code


def test_the_app_has_these_pages_and_no_others(transactional_db):
    assert urls_of_the_app() == EXPECTED_URLS


def expected(who, name, method):
    kind = name.rpartition("_")[2]
    found = ANSWERS.get(who, ANSWERS["viewer"])[kind][method]
    if who in ("canceller", "terminator", "superuser") and method == 1 and kind == "changelist":
        # A POST that chooses nobody, where somebody may be chosen.
        return {"celery_pglock_pglock_changelist": BACK}.get(name, FORBIDDEN)
    return found


@pytest.mark.parametrize("name", EXPECTED_URLS)
@pytest.mark.parametrize("who", PEOPLE)
def test_every_page_answers_each_person_as_it_should_and_no_get_stops_anybody(who, name, session):
    holder = holder_of(session, 7)
    session().waits("SELECT pg_advisory_lock(7)")
    LockReport.objects.create(pk=1, at=timezone.now())
    url = EXPECTED_URLS[name]
    client = client_of(who)
    got = answer(client.get(url))
    client.get(url, {"action": "terminate", "index": "0", "order": "x"})
    posts = answer(client.post(url, {"index": "0"}))
    without_token = answer(client_of(who, enforce_csrf_checks=True).post(url, {"index": "0"}))
    assert got == expected(who, name, 0)
    assert posts == expected(who, name, 1)
    assert without_token == expected(who, name, 2)
    assert is_alive(holder)
    assert not Act.objects.exists()


@pytest.mark.parametrize("page", [LOCKS, WAITS])
@pytest.mark.parametrize("action", ["cancel", "terminate"])
@pytest.mark.parametrize("who", PEOPLE)
def test_only_who_may_stop_backends_in_this_way_is_asked_and_only_he_can_say_yes(who, action, page, session):
    holder = holder_of(session, 7)
    session().waits("SELECT pg_advisory_lock(7)")
    superuser = client_of("superuser")
    client = client_of(who)
    if page == LOCKS:
        value = checkbox(superuser.get(LOCKS, {"pid": holder.pid, "kind": "ADVISORY"}), holder.pid)
        sent = {"action": action, "index": "0", "_selected_action": value}
    else:
        value = next(one for one in buttons(superuser.get(WAITS)) if one.startswith(f"{holder.pid}|"))
        sent = {action: value}
    asked = client.post(page, sent)
    may = who == "superuser" or (who, action) in (("canceller", "cancel"), ("terminator", "terminate"))
    assert answer(asked) == (PAGE if may else LOGIN if who == "anonymous" else FORBIDDEN)
    if may:
        assert f"backend {holder.pid}:" in words_of(asked)
        say_yes(client, asked, page)
        assert list(Act.objects.values_list("action", "pid", "through", "by")) == [
            (action, holder.pid, "admin", who)
        ]
        assert is_alive(holder) == (action == "cancel")
    else:
        assert not Act.objects.exists()
        assert is_alive(holder)


def buttons(response, action="terminate"):
    return [html.unescape(one) for one in re.findall(rf'name="{action}" value="([^"]*)"', text_of(response))]


@pytest.mark.parametrize("who", ["staff", "viewer", "canceller"])
def test_a_yes_of_somebody_else_or_without_the_permission_stops_nobody(who, session):
    holder = holder_of(session, 7)
    asked = ask(client_of("terminator"), "terminate", holder)
    client = client_of(who)
    client.post(f"{LOCKS}stop/", {"order": order_in(asked)})
    assert is_alive(holder)
    assert not Act.objects.exists()


def test_a_permission_that_was_taken_away_between_question_and_yes_counts(session):
    holder = holder_of(session, 7)
    client = client_of("terminator")
    asked = ask(client, "terminate", holder)
    User.objects.get(username="terminator").user_permissions.remove(
        Permission.objects.get(codename="terminate_pgactivity")
    )
    assert client.post(f"{LOCKS}stop/", {"order": order_in(asked)}).status_code == 403
    assert is_alive(holder)


def test_an_order_that_was_changed_or_is_too_old_stops_nobody(session, monkeypatch):
    holder = holder_of(session, 7)
    client = client_of("superuser")
    order = order_in(ask(client, "terminate", holder))
    changed = client.post(
        f"{LOCKS}stop/", {"order": order[:-1] + ("A" if order[-1] != "A" else "B")}, follow=True
    )
    assert "Nothing was done: what came back is not what was asked" in words_of(changed)
    monkeypatch.setattr(confirmations, "LONGEST_THOUGHT", -1)
    late = client.post(f"{LOCKS}stop/", {"order": order}, follow=True)
    assert "Nothing was done: it was asked for more than 10 minutes ago" in words_of(late)
    assert is_alive(holder)


@pytest.mark.parametrize("who", ["viewer", "canceller", "terminator"])
def test_nobody_sees_buttons_that_he_may_not_press(who, session):
    holder_of(session, 7)
    session().waits("SELECT pg_advisory_lock(7)")
    client = client_of(who)
    in_list = set(re.findall(r'<option value="(cancel|terminate)"', text_of(client.get(LOCKS))))
    in_tree = {action for action in ("cancel", "terminate") if buttons(client.get(WAITS), action)}
    may = {"canceller": {"cancel"}, "terminator": {"terminate"}}.get(who, set())
    assert in_list == in_tree == may
    assert ("_selected_action" in text_of(client.get(LOCKS))) == bool(may)


# Between the list and the click


def test_a_backend_that_has_ended_between_question_and_yes_is_told_as_gone(session):
    holder = holder_of(session, 7)
    client = client_of("superuser")
    asked = ask(client, "terminate", holder)
    holder.connection.close()
    wait_until(lambda: not is_alive(holder))
    assert f"Backend {holder.pid}: gone" in words_of(say_yes(client, asked))


def test_a_pid_of_somebody_else_by_now_is_not_touched(session):
    holder = holder_of(session, 7, "celery:first")
    client = client_of("superuser")
    listed = checkbox(client.get(LOCKS, {"pid": holder.pid, "kind": "ADVISORY"}), holder.pid)
    asked = choose(client, "terminate", listed)
    # PostgreSQL gives a pid again when it likes: a forged one is the same to us.
    other = holder_of(session, 8, "celery:first")
    forged = confirmations.confirmed(order_in(asked), str(User.objects.get(username="superuser").pk))
    row = PGLock.objects.get(activity_id=other.pid, type="ADVISORY").pk
    (victim,) = forged.victims
    mixed = confirmations.Confirmation(
        forged.action,
        forged.view,
        forged.alias,
        forged.user,
        forged.back,
        (confirmations.Victim(other.pid, victim.backend_start, victim.application_name, (row,)),),
    )
    answer = client.post(f"{LOCKS}stop/", {"order": mixed.signed()}, follow=True)
    assert f"Backend {other.pid}: gone" in words_of(answer)
    seen = listed.rpartition("|")[2]
    again = client.post(
        LOCKS, {"action": "terminate", "index": "0", "_selected_action": f"{row}|{seen}"}, follow=True
    )
    assert "Nothing was done: nobody is left of those" in words_of(again)
    assert is_alive(other)
    assert is_alive(holder)


@pytest.mark.parametrize("page", [LOCKS, WAITS])
def test_a_session_that_works_for_another_task_by_the_time_of_the_click_is_left_out(page, session):
    holder = holder_of(session, 7, "pglock:first")
    session().waits("SELECT pg_advisory_lock(7)")
    client = client_of("superuser")
    if page == LOCKS:
        value = checkbox(client.get(LOCKS, {"pid": holder.pid, "kind": "ADVISORY"}), holder.pid)
        sent = {"action": "terminate", "index": "0", "_selected_action": value}
    else:
        value = next(one for one in buttons(client.get(WAITS)) if one.startswith(f"{holder.pid}|"))
        sent = {"terminate": value}
    holder.does("SET application_name = 'pglock:second'")
    assert "nobody is left of those" in words_of(client.post(page, sent, follow=True))
    assert is_alive(holder)


def test_a_session_that_works_for_another_task_by_the_time_of_the_yes_is_spared(session):
    holder = holder_of(session, 7, "pglock:first")
    client = client_of("superuser")
    asked = ask(client, "terminate", holder)
    holder.does("SET application_name = 'pglock:second'")
    assert f"Backend {holder.pid}: gone" in words_of(say_yes(client, asked))
    assert is_alive(holder)


def test_who_has_freed_the_lock_by_the_time_of_the_yes_is_spared(session):
    holder = holder_of(session, 7)
    client = client_of("superuser")
    asked = ask(client, "terminate", holder)
    holder.does("SELECT pg_advisory_unlock(7)")
    assert f"Backend {holder.pid}: gone" in words_of(say_yes(client, asked))
    assert is_alive(holder)
