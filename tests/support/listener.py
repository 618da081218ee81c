"""Listeners on real grpc.aio servers, with a service that echoes, ticks and answers health checks."""

from __future__ import annotations

import asyncio
import contextlib

import grpc

from jobstatus_grpc.server.transports.grpcio import Listener

ECHO = "/test.Echo/Unary"
TICK = "/test.Echo/Stream"
CHECK = "/grpc.health.v1.Health/Check"
OPTIONS = (("grpc.so_reuseport", 0),)
MAX_WAIT_SECONDS = 10.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


class Service(grpc.GenericRpcHandler):
    """Echoes, ticks and answers health checks; keeps the servers that were built for it."""

    def __init__(self) -> None:
        self.servers: list[grpc.aio.Server] = []
        self.healthy = asyncio.Event()
        self.healthy.set()
        self.checked = asyncio.Event()

    def build(self) -> grpc.aio.Server:
        server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers([self])
        self.servers.append(server)
        return server

    def service(self, details):
        return {
            ECHO: grpc.unary_unary_rpc_method_handler(self.echo),
            CHECK: grpc.unary_unary_rpc_method_handler(self.check),
            TICK: grpc.unary_stream_rpc_method_handler(self.tick),
        }.get(details.method)

    async def echo(self, request, context):
        return request

    async def tick(self, request, context):
        while True:
            yield b"tick"
            await asyncio.sleep(0.01)

    async def check(self, request, context):
        await self.healthy.wait()
        self.checked.set()
        return b""


@contextlib.asynccontextmanager
async def listening(*addresses, **settings):
    service = Service()
    listener = Listener(service.build, addresses or ["127.0.0.1:0"], **settings)
    (address, *_) = await listener.start()
    try:
        yield service, listener, address
    finally:
        await listener.stop(0)


async def call(address, timeout_seconds=MAX_WAIT_SECONDS):
    """Make one call on a new connection, which is retried while it is refused."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        return await echo(channel, timeout_seconds)


async def echo(channel, timeout_seconds=MAX_WAIT_SECONDS):
    method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(ECHO)
    return await method(b"hello", timeout=timeout_seconds, wait_for_ready=True)


def ticks(channel):
    method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(TICK)
    return method(b"")


async def make_the_accept_loop_fail(address):
    """Make the accept loop raise while it accepts a call, as some malformed calls do."""

    def refuse(loop, coroutine, **settings):
        if coroutine.__qualname__ == "_schedule_rpc_coro":
            loop.set_task_factory(None)
            coroutine.close()
            raise RuntimeError("no task for this call")
        return asyncio.Task(coroutine, loop=loop, **settings)

    asyncio.get_running_loop().set_task_factory(refuse)
    with contextlib.suppress(grpc.aio.AioRpcError):  # unless the listener's probe was accepted first
        await call(address, timeout_seconds=0.2)


async def send(address, data):
    _, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(data)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def read_to_the_end(stream):
    while await stream.read():
        pass


def ends(caplog):
    return [message for message in caplog.messages if "has ended" in message]


async def logged(caplog, count=1):
    while len(ends(caplog)) < count:  # noqa: ASYNC110 - the log has no event to wait for
        await asyncio.sleep(0.01)
