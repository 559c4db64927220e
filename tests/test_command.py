"""The command ``manage.py pglock``."""

import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta
from io import StringIO
from uuid import uuid4

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import connection, transaction

from celery_pglock import advisory
from celery_pglock.inquiries import identifier
from celery_pglock.keys import key
from celery_pglock.models import BlockedPGLock, PGActivity
from celery_pglock.printed_texts import cut, one_line
from celery_pglock.trees import Waits
from tests.conftest import Rival, wait_until
from tests.models import Entry

# Only in this database: a pid may belong to somebody else by then.
STOP_ALL = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid = ANY(%s)
"""

ENDED = "terminated (it has ended)"


class Answer:
    def __init__(self, out, err, code):
        self.out, self.err, self.code = out, err, code
        self.lines = out.splitlines()

    @property
    def json(self):
        return json.loads(self.out)


def pglock(*arguments):
    out, err = StringIO(), StringIO()
    try:
        call_command("pglock", *arguments, stdout=out, stderr=err)
        code = 0
    except SystemExit as ending:
        code = ending.code
    return Answer(out.getvalue(), err.getvalue(), code)


def error_of(*arguments):
    with pytest.raises(CommandError) as caught:
        pglock(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _process(*arguments, **options):
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "TEST_DATABASE_NAME": connection.settings_dict["NAME"],
        "PYTHONUNBUFFERED": "",
        **options.pop("variables", {}),
    }
    command = [sys.executable, "-m", "django", "pglock", *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **{**pipes, **options})


def in_process(*arguments, **options):
    with _process(*arguments, **options) as process:
        out, err = process.communicate(timeout=30)
    return Answer(out, err, process.returncode)


def on_terminal(*arguments, answer=None, meanwhile=None, columns=60):
    """As a person sees it; what goes to stdout is between the terminal's lines."""
    terminal, slave = pty.openpty()
    variables = {"COLUMNS": str(columns), "LINES": "40"}
    with _process(*arguments, stdin=slave, stdout=slave, variables=variables) as process:
        os.close(slave)
        err = ""
        if answer is not None:
            while not err.endswith("[y/N] "):
                err += process.stderr.read(1) or pytest.fail(err)
            if meanwhile is not None:
                meanwhile()
            os.write(terminal, answer.encode())
        out = b""
        with suppress(OSError):
            while True:
                out += os.read(terminal, 65536)
        err += process.stderr.read()
    os.close(terminal)
    return Answer(out.decode(), err, process.returncode)


def pid_of(somebody):
    return somebody.connection.info.backend_pid


def call_himself(somebody, name):
    somebody.connection.execute("SELECT set_config('application_name', %s, false)", [name])


def want(somebody, identifier):
    """Begin to wait for a lock, without a thread."""
    arguments = ", ".join(map(str, key(identifier).arguments))
    somebody.connection.pgconn.send_query(f"SELECT pg_advisory_lock({arguments})".encode())
    wait_until(lambda: BlockedPGLock.objects.filter(activity_id=pid_of(somebody)).exists(), "somebody waits")


@pytest.fixture
def rivals(transactional_db):
    everybody = [Rival() for _ in range(5)]
    pids = [pid_of(somebody) for somebody in everybody]
    yield everybody
    # Who waits for a lock does not notice that his client has gone.
    with connection.cursor() as cursor:
        cursor.execute(STOP_ALL, [pids])
    wait_until(lambda: not PGActivity.objects.filter(pk__in=pids).exists(), "they have left")
    for somebody in everybody:
        somebody.connection.close()


@pytest.fixture
def waiting(rivals):
    """One that holds key 7, and one that waits for it."""
    holder, waiter, *_ = rivals
    call_himself(holder, "holder")
    call_himself(waiter, "waiter")
    holder.take(7)
    want(waiter, 7)
    return holder, waiter


# What is listed


def test_the_table_has_a_header_and_a_line_for_each_lock_with_waiters_first(waiting):
    holder, waiter = waiting
    answer = pglock("-f", "type=ADVISORY")
    header, first, second = answer.lines
    assert header.split(" | ")[0].strip() == "activity_id"
    assert "activity__query" in header
    assert first.startswith(f"{pid_of(waiter)} ")
    assert second.startswith(f"{pid_of(holder)} ")
    assert answer.err == ""


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_those_who_wait_longest_come_first(order, rivals):
    holder = rivals[0]
    late, early = (rivals[number] for number in order)
    holder.take(7)
    want(early, 7)
    want(late, 7)
    found = pglock("-f", "granted=false", "--json").json
    assert [row["activity_id"] for row in found] == [pid_of(early), pid_of(late)]


