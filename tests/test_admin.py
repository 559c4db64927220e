"""The pages of the admin, and the backends that are stopped there."""

import html
import re
from contextlib import contextmanager
from datetime import timedelta

import pytest
from django.conf import settings
from django.contrib.auth.models import Permission, User
from django.core.management import call_command
from django.db import connection, connections
from django.test import Client
from django.urls import get_resolver
from django.utils import timezone

from celery_pglock import LockLost, admin_pages, confirmations
from celery_pglock.keys import Key, key
from celery_pglock.labels import Holding, Owner, comment
from celery_pglock.models import Act, LockReport, Outcome, PGActivity, PGLock
from tests import worker_tasks as tasks
from tests.bystanders import bystanders
from tests.conftest import wait_until
from tests.servers import Cluster

pytestmark = pytest.mark.django_db(transaction=True, available_apps=settings.INSTALLED_APPS)

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


@pytest.mark.parametrize("who", PEOPLE)
def test_every_page_answers_each_person_as_it_should_and_no_get_stops_anybody(who, session):
    holder = holder_of(session, 7)
    session().waits("SELECT pg_advisory_lock(7)")
    LockReport.objects.create(pk=1, at=timezone.now())
    client = client_of(who)
    strict = client_of(who, enforce_csrf_checks=True)
    for name, url in EXPECTED_URLS.items():
        answers = (
            answer(client.get(url)),
            answer(client.post(url, {"index": "0"})),
            answer(strict.post(url, {"index": "0"})),
        )
        assert answers == tuple(expected(who, name, method) for method in range(3)), name
        client.get(url, {"action": "terminate", "index": "0", "order": "x"})
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


@pytest.mark.parametrize("who", ["staff", "viewer", "canceller", "superuser"])
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


# What the list of locks shows


def labelled(
    session, task="shop.tasks.sync", task_id="some-id", worker="celery@web1", name="stock:north", number=7
):
    """A lock session of a task, as PostgreSQL sees one."""
    somebody = session()
    lock = key(number)
    since = timezone.now() - timedelta(minutes=10)
    held = Holding(Key(lock.objsubid, lock.classid, lock.objid, name), since.timestamp())
    label = comment(Owner(task, task_id, worker), [held], show_names=True)
    call_himself(somebody, f"pglock:{task_id}")
    somebody.connection.execute(f"{label} SELECT pg_advisory_lock({number})")
    return somebody


def call_himself(somebody, name):
    somebody.connection.execute("SELECT set_config('application_name', %s, false)", [name])


def listed(client, **parameters):
    return [words_of_row(row) for row in rows_of(client.get(LOCKS, parameters))]


def words_of_row(row):
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", row)).split())


def test_a_lock_is_listed_with_its_key_its_task_its_mode_its_age_and_its_holder(session):
    holder = labelled(session)
    (row,) = listed(client_of("viewer"))
    moment = timezone.localtime(PGLock.objects.get(activity_id=holder.pid, type="ADVISORY").since)
    for words in (
        "'stock:north' advisory",
        "shop.tasks.sync [some-id] on celery@web1",
        "held 0:10:0",
        "EXCLUSIVE",
        f"{moment:%Y-%m-%d %H:%M:%S}",
        f"{holder.pid} lock session, IDLE",
    ):
        assert words in row


def test_waits_come_first_and_then_the_newest_and_each_names_who_is_in_the_way_with_a_link(session):
    holder = labelled(session)
    early, late = session(), session()
    early.waits("SELECT pg_advisory_lock(7)")
    late.waits("SELECT pg_advisory_lock(7)")
    client = client_of("viewer")
    rows = rows_of(client.get(LOCKS, {"kind": "ADVISORY"}))
    pids = [int(re.search(r"\?pid=(\d+)", row.partition("field-backend")[2])[1]) for row in rows]
    assert pids == [late.pid, early.pid, holder.pid]
    cells = [row.partition("field-blocked_by")[2].partition("</td>")[0] for row in rows]
    in_the_way = [re.findall(r"\?pid=(\d+)", cell) for cell in cells]
    assert [set(map(int, one)) for one in in_the_way] == [{holder.pid, early.pid}, {holder.pid}, set()]
    link = html.unescape(re.search(rf'href="([^"]*\?pid={holder.pid}[^"]*)"', rows[0])[1])
    shown = words_of(client.get(link))
    assert "'stock:north' advisory" in shown
    assert "virtualxid" not in shown


