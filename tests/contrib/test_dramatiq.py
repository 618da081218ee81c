"""Dramatiq's messages as jobs: real workers, and Redis."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from jobstatus_grpc import Job, JobState, JobStatusClient
from tests.support.service import Service

pytestmark = pytest.mark.slow

MAX_WAIT_SECONDS = 40


@pytest.fixture(scope="module")
def actors(memory_service: Service, redis: Path) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_ADDRESS", memory_service.address)
        patch.setenv("TEST_BROKER", f"unix://{redis}")
        module = importlib.import_module("tests.contrib.dramatiq_actors")
        yield module
        module.broker.close()


@pytest.fixture(scope="module")
def start(actors: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Callable[[], None]]]:
    """Start a worker; return a function that kills it with its processes."""
    kills: list[Callable[[], None]] = []

    def start() -> Callable[[], None]:
        command = [sys.executable, "-m", "dramatiq", "tests.contrib.dramatiq_actors", "--processes", "1"]
        with (tmp_path_factory.mktemp("dramatiq") / "worker.log").open("w") as log:
            process = subprocess.Popen([*command, "--threads", "2"], stdout=log, stderr=log, start_new_session=True)

        def kill() -> None:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

        kills.append(kill)
        return kill

    yield start
    for kill in kills:
        kill()


@pytest.fixture(scope="module")
def worker(start: Callable[[], Callable[[], None]]) -> Callable[[], None]:
    return start()


@pytest.fixture
def done(client: JobStatusClient, actors: ModuleType, worker: object) -> Callable[[object], Job]:
    def wait(message) -> Job:
        actors.middleware.flush()
        return client.wait(message.message_id, MAX_WAIT_SECONDS)

    return wait


def test_a_message_is_reported_from_its_queue_to_its_end(actors, client, done):
    job = done(actors.count.send(2))
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


def test_a_message_that_is_skipped_is_aborted(actors, done):
    job = done(actors.be_too_old.send_with_options(delay=100))
    assert (job.state, job.reason) == (JobState.ABORTED, "skipped")


def test_the_job_of_a_killed_worker_is_stalled_until_another_runs_it(actors, client, worker, start):
    message = actors.sleep_once.send()
    actors.middleware.flush()
    watch = client.watch(message.message_id)
    assert any(job.attempt == 1 for job in watch)
    worker()
    assert any(job.stalled for job in watch)
    start()
    assert list(watch)[-1].attempt == 2
