"""Replicas of the server on one PostgreSQL database, and workers and watchers spread over them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from jobstatus_grpc import AsyncJobStatusClient, JobState
from tests.faults.load import Load, connected, crowd, follow, require_kept
from tests.processes import ServerProcess

REPLICAS = 3
# A listener has asked nothing since but whether its connection is there.
CUT_LISTENERS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE usename = 'jobstatus' AND (query LIKE 'LISTEN%' OR query = 'SELECT 1')
"""
CUT_ALL = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'jobstatus'"

Harm: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


@contextlib.contextmanager
def replicas(url: str, *flags: str, count: int = REPLICAS) -> Iterator[list[ServerProcess]]:
    """Serve one database `count` times."""
    servers = [ServerProcess("--log-level", "warning", *flags, store=url) for _ in range(count)]
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.kill)
        with ThreadPoolExecutor() as starting:
            list(starting.map(ServerProcess.start, servers))
        yield servers


class Spread:
    """A stub whose every call goes to the next replica, as behind a load balancer."""

    def __init__(self, stubs: list[Any]) -> None:
        self._stubs = itertools.cycle(stubs)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        return lambda request, **options: getattr(next(self._stubs), name)(request, **options)


@contextlib.asynccontextmanager
async def connected_to(servers: list[ServerProcess]) -> AsyncIterator[tuple[list[Any], list[AsyncJobStatusClient]]]:
    """Yield a raw stub and our client for each replica."""
    async with contextlib.AsyncExitStack() as stack:
        pairs = [await stack.enter_async_context(connected(server.address)) for server in servers]
        yield [stub for stub, _ in pairs], [client for _, client in pairs]


async def harmed_under_load(
    servers: list[ServerProcess],
    harm: Callable[[], Coroutine[Any, Any, None]],
    *,
    times: int,
    pause: Callable[[], float],
) -> None:
    """Do harm again and again while workers report: nothing acknowledged is lost, and every watcher reaches the end."""
    async with connected_to(servers) as (stubs, clients), crowd() as start:
        stub = Spread(stubs)
        load = Load(stub)
        await load.begin()
        watches = [start(follow(client, worker.job_id)) for client in clients for worker in load.workers]
        running = start(load.run())
        for _ in range(times):
            await asyncio.sleep(pause())
            harming = start(harm())
            while not harming.done():
                acknowledged = {worker.job_id: worker.acknowledged for worker in load.workers + load.created}
                await asyncio.wait([harming, running], timeout=0.02, return_when=asyncio.FIRST_COMPLETED)
                assert not running.done(), running.result()
            await harming
            await require_kept(stub, acknowledged)
        await load.end(running)
        for jobs in await asyncio.gather(*watches):
            assert jobs[-1].state is JobState.SUCCEEDED