def test_the_command_does_not_list_its_own_locks(transactional_db):
    assert all("celery_pglock_pg" not in line for line in pglock("-l", "0").lines)


def test_the_locks_that_every_transaction_holds_on_itself_are_listed_when_asked_for(rivals):
    holder, *_ = rivals
    holder.connection.execute("BEGIN")
    holder.connection.execute("LOCK TABLE tests_entry IN SHARE MODE")
    types = pglock("-a", "type", "-a", "rel_name").lines
    assert "RELATION | tests_entry" in types
    assert not any("XID" in line or "TRANSACTIONID" in line for line in types)
    assert any("VIRTUALXID" in line for line in pglock(str(pid_of(holder)), "-a", "type").lines)
    assert any("VIRTUALXID" in line for line in pglock("-f", "type=virtualxid", "-a", "type").lines)


def test_the_command_does_not_list_its_own_backend_as_one_in_the_way(rivals):
    with transaction.atomic():
        assert advisory(7, xact=True).acquire()
        want(rivals[0], 7)
        assert pglock("--blocking", "--json").json == []
        assert pglock("--tree", "--json").json == []


def test_pids_choose_backends(waiting):
    _holder, waiter = waiting
    found = pglock(str(pid_of(waiter)), "--json").json
    assert {row["activity_id"] for row in found} == {pid_of(waiter)}


def test_filters_must_all_hold(waiting):
    holder, _waiter = waiting
    answer = pglock("-f", "type=ADVISORY", "--filter", "granted=true", "--json")
    assert [row["activity_id"] for row in answer.json] == [pid_of(holder)]
    assert pglock("-f", "wait_duration__gte=1 hour", "--json").json == []


def test_on_chooses_locks_of_models(rivals):
    with rivals[0].connection.transaction():
        rivals[0].connection.execute("LOCK TABLE tests_entry IN SHARE MODE")
        found = pglock("-o", "tests.Entry", "--json").json
        assert [(row["rel_name"], row["mode"]) for row in found] == [("tests_entry", "SHARE")]
        assert pglock("--on", "celery_pglock.SkipCount", "--json").json == []


def test_attributes_are_the_columns_in_the_order_given(waiting):
    _holder, _ = waiting
    attributes = ["-a", "activity__application_name", "--attribute", "mode"]
    answer = pglock("-f", "type=ADVISORY", "-f", "granted=t", *attributes)
    assert answer.lines == ["activity__application_name | mode", "holder                     | EXCLUSIVE"]


def test_blocking_shows_each_wait_with_who_is_in_its_way(waiting):
    holder, waiter = waiting
    (found,) = pglock("--blocking", "--json").json
    assert (found["activity_id"], found["blocking_activity_id"]) == (pid_of(waiter), pid_of(holder))
    assert found["blocking_activity__application_name"] == "holder"


def test_a_limit_says_on_stderr_how_many_it_cut_off(waiting):
    answer = pglock("-f", "type=ADVISORY", "-l", "1")
    assert len(answer.lines) == 2
    assert answer.err == "1 more: --limit 0 shows all.\n"


def test_the_limit_0_shows_all(waiting, pglock_settings):
    pglock_settings(LIST_LIMIT=1)
    assert len(pglock("-f", "type=ADVISORY").lines) == 2
    assert len(pglock("-f", "type=ADVISORY", "-l", "0").lines) == 3
    assert len(call_command_with(limit=0).lines) == 3


def call_command_with(**options):
    out = StringIO()
    call_command("pglock", filters=["type=ADVISORY"], stdout=out, stderr=StringIO(), **options)
    return Answer(out.getvalue(), "", 0)


def test_the_expanded_view_has_a_line_for_each_attribute(waiting):
    answer = pglock("-f", "granted=false", "-e", "-a", "mode", "-a", "rel_name", "-a", "activity__query")
    assert answer.lines == [
        "--- 1 ---",
        "mode           : EXCLUSIVE",
        "rel_name       : -",
        "activity__query: SELECT pg_advisory_lock(7)",
    ]


def test_a_configuration_chooses_and_options_override_it(waiting, pglock_settings):
    mine = {"blocking": True, "attributes": ["activity_id"], "limit": 5, "filters": ["mode=SHARE"]}
    pglock_settings(CONFIGS={"mine": mine})
    assert pglock("-c", "mine").err == "No waits were found.\n"
    answer = pglock("--config", "mine", "-f", "mode=EXCLUSIVE")
    assert answer.lines[0] == "activity_id"
    assert len(answer.lines) == 2


