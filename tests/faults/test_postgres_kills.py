"""Replicas, the database and connections fail under load: the checker finds nothing, on each replica."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal

import pytest

from jobstatus_grpc import AsyncJobStatusClient
from tests.support.judged import judged_under_faults
from tests.support.load import CUT_ALL, CUT_LISTENERS, replicas
from tests.support.postgres import signal_all
from tests.support.tcp_proxy import TcpProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE_SECONDS = 10.0
SUSPENSION_SECONDS = 4.0
"""Longer than a call may take."""

_BACKEND = "SELECT pid FROM pg_stat_activity WHERE usename = 'jobstatus' AND state = 'active' LIMIT 1"
_ANY_BACKEND = "SELECT pid FROM pg_stat_activity WHERE usename = 'jobstatus' ORDER BY random() LIMIT 1"


async def until_all_write(servers):
    """Wait until each replica commits again."""
    for server in servers:
        async with AsyncJobStatusClient(server.address) as client:
            await client.create(timeout_seconds=60)


class Faults:
    """Each method is a fault of replicas on one database; it returns when all of them commit again."""

    def __init__(self, servers, postgres, chance):
        self._servers = servers
        self._postgres = postgres
        self._chance = chance
        self._turns = itertools.cycle(servers)

    async def replica_killed(self):
        server = next(self._turns)
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(self._chance.uniform(0, 0.5))
        await asyncio.to_thread(server.start)

    async def replica_suspended(self):
        server = next(self._turns)
        server.signal(signal.SIGSTOP)
        await asyncio.sleep(SUSPENSION_SECONDS)
        server.signal(signal.SIGCONT)
        await until_all_write(self._servers)

    async def database_killed(self):
        await asyncio.to_thread(self._postgres.kill)
        await asyncio.sleep(self._chance.uniform(0, 1))
        await asyncio.to_thread(self._postgres.start)
        await until_all_write(self._servers)

    async def backend_killed(self):
        ((pid,),) = await asyncio.to_thread(self._postgres.execute, _ANY_BACKEND)
        os.kill(int(pid), signal.SIGKILL)
        await until_all_write(self._servers)

    async def backend_suspended(self):
        while not (rows := await asyncio.to_thread(self._postgres.execute, _BACKEND)):
            pass
        await self._suspend([int(rows[0][0])])

    async def database_suspended(self):
        await self._suspend(self._postgres.pids)

    async def _suspend(self, pids):
        try:
            signal_all(pids, signal.SIGSTOP)
            await asyncio.sleep(SUSPENSION_SECONDS)
        finally:
            signal_all(pids, signal.SIGCONT)
        await until_all_write(self._servers)

    async def sessions_cut(self):
        assert await asyncio.to_thread(self._postgres.execute, CUT_ALL)
        await until_all_write(self._servers)

    async def listeners_cut(self):
        assert await asyncio.to_thread(self._postgres.execute, CUT_LISTENERS)
        await until_all_write(self._servers)

    async def table_locked(self):
        name = self._servers[0].store.rpartition("/")[2]
        lock = "BEGIN; LOCK TABLE jobstatus.jobs IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(4); COMMIT"
        await asyncio.to_thread(self._postgres.execute, lock, name)
        await until_all_write(self._servers)


KINDS = {
    "replica_killed": ("`kill -9` of one of three replicas", 2, 60),
    "replica_suspended": ("SIGSTOP of a replica for 4 s", 1, 10),
    "database_killed": ("`kill -9` of PostgreSQL, all its processes", 1, 20),
    "backend_killed": ("`kill -9` of one PostgreSQL backend, which restarts them all", 1, 20),
    "backend_suspended": ("SIGSTOP of a PostgreSQL backend at work for 4 s", 1, 10),
    "database_suspended": ("SIGSTOP of all processes of PostgreSQL for 4 s", 1, 10),
    "sessions_cut": ("all sessions to PostgreSQL terminated", 1, 20),
    "listeners_cut": ("the listening sessions to PostgreSQL terminated", 1, 20),
    "table_locked": ("another session locks the table of jobs for 4 s", 1, 10),
}
"""What happens, how often, and how often at full length."""


@pytest.mark.parametrize("kind", KINDS)
def test_three_replicas_keep_the_contract(new_postgres, is_full, record_fault, kind):
    fault, times, times_in_full = KINDS[kind]
    times = times_in_full if is_full else times
    chance = random.Random(kind)
    with replicas(new_postgres.url(new_postgres.create_database())) as servers:
        judging = judged_under_faults(
            [server.address for server in servers],
            getattr(Faults(servers, new_postgres, chance), kind),
            times=times,
            pause=lambda: chance.uniform(0.3, 1.2),
            seed=1,
            patience_seconds=PATIENCE_SECONDS,
        )
        judged = asyncio.run(asyncio.wait_for(judging, 850))
    assert judged.acknowledged > times
    record_fault(fault, count=times, checked=judged.what, result="none lost, no violation")


async def cut_at_random(proxy, chance):
    """Reset new connections after some bytes, most within a login or the first transactions."""
    proxy.max_bytes, proxy.max_request_bytes = (int(10 ** chance.uniform(1, 4.3)) for _ in range(2))
    proxy.cut()
    await asyncio.sleep(chance.uniform(0.5, 1.5))
    proxy.max_bytes = proxy.max_request_bytes = None
    proxy.cut()


async def freeze(proxy, chance):
    proxy.freeze()
    await asyncio.sleep(chance.uniform(1, SUSPENSION_SECONDS))
    proxy.cut()


async def delay(proxy, chance):
    proxy.delay_seconds = lambda: chance.choice([0, 0.01, 0.3])
    await asyncio.sleep(2)
    proxy.delay_seconds = float


NETWORK = {
    "cut": (cut_at_random, "connections to PostgreSQL reset after a random number of bytes", 3, 40),
    "frozen": (freeze, "connections to PostgreSQL black-holed for 1 to 4 s, new ones pass", 1, 20),
    "delayed": (delay, "bytes to and from PostgreSQL delayed by up to 0.3 s for 2 s", 1, 20),
}


@pytest.mark.parametrize("kind", NETWORK)
def test_the_network_to_the_database_may_fail(new_postgres, tmp_path, is_full, record_fault, kind):
    harm, fault, times, times_in_full = NETWORK[kind]
    times = times_in_full if is_full else times
    chance = random.Random(kind)
    url = new_postgres.url(new_postgres.create_database())
    where = f"127.0.0.1:{new_postgres.port}"
    log = tmp_path / "log"
    with TcpProxy(where) as proxy, replicas(url.replace(where, proxy.address), count=2, log=log) as servers:

        async def fail():
            await harm(proxy, chance)
            await until_all_write(servers)

        judging = judged_under_faults(
            [server.address for server in servers],
            fail,
            times=times,
            pause=lambda: chance.uniform(0.3, 1.2),
            seed=2,
            patience_seconds=PATIENCE_SECONDS,
        )
        judged = asyncio.run(asyncio.wait_for(judging, 850))
    assert judged.acknowledged > times
    assert set(judged.failures) <= {"UNAVAILABLE", "DEADLINE_EXCEEDED"}, judged.failures
    assert "Traceback" not in log.read_text()
    record_fault(fault, count=times, checked=judged.what, result="none lost, no violation, no code but UNAVAILABLE")
