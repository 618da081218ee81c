"""Faults of workers: suspended for longer than the heartbeat timeout, forked, cancelled twice at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import sys

import pytest

from jobstatus_grpc import AsyncJobStatusClient, JobFilter, JobState, JobStatusClient, StaleAttemptError
from tests.support.servers import ServerProcess

SUSPENSIONS, SUSPENSIONS_IN_FULL = 1, 20
FORKS, FORKS_IN_FULL = 10, 100
CANCELS, CANCELS_IN_FULL = 200, 5_000

REPORTING = """
import sys, time
from jobstatus_grpc import JobStatusClient
with JobStatusClient(sys.argv[1]) as client, client.track("suspended", heartbeat_timeout_seconds=1) as tracked:
    tracked.progress(1)
    print(tracked.id, flush=True)
    number = 0
    while not tracked.lost:
        number += 1
        tracked.progress(1 + number / 1000, f"step {number}")
        time.sleep(0.01)
print("lost", flush=True)
"""
FORKING = """
import os, sys, warnings
from jobstatus_grpc import JobState, JobStatusClient
warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
client = JobStatusClient(sys.argv[1])
job = client.create(state=JobState.IN_PROGRESS)
watch = client.watch(job.id, min_update_interval_seconds=0)
next(watch)
for number in range(int(sys.argv[2])):
    pid = os.fork()
    if not pid:
        client.update(job.id, labels={"child": str(number)})
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert client.get(job.id).revision == number + 2
    assert next(watch).labels == {"child": str(number)}
client.update(job.id, state=JobState.SUCCEEDED)
assert [seen.done for seen in watch] == [True]
"""


@pytest.mark.timeout(300)
def test_a_worker_that_was_suspended_cannot_write_to_a_job_that_another_has_claimed(is_full, record_fault):
    times = SUSPENSIONS_IN_FULL if is_full else SUSPENSIONS
    with ServerProcess() as server, JobStatusClient(server.address) as client:
        for _ in range(times):
            command = [sys.executable, "-c", REPORTING, server.address]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
                assert worker.stdout is not None
                job_id = worker.stdout.readline().strip()
                worker.send_signal(signal.SIGSTOP)
                assert next(job for job in client.watch(job_id) if job.stalled).attempt == 1
                claimed = client.update(job_id, state=JobState.IN_PROGRESS, attempt=2)
                worker.send_signal(signal.SIGCONT)
                assert worker.stdout.readline() == "lost\n"
                assert worker.wait(30) == 0
            with pytest.raises(StaleAttemptError):
                client.update(job_id, progress=99, attempt=1)
            end = client.update(job_id, state=JobState.SUCCEEDED, attempt=2)
            assert end.reason == claimed.reason, "each report of the worker has another"
    record_fault(
        "SIGSTOP of a worker until its job is stalled and another has claimed it",
        count=times,
        checked="the job, and the worker after SIGCONT",
        result="no write of the old attempt; the worker sees that it has lost the job",
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_client_that_is_forked_again_and_again_works_in_parent_and_child(is_full, record_fault):
    forks = FORKS_IN_FULL if is_full else FORKS
    with ServerProcess() as server:
        command = [sys.executable, "-c", FORKING, server.address, str(forks)]
        ended = subprocess.run(command, timeout=280, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    record_fault(
        "a process forked while its client has an open watch",
        count=forks,
        checked="an update by each child, the parent's reads and its watch",
        result="each took effect once; the watch has missed none",
    )


async def use(client, job, number):
    """Make calls until cancelled."""
    while True:
        await client.update(job.id, labels={"number": str(number)})
        async for seen in client.watch(job.id, min_update_interval_seconds=0):
            if seen.labels == {"number": str(number)}:
                break
        async with client.track("tracked") as tracked:
            tracked.progress(50)


@pytest.mark.timeout(300)
def test_a_client_whose_calls_are_cancelled_twice_keeps_nothing_and_works(tmp_path, is_full, record_fault):
    times = CANCELS_IN_FULL if is_full else CANCELS
    chance = random.Random(1)
    places = 40  # watches that were not ended would soon take them all

    async def cancel_twice(client, job):
        for number in range(times // 20):
            task = asyncio.ensure_future(use(client, job, number))
            await asyncio.sleep(chance.choice([0, 0.001, 0.01, 0.05]))
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def scenario(address):
        tasks = asyncio.all_tasks()
        async with AsyncJobStatusClient(address) as client:
            jobs = [await client.create() for _ in range(20)]
            await asyncio.gather(*(cancel_twice(client, job) for job in jobs))
            for job in jobs:
                assert (await asyncio.wait_for(anext(client.watch(job.id)), 10)).id == job.id
            assert [job.id async for job in client.list_all(JobFilter(name_prefix="tracked", done=False))] == []
        assert asyncio.all_tasks() == tasks

    with ServerProcess("--max-watchers", str(places), store=f"sqlite:///{tmp_path}/jobs.db") as server:
        asyncio.run(asyncio.wait_for(scenario(server.address), 280))
    record_fault(
        "calls, watches and tracked jobs of an asyncio client cancelled twice, at any moment",
        count=times,
        checked="tasks, open watches, the tracked jobs, and calls afterwards",
        result="nothing is left; each tracked job is done",
    )
