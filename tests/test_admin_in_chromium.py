"""The pages of the admin as a person sees them: on a phone, in a dark room, without JavaScript."""

import io
import os
from datetime import timedelta
from pathlib import Path

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.core.management import call_command
from django.utils import timezone
from django.utils.html import escape

from celery_pglock import labels
from celery_pglock.keys import key
from celery_pglock.labels import Holding, Owner
from celery_pglock.models import Act, LockReport, Outcome, PGActivity
from tests.browsers import PHONE, browser, programs
from tests.bystanders import bystanders
from tests.conftest import wait_until
from tests.models import Entry

pytestmark = [
    pytest.mark.long,
    pytest.mark.django_db(transaction=True, available_apps=settings.INSTALLED_APPS),
    pytest.mark.skipif(
        not programs(), reason="chromium is not installed: apt-get install chromium chromium-driver"
    ),
]

LOCKS = "/admin/celery_pglock/pglock/"
WAITS = "/admin/celery_pglock/blockedpglock/"
REPORTS = "/admin/celery_pglock/lockreport/"
AUDIT = "/admin/celery_pglock/act/"

TASK_ID = "8c7b3a52-4a1e-4f43-9a27-0d3f1c5e6b7a"

# By WCAG the least for text; what is large may have less.
LEAST_CONTRAST = 4.5

# The documents show pictures of the first two.
LOOKS = {
    "light": {},
    "dark": {"dark": True, "scripts": False},
    "phone-dark": {"size": PHONE, "dark": True},
    "phone-without-scripts": {"size": PHONE, "scripts": False},
}


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    """Its screenshots are kept where ``SCREENSHOTS`` says."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    with browser(folder) as window:
        yield window


@pytest.fixture
def person(window, live_server):
    """A superuser at the browser, who has logged in."""
    User.objects.create_superuser("ada", password="lovelace")
    window.forgets()
    window.url = live_server.url
    window.shows()
    window.goes("/admin/")
    window.types("#id_username", "ada")
    window.types("#id_password", "lovelace")
    window.leaves_by("[type=submit]")
    return window


@pytest.fixture
def session(transactional_db):
    with bystanders() as make:
        yield make


def labelled(names, task_id):
    """What a lock session sends to take these keys."""
    keys = [key(name) for name in names]
    since = timezone.now().timestamp() - 125
    owner = Owner("shop.tasks.import_prices", task_id, "celery@shop-1")
    label = labels.comment(owner, [Holding(one, since) for one in keys], show_names=True)
    return f"{label} SELECT {', '.join(f'pg_advisory_lock({one.arguments[0]})' for one in keys)}"


def holder_of(session, *names):
    """The lock session of a task that holds these keys."""
    somebody = session(application_name=labels.application_name(labels.LOCK_SESSION, TASK_ID))
    somebody.does(labelled(names, TASK_ID))
    return somebody


def waiter_for(session, name, number=0):
    """The lock session of another task."""
    task_id = f"{number}d1f0c66-7a57-4b0c-9d56-2f6f0e7f5a11"
    somebody = session(application_name=labels.application_name(labels.LOCK_SESSION, task_id))
    somebody.waits(labelled([name], task_id))
    return somebody


@pytest.fixture
def scene(session):
    """A morning in a shop: tasks that wait for another, and somebody who left a row locked."""
    importer = holder_of(session, "prices:42", f"catalogue:{'of-a-supplier-with-a-long-name-' * 5}")
    for number in range(3):
        waiter_for(session, "prices:42", number)
    session(application_name="psql").does("SELECT pg_advisory_lock_shared(4711)")
    Entry.objects.create(key="a", task_id="", what="")
    session(application_name="gunicorn: worker [shop]").does("BEGIN", "UPDATE tests_entry SET key = 'b'")
    session(application_name="migrate").waits("BEGIN; ALTER TABLE tests_entry ADD COLUMN price int")
    return importer


@pytest.fixture
def history(transactional_db):
    """Reports of a day with a gap, and what was done to backends."""
    now = timezone.now()
    finding = {"kind": "held_too_long", "text": "ADVISORY EXCLUSIVE 'prices:42' is held for 0:42:00 by 4711"}
    for hour in range(24):
        if not 8 <= hour <= 10:
            LockReport.objects.create(
                at=now - timedelta(hours=hour),
                held=40 + hour * 7 % 23,
                waiting=hour * 5 % 11,
                skipped=hour,
                longest_held=timedelta(minutes=42),
                longest_wait=timedelta(seconds=hour),
                findings=[finding] * (hour % 3),
                unread=["the skips: canceling statement due to lock timeout"] if hour == 3 else [],
            )
    for pid, outcome in ((4711, "terminated"), (4712, "gone"), (4713, "")):
        act = Act.objects.create(
            at=now,
            through="admin",
            by="ada",
            action="terminate",
            pid=pid,
            backend_start=now,
            role="shop",
            application_name=f"pglock:{TASK_ID}",
            task_id=TASK_ID,
            query_hash="d41d8cd98f00b204e9800998ecf8427e",
            reason="advisory:16384:::::0:1234567890:1:4711:ExclusiveLock",
        )
        if outcome:
            Outcome.objects.create(act=act, at=now, outcome=outcome)
    return LockReport.objects.latest("at")


def looks_well(person, name):
    """Takes a picture, and measures what can be measured."""
    person.takes_picture(name)
    # What is around the content is Django's.
    texts = person.contrasts("#content")
    faint = [(text, contrast) for text, contrast in texts if contrast < LEAST_CONTRAST]
    assert texts
    assert (name, person.is_too_wide(), faint, person.errors()) == (name, False, [], [])


def choose(person, action, somebody):
    """The page that asks, after the first of somebody's locks was chosen in the list."""
    person.goes(f"{LOCKS}?pid={somebody.pid}")
    person.clicks(f"input[name=_selected_action][value*=':{somebody.pid}:']")
    person.clicks(f"select[name=action] option[value={action}]")
    person.leaves_by("button[name=index]")


