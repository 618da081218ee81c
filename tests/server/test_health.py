from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from jobstatus.v1 import job_status_pb2

from jobstatus_grpc.server import health
from jobstatus_grpc.server.health import (
    MAX_REQUEST_BYTES,
    MAX_SERVICE_BYTES,
    NOT_SERVING,
    OVERALL,
    SERVICE,
    SERVICE_NAME,
    SERVING,
    WRITE,
    HealthServicer,
    methods,
)
from jobstatus_grpc.server.transports import grpcio
from jobstatus_grpc.stores.memory import MemoryStore
from tests.support.auth import TRANSPORTS
from tests.support.loop import on_a_loop
from tests.support.servers import serving_at
from tests.support.service import read_refusal

UNKNOWN = HealthCheckResponse.SERVICE_UNKNOWN
NEVER_BY_ITSELF_SECONDS = 3600.0


class Serving:
    """A server with nothing but `health`, and a client of it."""

    def __init__(self, health: HealthServicer, server: grpc.aio.Server, channel: grpc.aio.Channel, port: int) -> None:
        self.health = health
        self.server = server
        self.channel = channel
        self.port = port
        self.stub: Any = HealthStub(channel)

    def watch(self, service: str) -> Any:
        return self.stub.Watch(HealthCheckRequest(service=service))

    async def check(self, service: str) -> int:
        return int((await self.stub.Check(HealthCheckRequest(service=service))).status)


@asynccontextmanager
async def serve(health: HealthServicer | None = None) -> AsyncIterator[Serving]:
    health = health or HealthServicer([SERVICE, WRITE])
    server = grpc.aio.server()
    grpcio.add_methods(server, methods(health))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Serving(health, server, channel, port)
    finally:
        await server.stop(None)


async def status_of(watch: Any) -> int:
    response = await watch.read()
    assert response is not grpc.aio.EOF
    return int(response.status)


def test_the_service_is_called_as_in_the_api() -> None:
    assert job_status_pb2.DESCRIPTOR.services_by_name["JobStatusService"].full_name == SERVICE


@pytest.mark.parametrize("service", [OVERALL, SERVICE, WRITE])
@on_a_loop
async def test_a_service_serves_only_once_it_is_set(service: str) -> None:
    async with serve() as serving:
        assert await serving.check(service) == NOT_SERVING
        serving.health.set(service, SERVING)
        assert await serving.check(service) == SERVING


@on_a_loop
async def test_a_server_that_cannot_write_may_serve_all_the_same() -> None:
    async with serve() as serving:
        for service in (OVERALL, SERVICE, WRITE):
            serving.health.set(service, SERVING)
        serving.health.set(WRITE, NOT_SERVING)
        assert [await serving.check(service) for service in (OVERALL, SERVICE, WRITE)] == [
            SERVING,
            SERVING,
            NOT_SERVING,
        ]


@pytest.mark.parametrize("service", ["jobstatus.v1.Nobody", "jobstatus.v1.JobStatusService/read", " "])
@on_a_loop
async def test_an_unknown_service_is_not_found(service: str) -> None:
    async with serve() as serving:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await serving.check(service)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("method", ["Check", "Watch"])
@on_a_loop
async def test_a_malformed_request_is_an_invalid_argument(method: str) -> None:
    async with serve() as serving:
        method_of_bytes: Any = serving.channel.unary_stream(f"/{SERVICE_NAME}/{method}")
        call = method_of_bytes(b"\x0a\x01\xff")
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("method", ["Check", "Watch"])
@pytest.mark.parametrize("more", [b"", bytes([0x7A, 0x80, 0x10]) + bytes(2048)], ids=["name", "unknown field"])
@on_a_loop
async def test_a_request_that_is_too_large_is_an_invalid_argument(method: str, more: bytes) -> None:
    request = b"" if more else HealthCheckRequest(service="x" * (MAX_SERVICE_BYTES + 1)).SerializeToString()
    assert not more or len(more) > MAX_REQUEST_BYTES
    async with serve() as serving:
        method_of_bytes: Any = serving.channel.unary_stream(f"/{SERVICE_NAME}/{method}")
        call = method_of_bytes(request + more)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


