"""RQ's jobs as jobs here: a real worker, which forks a work horse for each, and Redis."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest
from redis import Redis
from rq import Callback, Queue, Repeat, Retry

from jobstatus_grpc import Job, JobState, JobStatusClient
from tests.support.service import Service
from tests.support.task_worker import TaskWorker, imported

pytestmark = pytest.mark.slow

MAX_WAIT_SECONDS = 30


@pytest.fixture(scope="module")
def tasks(memory_service: Service) -> Iterator[ModuleType]:
    with imported("tests.contrib.rq_tasks", TEST_ADDRESS=memory_service.address) as module:
        yield module


@pytest.fixture(scope="module")
def queue(tasks: ModuleType, redis: Path) -> Iterator[Queue]:
    with Redis(unix_socket_path=str(redis)) as connection:
        yield Queue(connection=connection, job_class=tasks.ReportedJob)


@pytest.fixture(scope="module")
def worker(queue: Queue, redis: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TaskWorker]:
    command = [sys.executable, "-m", "rq.cli", "worker", "--url", f"unix://{redis}"]
    command += ["--job-class", "tests.contrib.rq_tasks.ReportedJob"]
    worker = TaskWorker(command, tmp_path_factory.mktemp("rq") / "worker.log")
    yield worker
    worker.kill()


@pytest.fixture
def done(client: JobStatusClient, tasks: ModuleType, worker: object) -> Callable[[object], Job]:
    def wait(enqueued) -> Job:
        tasks.ReportedJob.flush()
        return client.wait(enqueued.id, MAX_WAIT_SECONDS)

    return wait


def pid_of(client: JobStatusClient, enqueued) -> int:
    return next(int(job.reason.removeprefix("pid ")) for job in client.watch(enqueued.id) if job.reason)


def test_a_job_is_reported_from_its_queue_to_its_end(queue, tasks, client, done):
    queue.enqueue(tasks.count, 1, pause_seconds=0.5)  # an idle worker may be quicker than the report of PENDING
    job = done(queue.enqueue(tasks.count, 3))
    states = [entry.to_state for entry in client.history(job.id).transitions]
    assert states == [JobState.PENDING, JobState.IN_PROGRESS, JobState.SUCCEEDED]
    assert job.name == "tests.contrib.rq_tasks.count"


def test_meta_that_is_saved_is_the_progress(queue, tasks, client, worker):
    enqueued = queue.enqueue(tasks.count, 4, pause_seconds=0.3)
    tasks.ReportedJob.flush()
    assert {(25.0, "row 1"), (75.0, "row 3")} <= {(job.progress, job.reason) for job in client.watch(enqueued.id)}


def test_a_retry_is_another_attempt(queue, tasks, client, done):
    job = done(queue.enqueue(tasks.fail_once, retry=Retry(max=1)))
    reasons = [entry.reason for entry in client.history(job.id).transitions if entry.to_state is JobState.RETRYING]
    assert (job.state, job.attempt, reasons) == (JobState.SUCCEEDED, 2, ["the disk is away"])


def test_a_job_without_a_retry_fails(queue, tasks, done):
    job = done(queue.enqueue(tasks.fail_once))
    assert (job.state, job.error.reason, job.error.message) == (JobState.FAILED, "OSError", "the disk is away")


def test_a_retry_that_is_returned_is_another_attempt(queue, tasks, client, done):
    job = done(queue.enqueue(tasks.return_retry, 1))
    states = [entry.to_state for entry in client.history(job.id).transitions]
    assert (job.state, job.attempt, JobState.RETRYING in states) == (JobState.SUCCEEDED, 2, True)


def test_a_retry_that_is_returned_too_often_fails(queue, tasks, done):
    job = done(queue.enqueue(tasks.return_retry, 2))
    assert (job.state, job.attempt) == (JobState.FAILED, 2)
    assert job.error.message == "it returned Retry, but has no retries left"


def test_a_job_fails_with_its_callback(queue, tasks, done):
    job = done(queue.enqueue(tasks.succeed, on_success=Callback(tasks.fail_in_callback)))
    assert (job.state, job.error.message) == (JobState.FAILED, "the disk is away")


def test_a_job_whose_callback_fails_is_retried(queue, tasks, done):
    job = done(queue.enqueue(tasks.succeed, on_success=Callback(tasks.fail_in_callback), retry=Retry(max=1)))
    assert (job.state, job.attempt) == (JobState.FAILED, 2)


@pytest.mark.parametrize("options", [{"result_ttl": 0}, {"repeat": Repeat(times=1)}], ids=["no result", "repeated"])
def test_a_run_that_succeeds_is_a_success(queue, tasks, done, options):
    assert done(queue.enqueue(tasks.succeed, **options)).state is JobState.SUCCEEDED


def test_the_job_of_a_killed_work_horse_fails(queue, tasks, client, done):
    enqueued = queue.enqueue(tasks.sleep)
    tasks.ReportedJob.flush()
    os.kill(pid_of(client, enqueued), signal.SIGKILL)
    job = done(enqueued)
    assert (job.state, job.error.message) == (JobState.FAILED, "the process of the job was lost")


def test_a_job_that_is_cancelled_in_its_queue_is_cancelled(queue, tasks, done):
    enqueued = queue.enqueue_in(timedelta(hours=1), tasks.sleep)
    enqueued.cancel()
    assert done(enqueued).state is JobState.CANCELLED


def test_a_job_that_is_deleted_from_its_queue_is_cancelled(queue, tasks, done):
    enqueued = queue.enqueue_in(timedelta(hours=1), tasks.sleep)
    enqueued.delete()
    job = done(enqueued)
    assert (job.state, job.reason) == (JobState.CANCELLED, "deleted from RQ")


def test_the_job_of_a_run_that_is_deleted_meanwhile_ends_with_the_run(queue, tasks, client, done):
    enqueued = queue.enqueue(tasks.count, 2, pause_seconds=0.3)
    tasks.ReportedJob.flush()
    assert any(job.reason for job in client.watch(enqueued.id))
    enqueued.delete()
    assert done(enqueued).state is JobState.SUCCEEDED
