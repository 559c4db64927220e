"""The recipes for metrics count what really became of locks, over all processes of a prefork worker."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from celery_pglock import LockNotAcquired
from example_project.servers import free_port
from tests.celery_app import app
from tests.conftest import ADVISORY_HERE, PATIENCE, Rival, running_worker, wait_until
from tests.losing_tasks import is_only_warned
from tests.models import Entry
from tests.worker_tasks import raises, retries, skips

# Without a database of the tests no worker has one.
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.long]

CHILDREN = 3
OUTCOMES = [(skips, "skipped"), (raises, "raised"), (retries, "retried")]


class Collector(ThreadingHTTPServer):
    """Takes what exporters send by OTLP, and keeps the newest of each process."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.newest = {}

    def sums(self):
        """By metric and labels: what all processes counted, or number and sum of what they measured."""
        totals = {}
        for (_, name, labels), numbers in list(self.newest.items()):
            known = totals.get((name, labels), [0] * len(numbers))
            totals[name, labels] = [sum(pair) for pair in zip(known, numbers, strict=True)]
        return totals


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = ExportMetricsServiceRequest()
        assert self.headers.get("Content-Encoding") is None
        request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
        for one in request.resource_metrics:
            resource = {pair.key: pair.value.string_value for pair in one.resource.attributes}
            for metric in (metric for scope in one.scope_metrics for metric in scope.metrics):
                self.keep(resource["service.instance.id"], metric)
        self.send_response(200)
        self.end_headers()

    def keep(self, process, metric):
        for point in (*metric.sum.data_points, *metric.histogram.data_points):
            labels = frozenset((pair.key, pair.value.string_value) for pair in point.attributes)
            measured = metric.HasField("histogram")
            numbers = [point.count, point.sum] if measured else [point.as_int]
            self.server.newest[process, metric.name, labels] = numbers

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def collector():
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def measured(django_db_setup, django_db_blocker, tmp_path_factory, collector):
    """What was counted where every outcome came up: by Prometheus, by OpenTelemetry, and by whom."""
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "counter_1.db").write_bytes(b"of a worker that has ended")
    port = free_port()
    variables = {
        "TASKS": "measured_tasks",
        "PROMETHEUS_MULTIPROC_DIR": str(folder),
        "METRICS_PORT": str(port),
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
    }
    with django_db_blocker.unblock():
        app.control.purge()
        with running_worker("celery", concurrency=CHILDREN, **variables) as worker:
            meet_every_outcome()
            scraped = scrape(port)
            # By itself an exporter would send once a minute.
            assert not collector.newest
            worker.process.terminate()
            worker.process.wait(PATIENCE)
    return scraped, collector.sums(), {process for process, *_ in collector.newest}


def meet_every_outcome():
    # As many at once as there are processes, so that each has one.
    for result in [skips.delay(f"free {number}", 0.5) for number in range(CHILDREN)]:
        assert result.get(timeout=20) == "done"
    rival = Rival()
    rival.take("taken")
    assert skips.delay("taken").get(timeout=10) == "skipped"
    with pytest.raises(LockNotAcquired):
        raises.delay("taken").get(timeout=10)
    retried = retries.delay("taken")
    wait_until(lambda: retried.state == "RETRY")
    rival.give_back("taken")
    assert retried.get(timeout=10) == 0
    lost = is_only_warned.delay("lost", 0.5)
    wait_until(lambda: Entry.objects.filter(key="lost", what="begins"))
    rival.ask(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE {ADVISORY_HERE}")
    assert lost.get(timeout=10) == "done"
    rival.connection.close()


def scrape(port):
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def labels(task, **more):
    return frozenset({"task": task.name, **more}.items())


class TestPrometheus:
    @pytest.fixture
    def found(self, measured):
        return measured[0]

    def test_it_counts_locks_of_all_processes(self, found):
        assert found["pglock_acquired_total", labels(skips)] == CHILDREN
        assert found["pglock_acquired_total", labels(retries)] == 1

    @pytest.mark.parametrize(("task", "outcome"), OUTCOMES)
    def test_it_counts_conflicts_by_outcome(self, found, task, outcome):
        number = found["pglock_conflicts_total", labels(task, outcome=outcome)]
        assert number >= 1 if outcome == "retried" else number == 1

    def test_it_measures_waits_over_retries(self, found):
        assert found["pglock_waited_seconds_count", labels(retries)] == 1
        assert 0.05 < found["pglock_waited_seconds_sum", labels(retries)] < 10
        assert found["pglock_waited_seconds_bucket", labels(skips, le="+Inf")] == CHILDREN

    def test_it_measures_for_how_long_locks_were_held(self, found):
        assert found["pglock_held_seconds_count", labels(skips)] == CHILDREN
        assert 0.5 * CHILDREN <= found["pglock_held_seconds_sum", labels(skips)] < 2 * CHILDREN
        assert found["pglock_held_seconds_count", labels(is_only_warned)] == 1

    def test_it_counts_losses(self, found):
        assert found["pglock_lost_total", labels(is_only_warned)] == 1


class TestOpenTelemetry:
    @pytest.fixture
    def sums(self, measured):
        return measured[1]

    def test_it_counts_locks_of_all_processes(self, sums, measured):
        assert sums["pglock.acquired", labels(skips)] == [CHILDREN]
        assert sums["pglock.acquired", labels(retries)] == [1]
        assert len(measured[2]) == CHILDREN

    @pytest.mark.parametrize(("task", "outcome"), OUTCOMES)
    def test_it_counts_conflicts_by_outcome(self, sums, task, outcome):
        (number,) = sums["pglock.conflicts", labels(task, outcome=outcome)]
        assert number >= 1 if outcome == "retried" else number == 1

    def test_it_measures_waits_over_retries(self, sums):
        number, seconds = sums["pglock.waited", labels(retries)]
        assert number == 1
        assert 0.05 < seconds < 10

    def test_it_measures_for_how_long_locks_were_held(self, sums):
        number, seconds = sums["pglock.held", labels(skips)]
        assert number == CHILDREN
        assert 0.5 * CHILDREN <= seconds < 2 * CHILDREN

    def test_it_counts_losses(self, sums):
        assert sums["pglock.lost", labels(is_only_warned)] == [1]