def test_what_each_transaction_holds_on_itself_is_listed_when_asked_for(session):
    somebody = session()
    somebody.does("BEGIN", "LOCK TABLE tests_entry IN SHARE MODE")
    client = client_of("viewer")
    assert [row.split()[:2] for row in listed(client)] == [["tests_entry", "relation"]]
    for parameters in ({"kind": "VIRTUALXID"}, {"kind": "every"}, {"pid": somebody.pid}):
        assert any("virtualxid" in row for row in listed(client, **parameters)), parameters


CHOICES = [
    ({}, {7, 8}),
    ({"kind": "ADVISORY"}, {7, 8}),
    ({"kind": "RELATION"}, set()),
    ({"granted": "yes"}, {7, 8}),
    ({"granted": "no"}, set()),
    ({"task": "shop.tasks.sync"}, {7}),
    ({"task": "shop.tasks.syn"}, set()),
    ({"older": "300"}, {7}),
    ({"older": "3600"}, set()),
    ({"q": "stock:nor"}, {7}),
    ({"q": "TASKS.sync"}, {7}),
    ({"q": "ome-i"}, {7}),
    ({"q": "@web1"}, {7}),
    ({"q": "nothing"}, set()),
    ({"q": "stock nothing"}, set()),
    ({"q": "canary"}, set()),
    ({"database": "locks"}, {7, 8}),
]


@pytest.mark.django_db(
    transaction=True, available_apps=settings.INSTALLED_APPS, databases=["default", "locks"]
)
def test_filters_and_search_choose(session):
    labelled(session)
    holder_of(session, 8, query=" /* canary */")
    client = client_of("superuser")
    for parameters, numbers in CHOICES:
        found = {7 if "stock:north" in row else 8 for row in listed(client, **parameters)}
        assert found == numbers, parameters


def test_a_table_and_a_pid_are_found_by_the_search(session):
    somebody = session()
    somebody.does("BEGIN", "LOCK TABLE tests_entry IN SHARE MODE")
    client = client_of("viewer")
    holder = holder_of(session, 7)
    assert [row.split()[0] for row in listed(client, q="tests_ent")] == ["tests_entry"]
    assert [row.split()[0] for row in listed(client, q=str(holder.pid))] == ["7"]


@pytest.mark.parametrize("page", LISTS)
def test_a_page_shows_itself_anew_when_asked_for_and_only_then(page, transactional_db):
    client = client_of("viewer")
    anew = '<meta http-equiv="refresh" content="5">'
    assert anew in text_of(client.get(page, {"refresh": "5"}))
    for off in ({}, {"refresh": "0"}, {"refresh": '5"><script>'}):
        assert 'http-equiv="refresh"' not in text_of(client.get(page, off))


def test_no_more_than_a_page_is_read_and_nothing_is_counted_twice(session, django_assert_max_num_queries):
    for number in range(3):
        session().does(f"SELECT pg_advisory_lock(i) FROM generate_series({number}00, {number}99) AS i")
    client = client_of("viewer")
    with django_assert_max_num_queries(30) as asked:
        response = client.get(LOCKS, {"p": "2"})
    counts = [query["sql"] for query in asked.captured_queries if "COUNT(" in query["sql"].upper()]
    assert len([sql for sql in counts if "celery_pglock_pglock" in sql]) == 1
    assert len(rows_of(response)) == 100
    assert "300 locks" in text_of(response)


# Queries


