"""Watchers whose connections stay open and pass nothing are gone within half a minute, on both transports."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from jobstatus_grpc.server import config
from jobstatus_grpc.stores.memory import MemoryStore
from tests.support.servers import serving_at
from tests.support.tcp_proxy import TcpProxy


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_a_watcher_that_answers_no_ping_is_gone(monkeypatch, transport):
    monkeypatch.setattr(config, "KEEPALIVE_MILLISECONDS", 1000)
    monkeypatch.setattr(config, "KEEPALIVE_TIMEOUT_MILLISECONDS", 1000)

    async def main() -> None:
        async with serving_at(MemoryStore(), transport=transport, max_watchers=1) as (stub, address):
            created = await stub.CreateJob(pb.CreateJobRequest())
            request = pb.WatchJobRequest(id=created.job.id)
            with TcpProxy(address) as proxy:
                async with grpc.aio.insecure_channel(proxy.address) as channel:
                    watching = JobStatusServiceStub(channel).WatchJob(request)
                    await watching.read()
                    proxy.freeze()
                    began = time.monotonic()
                    while not await can_watch(stub, request):
                        assert time.monotonic() - began < 20
                        await asyncio.sleep(0.2)

    asyncio.run(main())


async def can_watch(stub, request) -> bool:
    watching = stub.WatchJob(request)
    try:
        await watching.read()
    except grpc.aio.AioRpcError:
        return False
    watching.cancel()
    return True


def test_a_connection_without_calls_is_closed_after_a_while(monkeypatch):
    monkeypatch.setattr(config, "IDLE_MILLISECONDS", 500)

    async def main() -> bytes:
        async with serving_at(MemoryStore(), transport="grpcio") as (_, address):
            reader, writer = await asyncio.open_connection(*address.split(":"))
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4" + bytes(5))  # an empty SETTINGS
            received = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            return received

    assert asyncio.run(main()).endswith(b"connection idle")


def test_a_dead_connection_is_gone_within_half_a_minute():
    options = dict(config.channel_options(config.ServerConfig()))
    assert options["grpc.keepalive_time_ms"] + options["grpc.http2.ping_timeout_ms"] < 30_000
    front = config.front_options()
    assert front["keepalive_time_ms"] + front["keepalive_timeout_ms"] < 30_000