def test_the_default_database_is_the_one_of_the_locks_of_tasks(pglock_settings, transactional_db):
    pglock_settings(USING="sqlite")
    assert "'sqlite' is not PostgreSQL" in error_of()
    assert pglock("-d", "default").code == 0
    assert "'sqlite' is not PostgreSQL" in error_of("--database", "sqlite", "-o", "tests.Entry")


def test_finding_nothing_is_said_on_stderr(transactional_db):
    answer = pglock("-f", "name=nobody")
    assert (answer.out, answer.err, answer.code) == ("", "No locks were found.\n", 0)


def test_json_has_iso_8601_times_and_seconds(waiting):
    (found,) = pglock("--blocking", "--json", "-a", "wait_duration", "-a", "wait_start", "-a", "granted").json
    assert 0 <= found["wait_duration"] < 60
    assert found["wait_start"][10] == "T"
    assert found["granted"] is False


# What data cannot do


def test_data_cannot_steer_the_terminal_nor_forge_a_line(rivals):
    evil, waiter, *_ = rivals
    evil.take(7)
    evil.connection.execute("SELECT 1 /* \x1b[2J\x1b]0;x\x07 \u202e \r\nactivity_id: 1 */")
    want(waiter, 7)
    texts = [
        pglock("-f", "type=ADVISORY").out,
        pglock("-f", "type=ADVISORY", "-e").out,
        pglock("--blocking", "-a", "blocking_activity__query").out,
        pglock("--tree").out,
        pglock("--terminate", str(pid_of(evil)), "-f", "type=ADVISORY", "-y").err,
    ]
    for text in texts:
        assert not any(sign in text for sign in "\x1b\x07\r\u202e")
        assert "\nactivity_id: 1" not in text
    assert r"\x1b[2J" in texts[0]


def test_a_name_in_a_label_cannot_steer_the_terminal(rivals):
    with advisory("a\x1b[31m\nb"):
        for arguments in (["-f", "name__contains=a"], ["--why", "a\x1b[31m\nb"]):
            assert "\x1b" not in pglock(*arguments).out
            assert "\nb" not in pglock(*arguments).out


def test_one_line_shows_what_it_may_not_write():
    assert one_line("a\n  b\t\x9b1m\u2066\ud800") == r"a b \x9b1m\u2066\ud800"
    assert one_line(None) == "-"
    assert one_line(timedelta(days=1, seconds=5, microseconds=7)) == "1 day, 0:00:05"


def test_a_cut_counts_the_columns_of_wide_characters():
    assert cut("漢字漢字", 5) == "漢字…"
    assert cut("abc", 3) == "abc"


@contextmanager
def as_ordinary_role():
    role = f"plain_{uuid4().hex}"
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {role}")
        for view in ("pgactivity", "pglock", "blockedpglock"):
            cursor.execute(f"GRANT SELECT ON celery_pglock_{view} TO {role}")
        cursor.execute(f"SET ROLE {role}")
        try:
            yield
        finally:
            cursor.execute("RESET ROLE")
            cursor.execute(f"DROP OWNED BY {role}")
            cursor.execute(f"DROP ROLE {role}")


def test_what_may_not_be_read_is_shown_as_such_and_said_once(waiting):
    holder, _ = waiting
    with as_ordinary_role():
        for arguments in (["-f", "type=ADVISORY"], ["--blocking"], ["--tree"], ["--why", "7"]):
            answer = pglock(*arguments)
            assert answer.err.count("pg_read_all_stats") == 1
            if arguments[0] != "--tree" and arguments[0] != "--why":
                assert "<insufficient privilege>" in answer.out
        refused = pglock(str(pid_of(holder)), "--terminate", "-y")
        assert "not permitted" in refused.out
        assert refused.code == 3
    assert pglock("--tree").err == ""


# Trees


def test_the_tree_shows_root_blockers_first_and_who_waits_for_them(waiting):
    holder, waiter = waiting
    root, below = pglock("--tree").lines
    assert root.startswith(f"{pid_of(holder)} holder, IDLE for 0:00:")
    assert below.startswith(f"    {pid_of(waiter)} waiter, ACTIVE for 0:00:")
    assert below.endswith("for ADVISORY EXCLUSIVE 7")


