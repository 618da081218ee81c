"""The native transport with handlers of the test's own: tasks, cancellation, clients that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import grpc
import pytest

from tests.support.loop import run

pytest.importorskip("pygrpc_native", reason="pygrpc-native is not built for this Python")

from pygrpc_native import EVENT_CALL

from jobstatus_grpc.errors import StreamAgeError
from jobstatus_grpc.server.transports.interface import CallContext, Method, StreamContext
from jobstatus_grpc.server.transports.native import FrontCalls, NativeServer

Behaviour = Callable[[bytes, Any], Awaitable[bytes | None]]
LARGE = b"x" * 60_000


@contextlib.asynccontextmanager
async def serving(
    behaviour: Behaviour, *, is_stream: bool = False, max_stream_seconds: float = 60, grace_seconds: float = 5
) -> AsyncIterator[Callable[..., Any]]:
    """Serve one handler, and yield a function that calls it; the server stops at the end of the block."""
    server = NativeServer(
        ["127.0.0.1:0"],
        [Method("/test.Test/Call", behaviour, is_stream)],
        grpc.aio.server,
        is_shared=False,
        max_stream_seconds=max_stream_seconds,
    )
    (address,) = await server.start()
    channel = grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
    try:
        yield channel.unary_stream("/test.Test/Call") if is_stream else channel.unary_unary("/test.Test/Call")
    finally:
        await server.stop(grace_seconds)
        await channel.close(5)  # replies that were sent can still be read


def test_a_call_sees_one_current_task_before_and_after_it_waits():
    tasks = []

    async def behaviour(data: bytes, context: CallContext) -> bytes:
        before = asyncio.current_task()
        await asyncio.sleep(0.05)
        after = asyncio.current_task()
        tasks.append(after)
        return b"one" if before is after is not None else b"two"

    async def scenario() -> None:
        async with serving(behaviour) as call:
            assert set(await asyncio.gather(*(call(b"") for _ in range(50)))) == {b"one"}

    run(scenario)
    assert len(set(tasks)) == 50


def test_calls_that_need_not_wait_share_a_task_also_with_one_that_does():
    tasks = []

    async def behaviour(data: bytes, context: CallContext) -> bytes:
        tasks.append(asyncio.current_task())
        if data == b"wait":
            await asyncio.sleep(0.05)
        return data

    async def scenario() -> None:
        async with serving(behaviour) as call:
            said = [b"wait" if number % 100 == 50 else b"%d" % number for number in range(500)]
            assert await asyncio.gather(*(call(each) for each in said)) == said

    run(scenario)
    assert len(set(tasks)) < 400


def test_a_call_can_limit_its_own_time():
    async def behaviour(data: bytes, context: CallContext) -> bytes:
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 0.01)
        except asyncio.TimeoutError:
            return b"late"
        return b""

    async def scenario() -> None:
        async with serving(behaviour) as call:
            assert set(await asyncio.gather(*(call(b"") for _ in range(20)))) == {b"late"}

    run(scenario)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("leaves", ["cancels", "has a deadline"])
def test_a_call_whose_client_leaves_is_cancelled_within_a_second(is_stream, leaves):
    began, ended = asyncio.Event(), asyncio.Event()

    async def behaviour(data: bytes, context: CallContext) -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def scenario() -> None:
        async with serving(behaviour, is_stream=is_stream) as call:
            call_it = call(b"", timeout=0.1 if leaves == "has a deadline" else None)
            running = asyncio.ensure_future(call_it.code())
            await began.wait()
            if leaves == "cancels":
                call_it.cancel()
            await asyncio.wait_for(ended.wait(), 1)
            expected = grpc.StatusCode.CANCELLED if leaves == "cancels" else grpc.StatusCode.DEADLINE_EXCEEDED
            assert await running is expected

    run(scenario)


def test_a_failure_is_internal_reveals_nothing_and_stops_no_other(caplog):
    async def behaviour(data: bytes, context: CallContext) -> bytes:
        if data == b"bad":
            raise ZeroDivisionError("password=hunter2")
        return data

    async def scenario() -> list[Any]:
        async with serving(behaviour) as call:
            return await asyncio.gather(*(call(each) for each in [b"1", b"bad", b"2"]), return_exceptions=True)

    first, failed, last = run(scenario)
    assert (first, last) == (b"1", b"2")
    assert (failed.code(), "hunter2" in str(failed)) == (grpc.StatusCode.INTERNAL, False)
    assert "ZeroDivisionError" in caplog.text


def test_writers_to_readers_that_do_not_read_wait_without_a_thread_and_lose_nothing():
    async def behaviour(data: bytes, context: StreamContext) -> None:
        for number in range(100):
            await context.write(b"%03d" % number + LARGE)

    async def scenario() -> None:
        async with serving(behaviour, is_stream=True) as call:
            threads = threading.active_count()
            slow = [aiter(call(b"")) for _ in range(50)]
            for stream in slow:
                await anext(stream)
            assert [message[:3] async for message in call(b"")] == [b"%03d" % number for number in range(100)]
            assert threading.active_count() <= threads
            for stream in slow:
                assert [message[:3] async for message in stream] == [b"%03d" % number for number in range(1, 100)]

    run(scenario)


def test_a_reader_that_never_reads_is_given_up_when_its_stream_is_too_old():
    ended = asyncio.Event()

    async def behaviour(data: bytes, context: StreamContext) -> None:
        try:
            while True:
                await context.write(LARGE)
        except StreamAgeError:
            ended.set()
            raise

    async def scenario() -> None:
        async with serving(behaviour, is_stream=True, max_stream_seconds=0.5) as call:
            stream = call(b"")
            await stream.wait_for_connection()
            await ended.wait()
            with pytest.raises(grpc.aio.AioRpcError, match="maximum age"):
                await read_all(stream)

    run(scenario)


async def read_all(stream: Any) -> list[bytes]:
    return [message async for message in stream]


def test_a_stop_waits_for_the_calls_that_run_and_for_what_they_send():
    async def behaviour(data: bytes, context: StreamContext) -> None:
        await asyncio.sleep(0.2)
        for _ in range(20):
            await context.write(LARGE)

    async def scenario() -> None:
        async with serving(behaviour, is_stream=True) as call:
            reading = [asyncio.ensure_future(read_all(call(b""))) for _ in range(20)]
            await asyncio.sleep(0.1)
        assert [len(messages) for messages in await asyncio.gather(*reading)] == [20] * 20

    run(scenario)


def test_a_stop_cuts_off_what_outlasts_its_grace():
    began = asyncio.Event()

    async def behaviour(data: bytes, context: CallContext) -> None:
        began.set()
        await asyncio.Event().wait()

    async def scenario() -> None:
        async with serving(behaviour, grace_seconds=0.1) as call:
            waiting = call(b"")
            await began.wait()
        assert await waiting.code() is grpc.StatusCode.UNAVAILABLE

    run(scenario)


class StatusesOf:
    """What FrontCalls needs of a front; keeps the code of a call."""

    def __init__(self) -> None:
        self.code: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def fail(self, call_id: int, code: int, details: str, trailers: object) -> None:
        self.code.set_result(code)


def test_a_call_that_arrives_after_its_deadline_has_no_effect():
    answered = []

    async def behaviour(data: bytes, context: CallContext) -> bytes:
        answered.append(data)
        return b""

    async def scenario() -> None:
        front = StatusesOf()
        calls = FrontCalls(cast("Any", front), [Method("/s/M", behaviour, False)], max_stream_seconds=1)
        calls.begin([(EVENT_CALL, 1, 0, b"late", None, ((), "ipv4:127.0.0.1:1", 0.0))])
        assert await front.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]

    run(scenario)
    assert answered == []
