"""`kill -9` under load: no acknowledged write is lost, and every watcher reaches the end."""

from __future__ import annotations

import asyncio
import random

import pytest

from jobstatus_grpc import JobState
from tests.support.load import Load, background_tasks, connected, follow, require_kept
from tests.support.servers import ServerProcess

KILLS, KILLS_IN_FULL = 3, 20
WATCHERS_OF_EACH = 3


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1])
def test_no_acknowledged_write_is_lost_and_every_watcher_reaches_the_end(tmp_path, is_full, seed):
    chance = random.Random(seed)
    server = ServerProcess("--log-level", "warning", store=f"sqlite:///{tmp_path}/jobs.db")

    async def scenario():
        async with connected(server.address) as (stub, client), background_tasks() as start:
            load = Load(stub)
            await load.begin()
            watched = [worker.job_id for worker in load.workers for _ in range(WATCHERS_OF_EACH)]
            watches = [start(follow(client, job_id)) for job_id in watched]
            running = start(load.run())
            for _ in range(KILLS_IN_FULL if is_full else KILLS):
                await asyncio.sleep(chance.uniform(0.1, 1))
                await asyncio.to_thread(server.kill)
                acknowledged = {worker.job_id: worker.acknowledged for worker in load.workers + load.created}
                await asyncio.to_thread(server.start)
                async with connected(server.address) as (fresh, _):
                    await require_kept(fresh, acknowledged)
            await load.end(running)
            for jobs in await asyncio.gather(*watches):
                assert jobs[-1].state is JobState.SUCCEEDED

    with server:
        asyncio.run(asyncio.wait_for(scenario(), 240))