def test_who_waits_for_several_appears_below_each(rivals):
    one, other, waiter, *_ = rivals
    one.take(7, shared=True)
    other.take(7, shared=True)
    want(waiter, 7)
    lines = pglock("--tree").lines
    assert len(lines) == 4
    assert {line.split()[0] for line in lines[0:3:2]} == {str(pid_of(one)), str(pid_of(other))}
    assert lines[1].startswith(f"    {pid_of(waiter)} ")
    assert lines[3] == f"    {pid_of(waiter)} waits for it, too (shown elsewhere)"


def test_the_tree_of_a_pid_is_the_whole_tree_that_contains_it(rivals):
    holder, waiter, other, other_waiter, _ = rivals
    holder.take(7)
    other.take(8)
    want(waiter, 7)
    want(other_waiter, 8)
    assert len(pglock("--tree").lines) == 4
    for pid in (pid_of(other), pid_of(other_waiter)):
        lines = pglock("--tree", str(pid)).lines
        assert [line.split()[0] for line in lines] == [str(pid_of(other)), str(pid_of(other_waiter))]
    (tree,) = pglock("--tree", "--json", "-f", "objid=7").json
    assert tree["pid"] == pid_of(holder)
    answer = pglock("--tree", "-l", "1")
    assert len(answer.lines) == 2
    assert answer.err == "1 more: --limit 0 shows all.\n"
    assert pglock("--tree", "1").err == "No such waits were found.\n"


def test_a_tree_without_waits_says_so(transactional_db):
    answer = pglock("--tree")
    assert (answer.out, answer.err, answer.code) == ("", "Nobody waits.\n", 0)


def test_the_tree_is_nested_objects_in_json(waiting):
    holder, waiter = waiting
    (root,) = pglock("--tree", "--json").json
    assert (root["pid"], root["application_name"], root["wait"]) == (pid_of(holder), "holder", None)
    (below,) = root["waiters"]
    assert (below["pid"], below["wait"]["objid"], below["waiters"]) == (pid_of(waiter), 7, [])


def hold_as_task(somebody, number, task_name, task_id, name):
    """Hold a lock with the label of a task."""
    call_himself(somebody, f"pglock:{task_id}")
    label = f"/*pglock:1 task={task_name} id={task_id} worker=w1 key=1:0:{number}:1.0:{name}*/"
    somebody.connection.execute(f"{label} SELECT pg_advisory_lock({number})")


def test_tasks_are_named_where_a_label_is_beside_its_lock(rivals):
    lock_session, work, holder, *_ = rivals
    hold_as_task(lock_session, 7, "shop.sync", "abc", "report")
    call_himself(work, "celery:abc")
    hold_as_task(holder, 8, "shop.%1b%5b31mother", "def", "other")
    want(work, 8)
    root, below = pglock("--tree").lines
    assert root.startswith(rf"{pid_of(holder)} shop.\x1b[31mother [def], IDLE for ")
    assert below.startswith(f"    {pid_of(work)} shop.sync [abc], ACTIVE for ")
    assert f", the other session of its task is {pid_of(lock_session)}, waits " in below
    victim = pglock("-f", "name=report", "--terminate", "-y").err
    assert victim.startswith(f"backend {pid_of(lock_session)}: shop.sync [abc] (pglock:abc), IDLE for ")
    assert "holds ADVISORY EXCLUSIVE 'report'" in victim


def test_the_tree_mentions_the_other_session_of_a_task(rivals):
    lock_session, work, waiter, *_ = rivals
    call_himself(lock_session, "pglock:abc")
    call_himself(work, "celery:abc")
    lock_session.take(7)
    want(waiter, 7)
    root, _ = pglock("--tree").lines
    assert root.startswith(f"{pid_of(lock_session)} task [abc], IDLE")
    assert root.endswith(f"the other session of its task is {pid_of(work)}")


def test_a_deadlock_is_named_as_a_cycle(rivals):
    one, other, *_ = rivals
    for somebody, number in ((one, 7), (other, 8)):
        somebody.connection.execute("SET deadlock_timeout = '60s'")
        somebody.take(number)
    want(one, 8)
    want(other, 7)
    cycle, root, below, again = pglock("--tree").lines
    a, b = pid_of(one), pid_of(other)
    assert cycle in (
        f"cycle: {a} waits for {b}, {b} waits for {a}; PostgreSQL will end it",
        f"cycle: {b} waits for {a}, {a} waits for {b}; PostgreSQL will end it",
    )
    assert ", in a cycle, waits " in root
    assert ", in a cycle, waits " in below
    assert again.strip() == f"{root.split()[0]} waits for it, too (shown elsewhere)"


