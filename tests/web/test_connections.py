"""Clients that are slow, silent, large or broken: each gets a clear answer or none, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import ssl
import subprocess
import time
from contextlib import ExitStack, asynccontextmanager, suppress
from datetime import timedelta

import psutil
import pytest

from jobstatus_grpc.job import limits
from jobstatus_grpc.server import config
from jobstatus_grpc.stores.memory import MemoryStore
from jobstatus_grpc.web import http, listener
from tests.support.certificates import Authority, Mount
from tests.support.loop import on_a_loop
from tests.support.servers import TRANSPORT, ServerProcess, serving_web
from tests.support.web import SERVICE_PATH, Web, read_all

GET = f"{SERVICE_PATH}/GetJob"
WATCH = f"{SERVICE_PATH}/WatchJob"
HEAD = f"POST {GET} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


@pytest.mark.slow
def test_a_body_that_is_announced_too_large_is_refused_unread(web):
    reply = read_all(web.raw(f"{HEAD}content-length: {limits.MAX_REQUEST_BYTES + 1}\r\n\r\n".encode()))
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b'"code": "resource_exhausted"' in reply


def test_a_body_without_a_length_is_cut_off_while_it_comes(web):
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    sent = 0
    with web.raw(f"{HEAD}transfer-encoding: chunked\r\n\r\n".encode()) as connection, suppress(ConnectionError):
        while sent < 16 * limits.MAX_REQUEST_BYTES:
            connection.sendall(chunk)
            sent += 0x10000
    # What is read of it, what is discarded, and what both sockets hold.
    assert sent < limits.MAX_REQUEST_BYTES + http.MAX_DISCARDED_BYTES + 4 * limits.MAX_REQUEST_BYTES


def test_curl_is_told_that_its_body_is_too_large(web, tmp_path):
    (tmp_path / "large").write_bytes(b" " * (limits.MAX_REQUEST_BYTES + 1))
    command = ["curl", "-s", "-w", "%{http_code}", f"{web.url}{GET}", "-H", "content-type: application/json"]
    command += ["--data-binary", f"@{tmp_path}/large"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.endswith("413")


def test_a_body_of_the_limit_is_taken(web):
    body = b'{"id": "a"' + b" " * (limits.MAX_REQUEST_BYTES - 11) + b"}"
    assert web.request("POST", GET, body, content_type="application/json").status == 404


def get(path, method="GET", *fields, body="", version="1.1", host="host: 127.0.0.1"):
    """Return a request, after which the server closes the connection."""
    lines = [f"{method} {path} HTTP/{version}", host, "connection: close", *fields, "", body]
    return "\r\n".join(lines).encode("latin-1")


def post(*fields, body="{}"):
    return get(GET, "POST", "content-type: application/json", *fields, body=body)


def header_of(size):
    """Return a request with a header of this number of bytes."""
    return get("/openapi.json", "GET", "x: " + "y" * (size - len(get("/openapi.json", "GET", "x: "))))


HUGE = "9" * 5000
CHUNKED, LENGTH = "transfer-encoding: chunked", "content-length: 2"
ANSWERS = {
    "a header of the limit": (200, header_of(listener.MAX_HEADER_BYTES)),
    "a header beyond it, at once": (431, header_of(listener.MAX_HEADER_BYTES + 1)),
    "in an answer to HEAD": (431, get("/", "HEAD", "x: " + "y" * 20_000)),
    "a header that does not end": (431, get("/", "GET", "x: " + "y" * 20_000)[:-4]),
    "the most fields": (200, get("/openapi.json", "GET", *["x: y"] * (listener.MAX_HEADER_FIELDS - 2))),
    "more fields": (431, get("/openapi.json", "GET", *["x: y"] * (listener.MAX_HEADER_FIELDS - 1))),
    "two hosts": (400, get("/openapi.json", "GET", "host: 127.0.0.1")),
    "no host": (400, get("/openapi.json", host="x: y")),
    "two different lengths": (400, post(LENGTH, "content-length: 3", body="{}x")),
    "a signed length": (400, post("content-length: +2")),
    "a huge length": (400, post(f"content-length: {HUGE}")),
    "a length and chunks": (400, post(LENGTH, CHUNKED, body="0\r\n\r\n")),
    "chunks twice": (501, post(CHUNKED, CHUNKED, body="0\r\n\r\n")),
    "another coding": (501, post("transfer-encoding: xchunked", body="0\r\n\r\n")),
    "a space before a colon": (400, post("transfer-encoding : chunked", body="0\r\n\r\n")),
    "a negative chunk": (400, post(CHUNKED, body="-2\r\n{}\r\n0\r\n\r\n")),
    "a chunk without its end": (400, post(CHUNKED, body="2\r\n{}0\r\n\r\n")),
    "two content types": (400, post("content-type: application/json", LENGTH)),
    "no content type": (415, get(GET, "POST", LENGTH, body="{}")),
    "that of gRPC": (415, get(GET, "POST", "content-type: application/grpc", LENGTH, body="{}")),
    "two deadlines": (400, post("connect-timeout-ms: 1", "connect-timeout-ms: 2", LENGTH)),
    "two origins": (400, post("origin: http://a", "origin: http://b", LENGTH)),
    "NUL in a field": (400, get("/openapi.json", "GET", "x: a\0b")),
    "CR in a field": (400, get("/openapi.json", "GET", "x: a\rb")),
    "a line without a colon": (400, get("/openapi.json", "GET", "xy")),
    "//": (404, get("//")),
    "// before a path": (404, get("//v1/jobs")),
    "/ after a path": (404, get("/v1/jobs/")),
    "%2f in a route": (404, get("/v1%2fjobs")),
    "%2f in an id": (400, get("/v1/jobs/a%2fb")),
    "..": (404, get("/v1/jobs/../../openapi.json")),
    "%2e%2e": (404, get("/v1/jobs/%2e%2e/%2e%2e/openapi.json")),
    "NUL in a path": (400, get("/v1/jobs/a\0b")),
    "%00 in an id": (400, get("/v1/jobs/a%00b")),
    "overlong UTF-8": (400, get("/v1/jobs/%c0%af")),
    "a surrogate": (400, get("/v1/jobs/%ed%a0%80")),
    "% alone": (400, get("/v1/jobs/%")),
    "overlong UTF-8 in a query": (400, get("/v1/jobs?name=%c0%af")),
    "%00 in a query": (400, get("/v1/jobs?name=%00")),
    "a whole URL": (404, get("http://other.example/v1/jobs")),
    "OPTIONS": (204, get("/v1/jobs", "OPTIONS")),
    "OPTIONS *": (404, get("*", "OPTIONS")),
    "HEAD": (200, get("/openapi.json", "HEAD")),
    "PUT": (405, get("/v1/jobs/x", "PUT", "content-type: application/json", LENGTH, body="{}")),
    "TRACE": (405, get("/", "TRACE")),
    "CONNECT": (404, get("127.0.0.1:80", "CONNECT")),
    "a long method": (405, get("/", "A" * 300)),
    "GET of an RPC": (405, get(GET)),
    "HTTP/0.9": (400, b"GET /openapi.json\r\n\r\n"),
    "HTTP/2.0": (505, get("/openapi.json", version="2.0")),
    # A server may ignore an upgrade that it does not support.
    "h2c": (200, get("/openapi.json", "GET", "connection: upgrade", "upgrade: h2c", "http2-settings: AAMAAABk")),
    "a WebSocket": (200, get("/openapi.json", "GET", "connection: upgrade", "upgrade: websocket")),
}


@pytest.mark.parametrize(("status", "data"), ANSWERS.values(), ids=ANSWERS)
def test_an_odd_request_gets_one_clear_answer(web, status, data):
    reply = read_all(web.raw(data))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), reply
    assert reply.count(b"HTTP/1.1 ") == 1
    if status >= 400 and b"application/problem+json" in head:
        assert json.loads(body)["status"] == status
    assert web.request("GET", "/openapi.json").status == 200


def test_requests_in_one_packet_are_answered_in_turn_up_to_the_one_that_is_broken(web):
    once = get("/openapi.json", "HEAD").replace(b"connection: close\r\n", b"")
    reply = read_all(web.raw(once * 5 + b"broken\r\n\r\n" + once))
    statuses = [line for line in reply.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    assert statuses == [b"HTTP/1.1 200 OK"] * 5 + [b"HTTP/1.1 400 Bad Request"]


@pytest.mark.slow
def test_a_client_that_asks_first_sends_no_body_that_is_refused(web):
    asks = ["content-type: application/json", "expect: 100-continue"]
    allowed = read_all(web.raw(get(GET, "POST", *asks, LENGTH, body="{}")))
    refused = read_all(web.raw(get(GET, "POST", *asks, f"content-length: {limits.MAX_REQUEST_BYTES + 1}")))
    assert (allowed.startswith(b"HTTP/1.1 100 "), refused.startswith(b"HTTP/1.1 413 ")) == (True, True)


def test_a_client_that_sends_its_whole_body_sees_that_it_is_too_large(web):
    body = b" " * (limits.MAX_REQUEST_BYTES * 3 // 2)
    assert web.request("POST", GET, body, content_type="application/json").status == 413


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET  / HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /\xc3\xbc HTTP/1.1\r\nhost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 20_000,
        b"\0" * 20_000,
    ],
    ids=range(10),
)
def test_what_is_not_http_gets_a_4xx_and_the_end(web, data):
    reply = read_all(web.raw(data))
    assert reply.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501 ", b"HTTP/1.1 505 ")), reply


def test_a_request_with_two_lengths_is_refused_and_what_follows_it_is_not_read(web):
    inner = b"GET /openapi.json HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    request = f"{HEAD}content-length: {5 + len(inner)}\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    reply = read_all(web.raw(request.encode() + inner))
    assert reply.startswith(b"HTTP/1.1 400 ")
    assert reply.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("path", ["/nothing", GET])
def test_a_body_that_is_not_http_gets_one_answer_and_no_line_in_the_log(path, tmp_path):
    request = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n"
    log = tmp_path / "log"
    with ServerProcess("--http", "127.0.0.1:0", log=log) as process:
        reply = read_all(Web(process.http).raw(request.encode()))
        process.terminate()
    assert reply.count(b"HTTP/1.1 400 ") == 1
    assert "error" not in log.read_text()


def test_a_header_beyond_ascii_reaches_its_reader(web):
    request = f"{HEAD}content-length: 2\r\nauthorization: Bearer \xff\r\nconnection: close\r\n\r\n{{}}"
    assert read_all(web.raw(request.encode("latin-1"))).startswith(b"HTTP/1.1 400 ")


def test_two_thousand_silent_connections_do_not_keep_others_waiting(serve_web):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 10_000), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        service, web = serve_web()
        for _ in range(2000):
            stack.enter_context(web.raw(HEAD.encode()))
        started = time.monotonic()
        assert web.call("CreateJob", {"job": {"id": "x"}}).status == 200
        assert service.get("x").id == "x"
        assert time.monotonic() - started < 5


@pytest.fixture
def quick_limits(monkeypatch):
    monkeypatch.setattr(listener, "HEADER_SECONDS", 1.0)
    monkeypatch.setattr(http, "BODY_SECONDS", 1.0)
    monkeypatch.setattr(listener, "STALL_SECONDS", 1.0)


@pytest.mark.slow
@on_a_loop
async def test_half_a_header_is_closed_and_half_a_body_is_answered(quick_limits):
    async with serving_web(MemoryStore()) as url:
        halves = [b"", b"POST", HEAD.encode(), f"{HEAD}content-length: 9\r\n\r\n{{".encode()]
        replies = await asyncio.gather(
            *(asyncio.to_thread(lambda half: read_all(Web(url).raw(half)), half) for half in halves)
        )
    assert replies[:3] == [b"", b"", b""]
    assert replies[3].startswith(b"HTTP/1.1 408 ")


@on_a_loop
async def test_the_second_request_of_a_connection_has_a_time_limit_too(quick_limits):
    async with serving_web(MemoryStore()) as url:
        connection = Web(url).connect()
        await asyncio.to_thread(connection.request, "GET", "/openapi.json")
        await asyncio.to_thread(lambda: connection.getresponse().read())
        connection.sock.sendall(b"POST")
        assert await asyncio.to_thread(read_all, connection.sock) == b""


@on_a_loop
async def test_a_reader_that_does_not_read_is_cut_off_at_the_age_of_streams(monkeypatch):
    monkeypatch.setattr(config, "CONNECTION_AGE_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(listener.WebListener, "start", _with_small_buffers(listener.WebListener.start))
    async with serving_web(MemoryStore(), max_connection_age=timedelta(seconds=2)) as url:
        web = Web(url)
        # Each is six bytes in JSON: one event is more than the connection buffers, and the second waits.
        job = {"id": "x", "result": {"text": "\u0001" * 60_000}}
        assert (await asyncio.to_thread(web.call, "CreateJob", {"job": job})).status == 200
        message = b'{"id":"x","minUpdateInterval":"0s"}'
        frame = b"\0" + len(message).to_bytes(4, "big") + message
        head = f"POST {WATCH} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/connect+json\r\n"
        silent = web.raw(f"{head}content-length: {len(frame)}\r\n\r\n".encode() + frame, receive_buffer_bytes=4096)
        assert await asyncio.to_thread(silent.recv, 12) == b"HTTP/1.1 200"
        await asyncio.to_thread(web.call, "UpdateJob", {"job": {"id": "x", "reason": "r"}})
        await asyncio.sleep(2.4)
        received = await asyncio.to_thread(read_all, silent)
    assert b'"error"' not in received


def _with_small_buffers(start):
    """Let the kernel buffer few bytes of what is sent: else it takes some MiB that are not read."""

    async def start_so(self):
        for each in self._sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)  # connections inherit it
        await start(self)

    return start_so


BUFFER_BYTES = 16 * 1024


@asynccontextmanager
async def answering(body_bytes, monkeypatch):
    """Yield an HTTP gateway whose responses have this number of bytes, and an event: a connection is lost."""
    monkeypatch.setattr(listener.WebListener, "start", _with_small_buffers(listener.WebListener.start))
    lost = asyncio.Event()

    async def answer(scope, receive, send):
        scope["state"]["connection"].lost_callbacks.add(lost.set)
        fields = [(b"content-length", b"%d" % body_bytes)]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        await send({"type": "http.response.body", "body": bytes(body_bytes)})

    web_listener = listener.WebListener(answer, [socket.create_server(("127.0.0.1", 0))])
    await web_listener.start()
    try:
        yield Web(web_listener.url), lost
    finally:
        await web_listener.stop(0.1)


@pytest.mark.parametrize("field", ["connection: keep-alive", "connection: close"])
@pytest.mark.parametrize("body_bytes", [60_000, 4_000_000])
@on_a_loop
async def test_a_response_that_is_not_read_is_cut_off(quick_limits, monkeypatch, body_bytes, field):
    monkeypatch.setattr(listener, "IDLE_SECONDS", 0.3)
    async with answering(body_bytes, monkeypatch) as (web, lost):
        request = f"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\n{field}\r\n\r\n".encode()
        with web.raw(request, receive_buffer_bytes=BUFFER_BYTES):
            await asyncio.wait_for(lost.wait(), 10)


@pytest.mark.parametrize("field", ["connection: keep-alive", "connection: close"])
@on_a_loop
async def test_a_reader_that_is_slow_gets_its_whole_response(quick_limits, monkeypatch, field):
    monkeypatch.setattr(listener, "IDLE_SECONDS", 0.3)
    async with answering(1_000_000, monkeypatch) as (web, _):
        request = f"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\n{field}\r\n\r\n".encode()
        connection = web.raw(request, receive_buffer_bytes=BUFFER_BYTES)
        started, received = time.monotonic(), 0
        while part := await asyncio.to_thread(connection.recv, 65536):
            received += len(part)
            # As slow as to need three times the limit.
            await asyncio.sleep(max(started + received / 1_000_000 * 3 - time.monotonic(), 0))
        connection.close()
    assert received > 1_000_000


@on_a_loop
async def test_responses_that_are_not_read_are_not_made_without_end(quick_limits, monkeypatch):
    monkeypatch.setattr(listener.WebListener, "start", _with_small_buffers(listener.WebListener.start))
    async with serving_web(MemoryStore()) as url:
        web = Web(url)
        for number in range(20):
            job = {"id": f"x{number}", "result": {"text": "x" * 60_000}}
            await asyncio.to_thread(web.call, "CreateJob", {"job": job})
        request = f"POST {SERVICE_PATH}/ListJobs HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        silent = web.raw(f"{request}content-length: 2\r\n\r\n{{}}".encode() * 12, receive_buffer_bytes=4096)
        assert await asyncio.to_thread(silent.recv, 12) == b"HTTP/1.1 200"
        await asyncio.sleep(1.5)
        received = await asyncio.to_thread(read_all, silent)
    assert len(received) < 2 * limits.MAX_RESPONSE_BYTES


def test_a_stream_takes_at_most_60_kilobytes(serve_web):
    service, web = serve_web()
    web.call("CreateJob", {"job": {"id": "x"}})
    request = b"GET /v1/jobs/x/events HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with ExitStack() as stack:
        first = [stack.enter_context(web.raw(request)) for _ in range(20)]
        assert all(each.recv(10) for each in first)
        before = psutil.Process(service.process.pid).memory_info().rss
        more = [stack.enter_context(web.raw(request)) for _ in range(300)]
        assert all(each.recv(10) for each in more)
        assert (psutil.Process(service.process.pid).memory_info().rss - before) / len(more) < 60_000


def test_a_client_that_leaves_frees_its_stream(serve_web):
    _, web = serve_web("--max-watchers-per-caller", "1")
    web.call("CreateJob", {"job": {"id": "x"}})
    for _ in range(3):
        stream = _first_stream_that_is_admitted(web)
        stream.close()


def _first_stream_that_is_admitted(web):
    until = time.monotonic() + 5
    while True:
        stream = web.stream("WatchJob", {"id": "x"})
        if "event" in next(stream):
            return stream
        assert time.monotonic() < until


def handshake(web, tls, session=None):
    """Connect, send a request and return its status line and a session; empty if the server refuses the handshake."""
    plain = socket.create_connection((web.host, web.port), timeout=20)
    try:
        with tls.wrap_socket(plain, server_hostname=web.host, session=session) as connection:
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n")
            return connection.recv(12), connection.session
    except (ssl.SSLError, ConnectionError):
        return b"", None


@pytest.mark.skipif(TRANSPORT == "native", reason="the native transport has no TLS")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=str)
def test_a_client_whose_ca_is_withdrawn_resumes_no_session(serve_web, tmp_path, version):
    authority, other = Authority(), Authority()
    mount = Mount(tmp_path, authority.issue(), authority.pem)
    flags = ["--tls-cert", mount.cert, "--tls-key", mount.key, "--tls-client-ca", mount.ca]
    _, web = serve_web(*flags, "--tls-require-client-cert")
    tls = ssl.create_default_context(cadata=authority.pem.decode())
    tls.maximum_version = version
    tls.load_cert_chain(*authority.issue(name="worker").write(tmp_path, "client"))
    status, session = handshake(web, tls)
    assert handshake(web, tls, session)[0] == status == b"HTTP/1.1 200"
    mount.swap(authority.issue(), other.pem)
    until = time.monotonic() + 20
    while handshake(web, tls)[0]:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert handshake(web, tls, session)[0] == b""
