"""What may stand between a lock and the server that should keep it: poolers, a standby, Django's pool."""

import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from io import StringIO

import psycopg
import pytest
from django.conf import settings
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import OperationalError, connection, connections

from celery_pglock import LockLost, LockMisuse, LockNotAcquired, Raise, advisory, prioritize
from tests.conftest import running_worker, wait_until
from tests.models import Entry, most_at_once
from tests.pooled_tasks import only_in_transaction
from tests.servers import Cluster, PgBouncer, pgbouncer_program
from tests.worker_tasks import skips

# Sessions are kept as outside of tests: one that was closed would say nothing of what is given back.
pytestmark = [pytest.mark.usefixtures("pooled"), pytest.mark.long]

WAYS_OUT = [
    "connects to the server directly",
    "lock_using",
    "lock_xact",
    "xact=True",
    "CELERY_PGLOCK['POOLER']",
]


def pgbouncer(mode, pool_size=10):
    """A PgBouncer before the server that the tests run against."""
    if not pgbouncer_program():
        pytest.skip("pgbouncer is not installed: apt-get install pgbouncer")
    server = connection.settings_dict
    return PgBouncer(
        int(server["PORT"] or 5432),
        mode,
        pool_size,
        host=server["HOST"] or "127.0.0.1",
        user=server["USER"],
        password=server["PASSWORD"],
    )


@pytest.fixture
def alias(rival, django_db_blocker):
    """Adds an alias that is the default one, but for these settings."""
    added = []

    def add(name, **settings):
        connections.databases[name] = {**connections.databases["default"], **settings}
        added.append(name)
        return name

    # Django keeps a test from connecting to aliases that were not there when it began.
    with django_db_blocker.unblock():
        yield add
        for name in added:
            connections[name].close()
            del connections[name]
            del connections.databases[name]


@pytest.fixture
def through(alias):
    """An alias that leads to the tests' server through a PgBouncer in this mode."""
    with ExitStack() as poolers:

        def start(mode, pool_size=10):
            pooler = poolers.enter_context(pgbouncer(mode, pool_size))
            return alias(f"through-{mode}", HOST="127.0.0.1", PORT=str(pooler.port))

        yield start


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def standby(cluster):
    with cluster.standby() as standby:
        yield standby


def of(server):
    """Where an alias has to lead to reach a server of the tests' own."""
    return {"HOST": "127.0.0.1", "PORT": str(server.port), "NAME": "postgres", "USER": "postgres"}


class Room:
    """Counts who is inside, and the most that ever were at once."""

    def __init__(self, stay=0.002):
        self.stay = stay
        self.inside = self.most = self.visits = 0
        self._counting = threading.Lock()

    @contextmanager
    def visit(self):
        with self._counting:
            self.inside += 1
            self.visits += 1
            self.most = max(self.most, self.inside)
        try:
            time.sleep(self.stay)
            yield
        finally:
            with self._counting:
                self.inside -= 1


@contextmanager
def noting(refused):
    try:
        yield
    except (LockMisuse, LockLost) as error:
        refused.append(type(error))


def in_threads(function, count=8):
    def run(number):
        try:
            return function(number)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def messages_of_check(*aliases):
    try:
        call_command("check", databases=list(aliases) or None, stdout=StringIO())
    except SystemCheckError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("mode", ["transaction", "session"])
class TestAPoolerThatIsNotDeclared:
    @pytest.mark.parametrize("options", [{}, {"timeout": 0}, {"shared": True}, {"limit": 2}], ids=str)
    def test_session_level_locks_are_refused_with_the_ways_out(self, rival, through, mode, options):
        with pytest.raises(LockMisuse) as refused, advisory("k", using=through(mode), **options):
            pytest.fail("the body runs")
        for text in [f"'through-{mode}'", "connection pooler", *WAYS_OUT]:
            assert text in str(refused.value)
        assert not rival.sees_advisory_locks()

    def test_a_refusal_leaves_no_setting_behind(self, through, mode):
        using = through(mode, pool_size=1)
        parameters = {**connections[using].get_connection_params(), "cursor_factory": None, "context": None}

        def next_client_gets():
            with psycopg.connect(**parameters) as client:
                return client.execute(
                    "SELECT name, setting FROM pg_settings"
                    " WHERE source = 'session' OR name = 'application_name'"
                ).fetchall()

        before = next_client_gets()
        with pytest.raises(LockMisuse):
            advisory("k", using=using).acquire()
        assert next_client_gets() == before

    def test_transaction_level_locks_exclude(self, rival, through, mode):
        with advisory("k", xact=True, using=through(mode)) as acquired:
            assert acquired
            assert not rival.could_take("k")
        assert rival.could_take("k")

    def test_a_conflict_of_transaction_level_locks_is_one(self, rival, through, mode):
        rival.take("k")
        with pytest.raises(LockNotAcquired):
            advisory("k", xact=True, using=through(mode), timeout=0, side_effect=Raise).__enter__()