def test_a_deadlock_over_two_connections_of_each_task_is_named_as_a_cycle(rivals):
    lock_1, work_1, lock_2, work_2, _ = rivals
    for somebody, name in zip(rivals, ["pglock:a", "celery:a", "pglock:b", "celery:b"], strict=False):
        call_himself(somebody, name)
    lock_1.take(1)
    work_2.take(2)
    want(work_1, 2)
    want(lock_2, 1)
    lines = pglock("--tree").lines
    assert lines[0].startswith("cycle: ")
    assert f"{pid_of(work_1)} waits for {pid_of(work_2)} (of one task with {pid_of(lock_2)})" in lines[0]
    assert f"{pid_of(lock_2)} waits for {pid_of(lock_1)} (of one task with {pid_of(work_1)})" in lines[0]
    assert lines[0].endswith("PostgreSQL does not see it: stop one of them")
    assert sum("in a cycle" in line for line in lines) == 4


def test_a_task_that_waits_for_its_own_lock_session_is_a_cycle(rivals):
    lock_session, work, *_ = rivals
    call_himself(lock_session, "pglock:a")
    call_himself(work, "celery:a")
    lock_session.take(1)
    want(work, 1)
    assert pglock("--tree").lines[0].startswith(f"cycle: {pid_of(work)} waits for {pid_of(lock_session)} ")


def wait(waiter, blocker):
    activity = PGActivity(pk=waiter, application_name="", state="ACTIVE", query="")
    in_the_way = None if blocker is None else PGActivity(pk=blocker, application_name="", query="")
    return BlockedPGLock(
        pk=f"{waiter}:{blocker}",
        type="RELATION",
        mode="SHARE",
        activity=activity,
        blocking_activity=in_the_way,
        wait_duration=timedelta(seconds=1000 - waiter),
        rel_name="t",
    )


def test_a_prepared_transaction_is_a_root():
    waits = Waits([wait(1, None)], {}, {})
    root, below = waits.trees(waits.roots())[0].lines()
    assert root == "a transaction that was prepared (see pg_prepared_xacts)"
    assert below.startswith("    1 unnamed, ACTIVE, waits 0:16:39 for RELATION SHARE t")


def test_a_long_queue_takes_a_line_for_each_and_not_for_each_way_to_it():
    queue = [wait(waiter, blocker) for waiter in range(2, 102) for blocker in range(1, waiter)]
    waits = Waits(queue, {}, {})
    assert waits.cycles == []
    assert waits.roots() == [1]
    lines = list(waits.trees([1])[0].lines())
    assert len(lines) < 2 * 101
    assert max(map(len, lines)) < 120


@pytest.mark.long
@pytest.mark.parametrize("order", [1, -1])
def test_whoever_is_late_in_a_long_queue_is_told_everybody_before_him_once(order):
    queue = [wait(waiter, blocker) for waiter in range(2, 302) for blocker in range(1, waiter)]
    lines = [line for one in Waits(queue[::order], {}, {}).obstacles(301) for line in one.lines(1)]
    assert len(lines) == 2 * 300


def test_a_chain_is_followed_to_its_root():
    lines = [line for one in Waits([wait(3, 2), wait(2, 1)], {}, {}).obstacles(3) for line in one.lines(0)]
    assert [line.split()[:2] for line in lines] == [
        ["3", "waits"],
        ["behind", "2"],
        ["2", "waits"],
        ["behind", "1"],
    ]


def test_a_cycle_behind_a_root_and_one_before_another_are_both_found():
    waits = Waits(
        [wait(2, 1), wait(2, 3), wait(3, 2), wait(5, 6), wait(6, 5), wait(7, 5), wait(8, 7)], {}, {}
    )
    assert [{row.activity_id for row in cycle.waits} for cycle in waits.cycles] == [{2, 3}, {5, 6}]
    roots = waits.roots()
    assert sorted(roots) in ([1, 5], [1, 6])
    lines = [line for tree in waits.trees(roots) for line in tree.lines()]
    assert {int(line.split()[0]) for line in lines} == {1, 2, 3, 5, 6, 7, 8}


# Why


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("report", "report"),
        ("42", 42),
        ("-42", -42),
        ("(1, -2)", (1, -2)),
        ("(1,2)", (1, 2)),
        ('"42"', "42"),
        ("'(1, 2)'", "(1, 2)"),
        ("042", "042"),
        ("1,2", "1,2"),
        ('"a', '"a'),
        ("٤٢", "٤٢"),
    ],
)
def test_a_key_is_a_number_where_it_looks_like_one(text, meant):
    assert identifier(text) == meant


