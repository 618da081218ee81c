"""`kill -9` under load: the checker finds nothing, so no acknowledged write is lost and every watcher gets the end."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.support.judged import judged_under_faults
from tests.support.servers import ServerProcess

KILLS, KILLS_IN_FULL = 1, 50
"""For each seed. In full there are 150, with more than 50,000 acknowledged writes between them."""
MAX_WRITES, MAX_WRITES_IN_FULL = 200, 700
"""Acknowledged writes before a kill."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_acknowledged_write_is_lost_and_every_watcher_reaches_the_end(
    tmp_path, is_full, patience_seconds, record_fault, seed
):
    kills, max_writes = (KILLS_IN_FULL, MAX_WRITES_IN_FULL) if is_full else (KILLS, MAX_WRITES)
    chance = random.Random(seed)
    with ServerProcess("--log-level", "warning", store=f"sqlite:///{tmp_path}/jobs.db") as server:

        async def kill():
            await asyncio.to_thread(server.restart)

        judging = judged_under_faults(
            [server.address],
            kill,
            times=kills,
            writes=lambda: chance.randint(100, max_writes),
            seed=seed,
            clients=16 if is_full else 6,
            patience_seconds=patience_seconds,
        )
        judged = asyncio.run(judging)
    record_fault(
        f"`kill -9` of the server at random, on SQLite, seed {seed}",
        count=kills,
        checked=judged.what,
        result="none lost, no violation",
    )