def test_the_query_of_a_backend_is_shown_to_whoever_may_see_it_and_to_nobody_else(session):
    holder = holder_of(session, 7, query=f", '{CANARY}'")
    session().waits(f"SELECT pg_advisory_lock(7), '{CANARY}'")
    LockReport.objects.create(pk=1, at=timezone.now())
    sees = client_of("terminator", "view_pgactivity_query")
    pages = [*LISTS, f"{REPORTS}1/change/"]
    for page in (LOCKS, WAITS):
        assert CANARY in text_of(sees.get(page))
    assert CANARY in text_of(ask(sees, "terminate", holder))
    blind = client_of("terminator")
    asked = ask(blind, "terminate", holder)
    shown = [asked, *(blind.get(page) for page in pages)]
    in_tree = buttons(sees.get(WAITS))
    shown += [blind.post(WAITS, {"terminate": button}, follow=True) for button in in_tree]
    shown += [say_yes(blind, asked), *(blind.get(page) for page in pages)]
    for response in shown:
        assert CANARY not in text_of(response)


@pytest.mark.parametrize(
    "parameters",
    [
        {"activity__query__startswith": "SELECT"},
        {"activity__query": CANARY},
        {"activity__context__isnull": "0"},
        {"o": "9"},
        {"o": "activity__query"},
    ],
)
def test_no_lookup_and_no_order_tells_of_queries(parameters, session):
    holder_of(session, 7, query=f", '{CANARY}'")
    holder_of(session, 8)
    response = client_of("viewer").get(LOCKS, parameters)
    if response.status_code == 200:
        assert len(rows_of(response)) == 2
    else:
        assert response.status_code == 400


# Hostile input


BAD = '<script>alert("x")</script>'


def test_what_anybody_can_write_into_the_server_is_text_to_the_browser(session):
    holder = labelled(session, BAD, BAD, BAD, BAD)
    call_himself(holder, f"pglock:{BAD}")
    waiter = session()
    call_himself(waiter, BAD)
    waiter.waits(f"SELECT pg_advisory_lock(7), '{BAD}'")
    LockReport.objects.create(
        pk=1, at=timezone.now(), findings=[{"kind": BAD, "text": BAD}, BAD, {BAD: BAD}], unread=[BAD]
    )
    client = client_of("superuser")
    asked = ask(client, "terminate", holder)
    pages = [client.get(page) for page in (*LISTS, f"{REPORTS}1/change/")]
    pages += [asked, client.get(LOCKS, {"q": BAD, "task": BAD, "pid": BAD, "database": BAD})]
    say_yes(client, asked)
    pages.append(client.get(AUDIT, {"q": BAD}))
    for response in pages:
        assert BAD not in text_of(response)
    assert "&lt;script&gt;" in text_of(pages[0])


HOSTILE = [
    {"p": "999"},
    {"p": "-1"},
    {"p": "x"},
    {"o": "99.-99.x"},
    {"o": "1.2.3.-4"},
    {"all": ""},
    {"e": "1"},
    {"e": "1", "p": "999"},
    {"q": "\0"},
    {"q": "%"},
    {"q": "'"},
    {"q": "\\"},
    {"q": '"' * 50},
    {"q": "x " * 200},
    {"task": "\0"},
    {"task": "%00"},
    {"pid": "9" * 5000},
    {"pid": "\u0661"},
    {"pid": "-1"},
    {"older": "x"},
    {"kind": "\0"},
    {"database": "sqlite"},
    {"database": "\0"},
    {"_changelist_filters": "database=sqlite&x=\0"},
    {"refresh": "x"},
    {"period": "1e9"},
    {"through": "\0"},
    {"outcome": "none"},
    {"_facets": "1"},
    {"_popup": "1"},
    {"_to_field": "query"},
    {"unknown": "1"},
]


@pytest.mark.parametrize("page", [*LISTS, f"{REPORTS}1/change/"])
def test_no_parameter_is_an_error_of_the_server(page, session):
    holder_of(session, 7)
    LockReport.objects.create(pk=1, at=timezone.now())
    client = client_of("superuser")
    for parameters in HOSTILE:
        response = client.get(page, parameters)
        assert response.status_code in (200, 302, 400), parameters
        if response.status_code == 302:
            assert client.get(response["Location"]).status_code == 200


