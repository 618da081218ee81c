"""Of several replicas one sweeps; when it dies another does, and silence before that does not count."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime, timedelta, timezone

import psutil
import pytest

from jobstatus_grpc import JobState
from jobstatus_grpc.errors import JobExpiredError
from tests.support.load import background_tasks, connected_to, replicas
from tests.support.timing import rerun_after_pause
from tests.support.watch_jobs import REMOVED, Reader

pytestmark = pytest.mark.slow

TIMEOUT = timedelta(seconds=2)
KILLS, KILLS_IN_FULL = 1, 10
EXPIRING = 40
_LEADER = """
    SELECT client_port FROM pg_stat_activity AS a JOIN pg_locks AS l USING (pid)
    WHERE l.locktype = 'advisory' AND l.granted AND a.datname = current_database()
"""


async def leader(postgres, database, servers):
    """Wait until a replica sweeps, and return that replica."""
    while True:
        rows = await asyncio.to_thread(postgres.execute, _LEADER, database)
        assert len(rows) <= 1, "two sweep"
        for server in servers:
            ports = {str(connection.laddr.port) for connection in psutil.Process(server.pid).net_connections()}
            if rows and rows[0][0] in ports:
                return server
        await asyncio.sleep(0.02)


async def until_stalled(client, job_id):
    async for job in client.watch(job_id):
        if job.stalled:
            return job


@pytest.fixture
def database(postgres):
    name = postgres.create_database()
    yield name
    postgres.drop_database(name)


@pytest.mark.timeout(300)
@rerun_after_pause(0.5)
def test_when_the_sweeper_dies_another_takes_over_and_its_clocks_start_anew(postgres, database, is_full, record_fault):
    kills = KILLS_IN_FULL if is_full else KILLS

    async def scenario(servers):
        async with connected_to(servers) as (_, clients), background_tasks() as start:
            for _ in range(kills):
                sweeper = await leader(postgres, database, servers)
                client = clients[(servers.index(sweeper) + 1) % len(clients)]
                job = await client.create(state=JobState.IN_PROGRESS, heartbeat_timeout_seconds=TIMEOUT.total_seconds())
                stall = start(until_stalled(client, job.id))
                await asyncio.sleep(TIMEOUT.total_seconds() / 2)
                killed_at = datetime.now(timezone.utc)
                await asyncio.to_thread(sweeper.kill)
                assert await leader(postgres, database, [server for server in servers if server is not sweeper])
                stalled = await asyncio.wait_for(stall, 20)
                assert stalled.updated_at >= killed_at + TIMEOUT
                await asyncio.to_thread(sweeper.start)
                assert (await client.get(job.id)).revision == 2, "stalled once"

    with replicas(postgres.url(database)) as servers:
        asyncio.run(asyncio.wait_for(scenario(servers), 280))
    record_fault(
        "`kill -9` of the leader, which marks stalled jobs",
        count=kills,
        checked="a job that stalls meanwhile",
        result="another replica takes over, one stall, not early",
    )


@pytest.mark.timeout(120)
def test_jobs_expire_once_also_when_the_sweeper_dies_in_between(postgres, database):
    async def expired(client, job_id):
        while True:
            with contextlib.suppress(JobExpiredError):
                await client.get(job_id)
                await asyncio.sleep(0.05)
                continue
            return

    async def scenario(servers):
        async with connected_to(servers) as (stubs, clients):
            sweeper = await leader(postgres, database, servers)
            others = [n for n, server in enumerate(servers) if server is not sweeper]
            stub, client = stubs[others[0]], clients[others[1]]
            reader = Reader()
            stream = stub.WatchJobs(reader.begin(), timeout=60)
            while not reader.is_synced:
                reader.take(await stream.read())
            jobs = [await client.create() for _ in range(EXPIRING)]
            for job in jobs:
                await client.update(job.id, state=JobState.SUCCEEDED)
            await expired(client, jobs[0].id)
            await asyncio.to_thread(sweeper.kill)
            await asyncio.gather(*(expired(client, job.id) for job in jobs))
            removals: list[tuple[str, int]] = []
            while len(removals) < len(jobs):
                message = await stream.read()
                reader.take(message)
                removals += [(event.job.id, event.job.revision) for event in message.events if event.type == REMOVED]
            assert sorted(removals) == sorted((job.id, 3) for job in jobs)
            assert not reader.jobs

    with replicas(postgres.url(database), "--retention", "1s") as servers:
        asyncio.run(asyncio.wait_for(scenario(servers), 100))