def test_why_tells_who_holds_a_key_and_ends_with_3(rivals):
    rivals[0].take("report")
    want(rivals[1], "report")
    answer = pglock("--why", "report")
    first, held, waits = answer.lines
    assert first == "lock 'report': taken"
    assert f"backend {pid_of(rivals[0])}" in held
    assert f"backend {pid_of(rivals[1])}" in waits
    assert answer.code == 3
    found = pglock("--why", "report", "--json").json
    assert (found["would_run"], found["holders"][0]["pid"]) == (False, pid_of(rivals[0]))


def test_why_of_a_free_key_ends_with_0(transactional_db):
    answer = pglock("--why", "report")
    assert (answer.lines, answer.code) == (["lock 'report': free to take"], 0)


def test_why_goes_on_to_what_the_holder_waits_for(rivals):
    holder, work, middle, root, _ = rivals
    call_himself(holder, "pglock:abc")
    call_himself(work, "celery:abc")
    call_himself(root, "psql")
    holder.take(1)
    middle.take(2)
    root.take(3)
    want(middle, 3)
    want(work, 2)
    answer = pglock("--why", "1")
    _, held, work_waits, behind_middle, middle_waits, behind_root = answer.lines
    assert f"backend {pid_of(holder)}" in held
    assert work_waits.startswith(f"    {pid_of(work)} waits 0:00:0")
    assert work_waits.endswith("for ADVISORY EXCLUSIVE 2")
    assert behind_middle.startswith(f"    behind {pid_of(middle)} ")
    assert middle_waits.startswith(f"        {pid_of(middle)} waits ")
    assert behind_root.startswith(f"        behind {pid_of(root)} psql, IDLE for ")
    (holding,) = pglock("--why", "1", "--json").json["holders"]
    assert holding["waits"][0]["blocker"]["waits"][0]["blocker"]["pid"] == pid_of(root)


# Stopping


def test_terminate_ends_the_backends_of_what_was_chosen_and_says_so(waiting):
    holder, waiter = waiting
    answer = pglock("-f", "type=ADVISORY", "-f", "granted=true", "--terminate", "--yes")
    assert answer.err == (
        f"backend {pid_of(holder)}: holder, IDLE for 0:00:00, holds ADVISORY EXCLUSIVE 7; "
        "SELECT pg_try_advisory_lock($1)\n"
    )
    assert (answer.out, answer.code) == (f"backend {pid_of(holder)}: {ENDED}\n", 0)
    assert PGActivity.objects.filter(pk=pid_of(waiter)).exists()


def test_a_victim_is_told_by_the_most_telling_of_its_locks(rivals):
    Entry.objects.create(key="k", task_id="t", what="w")
    rivals[0].connection.execute("BEGIN")
    rivals[0].connection.execute("UPDATE tests_entry SET what = 'x'")
    answer = pglock(str(pid_of(rivals[0])), "--terminate", "-y")
    assert ", holds RELATION ROW_EXCLUSIVE tests_entry and " in answer.err


def test_blocking_terminate_ends_those_who_are_in_the_way(waiting):
    holder, waiter = waiting
    answer = pglock(str(pid_of(waiter)), "--blocking", "--terminate", "-y")
    assert f"blocks {pid_of(waiter)}, which waits for ADVISORY EXCLUSIVE 7" in answer.err
    assert answer.out == f"backend {pid_of(holder)}: {ENDED}\n"


def test_cancel_cancels_and_what_is_idle_is_told_with_exit_3(waiting):
    holder, waiter = waiting
    answer = pglock("-f", "type=ADVISORY", "--cancel", "-y", "--json")
    outcomes = {one["pid"]: (one["outcome"], one["is_done"]) for one in answer.json}
    assert outcomes == {pid_of(holder): ("idle", False), pid_of(waiter): ("cancelled", True)}
    assert answer.code == 3
    assert PGActivity.objects.filter(pk=pid_of(holder)).exists()


def test_all_that_was_chosen_is_stopped_whatever_the_limit(waiting):
    _holder, _waiter = waiting
    answer = pglock("-f", "type=ADVISORY", "-l", "1", "--terminate", "-y")
    assert "All of them are meant: the limit 1 is only for what is shown." in answer.err
    assert answer.out.count(ENDED) == 2


def test_stopping_nobody_is_well(transactional_db):
    answer = pglock("-f", "name=nobody", "--terminate")
    assert (answer.err, answer.code) == ("There is nobody to terminate.\n", 0)


