"""The code and the commands of docs/frameworks.md run as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobstatus_grpc import JobFilter, JobState, JobStatusClient
from tests.support.redis import redis_socket
from tests.support.servers import ServerProcess

ADDRESS = "127.0.0.1:50051"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as server:
        yield server


@pytest.fixture(scope="module")
def redis() -> Iterator[Path]:
    yield from redis_socket()


@pytest.fixture
def blocks(root: Path, server: ServerProcess):
    """The blocks of code of a section, with the server of this test."""

    def of(heading: str) -> list[str]:
        section = (root / "docs/frameworks.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        return [block.replace(ADDRESS, server.address) for block in re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)]

    return of


@pytest.fixture
def run(tmp_path: Path, server: ServerProcess):
    """Run a program in a folder of its own; return what it prints."""

    def run(*arguments: str) -> str:
        environment = {**os.environ, "JOBSTATUS_ADDRESS": server.address}
        # pytest loads our plugin only: all those of this environment take two seconds.
        environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "jobstatus_grpc.contrib.pytest"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def client(server: ServerProcess) -> Iterator[JobStatusClient]:
    with JobStatusClient(server.address) as client:
        yield client


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heading", "url"), [("Celery", "redis+socket://{}"), ("RQ", "unix://{}"), ("Dramatiq", "unix://{}")]
)
def test_the_worker_and_the_sender_of_a_queue_run(heading, url, blocks, run, redis, tmp_path):
    tasks, command, sender = (block.replace("redis://localhost", url.format(redis)) for block in blocks(heading))
    (tmp_path / "tasks.py").write_text(tasks)
    program, *arguments = shlex.split(command.removeprefix("$ "))
    program = str(Path(sys.executable).with_name(program))
    with (tmp_path / "worker.log").open("w") as log:
        worker = subprocess.Popen(
            [program, *arguments], cwd=tmp_path, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": "."}
        )
    try:
        (tmp_path / "send.py").write_text(sender)
        assert run("send.py") == "succeeded\n"
    finally:
        worker.terminate()
        assert worker.wait(30) in (0, -15)


def test_the_example_of_executors_runs(blocks, run, tmp_path):
    (tmp_path / "pages.py").write_text(blocks("Executors")[0])
    assert run("pages.py") == "['succeeded', 'succeeded', 'succeeded']\n"


def test_the_example_of_asyncio_runs(blocks, run):
    assert run("-c", blocks("asyncio")[0]) == "nap succeeded\n"


@pytest.mark.parametrize(("heading", "name"), [("tqdm", "epochs"), ("Loops", "rows")])
def test_the_example_of_loops_runs(heading, name, blocks, run, client):
    run("-c", blocks(heading)[0])
    (job,) = client.list(JobFilter(names=[name])).jobs
    assert (job.state, job.progress) == (JobState.SUCCEEDED, 100)


def test_the_command_of_pytest_runs(blocks, run, tmp_path, client):
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass")
    run("-m", *shlex.split(blocks("pytest")[0].removeprefix("$ ")))
    (job,) = client.list(JobFilter(names=["nightly"])).jobs
    assert job.state is JobState.SUCCEEDED


def test_the_example_of_jupyter_runs(blocks, run):
    assert run("-c", blocks("Jupyter")[0]) == "render succeeded\n"
