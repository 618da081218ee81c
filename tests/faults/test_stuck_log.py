"""A log that nobody reads: stderr is a full pipe."""

from __future__ import annotations

import asyncio
import contextlib
import os

import pytest

from tests.support.judged import judged_under_faults
from tests.support.servers import ServerProcess

pytestmark = pytest.mark.slow

TIMES, TIMES_IN_FULL = 1, 10


def test_a_log_that_is_stuck_stops_nothing(transport, tmp_path, is_full, patience_seconds, record_fault):
    times = TIMES_IN_FULL if is_full else TIMES
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    async def read_some():
        """The reader takes what there is, and stops again."""
        with contextlib.suppress(BlockingIOError):
            os.read(reader, 1 << 20)
        await asyncio.sleep(1)

    flags = ("--transport", transport, "--log-level", "debug")
    with ServerProcess(*flags, log=pipe, store=f"sqlite:///{tmp_path}/jobs.db") as server:
        judging = judged_under_faults(
            [server.address], read_some, times=times, pause=lambda: 1, seed=1, patience_seconds=patience_seconds
        )
        judged = asyncio.run(judging)
        assert server.terminate() == 0
    os.close(reader)
    assert not judged.failures
    record_fault(
        "a log that is not read, so that its pipe is full",
        count=times,
        checked=judged.what,
        result="no violation, no call failed",
    )