def test_stopping_everybody_is_refused(waiting, pglock_settings):
    holder, waiter = waiting
    pglock_settings(CONFIGS={"all": {"limit": 3}})
    for arguments in (["--terminate"], ["--cancel"], ["--blocking", "--cancel"], ["-c", "all", "--cancel"]):
        assert "name pids, or narrow it by --filter or --on" in error_of(*arguments, "-y")
    assert PGActivity.objects.filter(pk__in=[pid_of(holder), pid_of(waiter)]).count() == 2


def test_a_configuration_can_stop(waiting, pglock_settings):
    _holder, waiter = waiting
    filters = ["activity__application_name=waiter"]
    pglock_settings(CONFIGS={"mine": {"filters": filters, "cancel": True, "yes": True}})
    assert pglock("-c", "mine").out.startswith(f"backend {pid_of(waiter)}: cancelled")
    with pytest.raises(CommandError, match="--watch does not go together with --cancel"):
        pglock("-c", "mine", "--watch")


def test_one_way_to_stop_takes_the_place_of_that_of_the_configuration(waiting, pglock_settings):
    holder, _waiter = waiting
    filters = ["activity__application_name=holder"]
    pglock_settings(CONFIGS={"mine": {"filters": filters, "cancel": True, "yes": True}})
    assert pglock("-c", "mine", "--terminate").out.startswith(f"backend {pid_of(holder)}: terminated")


def test_without_a_terminal_and_without_yes_nothing_is_done(waiting):
    holder, _ = waiting
    answer = in_process(str(pid_of(holder)), "--terminate")
    assert answer.code == 1
    assert f"backend {pid_of(holder)}: holder" in answer.err
    assert "CommandError: Nothing was done: without a terminal nobody can be asked" in answer.err
    assert PGActivity.objects.filter(pk=pid_of(holder)).exists()


def test_a_person_is_asked_and_only_yes_means_yes(waiting):
    holder, waiter = waiting
    arguments = (str(pid_of(holder)), str(pid_of(waiter)), "--terminate")
    refused = on_terminal(*arguments, answer="\n")
    assert refused.err.endswith("Terminate 2 backends? [y/N] Nothing was done.\n")
    assert refused.code == 3
    assert PGActivity.objects.filter(pk=pid_of(holder)).exists()
    agreed = on_terminal(*arguments, answer="y\n")
    assert agreed.out.count(ENDED) == 2
    assert agreed.code == 0


def test_only_what_was_confirmed_is_stopped(waiting, rival):
    holder, waiter = waiting

    def change_sides():
        rival.take(9)
        holder.give_back(7)
        wait_until(lambda: rival.sees_held(7) and not rival.sees_held(7, granted=False), "it is handed over")

    arguments = ("-f", "granted=true", "-f", "type=ADVISORY", "--terminate")
    answer = on_terminal(*arguments, answer="y\n", meanwhile=change_sides)
    gone = f"backend {pid_of(holder)}: gone (it had ended already, or was no longer what was chosen)"
    assert answer.out.splitlines()[-1] == gone
    assert answer.code == 3
    assert PGActivity.objects.filter(pk__in=[pid_of(holder), pid_of(waiter), pid_of(rival)]).count() == 3


# The terminal, and what is no terminal


def test_lines_are_cut_to_a_terminal_and_whole_elsewhere(waiting):
    arguments = ["-f", "type=ADVISORY", "-l", "1", "-a", "id", "-a", "activity__query", "-a", "mode"]
    lines = on_terminal(*arguments, columns=30).out.replace("\r", "").splitlines()
    assert len(lines) == 2
    assert all(len(line) <= 30 for line in lines)
    assert lines[1].endswith("…")
    whole = in_process(*arguments, variables={"COLUMNS": "30"})
    assert "SELECT pg_advisory_lock(7)" in whole.out
    assert whole.lines[1].endswith("EXCLUSIVE")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_is_no_error(unbuffered, rivals):
    for number in range(3000):
        rivals[0].take(number)
    with _process("-l", "0", variables={"PYTHONUNBUFFERED": unbuffered}) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert err == ""
    assert process.returncode == 0


def test_a_reader_that_has_gone_before_the_first_line_is_no_error(transactional_db):
    with _process("-f", "name=nobody", "--json") as process:
        process.stdout.close()
        err = process.stderr.read()
    assert err == "No locks were found.\n"
    assert process.returncode == 0