@on_a_loop
async def test_a_watch_of_the_longest_name_is_allowed() -> None:
    async with serve() as serving:
        assert await status_of(serving.watch("é" * (MAX_SERVICE_BYTES // 2))) == UNKNOWN


@pytest.mark.parametrize("transport", TRANSPORTS)
@on_a_loop
async def test_watches_beyond_the_limit_are_refused_until_one_ends(
    monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setattr(health, "MAX_WATCHERS", 9)
    async with (
        serving_at(MemoryStore(), transport=transport) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub: Any = HealthStub(channel)
        request = HealthCheckRequest(service=SERVICE)
        watches = [stub.Watch(request) for _ in range(8)]
        assert {await status_of(watch) for watch in watches} == {SERVING}
        refusal = read_refusal(await error_of(stub.Watch(request)))
        assert (refusal.kind, refusal.retry_seconds) == (("RESOURCE_EXHAUSTED", "TOO_MANY_WATCHERS"), 1.0)
        assert (await stub.Check(request)).status == SERVING
        too_long = HealthCheckRequest(service="x" * (MAX_SERVICE_BYTES + 1))
        assert (await error_of(stub.Watch(too_long))).code() is grpc.StatusCode.INVALID_ARGUMENT
        watches[0].cancel()
        await asyncio.wait_for(until_admitted(lambda: stub.Watch(request)), 10)


async def until_admitted(watch: Callable[[], Any]) -> int:
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            return await status_of(watch())


async def error_of(watch: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await watch.read()
    return caught.value


@pytest.mark.skipif(not hasattr(health_pb2, "HealthListRequest"), reason="grpcio-health-checking is older than List")
@on_a_loop
async def test_a_list_has_every_service() -> None:
    async with serve() as serving:
        serving.health.set(OVERALL, SERVING)
        request: Any = getattr(health_pb2, "HealthListRequest")()  # noqa: B009 - its type stubs lack it
        statuses = (await serving.stub.List(request)).statuses
        assert {service: status.status for service, status in statuses.items()} == {
            OVERALL: SERVING,
            SERVICE: NOT_SERVING,
            WRITE: NOT_SERVING,
        }


@on_a_loop
async def test_a_watch_sends_the_status_at_once_and_then_each_change() -> None:
    async with serve() as serving:
        watch = serving.watch(SERVICE)
        assert await status_of(watch) == NOT_SERVING
        for status in (SERVING, NOT_SERVING, SERVING):
            serving.health.set(SERVICE, status)
            assert await status_of(watch) == status


@on_a_loop
async def test_a_watch_may_skip_what_is_already_over_but_never_the_newest() -> None:
    async with serve() as serving:
        watch = serving.watch(SERVICE)
        assert await status_of(watch) == NOT_SERVING
        serving.health.set(SERVICE, SERVING)
        serving.health.set(SERVICE, NOT_SERVING)
        serving.health.set(SERVICE, SERVING)
        assert await status_of(watch) == SERVING


@on_a_loop
async def test_a_watch_of_an_unknown_service_gets_its_status_when_it_appears() -> None:
    async with serve() as serving:
        watch = serving.watch("later")
        assert await status_of(watch) == UNKNOWN
        serving.health.set("later", SERVING)
        assert await status_of(watch) == SERVING


@on_a_loop
async def test_after_a_drain_nothing_serves_any_more() -> None:
    async with serve() as serving:
        serving.health.set(SERVICE, SERVING)
        serving.health.drain()
        serving.health.set(SERVICE, SERVING)
        assert [await serving.check(service) for service in (OVERALL, SERVICE, WRITE)] == [NOT_SERVING] * 3


@pytest.mark.parametrize("service", [OVERALL, SERVICE, "later"])
@on_a_loop
async def test_a_drain_ends_each_watch_after_its_last_status(service: str) -> None:
    async with serve() as serving:
        serving.health.set(OVERALL, SERVING)
        serving.health.set(SERVICE, SERVING)
        watches = [serving.watch(service) for _ in range(20)]
        before = {await status_of(watch) for watch in watches}
        serving.health.drain()
        if before != {UNKNOWN}:
            assert {await status_of(watch) for watch in watches} == {NOT_SERVING}
        assert {await watch.read() for watch in watches} == {grpc.aio.EOF}
        assert {await watch.code() for watch in watches} == {grpc.StatusCode.OK}


@on_a_loop
async def test_a_watch_that_comes_after_the_drain_ends_with_the_status() -> None:
    async with serve() as serving:
        serving.health.drain()
        watch = serving.watch(SERVICE)
        assert [response.status async for response in watch] == [NOT_SERVING]


@on_a_loop
async def test_open_watches_do_not_hold_up_the_stop() -> None:
    async with serve() as serving:
        watch = serving.watch(SERVICE)
        await status_of(watch)
        serving.health.drain()
        await serving.server.stop(NEVER_BY_ITSELF_SECONDS)


class ObservedHealth(HealthServicer):
    """Records when a watch of `SERVICE` has ended on the server."""

    def __init__(self) -> None:
        super().__init__([SERVICE, WRITE])
        self.ended = asyncio.Event()

    async def Watch(self, data: bytes, context: Any) -> None:
        try:
            await super().Watch(data, context)
        finally:
            if HealthCheckRequest.FromString(data).service == SERVICE:
                self.ended.set()


@on_a_loop
async def test_a_watch_ends_with_its_client() -> None:
    health = ObservedHealth()
    async with serve(health) as serving:
        watch, other = serving.watch(SERVICE), serving.watch(OVERALL)
        await status_of(watch)
        await status_of(other)
        watch.cancel()
        await health.ended.wait()
        health.set(SERVICE, SERVING)
        health.set(OVERALL, SERVING)
        assert await status_of(other) == SERVING


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def header(name: str, value: str) -> bytes:
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


@asynccontextmanager
async def a_watcher_that_never_reads(port: int, service: str) -> AsyncIterator[None]:
    """Open a watch over bare HTTP/2 with a window of 0 bytes; the server is writing to it from the first moment."""
    data, headers, settings = 0, 1, 4
    end_stream, end_headers, window_size = 1, 4, 4
    names = {":method": "POST", ":scheme": "http", ":path": f"/{SERVICE_NAME}/Watch", ":authority": "localhost"}
    names |= {"te": "trailers", "content-type": "application/grpc"}
    message = HealthCheckRequest(service=service).SerializeToString()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(settings, 0, 0, struct.pack(">HI", window_size, 0)))
    writer.write(frame(headers, end_headers, 1, b"".join(header(*item) for item in names.items())))
    writer.write(frame(data, end_stream, 1, struct.pack(">?I", False, len(message)) + message))
    try:
        kind = -1
        while kind != headers:
            head = await reader.readexactly(9)
            kind = head[3]
            await reader.readexactly(int.from_bytes(head[:3], "big"))
        yield
    finally:
        writer.close()
        await writer.wait_closed()


@on_a_loop
async def test_a_watcher_that_never_reads_delays_no_other() -> None:
    async with serve() as serving, a_watcher_that_never_reads(serving.port, SERVICE):
        watches = [serving.watch(SERVICE) for _ in range(3)]
        assert [await status_of(watch) for watch in watches] == [NOT_SERVING] * 3
        for status in (SERVING, NOT_SERVING, SERVING):
            serving.health.set(SERVICE, status)
            assert [await status_of(watch) for watch in watches] == [status] * 3
        serving.health.drain()
        assert [await status_of(watch) for watch in watches] == [NOT_SERVING] * 3
        assert {await watch.code() for watch in watches} == {grpc.StatusCode.OK}


@on_a_loop
async def test_a_watcher_that_never_reads_is_freed_with_the_grace_of_the_server() -> None:
    health = ObservedHealth()
    async with serve(health) as serving, a_watcher_that_never_reads(serving.port, SERVICE):
        health.drain()
        await serving.server.stop(0.01)
        await health.ended.wait()


@on_a_loop
async def test_a_watcher_that_never_reads_is_freed_with_its_connection() -> None:
    health = ObservedHealth()
    async with serve(health) as serving:
        async with a_watcher_that_never_reads(serving.port, SERVICE):
            pass
        await health.ended.wait()
