"""The listener on a real grpc.aio server: accept loops that end, hang or get garbage; new calls must succeed."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from pathlib import Path

import grpc
import pytest

from jobstatus_grpc.server.addresses import CannotListenError
from jobstatus_grpc.server.transports.grpcio import Listener
from tests.support.listener import (
    OPTIONS,
    PREFACE,
    Service,
    call,
    echo,
    ends,
    listening,
    logged,
    make_the_accept_loop_fail,
    read_to_the_end,
    send,
    ticks,
)
from tests.support.loop import run
from tests.support.timing import MAX_PAUSE_SECONDS, rerun_after_pause


@rerun_after_pause(0.5)
def test_calls_succeed_within_two_seconds_of_the_accept_loops_end_and_the_log_says_why(caplog):
    async def scenario():
        async with listening() as (_, _, address):
            await make_the_accept_loop_fail(address)
            assert await call(address, timeout_seconds=2) == b"hello"

    caplog.clear()
    run(scenario)
    assert len(ends(caplog)) == 1
    assert "accept loop failed with RuntimeError: no task for this call" in ends(caplog)[0]


def test_an_open_stream_outlives_the_listener_that_took_it(caplog):
    async def scenario():
        async with listening() as (_, _, address), grpc.aio.insecure_channel(address) as channel:
            stream = ticks(channel)
            assert await stream.read() == b"tick"
            await make_the_accept_loop_fail(address)
            await logged(caplog)
            assert [await stream.read() for _ in range(20)] == [b"tick"] * 20
            stream.cancel()

    run(scenario)


def test_a_channel_that_was_open_before_goes_on_with_new_calls(caplog):
    async def scenario():
        async with listening() as (_, _, address), grpc.aio.insecure_channel(address) as channel:
            for count in range(1, 6):
                await make_the_accept_loop_fail(address)
                await logged(caplog, count)
                assert await echoed(channel) == b"hello"

    run(scenario)


async def echoed(channel):
    """Repeat a call that meets the listener that ends, as clients do."""
    while True:
        try:
            return await echo(channel)
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE):
                raise


def test_a_server_that_was_stopped_behind_our_back_is_replaced(caplog):
    async def scenario():
        async with listening() as (service, _, address):
            await service.servers[0].stop(0)
            assert await call(address) == b"hello"
            assert len(service.servers) == 2

    run(scenario)
    assert len(ends(caplog)) == 1


def test_the_same_unix_socket_is_served_after_a_rebuild(tmp_path: Path, caplog):
    async def scenario():
        async with listening(f"unix:{tmp_path}/socket", "127.0.0.1:0") as (_, _, address):
            await make_the_accept_loop_fail(address)
            assert await call(address) == b"hello"

    run(scenario)
    assert len(ends(caplog)) == 1


def test_refused_connections_are_noticed_where_the_accept_loop_cannot_be_seen(caplog, monkeypatch):
    monkeypatch.setattr(asyncio, "all_tasks", set)

    async def scenario():
        async with listening(tick_seconds=0.2) as (service, _, address):
            await service.checked.wait()
            await service.servers[0].stop(0)
            assert await call(address) == b"hello"

    run(scenario)
    assert "refuses connections" in ends(caplog)[0]


@pytest.mark.parametrize("prefix", [b"", PREFACE], ids=["random", "after a preface"])
def test_calls_succeed_after_random_bytes(prefix):
    chance = random.Random(20)

    async def scenario():
        async with listening() as (_, _, address), grpc.aio.insecure_channel(address) as channel:
            stream = ticks(channel)
            for _ in range(10):
                data = [prefix + chance.randbytes(chance.randrange(1, 2000)) for _ in range(30)]
                await asyncio.gather(*(send(address, item) for item in data))
                assert await call(address) == b"hello"
            assert await stream.read() == b"tick"
            stream.cancel()

    run(scenario)


def test_a_server_that_takes_connections_but_no_calls_is_replaced(caplog):
    async def scenario():
        async with listening(tick_seconds=0.02, silence_ticks=10) as (service, _, address):
            await service.checked.wait()
            service.healthy.clear()
            await logged(caplog)
            assert await call(address) == b"hello"

    run(scenario)
    assert "health checks are unanswered" in ends(caplog)[0]


def test_a_busy_server_is_left_alone(caplog):
    async def scenario():
        async with listening(tick_seconds=0.02, silence_ticks=10) as (service, _, address):
            for _ in range(4):
                await call(address)
                time.sleep(0.3)  # noqa: ASYNC251 - blocks the event loop on purpose
            assert len(service.servers) == 1

    run(scenario)
    assert ends(caplog) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_taken_port_is_refused_with_its_name(host):
    async def scenario():
        async with listening() as (_, _, address):
            taken = f"{host}:{address.split(':')[1]}"
            with pytest.raises(CannotListenError, match=f"{taken}: another server listens there"):
                await Listener(Service().build, [taken]).start()
            assert await call(address) == b"hello"

    run(scenario)


def test_a_unix_socket_is_not_taken_from_a_living_server(tmp_path: Path):
    async def scenario():
        async with listening(f"unix:{tmp_path}/socket") as (_, _, address):
            with pytest.raises(CannotListenError, match="another server listens there"):
                await Listener(Service().build, [address]).start()
            assert await call(address) == b"hello"

    run(scenario)


def test_methods_registered_by_name_are_refused():
    def build():
        server = grpc.aio.server(options=OPTIONS)
        server.add_registered_method_handlers(
            "test.Echo", {"Unary": grpc.unary_unary_rpc_method_handler(Service().echo)}
        )
        return server

    async def scenario():
        with pytest.raises(RuntimeError, match="add_generic_rpc_handlers"):
            await Listener(build, ["127.0.0.1:0"]).start()

    run(scenario)


def test_stop_ends_the_streams_of_replaced_servers_within_its_grace(caplog):
    async def scenario():
        async with listening() as (_, listener, address), grpc.aio.insecure_channel(address) as channel:
            stream = ticks(channel)
            await stream.read()
            await make_the_accept_loop_fail(address)
            await logged(caplog)
            await asyncio.wait_for(listener.stop(0.2), 0.2 + 1 + MAX_PAUSE_SECONDS)
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                await read_to_the_end(stream)

    run(scenario)
    assert "not stopped" not in caplog.text


def test_a_stop_that_was_asked_for_is_not_an_end(caplog):
    async def scenario():
        async with listening() as (_, listener, _):
            await listener.stop(0)

    caplog.set_level(logging.INFO)
    run(scenario)
    assert caplog.records == []