FORMS = [
    {},
    {"action": "terminate"},
    {"action": "terminate", "index": "0"},
    {"action": "terminate", "index": "x", "_selected_action": "x"},
    {"action": "", "index": "0", "_selected_action": "x"},
    {"action": "drop", "index": "0", "_selected_action": "x"},
    {"action": "terminate", "index": "0", "_selected_action": "\0|\0"},
    {"terminate": "x"},
    {"terminate": "\0|x"},
    {"terminate": f"{2**40}|x"},
    {"order": "x"},
    {"order": "\0"},
]


@pytest.mark.parametrize("page", [LOCKS, WAITS, f"{LOCKS}stop/", f"{WAITS}stop/"])
def test_no_form_is_an_error_of_the_server_or_stops_anybody(page, session):
    holder = holder_of(session, 7)
    session().waits("SELECT pg_advisory_lock(7)")
    client = client_of("superuser")
    for sent in FORMS:
        assert client.post(page, sent).status_code in (200, 302, 403), sent
    assert is_alive(holder)
    assert not Act.objects.exists()


# What is asked


def test_the_question_names_each_backend_once_and_says_what_will_happen_to_its_task(session):
    holder = labelled(session)
    holder.connection.execute("SELECT pg_advisory_lock(70)")
    other = holder_of(session, 8, "celery:other-id")
    client = client_of("superuser")
    values = re.findall(r'name="_selected_action" value="([^"]*)"', text_of(client.get(LOCKS)))
    assert len(values) == 3
    asked = words_of(choose(client, "terminate", *map(html.unescape, values)))
    assert "Terminate 2 backends?" in asked
    assert "2 of 2 work for a task" in asked
    assert asked.count(f"backend {holder.pid}:") == asked.count(f"backend {other.pid}:") == 1
    assert "Task of an unknown name [some-id] is told that it lost them" in asked
    assert "interrupted by LockLost" in asked
    assert "Task of an unknown name [other-id] is hit by that" in asked


def test_the_question_says_that_cancelling_does_nothing_to_who_runs_no_statement(session):
    holder = holder_of(session, 7)
    waiter = session()
    waiter.waits("SELECT pg_advisory_lock(7)")
    client = client_of("canceller")
    assert "It runs no statement, so nothing happens to it" in words_of(ask(client, "cancel", holder))
    assert "The statement that it runs fails" in words_of(ask(client, "cancel", waiter))


def test_all_that_the_filters_choose_can_be_chosen_at_once(session):
    holders = [holder_of(session, number) for number in (7, 8)]
    client = client_of("superuser")
    asked = choose(client, "terminate", "x", select_across="1")
    assert "Terminate 2 backends?" in words_of(asked)
    say_yes(client, asked)
    assert not any(map(is_alive, holders))


def test_more_than_can_be_read_is_not_asked(session, monkeypatch):
    monkeypatch.setattr(admin_pages, "MOST_VICTIMS", 1)
    holders = [holder_of(session, number) for number in (7, 8)]
    answer = client_of("superuser").post(
        LOCKS,
        {"action": "terminate", "index": "0", "_selected_action": "x", "select_across": "1"},
        follow=True,
    )
    assert "these are 2 backends, and one page names 1 at most" in words_of(answer)
    assert all(map(is_alive, holders))


def test_what_became_of_each_is_told_with_a_warning_where_it_was_not_stopped(session):
    holder = holder_of(session, 7)
    client = client_of("superuser")
    body = text_of(say_yes(client, ask(client, "cancel", holder)))
    assert re.search(rf'<li class="warning">\s*Backend {holder.pid}: idle \(', body)
    body = text_of(say_yes(client, ask(client, "terminate", holder)))
    assert re.search(rf'<li class="success">\s*Backend {holder.pid}: terminated \(it has ended\)', body)