@pytest.mark.parametrize("look", LOOKS)
def test_every_page_can_be_read(person, scene, history, look):
    person.shows(**LOOKS[look])
    for name, path in {
        "locks": LOCKS,
        "waits": WAITS,
        "reports": REPORTS,
        "report": f"{REPORTS}{history.pk}/change/",
        "audit": AUDIT,
    }.items():
        person.goes(path)
        looks_well(person, f"{name}-{look}")
        assert not (look.startswith("phone") and person.hides_a_part_of(".results"))
    for action in ("cancel", "terminate"):
        choose(person, action, scene)
        assert str(scene.pid) in person.text
        looks_well(person, f"{action}-{look}")


TERMINAL = """<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<style>
body {{ margin: 0; padding: 20px; width: max-content; background: light-dark(#fff, #1e1e1e) }}
pre {{ margin: 0; font: 14px/1.45 monospace; color: light-dark(#1e1e1e, #e6e6e6) }}
</style><body id="content"><pre>$ manage.py pglock --tree\n{}</pre>"""


@pytest.mark.parametrize("look", ["light", "dark"])
def test_the_tree_of_the_command_can_be_read_in_a_terminal(window, scene, tmp_path, look):
    out = io.StringIO()
    call_command("pglock", "--tree", stdout=out)
    page = tmp_path / "tree.html"
    page.write_text(TERMINAL.format(escape(out.getvalue())))
    window.shows(**LOOKS[look])
    window.url = page.as_uri()
    window.goes("")
    assert f"{scene.pid} shop.tasks.import_prices" in window.text
    looks_well(window, f"tree-{look}")


@pytest.fixture(params=["light", "phone-without-scripts"])
def looking(request, person):
    person.shows(**LOOKS[request.param])
    return person


def test_cancel_ends_what_a_backend_runs_and_nothing_else(looking, session):
    holder, waiter = holder_of(session, "prices:42"), waiter_for(session, "prices:42")
    choose(looking, "cancel", waiter)
    assert waiter.is_busy
    looking.leaves_by("[type=submit][value='Yes, cancel']")
    assert waiter.answers() == "57014"
    assert f"{waiter.pid}: cancelled" in looking.text
    assert {holder.pid, waiter.pid} <= set(PGActivity.objects.values_list("pk", flat=True))
    looking.goes(AUDIT)
    assert str(waiter.pid) in looking.text


def test_terminate_ends_the_root_of_a_tree_and_frees_who_waits(looking, session):
    holder, waiter = holder_of(session, "prices:42"), waiter_for(session, "prices:42")
    looking.goes(WAITS)
    looking.leaves_by(f"button[name=terminate][value^='{holder.pid}|']")
    assert PGActivity.objects.filter(pk=holder.pid).exists()
    looking.leaves_by("[type=submit][value='Yes, terminate']")
    wait_until(lambda: not PGActivity.objects.filter(pk=holder.pid).exists())
    assert f"{holder.pid}: terminated" in looking.text
    assert waiter.answers() == ""
    looking.goes(WAITS)
    assert "Nobody waits" in looking.text


def test_who_says_no_stops_nobody(looking, session):
    holder = holder_of(session, "prices:42")
    choose(looking, "terminate", holder)
    looking.leaves_by("a.cancel-link")
    assert looking.driver.current_url.endswith(f"{LOCKS}?pid={holder.pid}")
    assert PGActivity.objects.filter(pk=holder.pid).exists()
    assert not Act.objects.exists()
