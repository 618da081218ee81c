"""Load for the fault tests: workers that record what was acknowledged, watchers that must reach the end, replicas."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from jobstatus_grpc import AsyncJobStatusClient, Job, JobState
from tests.support.servers import ServerProcess

REPLICAS = 3
# After LISTEN, a listener's connection sends nothing but its keepalive, SELECT 1.
CUT_LISTENERS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE usename = 'jobstatus' AND (query LIKE 'LISTEN%' OR query = 'SELECT 1')
"""
CUT_ALL = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'jobstatus'"
Harm: TypeAlias = Callable[[], Coroutine[Any, Any, None]]

# Codes that a call may get while its server dies, is down, or restarts.
PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
]


WORKERS, BATCHES, BATCH_SIZE = 8, 2, 10


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

    def note(self, result: pb.BatchUpdateJobsResult) -> None:
        """Record the result of the next report, which was sent in a batch."""
        assert result.HasField("job"), result.error
        self._note(result.job, self.acknowledged + 1)


async def until_answered(call: Any, request: Any) -> Any:
    """Call until there is an answer, as a worker with a request_id does."""
    while True:
        try:
            return await call(request, timeout=5, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            if error.code() not in PASSING:
                raise
            await asyncio.sleep(0.01)


async def require_kept(stub: Any, acknowledged: dict[str, int]) -> None:
    """Require that each job exists, at its last acknowledged report or a later one."""
    requests = [pb.GetJobRequest(id=job_id) for job_id in acknowledged]
    replies = await asyncio.gather(*(until_answered(stub.GetJob, request) for request in requests))
    for reply, (job_id, number) in zip(replies, acknowledged.items(), strict=True):
        assert reply.job.revision >= number + 1, f"{job_id}: an acknowledged write was lost"
        assert int(reply.job.labels.get("number", "0")) == reply.job.revision - 1


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


class Load:
    """Workers that report until `end`, alone and in batches, while more jobs are created."""

    def __init__(self, stub):
        self._stub = stub
        self.alone = [Worker(stub, f"alone-{number}") for number in range(WORKERS)]
        self.batches = [
            [Worker(stub, f"batch-{batch}-{number}") for number in range(BATCH_SIZE)] for batch in range(BATCHES)
        ]
        self.created = []
        self._is_over = False

    @property
    def workers(self):
        return self.alone + [worker for batch in self.batches for worker in batch]

    async def begin(self):
        await asyncio.gather(*(worker.create() for worker in self.workers))

    async def run(self):
        loads = [self._report(worker) for worker in self.alone] + [self._report_batch(batch) for batch in self.batches]
        await asyncio.gather(*loads, self._create())

    async def end(self, running):
        """Stop the load, and let every job succeed with one more report."""
        self._is_over = True
        await running
        await asyncio.gather(*(worker.report(state=pb.JOB_STATE_SUCCEEDED) for worker in self.workers))

    async def _report(self, worker):
        while not self._is_over:
            await worker.report()

    async def _report_batch(self, batch):
        while not self._is_over:
            updates = [worker.request(worker.acknowledged + 1) for worker in batch]
            reply = await until_answered(self._stub.BatchUpdateJobs, pb.BatchUpdateJobsRequest(updates=updates))
            for worker, result in zip(batch, reply.results, strict=True):
                worker.note(result)

    async def _create(self):
        while not self._is_over:
            worker = Worker(self._stub, f"created-{len(self.created)}")
            await worker.create()
            self.created.append(worker)


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


async def harmed_under_load(
    servers: list[ServerProcess],
    harm: Callable[[], Coroutine[Any, Any, None]],
    *,
    times: int,
    pause: Callable[[], float],
) -> None:
    """Call `harm` again and again under load: no acknowledged report is lost, and every watcher reaches the end."""
    async with connected_to(servers) as (stubs, clients), background_tasks() as start:
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