def test_the_outcome_stays_on_a_page_that_was_shown_anew_before(session):
    holder = holder_of(session, 7)
    client = client_of("superuser")
    value = checkbox(client.get(LOCKS, {"pid": holder.pid, "kind": "ADVISORY"}), holder.pid)
    asked = client.post(
        f"{LOCKS}?refresh=5&kind=ADVISORY", {"action": "terminate", "index": "0", "_selected_action": value}
    )
    answer = say_yes(client, asked)
    assert answer.redirect_chain == [(f"{LOCKS}?kind=ADVISORY", 302)]


# Who waits for whom


def test_the_tree_has_the_root_on_top_and_who_waits_below_it(session):
    root = labelled(session)
    first, second = session(), session()
    first.does("SELECT pg_advisory_lock(8)")
    first.waits("SELECT pg_advisory_lock(7)")
    second.waits("SELECT pg_advisory_lock(8)")
    body = text_of(client_of("superuser").get(WAITS))
    tree = body.partition('<ul class="pglock-tree">')[2].partition("</form>")[0]
    order = [tree.index(f">{somebody.pid}</a>") for somebody in (root, first, second)]
    assert order == sorted(order)
    depths = [tree[:at].count("<ul>") - tree[:at].count("</ul>") for at in order]
    assert depths == [0, 1, 2]
    assert tree.count("<details open>") == tree.count("</details>") == 2
    assert tree.count("<li>") == tree.count("</li>") == 3
    shown = words_of(client_of("viewer").get(WAITS))
    assert f"{root.pid} shop.tasks.sync [some-id], IDLE" in shown
    assert "for ADVISORY EXCLUSIVE 7" in shown


def test_a_deadlock_over_two_sessions_of_a_task_is_named(session):
    work, lock, other = session(), session(), session()
    call_himself(work, "celery:t1")
    call_himself(lock, "pglock:t1")
    lock.does("SELECT pg_advisory_lock(7)")
    other.does("SELECT pg_advisory_lock(8)")
    other.waits("SELECT pg_advisory_lock(7)")
    work.waits("SELECT pg_advisory_lock(8)")
    assert "PostgreSQL does not see it: stop one of them" in words_of(client_of("viewer").get(WAITS))


def test_a_backend_is_a_link_to_its_locks_for_those_who_may_see_them(session):
    holder = holder_of(session, 7)
    session().waits("SELECT pg_advisory_lock(7)")
    client = client_of("viewer")
    assert f"?pid={holder.pid}" in text_of(client.get(WAITS))
    User.objects.get().user_permissions.remove(Permission.objects.get(codename="view_pglock"))
    shown = client.get(WAITS)
    assert f"{holder.pid} CLIENT_BACKEND" in words_of(shown)
    assert "?pid=" not in text_of(shown)


def test_an_alias_whose_driver_is_missing_is_none_of_the_admins(transactional_db, monkeypatch):
    broken = {**connections.databases["sqlite"], "ENGINE": "no_such_driver"}
    monkeypatch.setitem(connections.databases, "broken", broken)
    assert "Nobody waits." in words_of(client_of("viewer").get(WAITS))


def test_when_nobody_waits_the_page_says_so(transactional_db):
    assert "Nobody waits." in words_of(client_of("viewer").get(WAITS))


# What cannot be read


@pytest.mark.parametrize(
    ("page", "table"),
    [
        (AUDIT, Act),
        (AUDIT, Outcome),
        (REPORTS, LockReport),
        (f"{REPORTS}1/change/", LockReport),
    ],
)
def test_what_somebody_keeps_for_himself_is_said_to_be_unreadable(page, table, session):
    LockReport.objects.create(pk=1, at=timezone.now())
    client = client_of("superuser")
    keeper = session()
    keeper.does("BEGIN", f"LOCK TABLE {table._meta.db_table} IN ACCESS EXCLUSIVE MODE")
    words = words_of(client.get(page))
    assert "Could not be read: lock 'celery_pglock_" in words
    assert re.search(r"was not acquired (without waiting|after waiting 0\.\d\d s): it is taken", words)
    keeper.does("ROLLBACK")
    assert "errornote" not in text_of(client.get(page))


