"""Celery's tasks as jobs: a real worker with a pool that forks, and Redis as its broker."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from jobstatus_grpc import Job, JobFilter, JobState, JobStatusClient
from tests.support.service import Service
from tests.support.task_worker import TaskWorker, imported

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

MAX_WAIT_SECONDS = 30


def start(log: Path, queue: str = "celery", pool: str = "prefork") -> TaskWorker:
    """Start `celery worker` with a pool of two."""
    command = [sys.executable, "-m", "celery", "-A", "tests.contrib.celery_app", "worker", "--concurrency", "2"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat", "--queues", queue, "--pool", pool]
    return TaskWorker(command, log)


@pytest.fixture(scope="module")
def app(memory_service: Service, redis: Path) -> Iterator[ModuleType]:
    """The module of the app, for a sender."""
    broker = f"redis+socket://{redis}"
    with imported("tests.contrib.celery_app", TEST_ADDRESS=memory_service.address, TEST_BROKER=broker) as module:
        yield module
        # At the end of this process, results would unsubscribe from a Redis that has ended.
        module.app.backend.result_consumer.subscribed_to.clear()


@pytest.fixture(scope="module")
def worker(app: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TaskWorker]:
    worker = start(tmp_path_factory.mktemp("celery") / "worker.log")
    yield worker
    worker.kill()


@pytest.fixture
def done(app: ModuleType, worker: TaskWorker, client: JobStatusClient):
    """Wait for the end of a job that was sent."""

    def wait(sent) -> Job:
        app.reporter.flush()
        return client.wait(sent.id, MAX_WAIT_SECONDS)

    return wait


def states_of(client: JobStatusClient, job: Job) -> list[JobState]:
    return [transition.to_state for transition in client.history(job.id).transitions]


def running(client: JobStatusClient, app: ModuleType, sent) -> int:
    """Wait until a task runs; return the id of its process."""
    app.reporter.flush()
    for job in client.watch(sent.id):
        if job.reason:
            return int(job.reason.removeprefix("pid "))
    raise AssertionError("the task does not run")


def test_a_task_that_is_sent_is_pending(app, client):
    sent = app.add.apply_async((1, 1), countdown=3600)
    app.reporter.flush()
    job = client.get(sent.id)
    assert (job.state, job.name) == (JobState.PENDING, "tests.contrib.celery_app.add")


def test_a_task_is_reported_from_its_sending_to_its_end(app, client, done):
    # With a delay: an idle worker may be quicker than the report of PENDING.
    job = done(app.add.apply_async((1, 2), countdown=0.5))
    assert states_of(client, job) == [JobState.PENDING, JobState.IN_PROGRESS, JobState.SUCCEEDED]


def test_update_state_reports_progress(app, worker, client):
    sent = app.count.delay(4, pause_seconds=0.3)
    app.reporter.flush()
    seen = {(job.progress, job.reason) for job in client.watch(sent.id)}
    assert {(25.0, "row 1"), (75.0, "row 3")} <= seen


def test_the_error_of_a_task_is_that_of_its_job(app, done):
    job = done(app.fail.delay("out of \x1b[31mpaper"))
    assert (job.state, job.error.reason, job.error.message) == (JobState.FAILED, "ValueError", "out of paper")


def test_a_retry_is_another_attempt(app, client, done):
    job = done(app.fail_once.delay())
    transitions = client.history(job.id).transitions
    assert [entry.reason for entry in transitions if entry.to_state is JobState.RETRYING] == ["the disk is away"]
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)


def test_a_message_that_is_rejected_and_comes_again_is_another_attempt(app, client, done):
    job = done(app.reject_once.delay())
    assert JobState.RETRYING in states_of(client, job)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)


def test_a_group_is_the_parent_of_its_members_and_ends_with_them(app, client, done):
    from celery import group

    sent = group(app.add.s(number, 1) for number in range(3)).apply_async()
    assert done(sent).state is JobState.SUCCEEDED
    members = client.list_all(JobFilter(parent_id=sent.id))
    assert {member.id for member in members} == {result.id for result in sent.results}


def test_a_group_fails_with_a_member(app, done):
    from celery import group

    sent = group(app.add.s(1, 1), app.fail.s("no paper")).apply_async()
    job = done(sent)
    assert job.state is JobState.FAILED
    assert f"1 of the members is failed, first job {sent.results[1].id}: no paper" in job.error.message


def test_a_group_ends_with_a_member_that_takes_too_long(app, done):
    from celery import group

    sent = group(app.add.s(1, 1), app.sleep.s().set(time_limit=1)).apply_async()
    assert done(sent).error.reason == "TimeLimitExceeded"


def test_a_task_that_is_ignored_is_aborted(app, done):
    job = done(app.ignore.delay())
    assert (job.state, job.reason) == (JobState.ABORTED, "not on Sundays")


@pytest.mark.parametrize("by", ["task", "chain", "group"])
def test_the_job_of_a_task_that_is_replaced_ends_with_the_replacement(app, client, done, by):
    job = done(app.replace.delay(by))
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    assert JobState.RETRYING in states_of(client, job)


@pytest.mark.parametrize(
    ("by", "attempt", "reason"), [("failure", 2, "ValueError"), ("nothing", 1, "ImproperlyConfigured")]
)
def test_a_task_that_is_replaced_fails_with_the_replacement(app, done, by, attempt, reason):
    job = done(app.replace.delay(by))
    assert (job.state, job.attempt, job.error.reason) == (JobState.FAILED, attempt, reason)


def test_a_task_whose_replacement_cannot_be_sent_may_go_on(app, done):
    job = done(app.replace_or_go_on.delay())
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)


@pytest.mark.parametrize("by", ["task", "chain", "group"])
def test_a_member_of_a_group_that_is_replaced_ends_with_the_replacement(app, client, done, by):
    from celery import group

    sent = group(app.add.s(1, 1), app.replace.s(by)).apply_async()
    assert done(sent).state is JobState.SUCCEEDED
    assert client.get(sent.results[1].id).attempt == 2


def test_a_member_of_a_chord_that_is_replaced_ends_with_the_replacement(app, client, done):
    from celery import chord

    sent = chord([app.add.s(1, 1), app.replace.s("chain")])(app.total.s())
    assert done(sent).state is JobState.SUCCEEDED
    assert client.wait(sent.parent.results[1].id).state is JobState.SUCCEEDED


def test_the_body_of_a_chord_is_the_parent_of_its_header(app, client, done):
    from celery import chord

    sent = chord([app.add.s(number, 1) for number in range(3)])(app.total.s())
    assert done(sent).name == "tests.contrib.celery_app.total"
    assert len(list(client.list_all(JobFilter(parent_id=sent.id)))) == 3


def test_a_cancel_request_revokes_a_task_that_runs(app, client, worker, done):
    sent = app.sleep.delay()
    running(client, app, sent)
    client.cancel(sent.id, reason="not needed")
    job = done(sent)
    assert (job.state, job.reason) == (JobState.CANCELLED, "revoked")


def test_a_task_fails_if_its_process_is_killed(app, client, worker, done):
    sent = app.sleep.delay()
    os.kill(running(client, app, sent), signal.SIGKILL)
    job = done(sent)
    assert (job.state, job.error.reason) == (JobState.FAILED, "WorkerLostError")


def test_a_task_that_is_acknowledged_late_runs_again_if_its_process_is_killed(app, client, worker, done):
    sent = app.sleep_once.delay()
    os.kill(running(client, app, sent), signal.SIGKILL)
    job = done(sent)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_other_pools_report_too(app, client, done, tmp_path, pool):
    worker = start(tmp_path / "worker.log", queue=pool, pool=pool)
    job = done(app.count.apply_async((2,), queue=pool))
    worker.kill()
    assert (job.state, job.progress, job.reason) == (JobState.SUCCEEDED, 100, "row 2")


def test_the_job_of_a_lost_worker_is_stalled(app, client, tmp_path):
    worker = start(tmp_path / "worker.log", queue="lost")
    sent = app.sleep.apply_async(queue="lost")
    running(client, app, sent)
    worker.kill()
    assert any(job.stalled for job in client.watch(sent.id))
