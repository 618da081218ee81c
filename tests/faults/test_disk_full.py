"""A full disk under a SQLite server: nothing is acknowledged that is not stored, and it recovers by itself."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import grpc
import pytest

from jobstatus_grpc.job import Create, Delete
from tests.support.disk import small_disk, until_writable
from tests.support.judged import judged_under_faults
from tests.support.servers import ServerProcess
from tests.support.sqlite import on_file, raw
from tests.support.stores import done, end

FAULTS, FAULTS_IN_FULL = 3, 60


def fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(64 * 1024)):
                pass
        except OSError:
            return


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1])
def test_a_disk_that_is_full_again_and_again_loses_no_acknowledged_write(tmp_path, is_full, record_fault, seed):
    chance = random.Random(seed)
    times = FAULTS_IN_FULL if is_full else FAULTS
    directory = tmp_path / "disk"
    directory.mkdir()
    with (
        small_disk(directory, megabytes=100, room=99_000_000),
        ServerProcess(store=f"sqlite:///{directory}/jobs.db", log=tmp_path / "log") as server,
        grpc.insecure_channel(server.address) as channel,
    ):

        def fill_for_a_while() -> None:
            fill(directory / "more")
            time.sleep(chance.uniform(0.05, 2))
            (directory / "more").unlink()
            until_writable(channel)

        async def fault() -> None:
            await asyncio.to_thread(fill_for_a_while)

        judging = judged_under_faults(
            [server.address], fault, times=times, pause=lambda: chance.uniform(0.1, 1), seed=seed
        )
        judged = asyncio.run(judging)
        assert server.terminate() == 0
        assert raw(directory / "jobs.db", "PRAGMA integrity_check") == [("ok",)]
        on_file(directory / "jobs.db", lambda store: done(store, Create(id="after"), end("after"), Delete(id="after")))
    record_fault(
        "a full disk under a SQLite server, with writes, checkpoints and trims going on",
        count=times,
        checked=f"{judged.acknowledged:,} acknowledged writes, {judged.calls:,} calls",
        result="none lost, no violation, writable again by itself",
    )