def test_locks_and_waits_are_shown_while_everything_else_is_kept_by_somebody(session):
    client = client_of("superuser")
    holder = holder_of(session, 7)
    session().waits("SELECT pg_advisory_lock(7)")
    keeper = session()
    keeper.does("BEGIN")
    for model in (Act, Outcome, LockReport):
        keeper.does(f"LOCK TABLE {model._meta.db_table} IN ACCESS EXCLUSIVE MODE")
    keeper.does("LOCK TABLE tests_entry IN ACCESS EXCLUSIVE MODE")
    assert str(holder.pid) in words_of(client.get(LOCKS))
    assert str(holder.pid) in words_of(client.get(WAITS))
    assert "tests_entry" in words_of(client.get(LOCKS))


def test_what_cannot_be_written_down_is_not_done_and_the_page_says_so(session):
    holder = holder_of(session, 7)
    client = client_of("superuser")
    asked = ask(client, "terminate", holder)
    keeper = session()
    keeper.does("BEGIN", f"LOCK TABLE {Act._meta.db_table} IN ACCESS EXCLUSIVE MODE")
    words = words_of(say_yes(client, asked))
    assert "Not everybody was stopped: canceling statement due to lock timeout" in words
    keeper.does("ROLLBACK")
    assert is_alive(holder)


def test_missing_views_are_named_with_their_cure(transactional_db):
    client = client_of("superuser")
    with connection.cursor() as cursor:
        cursor.execute("ALTER VIEW celery_pglock_pglock RENAME TO elsewhere")
        try:
            words = words_of(client.get(LOCKS))
        finally:
            cursor.execute("ALTER VIEW elsewhere RENAME TO celery_pglock_pglock")
    assert "run manage.py migrate celery_pglock --database=default" in words


@contextmanager
def as_ordinary_role():
    with connection.cursor() as cursor:
        cursor.execute("CREATE ROLE of_the_admin")
        cursor.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO of_the_admin")
        cursor.execute("SET ROLE of_the_admin")
        try:
            yield
        finally:
            cursor.execute("RESET ROLE")
            cursor.execute("DROP OWNED BY of_the_admin")
            cursor.execute("DROP ROLE of_the_admin")


def test_what_a_role_may_not_read_is_said_and_it_is_told_that_it_may_not_stop_it(session):
    holder = holder_of(session, 7, query=f", '{CANARY}'")
    session().waits("SELECT pg_advisory_lock(7)")
    client = client_of("superuser")
    for page in (LOCKS, WAITS):
        assert "GRANT pg_read_all_stats" not in words_of(client.get(page))
    with as_ordinary_role():
        for page in (LOCKS, WAITS):
            shown = words_of(client.get(page))
            assert "GRANT pg_read_all_stats would show it" in shown
            assert CANARY not in shown
        asked = ask(client, "terminate", holder)
        assert "PostgreSQL does not tell this role what it does" in words_of(asked)
        client.post(f"{LOCKS}stop/", {"order": order_in(asked)})
    assert "not permitted" in words_of(client.get(LOCKS))
    assert is_alive(holder)


# Reports


def report(minutes, held=None, waiting=None, **more):
    return LockReport.objects.create(
        at=timezone.now() - timedelta(minutes=minutes), held=held, waiting=waiting, **more
    )


def paths_in(response):
    return dict(re.findall(r'<path class="pglock-(\w+)" d="([^"]*)"', text_of(response)))


