"""Loops as jobs: `track_iter`."""

# mypy: disable-error-code="union-attr"

from __future__ import annotations

import asyncio

import pytest

from jobstatus_grpc import AsyncJobStatusClient, Job, JobFilter, JobState, JobStatusClient
from tests.support.service import Service


@pytest.fixture
def client(service: Service):
    with JobStatusClient(service.address) as client:
        yield client


def newest(client: JobStatusClient, name: str) -> Job:
    return client.list(JobFilter(names=[name]), page_size=1).jobs[0]


def test_a_loop_is_a_job(client):
    assert list(client.track_iter([1, 2, 3], "rows", labels={"table": "users"})) == [1, 2, 3]
    job = newest(client, "rows")
    assert (job.state, job.progress, job.labels) == (JobState.SUCCEEDED, 100, {"table": "users"})


def test_the_number_of_items_is_the_reason_where_the_total_is_not_known(client):
    list(client.track_iter((number for number in range(3)), "numbers"))
    assert newest(client, "numbers").reason == "3 done"


def test_a_loop_that_is_left_early_is_aborted(client):
    for number in client.track_iter(range(9), "left"):
        if number == 2:
            break
    job = newest(client, "left")
    assert (job.state, job.reason) == (JobState.ABORTED, "left after 2 items")


def test_items_that_raise_fail_the_job(client):
    with pytest.raises(ZeroDivisionError):
        list(client.track_iter((1 // (number - 1) for number in range(3)), "broken"))
    assert newest(client, "broken").error.reason == "ZeroDivisionError"


def test_a_loop_of_asyncio_is_a_job(service, client):
    async def run() -> list[int]:
        async with AsyncJobStatusClient(service.address) as client:
            return [number async for number in client.track_iter(range(3), "async rows")]

    assert asyncio.run(run()) == [0, 1, 2]
    assert newest(client, "async rows").state is JobState.SUCCEEDED