def test_an_output_that_knows_few_characters_is_no_error(rivals):
    call_himself(rivals[0], "x")
    rivals[0].take(7)
    rivals[0].connection.execute("SELECT 'é漢'")
    answer = in_process("-f", "type=ADVISORY", variables={"PYTHONIOENCODING": "ascii"})
    assert r"\xe9\u6f22" in answer.out


def test_watching_looks_again_over_errors_until_it_is_interrupted(waiting, rival):
    _holder, _ = waiting
    name = f"watching {uuid4()}"
    with _process("--blocking", "--json", "--watch", "0.1", variables={"PGAPPNAME": name}) as process:
        first = json.loads(process.stdout.readline())
        rival.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s", name)
        assert process.stderr.readline().startswith("The database says: ")
        second = json.loads(process.stdout.readline())
        assert first[0]["activity_id"] == second[0]["activity_id"]
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert "\x1b" not in rest


def test_a_terminal_is_cleared_before_each_look(transactional_db):
    terminal, slave = pty.openpty()
    with _process("--tree", "--watch", "0.1", stdout=slave) as process:
        os.close(slave)
        seen = b""
        while seen.count(b"\x1b[H\x1b[2J") < 2:
            seen += os.read(terminal, 4096)
        process.send_signal(signal.SIGINT)
        process.wait(20)
    os.close(terminal)
    assert b"every 0.1 s" in seen
    assert process.returncode == 0


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "default2"], "'default2', which is not in DATABASES. Did you mean 'default'?"),
        (["-o", "tests.Entri"], "no model 'tests.Entri'. Did you mean"),
        (["-f", "x=1"], "The filter 'x=1' cannot be used"),
        (["-f", "granted"], "must be LOOKUP=VALUE"),
        (["-f", "name__regex=("], "The database says: "),
        (["-a", "activity__dration"], "no attribute 'activity__dration'. Did you mean 'activity__duration'?"),
        (["-a", "blocking_activity_id"], "with --blocking there is one"),
        (["-c", "mine"], "no configuration 'mine'"),
        (["-l", "many"], "The limit 'many' must be a number of rows"),
        (["-l", "-1"], "The limit '-1' must be a number of rows"),
        (["x"], "'x' is not a pid"),
        (["--tree", "x"], "'x' is not a pid"),
        (["--watch", "0"], "--watch takes 0.1 to 3600 seconds, not '0'"),
        (["--watch", "4711"], "pids stand before it"),
        (["--watch", "soon"], "--watch takes"),
        (["--why", ""], "is not a lock id"),
        (["--why", str(2**64)], "does not fit"),
    ],
)
def test_what_cannot_be_is_an_error_of_one_line(arguments, message, transactional_db):
    assert message in error_of(*arguments)


VIEWS = ("pgactivity", "pglock", "blockedpglock", "wait")


@pytest.mark.parametrize("arguments", [[], ["--blocking"], ["--tree"], ["--why", "x"]])
def test_a_missing_migration_is_named(arguments, transactional_db):
    with connection.cursor() as cursor:
        for view in VIEWS:
            cursor.execute(f"ALTER VIEW celery_pglock_{view} RENAME TO away_{view}")
        try:
            assert "run manage.py migrate celery_pglock --database=default" in error_of(*arguments)
        finally:
            for view in VIEWS:
                cursor.execute(f"ALTER VIEW away_{view} RENAME TO celery_pglock_{view}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--why", "x", "1"],
        ["--why", "x", "--cancel"],
        ["--why", "x", "--tree"],
        ["--why", "x", "-f", "a=b"],
        ["--tree", "--terminate"],
        ["--tree", "-a", "mode"],
        ["--watch", "--terminate"],
        ["--cancel", "--terminate"],
        ["--json", "-e"],
    ],
)
def test_options_that_do_not_go_together_are_a_usage_error(arguments):
    with pytest.raises(CommandError, match="does not go together") as caught:
        pglock(*arguments)
    assert caught.value.returncode == 2


def test_the_exit_codes_are_those_that_the_help_tells(rivals):
    assert in_process("--tree").code == 0
    wrong = in_process("-d", "default2")
    assert wrong.code == 1
    assert wrong.err.startswith("CommandError: ")
    assert len(wrong.err.splitlines()) == 1
    assert in_process("--misspelt").code == 2
    assert in_process("--watch", "--cancel").code == 2
    rivals[0].take("report")
    taken = in_process("--why", "report")
    assert (taken.code, taken.err) == (3, "")
    told = in_process("--help")
    assert "0 done; 1 an error; 2 a usage error; 3 the answer is no" in " ".join(told.out.split())