def test_the_chart_draws_waits_and_holders_over_the_period(transactional_db):
    for minutes, held, waiting in ((900, 4, 0), (600, 10, 2), (300, 3, 1)):
        report(minutes, held, waiting)
    client = client_of("viewer")
    response = client.get(REPORTS)
    heights = {
        name: [float(y) for y in re.findall(r"L[\d.]+ ([\d.]+)", path)]
        for name, path in paths_in(response).items()
    }
    bottom = 192.0
    assert heights["waits"] == [bottom, pytest.approx(156, abs=0.1), pytest.approx(174, abs=0.1)]
    assert heights["holders"][1] == 12.0
    assert 'role="img"' in text_of(response)
    assert "at most 2 waits, at most 10 holders" in text_of(response)


def test_where_reports_are_missing_the_line_is_too(transactional_db):
    for minutes, waiting in ((1000, 1), (980, None), (960, 1), (500, 1), (480, 1)):
        report(minutes, 1, waiting)
    paths = paths_in(client_of("viewer").get(REPORTS))
    assert (paths["holders"].count("M"), paths["holders"].count("L")) == (2, 5)
    assert (paths["waits"].count("M"), paths["waits"].count("L")) == (3, 4)


def test_the_period_is_chosen(transactional_db):
    report(60 * 24 * 3, 5, 0)
    report(60 * 24 * 20, 6, 0)
    client = client_of("viewer")
    counted = {
        period: (len(rows_of(client.get(REPORTS, period and {"period": period}))))
        for period in ("", "7", "30")
    }
    assert counted == {"": 0, "7": 1, "30": 2}
    assert "at most 6 holders" in text_of(client.get(REPORTS, {"period": "30"}))
    assert "no holders known" in text_of(client.get(REPORTS))


def test_the_chart_begins_with_the_first_report(transactional_db):
    first = report(60 * 2, 5, 0)
    report(1, 6, 0)
    times = re.findall(r'text-anchor="middle">([^<]*)<', text_of(client_of("viewer").get(REPORTS)))
    assert times[0] == f"{timezone.localtime(first.at):%H:%M}"


def test_a_report_is_read_with_its_findings_and_with_what_could_not_be_read(transactional_db):
    one = report(
        1,
        3,
        1,
        findings=[{"kind": "held_too_long", "text": "shop.tasks.sync has held it"}],
        unread=["the audit"],
    )
    client = client_of("viewer")
    response = client.get(REPORTS)
    assert "1, 1 not read" in words_of(response)
    assert f'href="{REPORTS}{one.pk}/change/' in text_of(response)
    page = client.get(f"{REPORTS}{one.pk}/change/")
    assert "held too long shop.tasks.sync has held it" in words_of(page)
    assert "the audit" in words_of(page)
    assert "history" not in text_of(page)
    assert 'name="_save"' not in text_of(page)


# The audit


def act(**more):
    return Act.objects.create(
        **{
            "at": timezone.now(),
            "through": "command",
            "by": "ann",
            "action": "cancel",
            "pid": 42,
            "task_id": "",
        }
        | {"reason": "", **more}
    )


def test_the_audit_shows_who_did_what_and_what_became_of_it(transactional_db):
    Outcome.objects.create(
        act=act(task_id="some-id", application_name="celery:some-id", reason="advisory:7", comes_back=True),
        at=timezone.now(),
        outcome="cancelled",
    )
    act(action="terminate", by="bob", through="prioritize")
    last, first = (words_of_row(row) for row in rows_of(client_of("viewer").get(AUDIT)))
    for words in (
        "cancel 42 cancelled",
        "command ann",
        "some-id (comes back to its queue)",
        "celery:some-id",
        "advisory:7",
    ):
        assert words in first
    assert "terminate 42 no outcome: the process did not live to tell" in last
    assert "prioritize bob" in last


CHOICES_OF_ACTS = [
    ({}, {"ann", "bob"}),
    ({"action": "cancel"}, {"ann"}),
    ({"through": "prioritize"}, {"bob"}),
    ({"outcome": "cancelled"}, {"ann"}),
    ({"outcome": "none"}, {"bob"}),
    ({"q": "an"}, {"ann"}),
    ({"q": "some-id"}, {"ann"}),
    ({"q": "stock"}, {"bob"}),
]


