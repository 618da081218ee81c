"""`kill -9` under load: the checker finds nothing, so no acknowledged write is lost and every watcher gets the end."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.support.judged import judged_under_faults
from tests.support.servers import ServerProcess

KILLS, KILLS_IN_FULL = 3, 150


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1])
def test_no_acknowledged_write_is_lost_and_every_watcher_reaches_the_end(
    tmp_path, is_full, patience_seconds, record_fault, seed
):
    chance = random.Random(seed)
    kills = KILLS_IN_FULL if is_full else KILLS
    with ServerProcess("--log-level", "warning", store=f"sqlite:///{tmp_path}/jobs.db") as server:

        async def kill():
            await asyncio.to_thread(server.restart)

        judging = judged_under_faults(
            [server.address],
            kill,
            times=kills,
            pause=lambda: chance.uniform(0.1, 1),
            seed=seed,
            patience_seconds=patience_seconds,
        )
        judged = asyncio.run(judging)
    assert judged.acknowledged > kills
    record_fault(
        "`kill -9` of the server at random, on SQLite",
        count=kills,
        checked=judged.what,
        result="none lost, no violation",
    )
