"""Another session locks a job's row: only updates of that job wait."""

from __future__ import annotations

import asyncio
import time

import asyncpg
import pytest

from jobstatus_grpc import JobState
from tests.support.load import background_tasks, connected_to, follow, replicas

pytestmark = pytest.mark.slow

HOLD_SECONDS, HOLD_SECONDS_IN_FULL = 3, 10
OTHERS = 16
_HOLD = "SELECT FROM jobstatus.jobs WHERE id = $1 FOR UPDATE"


async def report_until(is_over, client, job):
    """Report without a pause; return how many milliseconds each report took."""
    took = []
    while not is_over.is_set():
        began_at = time.perf_counter()
        await client.update(job.id, attempt=1, labels={"at": str(began_at)})
        took.append((time.perf_counter() - began_at) * 1000)
    return took


@pytest.mark.timeout(120)
def test_a_lock_on_one_job_delays_no_other(postgres_url, is_full, record_fault):
    hold_seconds = HOLD_SECONDS_IN_FULL if is_full else HOLD_SECONDS

    async def scenario(servers):
        async with connected_to(servers) as (_, clients), background_tasks() as start:
            jobs = [await clients[0].create(state=JobState.IN_PROGRESS) for _ in range(OTHERS)]
            held = await clients[0].create(state=JobState.IN_PROGRESS)
            watch = start(follow(clients[1], held.id))
            holder = await asyncpg.connect(postgres_url)
            async with holder.transaction():
                await holder.execute(_HOLD, held.id)
                is_over = asyncio.Event()
                reports = [start(report_until(is_over, clients[n % len(clients)], job)) for n, job in enumerate(jobs)]
                waiting = [
                    start(client.update(held.id, labels={str(n): ""}, timeout_seconds=hold_seconds + 20))
                    for n, client in enumerate(clients * 2)
                ]
                await asyncio.wait(waiting, timeout=hold_seconds)
                assert not any(update.done() for update in waiting)
                is_over.set()
                took = await asyncio.gather(*reports)
            replies = await asyncio.gather(*waiting)
            slowest, fewest = max(map(max, took)), min(map(len, took))
            print(f"the slowest of the others' updates took {slowest:.0f} ms; each made {fewest} or more")
            assert fewest > 2, "the update that waits for the lock makes one"
            assert sorted(reply.revision for reply in replies) == list(range(2, 2 + len(waiting)))
            await clients[0].update(held.id, state=JobState.SUCCEEDED)
            await watch
            await holder.close()
            return slowest

    with replicas(postgres_url) as servers:
        slowest = asyncio.run(asyncio.wait_for(scenario(servers), 100))
    record_fault(
        f"another session locks the row of one job for {hold_seconds} s",
        count=1,
        checked=f"updates of it and of {OTHERS} other jobs through three replicas",
        result=f"its updates wait, the slowest of the others took {slowest:.0f} ms",
    )
