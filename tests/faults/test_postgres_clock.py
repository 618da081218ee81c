"""The database's clock is set, and processes are suspended: no living worker's job fails, a silent one's does."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import itertools
import os
import signal

import pytest

from jobstatus_grpc import DeadlineExceededError, JobState, UnavailableError
from tests.support.load import background_tasks, connected_to, replicas
from tests.support.postgres import PostgresCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

JOBS = 40
TIMEOUT_SECONDS, FAIL_AFTER = 3, "2s"
HEARTBEAT_SECONDS = 0.5
STEPS = ["+20s", "+1h", "+0", "-1h", "+0"]
ROUNDS, ROUNDS_IN_FULL = 1, 10
CALM_SECONDS = 6.0
"""Longer than it takes to fail a job: the stall clocks run since before."""
SUSPENSIONS, SUSPENSIONS_IN_FULL = 1, 10
SUSPENSION_SECONDS = 6.0


@contextlib.contextmanager
def faked_clock(postgres_home, version):
    """Yield a cluster whose clock a function sets, given the difference; the monotonic clock stays as it is."""
    libraries = glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")
    if not libraries:
        pytest.skip("libfaketime is missing: apt-get install faketime")
    file = postgres_home.path / "clock"
    file.write_text("+0")
    environment = {
        "LD_PRELOAD": libraries[0],
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with PostgresCluster(version, postgres_home, environment=environment) as cluster:

        def set_to(difference):
            # At once: a half-written file would be another time.
            (new := file.with_suffix(".new")).write_text(difference)
            new.replace(file)

        yield cluster, set_to


async def beat(clients, number, job):
    """Send heartbeats through all replicas in turn, as a load balancer does; some may not answer."""
    for client in itertools.islice(itertools.cycle(clients), number, None):
        with contextlib.suppress(UnavailableError, DeadlineExceededError):
            await client.update(job.id, timeout_seconds=1)
        await asyncio.sleep(HEARTBEAT_SECONDS)


async def require_living(servers, harm):
    """Send heartbeats through all replicas, call `harm` meanwhile, and require that no job has failed."""
    async with connected_to(servers) as (_, clients), background_tasks() as start:
        dead, *jobs = [
            await clients[0].create(state=JobState.IN_PROGRESS, heartbeat_timeout_seconds=TIMEOUT_SECONDS)
            for _ in range(1 + JOBS)
        ]
        beats = [start(beat(clients, number, job)) for number, job in enumerate(jobs)]
        await asyncio.sleep(2 * HEARTBEAT_SECONDS)
        await harm()
        await asyncio.wait(beats, timeout=TIMEOUT_SECONDS)
        assert [task.exception() for task in beats if task.done()] == [], "a heartbeat was refused"
        found = [await clients[0].get(job.id) for job in jobs]
        assert {(job.state, job.attempt) for job in found} == {(JobState.IN_PROGRESS, 1)}
        assert (await asyncio.wait_for(clients[0].wait(dead.id), 60)).state is JobState.FAILED


def test_no_living_worker_fails_when_the_clock_of_the_database_is_set(postgres, postgres_home, is_full, record_fault):
    rounds = ROUNDS_IN_FULL if is_full else ROUNDS
    with faked_clock(postgres_home, postgres.version) as (cluster, set_to):

        async def step():
            for _ in range(rounds):
                await asyncio.sleep(CALM_SECONDS)
                for difference in STEPS:
                    set_to(difference)
                    await asyncio.sleep(1.5)

        url = cluster.url(cluster.create_database())
        with replicas(url, "--fail-stalled-after", FAIL_AFTER) as servers:
            asyncio.run(asyncio.wait_for(require_living(servers, step), 500))
    record_fault(
        "the clock of PostgreSQL set by an hour and back, and by 20 s (libfaketime)",
        count=rounds * len(STEPS),
        checked=f"{JOBS} workers that send heartbeats through three replicas, one that does not",
        result="no living worker's job failed, the dead one's did",
    )


@pytest.mark.parametrize("which", ["a replica", "the database"])
def test_no_living_worker_fails_when_a_process_is_suspended(new_postgres, is_full, record_fault, which):
    times = SUSPENSIONS_IN_FULL if is_full else SUSPENSIONS
    url = new_postgres.url(new_postgres.create_database())
    with replicas(url, "--fail-stalled-after", FAIL_AFTER) as servers:

        async def suspend():
            for number in range(times):
                pids = new_postgres.pids if which == "the database" else [servers[number % len(servers)].pid]
                for sent, seconds in ((signal.SIGSTOP, SUSPENSION_SECONDS), (signal.SIGCONT, TIMEOUT_SECONDS)):
                    for pid in pids:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, sent)
                    await asyncio.sleep(seconds)

        asyncio.run(asyncio.wait_for(require_living(servers, suspend), 500))
    record_fault(
        f"SIGSTOP of {which} for {SUSPENSION_SECONDS:.0f} s, longer than a worker may be silent",
        count=times,
        checked=f"{JOBS} workers that send heartbeats through three replicas, one that does not",
        result="no living worker's job failed, the dead one's did",
    )
