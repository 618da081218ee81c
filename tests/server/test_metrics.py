"""`serve --metrics`, read as Prometheus reads it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

UNARY = {"grpc_type": "unary", "grpc_service": "jobstatus.v1.JobStatusService"}
STREAM = {**UNARY, "grpc_type": "server_stream"}
OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.3"

OURS = {
    "grpc_server_started", "grpc_server_handled", "grpc_server_msg_received", "grpc_server_msg_sent",
    "grpc_server_handling_seconds", "jobstatus_build_info", "jobstatus_commit_commands", "jobstatus_commit_seconds",
    "jobstatus_feed_lag_seconds", "jobstatus_jobs", "jobstatus_store_writable", "jobstatus_watchers",
}  # fmt: skip


class Metered:
    """A server that tells its metrics."""

    def __init__(self, service, log):
        self.service = service
        told = [json.loads(line)["message"] for line in log.read_text().splitlines()]
        (self.url,) = [line.removeprefix("metrics on ") for line in told if line.startswith("metrics on ")]

    def scrape(self, accept=""):
        request = urllib.request.Request(self.url, headers={"Accept": accept} if accept else {})
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.headers["Content-Type"], response.read().decode()

    def values(self):
        families = parse_text(self.scrape()[1])
        samples = [sample for family in families for sample in family.samples]
        return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}

    def value(self, name, **labels):
        return self.values()[name, frozenset(labels.items())]

    def wait_for(self, wanted, name, **labels):
        ends_at = time.monotonic() + 20
        while (value := self.value(name, **labels)) != wanted:
            assert time.monotonic() < ends_at, f"{name} {labels} is {value}, not {wanted}"


@pytest.fixture
def meter(serve, tmp_path):
    def start(store="memory:"):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        return Metered(serve("--metrics", "127.0.0.1:0", "--log-format", "json", store=store, log=log), log)

    return start


@pytest.mark.parametrize(
    ("accept", "kind", "parse"),
    [("", "text/plain; version=0.0.4", parse_text), (OPENMETRICS, "application/openmetrics-text", parse_openmetrics)],
)
def test_each_format_holds_every_metric_and_parses(meter, accept, kind, parse):
    content_type, text = meter().scrape(accept)
    names = {family.name for family in parse(text)}
    assert content_type.startswith(kind)
    assert {name for name in names if name.startswith(("grpc", "jobstatus"))} == OURS
    assert {"process_resident_memory_bytes", "process_cpu_seconds", "process_open_fds", "python_info"} <= names


def test_calls_are_counted_by_method_and_gos_code(meter, refused):
    metered = meter()
    service = metered.service
    service.create(id="a")
    service.get("a")
    refused(service.get, "nobody")
    refused(service.get, "no id!")
    get = {**UNARY, "grpc_method": "GetJob"}
    metered.wait_for(1, "grpc_server_handled_total", **get, grpc_code="InvalidArgument")
    values = metered.values()

    def value(name, **labels):
        return values[f"grpc_server_{name}", frozenset(labels.items())]

    codes = ("OK", "NotFound", "InvalidArgument", "Canceled")
    assert [value("handled_total", **get, grpc_code=code) for code in codes] == [1, 1, 1, 0]
    names = ("started_total", "msg_received_total", "msg_sent_total", "handling_seconds_count")
    assert [value(name, **get) for name in names] == [3, 3, 1, 3]
    assert value("started_total", **UNARY, grpc_method="CreateJob") == 1
    assert 0 < value("handling_seconds_sum", **get) < 10


def test_open_watches_are_counted_until_they_end(meter):
    metered = meter()
    watch = {**STREAM, "grpc_method": "WatchJob"}
    metered.service.create(id="a")
    streams = [metered.service.watch("a") for _ in range(2)]
    for stream in streams:
        next(stream)
    assert metered.value("jobstatus_watchers", kind="job") == 2
    streams[0].cancel()
    metered.wait_for(1, "jobstatus_watchers", kind="job")
    metered.service.update("a", state="JOB_STATE_SUCCEEDED")
    assert len(list(streams[1])) == 1
    metered.wait_for(0, "jobstatus_watchers", kind="job")
    codes = [metered.value("grpc_server_handled_total", **watch, grpc_code=code) for code in ("OK", "Canceled")]
    assert codes == [1, 1]
    assert metered.value("grpc_server_msg_sent_total", **watch) == 3


def test_commits_are_counted_with_their_commands(meter, tmp_path, update_of):
    metered = meter(f"sqlite:///{tmp_path}/jobs.db")
    metered.service.create(id="a")
    metered.service.batch(*(update_of("a", progress=float(number)) for number in range(4)))
    metered.service.get("a")
    assert metered.value("jobstatus_commit_commands_count") == 2
    assert metered.value("jobstatus_commit_commands_sum") == 5
    assert metered.value("jobstatus_commit_commands_bucket", le="2.0") == 1
    assert metered.value("jobstatus_commit_seconds_count") == 2
    assert metered.value("jobstatus_store_writable") == 1


def test_each_batch_of_changes_is_counted_with_its_lag(meter):
    metered = meter()
    for number in range(3):
        metered.service.create()
        metered.wait_for(number + 1, "jobstatus_feed_lag_seconds_count")
    assert 0 < metered.value("jobstatus_feed_lag_seconds_sum") < 10


def test_jobs_are_counted_by_state_also_after_a_restart(meter, tmp_path):
    store = f"sqlite:///{tmp_path}/jobs.db"
    for _ in range(2):
        metered = meter(store)
        for state in ("PENDING", "IN_PROGRESS", "IN_PROGRESS", "FAILED"):
            metered.service.job_in(state)
        metered.service.process.terminate()
    metered = meter(store)
    counts = {state: metered.value("jobstatus_jobs", state=state) for state in ("pending", "in_progress", "failed")}
    assert counts == {"pending": 2, "in_progress": 4, "failed": 2}
    assert metered.value("jobstatus_jobs", state="succeeded") == 0


def test_the_metrics_end_with_the_server(meter):
    metered = meter()
    assert metered.service.process.terminate() == 0
    with pytest.raises(OSError, match="refused"):
        metered.scrape()


def test_nothing_of_prometheus_is_loaded_by_a_server_without_metrics():
    program = "import sys, jobstatus_grpc.server.app; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
