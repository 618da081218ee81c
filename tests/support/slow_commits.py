"""`jobstatus` with a memory store whose commits take COMMIT_SECONDS: `python -m tests.support.slow_commits serve …`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from jobstatus_grpc.cli import main
from jobstatus_grpc.job import Command
from jobstatus_grpc.stores.interface import CommitResult
from jobstatus_grpc.stores.memory import MemoryStore

COMMIT_SECONDS = 0.5

commit = MemoryStore.commit


async def commit_slowly(self: MemoryStore, commands: Sequence[Command]) -> CommitResult:
    await asyncio.sleep(COMMIT_SECONDS)
    return await commit(self, commands)


if __name__ == "__main__":
    MemoryStore.commit = commit_slowly  # type: ignore[method-assign]
    main()
