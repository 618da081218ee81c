"""Arbitrary bytes on the port: new calls succeed within two seconds, and watches continue."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct

import pytest

from jobstatus_grpc import AsyncJobStatusClient, JobState
from tests.support.servers import ServerProcess

ROUNDS, ROUNDS_IN_FULL = 6, 100
CONNECTIONS = 30
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def settings(stream=0):
    return struct.pack(">I", 0)[1:] + bytes([4, 0]) + struct.pack(">I", stream)


def random_frame(chance):
    """A frame with the right length and random content."""
    payload = chance.randbytes(chance.choice([0, 1, 4, 5, 6, 8, 30, 300]))
    head = bytes([chance.randrange(12), chance.randrange(256)]) + struct.pack(">I", chance.randrange(6))
    return struct.pack(">I", len(payload))[1:] + head + payload


KINDS = {
    "anything": lambda chance: chance.randbytes(chance.randrange(1, 2000)),
    "anything behind a preface": lambda chance: PREFACE + settings() + chance.randbytes(chance.randrange(1, 2000)),
    "frames": lambda chance: PREFACE + settings() + b"".join(random_frame(chance) for _ in range(20)),
    "nothing": lambda chance: b"",
    "HTTP/1.1": lambda chance: b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "TLS": lambda chance: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(512),
}


async def send(address, data, *, is_patient):
    """Send bytes on a new connection, and close it, sometimes after an answer."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        await writer.drain()
        if is_patient:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(), 0.2)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
def test_calls_succeed_within_two_seconds_of_any_bytes_and_a_watch_goes_on(tmp_path, is_full, kind, record_fault):
    chance, rounds = random.Random(kind), ROUNDS_IN_FULL if is_full else ROUNDS

    async def scenario(address):
        async with AsyncJobStatusClient(address) as client:
            job = await client.create(state=JobState.IN_PROGRESS)
            watch = client.watch(job.id, min_update_interval_seconds=0)
            assert (await anext(watch)) == job
            for number in range(rounds):
                data = [KINDS[kind](chance) for _ in range(CONNECTIONS)]
                await asyncio.gather(*(send(address, item, is_patient=chance.random() < 0.5) for item in data))
                async with AsyncJobStatusClient(address) as newcomer:
                    job = await newcomer.update(job.id, labels={"n": str(number)}, timeout_seconds=2)
                assert await asyncio.wait_for(anext(watch), 5) == job
            end = await client.update(job.id, state=JobState.SUCCEEDED)
            assert [job async for job in watch] == [end]

    log = tmp_path / "log"
    with ServerProcess("--log-level", "warning", log=log, store=f"sqlite:///{tmp_path}/jobs.db") as server:
        asyncio.run(asyncio.wait_for(scenario(server.address), 240))
        assert server.terminate() == 0
    assert b"Traceback" not in log.read_bytes()
    record_fault(
        f"connections with arbitrary bytes: {kind}",
        count=rounds * CONNECTIONS,
        checked=f"a call of a new client and an open watch, after each {CONNECTIONS}",
        result="served within 2 s, no traceback in the log",
    )
