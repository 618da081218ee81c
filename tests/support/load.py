"""Load for the fault tests: workers that record what was acknowledged, watchers that must reach the end, replicas."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from jobstatus_grpc import AsyncJobStatusClient, Job
from tests.support.servers import ServerProcess

REPLICAS = 3
# After LISTEN, a listener's connection sends nothing but its keepalive, SELECT 1.
CUT_LISTENERS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE usename = 'jobstatus' AND (query LIKE 'LISTEN%' OR query = 'SELECT 1')
"""
CUT_ALL = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'jobstatus'"

# Codes that a call may get while its server dies, is down, or restarts.
PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
]


class Worker:
    """Reports on one job, each report once; `acknowledged` is the number of the last that was answered.

    Report number n makes revision n + 1.
    """

    def __init__(self, stub: Any, job_id: str) -> None:
        self.job_id = job_id
        self.acknowledged = -1
        self._stub = stub

    async def create(self) -> None:
        job = pb.JobStatus(id=self.job_id, state=pb.JOB_STATE_IN_PROGRESS)
        request = pb.CreateJobRequest(job=job, request_id=f"{self.job_id}-create")
        reply = await until_answered(self._stub.CreateJob, request)
        self._note(reply.job, 0)

    async def report(self, *, state: pb.JobState.ValueType | None = None) -> None:
        number = self.acknowledged + 1
        reply = await until_answered(self._stub.UpdateJob, self.request(number, state=state))
        self._note(reply.job, number)

    def request(self, number: int, *, state: pb.JobState.ValueType | None = None) -> pb.UpdateJobRequest:
        job = pb.JobStatus(id=self.job_id, labels={"number": str(number)})
        if state is not None:
            job.state = state
        return pb.UpdateJobRequest(job=job, attempt=1, request_id=f"{self.job_id}-{number}")

    def _note(self, job: pb.JobStatus, number: int) -> None:
        assert job.revision == number + 1, "a report has one effect, however often it was sent"
        self.acknowledged = number


async def until_answered(call: Any, request: Any) -> Any:
    """Call until there is an answer, as a worker with a request_id does."""
    while True:
        try:
            return await call(request, timeout=5, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            if error.code() not in PASSING:
                raise
            await asyncio.sleep(0.01)


async def follow(client: AsyncJobStatusClient, job_id: str) -> list[Job]:
    """Watch a job to its end, and return its revisions, which must rise."""
    jobs = [job async for job in client.watch(job_id)]
    revisions = [job.revision for job in jobs]
    assert revisions == sorted(set(revisions))
    assert jobs[-1].done
    return jobs


@asynccontextmanager
async def background_tasks() -> AsyncIterator[Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]]:
    """Yield a function that starts tasks; at the end of the block, running ones are cancelled and awaited."""
    tasks: list[asyncio.Task[Any]] = []

    def start(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        tasks.append(asyncio.ensure_future(coroutine))
        return tasks[-1]

    try:
        yield start
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[tuple[Any, AsyncJobStatusClient]]:
    """Yield a raw stub and our client, each on a connection of its own."""
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel, AsyncJobStatusClient(address) as client:
        yield JobStatusServiceStub(channel), client


@contextlib.contextmanager
def replicas(url: str, *flags: str, count: int = REPLICAS, log: Path | None = None) -> Iterator[list[ServerProcess]]:
    """Serve one database `count` times, with one log."""
    servers = [ServerProcess("--log-level", "warning", *flags, store=url, log=log) for _ in range(count)]
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.kill)
        with ThreadPoolExecutor() as starting:
            list(starting.map(ServerProcess.start, servers))
        yield servers


class Spread:
    """A stub that sends each call to the next replica, like a load balancer."""

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
