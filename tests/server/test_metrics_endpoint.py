"""`serve --metrics`: read as Prometheus does, and by clients that are wrong, slow or silent."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import re
import socket
import subprocess
import sys
import time
import urllib.request
from urllib.parse import urlsplit

import psutil
import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.server.metrics import MetricsEndpoint


@pytest.fixture(scope="module")
def metered_process(serve_module, tmp_path_factory):
    log = tmp_path_factory.mktemp("metered") / "log"
    service = serve_module("--metrics", "127.0.0.1:0", "--log-format", "text", log=log)
    (line,) = [line for line in log.read_text().splitlines() if "metrics on " in line]
    host, port = line.partition("http://")[2].removesuffix("/metrics").split(":")
    return (host, int(port)), psutil.Process(service.process.pid)


@pytest.fixture(scope="module")
def address(metered_process):
    return metered_process[0]


def registry():
    made = CollectorRegistry()
    Gauge("things", "How many.", registry=made)
    return made


def ask(address, method, path, headers=None, body=None):
    with contextlib.closing(http.client.HTTPConnection(address[0], address[1], timeout=20)) as connection:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def answer_to(address, sent):
    with socket.create_connection(address, 20) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("path", ["/", "/metric", "/metrics/", "/metrics%20", "/favicon.ico", "//"])
def test_another_path_is_not_found(address, path):
    assert ask(address, "GET", path)[0] == 404


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_another_method_is_not_allowed(address, method):
    status, headers, _ = ask(address, method, "/metrics", body=b"x" * 500_000 if method == "POST" else None)
    assert (status, headers["Allow"]) == (405, "GET")


def test_a_query_changes_nothing(address):
    status, _, body = ask(address, "GET", "/metrics?name[]=python_info")
    assert status == 200
    assert b"jobstatus_watchers" in body


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text;version=loud", f"text/plain;version={'9' * 5000}", ";;,=,"]
)
def test_an_odd_accept_header_never_breaks_the_answer(address, accept):
    assert ask(address, "GET", "/metrics", {"Accept": accept})[0] == 200


@pytest.mark.parametrize(
    "sent", [b"GET /metrics HTTP/9\r\n\r\n", b"GET /met rics HTTP/1.1\r\n\r\n", b"\x00\xff" * 100 + b"\r\n\r\n"]
)
def test_what_is_no_request_is_refused(address, sent):
    assert b" 200 " not in answer_to(address, sent)
    assert ask(address, "GET", "/metrics")[0] == 200


def test_a_client_that_goes_before_its_answer_costs_nothing(address):
    for sent in (b"", b"GET /met", b"GET /metrics HTTP/1.1\r\n\r\n"):
        with socket.create_connection(address, 20) as connection:
            connection.sendall(sent)
    assert ask(address, "GET", "/metrics")[0] == 200


def end_of(connection):
    """Read to the end of a connection, clean or not; return the number of bytes."""
    count = 0
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            count += len(data)
    return count


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\n"])
def test_a_client_that_falls_silent_is_dropped(sent):
    async def main():
        endpoint = MetricsEndpoint("127.0.0.1:0", registry(), connection_seconds=0.1)
        await endpoint.start()
        with socket.create_connection(("127.0.0.1", urlsplit(endpoint.url).port or 0), 15) as connection:
            connection.sendall(sent)
            assert await asyncio.to_thread(end_of, connection) == 0
        await endpoint.close()

    asyncio.run(main())


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nx: y\r\n"])
def test_clients_that_do_not_finish_their_request_keep_nobody_out_and_cost_few_threads(metered_process, sent):
    address, process = metered_process
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection(address, 20)).sendall(sent)
        assert ask(address, "GET", "/metrics")[0] == 200
        assert process.num_threads() < 60


def test_a_client_that_sends_a_byte_now_and_then_is_cut_off():
    async def main():
        endpoint = MetricsEndpoint("127.0.0.1:0", registry(), connection_seconds=0.5)
        await endpoint.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(endpoint.url).port)
        reading = asyncio.ensure_future(reader.read())
        while not reading.done():
            writer.write(b"x")
            await asyncio.sleep(0.05)
        writer.close()
        await endpoint.close()

    asyncio.run(asyncio.wait_for(main(), 20))


@pytest.mark.parametrize("head", [b"GET /metrics?" + b"x" * 20_000, b"GET /metrics HTTP/1.1\r\n" + b"x: y\r\n" * 3000])
def test_the_head_of_a_request_is_bounded(address, head):
    with socket.create_connection(address, 20) as connection:
        connection.sendall(head)
        assert end_of(connection) < 1000
    assert ask(address, "GET", "/metrics")[0] == 200


def test_a_silent_client_holds_up_no_end(serve, tmp_path):
    log = tmp_path / "log"
    service = serve("--metrics", "127.0.0.1:0", "--log-format", "text", log=log)
    port = int(log.read_text().partition("http://127.0.0.1:")[2].partition("/")[0])
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        assert service.process.terminate() == 0
        assert end_of(connection) == 0


def test_a_host_may_be_a_name():
    async def main():
        endpoint = MetricsEndpoint("localhost:0", registry())
        await endpoint.start()
        await endpoint.close()
        return endpoint.url

    assert asyncio.run(main()).startswith("http://127.0.0.1:")


@pytest.mark.parametrize("address", ["192.0.2.1:0", f"{'x' * 70}:0", "no.such.host.invalid:0"])
def test_an_address_that_is_not_of_this_machine_is_an_error_of_one_line(address):
    with pytest.raises(CannotStartError, match="choose another --metrics") as caught:
        asyncio.run(MetricsEndpoint(address, registry()).start())
    assert address in f"{caught.value}"
    assert "None" not in f"{caught.value}"
    assert "\n" not in f"{caught.value}"


UNARY = {"grpc_type": "unary", "grpc_service": "jobstatus.v1.JobStatusService"}
STREAM = {**UNARY, "grpc_type": "server_stream"}
OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.3"

OURS = {
    "grpc_server_started", "grpc_server_handled", "grpc_server_msg_received", "grpc_server_msg_sent",
    "grpc_server_handling_seconds", "jobstatus_auth_refusals", "jobstatus_build_info", "jobstatus_commit_commands",
    "jobstatus_commit_seconds", "jobstatus_feed_lag_seconds", "jobstatus_held_bytes", "jobstatus_held_bytes_refusals",
    "jobstatus_max_held_bytes", "jobstatus_max_watchers",
    "jobstatus_jobs", "jobstatus_jobs_stalled",
    "jobstatus_log_lines_dropped", "jobstatus_store_damaged_rows", "jobstatus_store_writable", "jobstatus_watchers",
}  # fmt: skip


class Metered:
    """A server with a metrics endpoint."""

    def __init__(self, service, log):
        self.service = service
        ends_at = time.monotonic() + 20
        # A thread of its own writes the log, perhaps after the server answers.
        while (found := re.search(r'"metrics on ([^"]+)"', log.read_text())) is None:
            assert time.monotonic() < ends_at, "the log does not say where the metrics are"
            time.sleep(0.01)
        self.url = found[1]

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
