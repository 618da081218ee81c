"""Spans of several processes, as a collector receives them by OTLP."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from jobstatus_grpc.client import JobStatusClient
from tests.support.collector import Collector, collecting
from tests.support.servers import ServerProcess

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
SERVICE = "jobstatus.v1.JobStatusService"

PROGRAM = """
import sys
from opentelemetry import trace
from jobstatus_grpc import JobStatusClient
from jobstatus_grpc.telemetry import close, open_provider

provider = open_provider(sys.argv[1])
trace.set_tracer_provider(provider)
with JobStatusClient(sys.argv[2], tracing=True) as client:
    run(client)
close(provider)
"""

WORKER = f"""
def run(client):
    with trace.get_tracer("test").start_as_current_span("work"):
        client.update("a", state="in_progress", attempt=1)
        with client.track(id="b") as job:
            job.progress(50)
        client.update("a", state="succeeded", attempt=1)
{PROGRAM}
"""

WATCHER = f"""
def run(client):
    for job in client.watch("a", min_update_interval_seconds=0):
        print(job.state.word, flush=True)
{PROGRAM}
"""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # milliseconds
        yield collector


def start(program, *arguments, **more):
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True, **more)


def test_a_worker_the_server_and_a_watcher_share_a_trace_and_the_delivery_links_to_the_update(collector):
    with ServerProcess("--otel") as server, JobStatusClient(server.address) as client:
        client.create(id="a")
        client.create(id="b")
        with start(WATCHER, "watcher", server.address) as watcher:
            assert watcher.stdout.readline() == "pending\n"
            with start(WORKER, "worker", server.address) as worker:
                assert worker.wait(30) == 0
            assert watcher.wait(30) == 0
        job = client.get("a")
        spans = collector.wait_for(["work", f"{SERVICE}/UpdateJob", "jobstatus deliver", "jobstatus receive"])
        assert server.terminate() == 0
    work = spans["work"]
    assert job.trace_parent[:52] == f"00-{work.trace_id}-{work.span_id}"
    received = collector.received()
    of_updates = [span for span in received if span.name == f"{SERVICE}/UpdateJob"]
    service_of = {span.span_id: span.service for span in received}
    of_server = {span.span_id for span in of_updates if span.service == "jobstatus"}
    assert {service_of[span.parent_id] for span in of_updates if span.service == "jobstatus"} == {"worker"}
    assert spans["jobstatus deliver"].links[0][1] in of_server
    assert spans["jobstatus receive"].links == ((work.trace_id, work.span_id),)
    assert spans["jobstatus receive"].service == "watcher"
    path = [
        *of_updates,
        *(spans[name] for name in ("jobstatus store commit", "jobstatus deliver", "jobstatus receive")),
    ]
    assert {span.trace_id for span in path} == {work.trace_id}


def test_run_passes_its_trace_on_to_the_command_and_to_the_job(collector, tmp_path):
    out = tmp_path / "out"
    command = ["sh", "-c", f"echo $TRACEPARENT > {out}"]
    with ServerProcess() as server, JobStatusClient(server.address) as client:
        run = [sys.executable, "-m", "jobstatus_grpc", "run", "--address", server.address]
        subprocess.run(
            [*run, "--otel", "--id", "a", "--name", "a", *command],
            env={**os.environ, "TRACEPARENT": PARENT},
            check=True,
        )
        span = collector.wait_for(["jobstatus run"])["jobstatus run"]
        assert (span.service, span.trace_id, span.parent_id) == ("jobstatus-run", TRACE, SPAN)
        assert out.read_text().strip()[:52] == f"00-{TRACE}-{span.span_id}"
        assert client.get("a").trace_parent == out.read_text().strip()


def test_the_calls_of_run_are_in_the_trace_of_its_command(collector):
    with ServerProcess("--otel") as server, JobStatusClient(server.address) as client:
        run = [sys.executable, "-m", "jobstatus_grpc", "run", "--address", server.address]
        with subprocess.Popen([*run, "--otel", "--id", "a", "cat"], stdin=subprocess.PIPE) as running:
            collector.wait_for([f"{SERVICE}/UpdateJob"])  # the job is claimed
            client.cancel("a")
            assert running.wait(20) != 0
        of_run = collector.wait_for(["jobstatus run"])["jobstatus run"]
        assert server.terminate() == 0
    calls = [span for span in collector.received() if span.name == f"{SERVICE}/UpdateJob"]
    assert {span.service for span in calls} == {"jobstatus-run", "jobstatus"}
    assert {span.trace_id for span in calls} == {of_run.trace_id}
    assert {span.parent_id for span in calls if span.service == "jobstatus-run"} == {of_run.span_id}
    assert {span.trace_id for span in collector.received() if span.name == f"{SERVICE}/WatchJob"} == {of_run.trace_id}


def test_run_without_opentelemetry_gives_the_job_the_trace_of_its_environment(tmp_path):
    out = tmp_path / "out"
    command = ["sh", "-c", f"echo $TRACEPARENT > {out}"]
    with ServerProcess() as server, JobStatusClient(server.address) as client:
        run = [sys.executable, "-m", "jobstatus_grpc", "run", "--address", server.address]
        for job_id, given in {"a": PARENT, "b": "nonsense"}.items():
            subprocess.run(
                [*run, "--id", job_id, "--name", "x", *command], env={**os.environ, "TRACEPARENT": given}, check=True
            )
            assert out.read_text() == f"{given}\n"
        assert (client.get("a").trace_parent, client.get("b").trace_parent) == (PARENT, "")


def test_a_command_ends_soon_if_no_collector_can_be_reached(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    with ServerProcess() as server:
        run = [sys.executable, "-m", "jobstatus_grpc", "run", "--otel", "--quiet", "--address", server.address]
        done = subprocess.run([*run, "echo", "done"], capture_output=True, text=True, timeout=20, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")


REFUSED = {
    "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
    "OTEL_BSP_MAX_QUEUE_SIZE": "5",
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "many",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_the_sdk_refuses_is_one_line_and_does_not_keep_a_command_from_running(monkeypatch, name):
    monkeypatch.setenv(name, REFUSED[name])
    program = [sys.executable, "-m", "jobstatus_grpc"]
    serve = subprocess.run(
        [*program, "serve", "--otel", "--store", "memory:"], capture_output=True, text=True, timeout=20
    )
    assert (serve.returncode, serve.stderr.count("\n")) == (2, 1)
    assert serve.stderr.startswith("error: --otel: OpenTelemetry refuses the value of a variable OTEL_…: ")
    with ServerProcess() as server:
        run = [*program, "run", "--otel", "--quiet", "--address", server.address]
        done = subprocess.run([*run, "echo", "done"], capture_output=True, text=True, timeout=20, check=True)
    assert (done.stdout, done.stderr.count("\n")) == ("done\n", 1)
    assert done.stderr.startswith("jobstatus: --otel: OpenTelemetry refuses")
    assert done.stderr.endswith("; the command runs without a span\n")


def test_nothing_of_opentelemetry_is_imported_unless_it_is_switched_on():
    program = """
import sys
import jobstatus_grpc.cli.commands.serve, jobstatus_grpc.cli.run.command, jobstatus_grpc.server.app
with jobstatus_grpc.JobStatusClient("127.0.0.1:1"):
    print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"
