"""Workers on PostgreSQL: each returns the same job."""

from __future__ import annotations

import contextlib

import grpc
import psutil
import pytest

from tests.support.service import Service

pytestmark = pytest.mark.slow


@pytest.fixture
def callers(serve, postgres_url):
    """Callers with a connection each, which the kernel gives to any of three workers; and the server."""
    service = serve("--workers", "3", "--log-level", "error", store=postgres_url)
    with contextlib.ExitStack() as stack:
        yield service, [stack.enter_context(contextlib.closing(Service(service.address))) for _ in range(12)]


def test_a_job_is_the_same_at_each_worker(callers):
    _, (first, *others) = callers
    job = first.job_in("IN_PROGRESS")
    assert [caller.get(job.id) for caller in others] == [job] * len(others)


def test_watchers_at_each_worker_see_the_end(callers):
    _, (first, *others) = callers
    job = first.job_in("IN_PROGRESS")
    streams = [caller.watch(job.id) for caller in others]
    for stream in streams:
        next(stream)
    end = first.update(job.id, state="JOB_STATE_SUCCEEDED")
    assert [[message.event.job for message in stream][-1] for stream in streams] == [end] * len(streams)


def test_what_a_killed_worker_acknowledged_is_there(callers):
    service, others = callers
    jobs = [caller.create() for caller in others]
    for worker in psutil.Process(service.process.pid).children():
        worker.kill()
        worker.wait()
    with contextlib.closing(Service(service.address)) as caller:
        grpc.channel_ready_future(caller.channel).result(20)
        assert [caller.get(job.id) for job in jobs] == jobs
