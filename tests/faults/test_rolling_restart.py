"""Replicas on one database that are replaced one after another, as a deployment does it."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from jobstatus_grpc import AsyncJobStatusClient, JobState
from tests.support.judged import judged_under_faults
from tests.support.load import REPLICAS, background_tasks, replicas

pytestmark = pytest.mark.slow

ROUNDS, ROUNDS_IN_FULL = 1, 10


async def work(client, is_over):
    """Run jobs with our client, of which no call may fail; return their number."""
    for number in itertools.count():
        if is_over.is_set():
            return number
        async with client.track("rolling", strict=True) as tracked:
            watch = client.watch(tracked.id, min_update_interval_seconds=0)
            for step in range(5):
                job = await client.update(tracked.id, reason=f"step {step}", attempt=1)
                while (await anext(watch)).revision < job.revision:
                    pass
        assert (await client.wait(tracked.id)).state is JobState.SUCCEEDED


@pytest.mark.timeout(600)
def test_a_rolling_restart_fails_no_call_that_is_not_retried(postgres_url, is_full, patience_seconds, record_fault):
    rounds, chance = ROUNDS_IN_FULL if is_full else ROUNDS, random.Random(1)

    async def scenario(servers):
        addresses, turns = [server.address for server in servers], itertools.cycle(servers)

        async def replace_one():
            server = next(turns)
            assert await asyncio.to_thread(server.terminate) == 0
            await asyncio.to_thread(server.start)

        target = f"ipv4:{','.join(addresses)}"
        async with AsyncJobStatusClient(target) as client, background_tasks() as start:
            is_over = asyncio.Event()
            working = [start(work(client, is_over)) for _ in range(4)]
            judged = await judged_under_faults(
                addresses,
                replace_one,
                times=rounds * REPLICAS,
                pause=lambda: chance.uniform(0.2, 1),
                seed=1,
                patience_seconds=patience_seconds,
            )
            is_over.set()
            return judged, sum(await asyncio.gather(*working))

    with replicas(postgres_url) as servers:
        judged, jobs = asyncio.run(asyncio.wait_for(scenario(servers), 580))
    # grpcio's core cancels calls that arrive while it stops; our client makes them again.
    assert set(judged.failures) <= {"UNAVAILABLE", "CANCELLED"}
    record_fault(
        "a rolling restart of 3 replicas, each drained",
        count=rounds,
        checked=f"{judged.what}; {jobs} jobs of our client, each with a watch",
        result="no violation; no call of our client failed, and raw calls only with UNAVAILABLE or CANCELLED",
    )
