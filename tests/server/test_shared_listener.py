"""Listeners that share a port: one that stops accepting is replaced, though others answer on the port."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest

from jobstatus_grpc.server.addresses import CannotListenError, Reservation, require_free
from jobstatus_grpc.server.transports.grpcio import Listener
from tests.support.listener import Service, call, ends, logged, make_the_accept_loop_fail
from tests.support.loop import run


class SharingService(Service):
    """Servers that share their port; `has_answered` says whether one has answered."""

    def __init__(self) -> None:
        super().__init__()
        self.has_answered = False

    def build(self) -> grpc.aio.Server:
        server = grpc.aio.server(options=(("grpc.so_reuseport", 1),))
        server.add_generic_rpc_handlers([self])
        self.servers.append(server)
        return server

    async def echo(self, request, context):
        self.has_answered = True
        return request


@contextlib.asynccontextmanager
async def sharing(folder, **settings):
    """Yield the services of two listeners on one port, and its address."""
    services = [SharingService(), SharingService()]
    with contextlib.closing(Reservation()) as reservation:
        address = await reservation.add("127.0.0.1:0")
        async with contextlib.AsyncExitStack() as stack:
            for number, service in enumerate(services):
                listener = Listener(service.build, [address], private=f"unix:{folder}/{number}", **settings)
                assert await listener.start() == [address]
                stack.push_async_callback(listener.stop, 0)
            yield services, address


async def call_until_all_answer(services, address):
    """Call, each time on a new connection, until each service has got a call."""
    for service in services:
        service.has_answered = False
    while not all(service.has_answered for service in services):
        await call(address)


def test_both_answer_again_after_the_end_of_an_accept_loop(tmp_path, caplog):
    async def scenario():
        async with sharing(tmp_path) as (services, address):
            await call_until_all_answer(services, address)
            await make_the_accept_loop_fail(address)
            await logged(caplog)
            await call_until_all_answer(services, address)

    run(scenario)
    assert "its accept loop failed" in ends(caplog)[0]


def test_closed_sockets_are_noticed_though_a_sibling_answers(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(asyncio, "all_tasks", set)

    async def scenario():
        async with sharing(tmp_path, tick_seconds=0.2) as (services, address):
            await asyncio.gather(*(service.checked.wait() for service in services))
            await services[1].servers[0].stop(0)
            await logged(caplog)
            await call_until_all_answer(services, address)

    run(scenario)
    assert f"unix:{tmp_path}/1 refuses connections" in ends(caplog)[0]


def test_silence_is_noticed_though_a_sibling_answers(tmp_path, caplog):
    async def scenario():
        async with sharing(tmp_path, tick_seconds=0.02, silence_ticks=10) as (services, address):
            await asyncio.gather(*(service.checked.wait() for service in services))
            services[1].healthy.clear()
            await logged(caplog)
            await call_until_all_answer(services, address)
            assert [len(service.servers) for service in services] == [1, 2]

    run(scenario)
    assert "health checks are unanswered" in ends(caplog)[0]


def test_a_reserved_port_is_neither_free_nor_reserved_again():
    async def scenario():
        with contextlib.closing(Reservation()) as reservation, contextlib.closing(Reservation()) as late:
            address = await reservation.add("localhost:0")
            assert not address.endswith(":0")
            for ask in (require_free, late.add):
                with pytest.raises(CannotListenError, match="another server listens there"):
                    await ask(address)
            reservation.close()
            assert await late.add(address) == address

    run(scenario)
