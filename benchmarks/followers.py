"""`python -m benchmarks.followers ADDRESS JOB WATCHES`: watches of one job through our Python client, for ever.

It says `all REVISION` whenever all have a revision. When its input ends, so does it: it says how often a watch was cut,
and how often it was refused.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections import Counter
from contextlib import AsyncExitStack

from jobstatus_grpc import AsyncJobStatusClient, ResourceExhaustedError

WATCHES_PER_CLIENT = 250


class CutCounter(logging.Handler):
    """Counts the ends of streams that the client survives: it logs each, with its cause."""

    def __init__(self) -> None:
        super().__init__()
        self.cuts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        if "was cut" in record.msg and isinstance(record.args, tuple):
            is_refusal = isinstance(record.args[1], ResourceExhaustedError)
            self.cuts["refused" if is_refusal else "cut"] += 1


class Followers:
    """Watches, and how many of them have each revision."""

    def __init__(self, watches: int) -> None:
        self._watches = watches
        self._seen: Counter[int] = Counter()

    async def follow(self, client: AsyncJobStatusClient, job_id: str) -> None:
        """Follow a job to its end."""
        async for job in client.watch(job_id):
            self._seen[job.revision] += 1
            if self._seen[job.revision] == self._watches:
                print(f"all {job.revision}", flush=True)


async def _main(address: str, job_id: str, watches: int) -> None:
    counter = CutCounter()
    logger = logging.getLogger("jobstatus_grpc.client")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(counter)
    logger.propagate = False
    followers = Followers(watches)
    async with AsyncExitStack() as clients:
        tasks: list[asyncio.Task[None]] = []
        for number in range(watches):
            if number % WATCHES_PER_CLIENT == 0:
                client = await clients.enter_async_context(AsyncJobStatusClient(address))
            tasks.append(asyncio.create_task(followers.follow(client, job_id)))
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps(counter.cuts))


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
