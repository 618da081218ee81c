"""Dramatiq's messages as jobs: real workers, and Redis."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from jobstatus_grpc import Job, JobState, JobStatusClient
from tests.support.service import Service
from tests.support.task_worker import TaskWorker, imported

pytestmark = pytest.mark.slow

MAX_WAIT_SECONDS = 40


@pytest.fixture(scope="module")
def actors(memory_service: Service, redis: Path) -> Iterator[ModuleType]:
    broker = f"unix://{redis}"
    with imported("tests.contrib.dramatiq_actors", TEST_ADDRESS=memory_service.address, TEST_BROKER=broker) as module:
        yield module
        module.broker.close()


@pytest.fixture(scope="module")
def start(actors: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], TaskWorker]]:
    command = [sys.executable, "-m", "dramatiq", "tests.contrib.dramatiq_actors", "--processes", "1", "--threads", "2"]
    workers: list[TaskWorker] = []

    def start() -> TaskWorker:
        workers.append(TaskWorker(command, tmp_path_factory.mktemp("dramatiq") / "worker.log"))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()


@pytest.fixture(scope="module")
def worker(start: Callable[[], TaskWorker]) -> TaskWorker:
    return start()


@pytest.fixture
def done(client: JobStatusClient, actors: ModuleType, worker: object) -> Callable[[object], Job]:
    def wait(message) -> Job:
        actors.middleware.flush()
        return client.wait(message.message_id, MAX_WAIT_SECONDS)

    return wait


def test_a_message_is_reported_from_its_queue_to_its_end(actors, client, done):
    # With a delay: an idle worker may be quicker than the report of PENDING.
    job = done(actors.count.send_with_options(args=(2,), delay=500))
    states = [entry.to_state for entry in client.history(job.id).transitions]
    assert states == [JobState.PENDING, JobState.IN_PROGRESS, JobState.SUCCEEDED]
    assert (job.name, job.progress) == ("count", 100)


def test_a_retry_is_another_attempt(actors, client, done):
    job = done(actors.fail_once.send())
    reasons = [entry.reason for entry in client.history(job.id).transitions if entry.to_state is JobState.RETRYING]
    assert (job.state, job.attempt, reasons) == (JobState.SUCCEEDED, 2, ["the disk is away"])


def test_a_message_without_retries_left_fails(actors, done):
    job = done(actors.fail.send())
    assert (job.state, job.attempt, job.error.reason) == (JobState.FAILED, 2, "ValueError")


@pytest.mark.parametrize("max_retries", [0, 1])
def test_a_message_that_takes_too_long_fails(actors, done, max_retries):
    job = done(actors.take_too_long.send_with_options(max_retries=max_retries))
    assert (job.state, job.attempt, job.error.reason) == (JobState.FAILED, max_retries + 1, "TimeLimitExceeded")


def test_the_time_limit_is_not_in_force_while_a_message_is_reported(actors):
    order = [type(middleware).__name__ for middleware in actors.broker.middleware]
    assert order.index("AgeLimit") < order.index("JobStatusMiddleware") < order.index("TimeLimit")


def test_a_message_that_is_skipped_is_aborted(actors, done):
    job = done(actors.be_too_old.send_with_options(delay=100))
    assert (job.state, job.reason) == (JobState.ABORTED, "skipped")


def test_the_job_of_a_killed_worker_is_stalled_until_another_runs_it(actors, client, worker, start):
    message = actors.sleep_once.send()
    actors.middleware.flush()
    watch = client.watch(message.message_id)
    assert any(job.attempt == 1 for job in watch)
    worker.kill()
    assert any(job.stalled for job in watch)
    start()
    assert list(watch)[-1].attempt == 2