def test_threads_exclude_each_other_by_transaction_level_locks_through_a_pooler(through):
    using, room = through("transaction", pool_size=4), Room()

    def visit(_):
        for _ in range(25):
            with advisory("k", xact=True, using=using) as acquired, room.visit():
                assert acquired

    in_threads(visit)
    assert (room.most, room.visits) == (1, 200)


class TestAPoolerDeclaredToRunInSessionMode:
    @pytest.fixture(autouse=True)
    def _declared(self, pglock_settings):
        pglock_settings(POOLER="session")

    def test_a_session_level_lock_excludes_and_is_given_back(self, rival, through):
        with advisory("k", using=through("session")) as acquired:
            assert acquired
            assert not rival.could_take("k")
        assert rival.could_take("k")

    def test_one_session_of_the_pooler_is_enough_for_one_lock(self, through):
        with advisory("k", using=through("session", pool_size=1)) as acquired:
            assert acquired

    def test_a_killed_process_frees_its_key_within_a_second(self, rival, through):
        using = through("session")
        child = os.fork()
        if not child:
            try:
                advisory("k", using=using).acquire()
                time.sleep(60)
            finally:
                os._exit(1)
        wait_until(lambda: rival.sees_held("k"))
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: rival.could_take("k"), "the key is free", seconds=1)
        os.waitpid(child, 0)

    def test_a_pooler_that_dies_costs_the_lock_and_the_holder_is_told(self, rival, alias):
        with pgbouncer("session") as pooler:
            using = alias("dies", HOST="127.0.0.1", PORT=str(pooler.port))
            with pytest.raises(LockLost), advisory("k", using=using):
                pooler.process.kill()
                wait_until(lambda: rival.could_take("k"))

    def test_threads_exclude_each_other(self, through):
        using, room = through("session"), Room()

        def visit(_):
            for _ in range(25):
                with advisory("k", using=using) as acquired, room.visit():
                    assert acquired

        in_threads(visit)
        assert (room.most, room.visits) == (1, 200)

    def test_one_that_gives_two_clients_the_same_server_session_is_noticed(self, through):
        using = through("transaction", pool_size=1)

        def enter(_):
            assert not advisory("k", using=using, timeout=0).acquire()

        with pytest.raises(LockMisuse), advisory("k", using=using):
            in_threads(enter, count=1)

    @pytest.mark.parametrize("timeout", [0, 0.2])
    def test_one_that_runs_in_transaction_mode_never_lets_two_bodies_meet(self, through, timeout):
        using, room, refused = through("transaction", pool_size=2), Room(stay=0.2), []
        until = time.monotonic() + 1.5

        def visit(number):
            while time.monotonic() < until:
                if number < 3:
                    # The others of the pooler's clients: who gets which server session is up to chance.
                    with connections[using].cursor() as cursor:
                        cursor.execute("SELECT pg_sleep(0.001)")
                    continue
                with (
                    noting(refused),
                    advisory("k", using=using, timeout=timeout) as acquired,
                    room.visit() if acquired else nullcontext(),
                ):
                    pass

        in_threads(visit, count=24)
        assert room.most <= 1
        assert LockMisuse in refused


class TestWorkersThroughAPoolerInTransactionMode:
    def test_one_with_session_level_locks_does_not_start_and_its_messages_stay(self, rival):
        result = skips.apply_async(["k"], queue="pooled")
        refused = re.compile("exit code [1-9].*'default'.*connection pooler.*lock_xact", re.DOTALL)
        with (
            pgbouncer("transaction") as pooler,
            pytest.raises(AssertionError, match=refused),
            running_worker("pooled", DATABASE_URL=pooler.url),
        ):
            pass
        assert not Entry.objects.exists()
        with running_worker("pooled"):
            assert result.get(timeout=20) == "done"

    def test_one_that_could_not_ask_when_it_started_runs_no_body_later(self, rival):
        with pgbouncer("transaction") as pooler:
            pooler.stop()
            with running_worker("pooled-later", DATABASE_URL=pooler.url) as worker:
                pooler.start()
                result = skips.apply_async(["k"], queue=worker.queue)
                with pytest.raises(LockMisuse, match="connection pooler"):
                    result.get(timeout=20)
        assert not Entry.objects.exists()
        assert not rival.sees_advisory_locks()

    def test_one_that_locks_nothing_starts(self, rival):
        disabled = {"PGLOCK_SETTINGS": '{"ENABLED": false}'}
        with (
            pgbouncer("transaction") as pooler,
            running_worker("disabled", DATABASE_URL=pooler.url, **disabled) as worker,
        ):
            assert skips.apply_async(["k"], queue=worker.queue).get(timeout=20) == "done"

    def test_one_whose_locks_are_all_transaction_level_excludes(self, rival):
        with (
            pgbouncer("transaction", pool_size=3) as pooler,
            running_worker(
                "xact", pool="threads", concurrency=6, DATABASE_URL=pooler.url, TASKS="pooled_tasks"
            ),
        ):
            results = [only_in_transaction.apply_async(["k"], queue="xact") for _ in range(30)]
            assert [result.get(timeout=30) for result in results] == ["done"] * 30
        assert most_at_once("k") == 1


