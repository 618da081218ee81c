"""`kill -9` under load: the checker finds nothing, so no acknowledged write is lost and every watcher gets the end."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from tests.support.judged import judged_under_faults
from tests.support.servers import ServerProcess

KILLS, KILLS_IN_FULL = 3, 150
WRITES, WRITES_IN_FULL = 100, 700
"""Acknowledged writes before a kill, at most. In full, 150 kills make over 50,000, and go on until they do."""
ALL_WRITES_IN_FULL = 50_000
KILLS_OF_A_PART = 50
"""Kills between two judgements."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_acknowledged_write_is_lost_and_every_watcher_reaches_the_end(
    tmp_path, is_full, patience_seconds, record_fault
):
    kills, writes, all_writes = (KILLS_IN_FULL, WRITES_IN_FULL, ALL_WRITES_IN_FULL) if is_full else (KILLS, WRITES, 1)
    chance = random.Random(1)
    killed = acknowledged = calls = 0
    with ServerProcess("--log-level", "warning", store=f"sqlite:///{tmp_path}/jobs.db") as server:

        async def kill():
            await asyncio.to_thread(server.restart)

        for seed in itertools.count(1):
            judging = judged_under_faults(
                [server.address],
                kill,
                times=min(kills, KILLS_OF_A_PART),
                writes=lambda: chance.randint(1, writes),
                seed=seed,
                clients=16 if is_full else 6,
                patience_seconds=patience_seconds,
            )
            judged = asyncio.run(judging)
            killed += judged.faults
            acknowledged, calls = acknowledged + judged.acknowledged, calls + judged.calls
            if killed >= kills and acknowledged >= all_writes:
                break
    record_fault(
        "`kill -9` of the server at random, on SQLite",
        count=killed,
        checked=f"{acknowledged:,} acknowledged writes, {calls:,} calls",
        result="none lost, no violation",
    )