def test_the_audit_is_filtered_and_searched(transactional_db):
    Outcome.objects.create(act=act(task_id="some-id"), at=timezone.now(), outcome="cancelled")
    act(action="terminate", by="bob", through="prioritize", reason="advisory:stock")
    client = client_of("viewer")
    for parameters, names in CHOICES_OF_ACTS:
        rows = rows_of(client.get(AUDIT, parameters))
        assert {name for row in rows for name in ("ann", "bob") if f">{name}<" in row} == names, parameters


# What becomes of tasks


def lock_of(task_id, *, granted):
    return PGLock.objects.filter(task_id=task_id, type="ADVISORY", granted=granted).first()


def choose_task(client, action, result, *, granted):
    """The page that asks about the lock session of a task."""
    row = wait_until(lambda: lock_of(result.id, granted=granted), "the task is seen")
    page = client.get(LOCKS, {"pid": row.activity_id, "kind": "ADVISORY"})
    return choose(client, action, checkbox(page, row.activity_id))


def test_what_the_page_says_of_a_task_comes_true(worker):
    client = client_of("superuser")
    holder = tasks.waits.delay("admin", 60)
    wait_until(lambda: lock_of(holder.id, granted=True))
    waiter = tasks.waits.delay("admin", 0)
    asked = choose_task(client, "cancel", waiter, granted=False)
    assert "does not begin, and its message comes back later" in words_of(asked)
    assert "cancelled" in words_of(say_yes(client, asked))
    wait_until(lambda: waiter.state == "RETRY")
    asked = choose_task(client, "terminate", holder, granted=True)
    assert f"Task tests.worker_tasks.waits [{holder.id}] is told that it lost them" in words_of(asked)
    assert "terminated (it has ended)" in words_of(say_yes(client, asked))
    with pytest.raises(LockLost):
        holder.get(timeout=20)
    assert waiter.get(timeout=20) == "done"
    assert list(Act.objects.order_by("pk").values_list("action", "task_id")) == [
        ("cancel", waiter.id),
        ("terminate", holder.id),
    ]


# Prepared transactions


@pytest.fixture
def prepared(transactional_db, monkeypatch):
    """The alias of a server on which a table is locked by a transaction that was prepared, and waited for."""
    locks = connections["locks"]
    with Cluster(max_prepared_transactions="2") as cluster:
        locks.close()
        here = {"HOST": "127.0.0.1", "PORT": str(cluster.port), "NAME": "postgres", "USER": "postgres"}
        for name, value in here.items():
            monkeypatch.setitem(locks.settings_dict, name, value)
        try:
            call_command("migrate", "celery_pglock", database="locks", verbosity=0)
            with bystanders("locks") as make:
                holder, waiter = make(), make()
                holder.does("BEGIN", "LOCK TABLE celery_pglock_skipcount", "PREPARE TRANSACTION 'x'")
                waiter.waits("SELECT FROM celery_pglock_skipcount")
                yield "locks"
                holder.does("ROLLBACK PREPARED 'x'")
        finally:
            locks.close()


@pytest.mark.django_db(
    transaction=True, available_apps=settings.INSTALLED_APPS, databases=["default", "locks"]
)
def test_a_prepared_transaction_is_told_to_have_no_backend(prepared):
    client = client_of("superuser")
    tree = client.get(WAITS, {"database": prepared})
    assert "a transaction that was prepared (see pg_prepared_xacts)" in words_of(tree)
    assert len(buttons(tree)) == 1
    page = client.get(LOCKS, {"database": prepared, "granted": "yes", "kind": "RELATION"})
    (row,) = (row for row in rows_of(page) if "celery_pglock_skipcount" in row)
    assert "prepared transaction" in row
    value = html.unescape(re.search(r'name="_selected_action" value="([^"]*)"', row)[1])
    sent = {"action": "terminate", "index": "0", "_selected_action": value}
    answer = client.post(f"{LOCKS}?database={prepared}", sent, follow=True)
    assert "Nothing was done: a prepared transaction has no backend" in words_of(answer)
