"""The metrics' own address, with clients that are wrong, slow or silent."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
from urllib.parse import urlsplit

import pytest
from prometheus_client import CollectorRegistry, Gauge

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.server.metrics import MetricsEndpoint


@pytest.fixture(scope="module")
def address(serve_module, tmp_path_factory):
    log = tmp_path_factory.mktemp("metered") / "log"
    serve_module("--metrics", "127.0.0.1:0", "--log-format", "text", log=log)
    (line,) = [line for line in log.read_text().splitlines() if "metrics on " in line]
    host, port = line.partition("http://")[2].removesuffix("/metrics").split(":")
    return host, int(port)


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
    """Read to the end of a connection, however it ends; return how much came."""
    count = 0
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            count += len(data)
    return count


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\n"])
def test_a_client_that_falls_silent_is_dropped(sent):
    async def main():
        endpoint = MetricsEndpoint("127.0.0.1:0", registry(), silence_seconds=0.1)
        await endpoint.start()
        with socket.create_connection(("127.0.0.1", urlsplit(endpoint.url).port or 0), 15) as connection:
            connection.sendall(sent)
            assert await asyncio.to_thread(end_of, connection) == 0
        await endpoint.close()

    asyncio.run(main())


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
