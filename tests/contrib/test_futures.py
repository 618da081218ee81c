"""Calls of executors and asyncio tasks as jobs."""

# mypy: disable-error-code="union-attr"

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from jobstatus_grpc import AsyncJobStatusClient, Job, JobFilter, JobState, JobStatusClient
from jobstatus_grpc.contrib.asyncio import create_task
from jobstatus_grpc.contrib.futures import TrackedExecutor, current_job
from tests.support.servers import ServerProcess
from tests.support.service import Service

MAX_WAIT_SECONDS = 20


def work(percent: float) -> int:
    current_job().progress(percent, "half")
    return os.getpid()


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def fail(message: str) -> None:
    raise ValueError(message)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(params=["threads", "fork", "spawn"])
def executor(request: pytest.FixtureRequest, client: JobStatusClient) -> Iterator[TrackedExecutor]:
    if request.param == "threads":
        pool: ThreadPoolExecutor | ProcessPoolExecutor = ThreadPoolExecutor(2)
    else:
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(request.param))
    with TrackedExecutor(pool, client) as executor:
        yield executor


@pytest.fixture
def done(client: JobStatusClient) -> Callable[..., Job]:
    def wait(executor: TrackedExecutor, future) -> Job:
        executor.flush()
        return client.wait(executor.job_id(future), MAX_WAIT_SECONDS)

    return wait


def test_a_call_is_a_job(executor, client, done, tmp_path):
    for _ in range(2):  # an idle worker may be quicker than the report that the call waits
        executor.submit(wait_for, tmp_path / "go")
    future = executor.submit(work, 50)
    executor.flush()
    (tmp_path / "go").touch()
    job = done(executor, future)
    states = [entry.to_state for entry in client.history(job.id).transitions]
    assert states == [JobState.PENDING, JobState.IN_PROGRESS, JobState.SUCCEEDED]
    assert (job.name, job.progress, job.reason) == ("work", 100, "half")


def test_the_error_of_a_call_is_that_of_its_job(executor, done):
    future = executor.submit(fail, "no paper")
    job = done(executor, future)
    assert (job.state, job.error.reason, job.error.message) == (JobState.FAILED, "ValueError", "no paper")
    with pytest.raises(ValueError, match="no paper"):
        future.result()


def test_a_call_whose_process_is_killed_fails(client, done):
    with TrackedExecutor(ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")), client) as executor:
        future = executor.submit(die)
        assert isinstance(future.exception(), BrokenExecutor)
        assert done(executor, future).error.reason == "BrokenProcessPool"


def test_a_future_that_is_cancelled_is_a_job_that_is(client, done):
    go = threading.Event()
    with TrackedExecutor(ThreadPoolExecutor(1), client) as executor:
        executor.submit(go.wait)
        future = executor.submit(work, 1)
        assert future.cancel()
        go.set()
        assert done(executor, future).state is JobState.CANCELLED


def test_a_call_within_a_call_is_a_child(client, done):
    with TrackedExecutor(ThreadPoolExecutor(2), client) as executor:
        outer = executor.submit(lambda: executor.submit(work, 1).result())
        job = done(executor, outer)
        assert [child.name for child in client.list_all(JobFilter(parent_id=job.id))] == ["work"]


@pytest.fixture
def offline():
    """A server that is not running, and a client and an executor of it."""
    with (
        ServerProcess() as server,
        JobStatusClient(server.address) as client,
        TrackedExecutor(ThreadPoolExecutor(1), client, end_timeout_seconds=0.2) as executor,
    ):
        server.kill()
        yield server, client, executor


def test_calls_run_while_no_server_is_there_and_are_reported_later(offline):
    server, client, executor = offline
    futures = [executor.submit(work, 1) for _ in range(3)]
    assert [future.result(MAX_WAIT_SECONDS) for future in futures] == [os.getpid()] * 3
    server.start()
    executor.flush()
    assert {client.get(executor.job_id(future)).state for future in futures} == {JobState.SUCCEEDED}


def test_an_outcome_that_a_call_sets_is_reported_later_too(offline):
    server, client, executor = offline
    future = executor.submit(lambda: current_job().abort("no paper"))
    future.result(MAX_WAIT_SECONDS)
    server.start()
    executor.flush()
    job = client.get(executor.job_id(future))
    assert (job.state, job.reason) == (JobState.ABORTED, "no paper")


def in_a_loop(service: Service, use: Callable[[AsyncJobStatusClient], Coroutine[None, None, None]]) -> None:
    async def run() -> None:
        async with AsyncJobStatusClient(service.address) as client:
            await use(client)

    asyncio.run(run())


def test_an_asyncio_task_is_a_job(service: Service):
    async def use(client: AsyncJobStatusClient) -> None:
        task = create_task(client, asyncio.sleep(0, "done"), name="nap")
        assert await task == "done"
        job = await client.get(task.get_name())
        assert (job.name, job.state) == ("nap", JobState.SUCCEEDED)

    in_a_loop(service, use)


def test_a_cancel_request_cancels_an_asyncio_task(service: Service):
    async def use(client: AsyncJobStatusClient) -> None:
        begun = asyncio.Event()

        async def nap() -> None:
            begun.set()
            await asyncio.sleep(60)

        task = create_task(client, nap(), cancel_on_request=True)
        await begun.wait()
        await client.cancel(task.get_name())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await client.get(task.get_name())).state is JobState.CANCELLED

    in_a_loop(service, use)


def test_an_asyncio_task_that_is_cancelled_before_it_begins_leaves_no_warning(service: Service):
    async def use(client: AsyncJobStatusClient) -> None:
        task = create_task(client, asyncio.sleep(60))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    in_a_loop(service, use)