# The checks are those of all apps.
@pytest.mark.django_db(transaction=True, available_apps=settings.INSTALLED_APPS)
class TestSystemCheck:
    def test_an_alias_through_a_pooler_is_an_error(self, through, pglock_settings):
        pglock_settings(USING=through("transaction"))
        messages = messages_of_check("through-transaction")
        assert "(celery_pglock.E003)" in messages
        for text in ["'through-transaction'", *WAYS_OUT]:
            assert text in messages

    def test_an_alias_that_keeps_no_locks_may_lead_anywhere(self, through, alias, standby):
        # Else one could not migrate through a pooler: migrate runs this check.
        through("transaction")
        alias("standby", **of(standby))
        assert messages_of_check("through-transaction", "standby") == ""

    def test_with_locks_disabled_there_is_none(self, through, pglock_settings):
        pglock_settings(USING=through("transaction"), ENABLED=False)
        assert messages_of_check("through-transaction") == ""

    def test_a_direct_alias_is_none(self, rival):
        assert messages_of_check("default") == ""

    def test_a_pooler_declared_to_run_in_session_mode_is_none(self, through, pglock_settings):
        pglock_settings(USING=through("session"), POOLER="session")
        assert messages_of_check("through-session") == ""

    def test_without_a_database_to_check_nothing_is_connected_to(self, through, pglock_settings):
        pglock_settings(USING=through("transaction"))
        assert messages_of_check() == ""

    def test_a_standby_is_an_error(self, alias, standby, pglock_settings):
        pglock_settings(USING=alias("standby", **of(standby)))
        messages = messages_of_check("standby")
        assert "(celery_pglock.E003)" in messages
        assert "standby (in recovery)" in messages


class TestStandby:
    @pytest.mark.parametrize("options", [{}, {"limit": 2}, {"xact": True}], ids=str)
    def test_a_lock_there_is_refused(self, alias, standby, options):
        using = alias("standby", **of(standby))
        with pytest.raises(OperationalError, match=r"'standby' is a standby \(in recovery\)"):  # noqa: SIM117
            with advisory("k", using=using, **options):
                pytest.fail("the body runs")

    def test_a_worker_whose_locks_would_live_there_does_not_start(self, rival, standby):
        with (
            pytest.raises(AssertionError, match=r"(?s)exit code [1-9].*standby \(in recovery\)"),
            running_worker("standby", DATABASE_URL=standby.url, TEST_DATABASE_NAME="postgres"),
        ):
            pass

    def test_once_promoted_it_keeps_locks(self, alias, cluster):
        with cluster.standby() as standby:
            using = alias("promoted", **of(standby))
            standby.promote()
            with advisory("k", using=using) as acquired:
                assert acquired


@pytest.mark.parametrize("xact", [False, True], ids=["session-level", "transaction-level"])
def test_threads_exclude_each_other_with_djangos_native_pool(rival, alias, xact):
    options = {**connections.databases["default"]["OPTIONS"], "pool": {"min_size": 1, "max_size": 10}}
    using, room = alias("natively-pooled", OPTIONS=options, CONN_MAX_AGE=0), Room()

    def visit(_):
        for _ in range(25):
            with advisory("k", xact=xact, using=using) as acquired, room.visit():
                assert acquired

    try:
        in_threads(visit)
        assert (room.most, room.visits) == (1, 200)
        assert rival.could_take("k")
    finally:
        connections[using].close_pool()


def test_whose_way_to_clear_cannot_be_told_through_a_pooler(through):
    with pytest.raises(LockMisuse, match="session mode"), prioritize(using=through("transaction")):
        raise AssertionError("the code ran")


def test_the_way_is_cleared_through_a_pooler_in_session_mode(through, rival, pglock_settings):
    pglock_settings(POOLER="session")
    alias = through("session")
    rival.connection.execute("BEGIN")
    rival.connection.execute("LOCK TABLE tests_entry IN ACCESS EXCLUSIVE MODE")
    with prioritize(interval=0.1, using=alias):
        assert Entry.objects.using(alias).count() == 0
    with pytest.raises(psycopg.OperationalError):
        rival.ask("SELECT true")
