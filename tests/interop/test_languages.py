"""The examples in six languages, built and run as a newcomer would: `make -C examples`, against a real server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import pytest

from tests.support.auth import AuthText
from tests.support.certificates import Authority
from tests.support.scripted_server import ScriptedServer, fail
from tests.support.servers import TRANSPORT, ServerProcess

EXAMPLES = Path(__file__).parents[2] / "examples"
LANGUAGES = [
    "python",
    pytest.param("node", marks=pytest.mark.slow),
    *(pytest.param(each, marks=pytest.mark.interop) for each in ("go", "ruby", "java", "cpp")),
]
BUILD_SECONDS = 540
# Long enough for a test to act before the job ends.
LONG_STEP_SECONDS = 2

BEGINNING = [
    "created: JOB_STATE_PENDING",
    "created again: the same job",
    "claimed: JOB_STATE_IN_PROGRESS, attempt 1",
    "second claim: STALE_ATTEMPT",
]
WELL = ["progress: 25", "progress: 50", "progress: 75", "ended: JOB_STATE_SUCCEEDED, progress 100"]
CANCELLED = ["progress: 25", "ended: JOB_STATE_CANCELLED, progress 25"]
END = ["unknown job: JOB_NOT_FOUND"]

pytestmark = pytest.mark.timeout(BUILD_SECONDS + 60)


def make(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a task, without what a `make` around the tests was called with and puts in PATH.

    In .venv-proto, protoc is newer than Debian's libraries, which the code that it generates would not fit.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES")}
    folders = environment["PATH"].split(os.pathsep)
    environment["PATH"] = os.pathsep.join(each for each in folders if not Path(each).is_relative_to(EXAMPLES.parent))
    command = ["make", "--silent", "--no-print-directory", "-C", str(EXAMPLES), f"PYTHON={sys.executable}", *arguments]
    return command, environment


class Run:
    """An example at work, and what it has printed: the lines of its worker, and of its watcher, side by side."""

    def __init__(self, language: str, address: str, step_seconds: float = 0.05) -> None:
        task, environment = make(f"run-{language}", f"ADDRESS={address}", f"STEP_SECONDS={step_seconds}")
        self._process = subprocess.Popen(
            task, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._lines: list[str] = []

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        with self._process:
            pass

    def read_until(self, text: str) -> None:
        """Read on to the line that begins with `text`."""
        while not any(line.startswith(text) for line in self._lines):
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            assert line, f"it ended before it said {text!r}: {self._lines}"
            self._lines.append(line.rstrip("\n"))

    def finish(self) -> bool:
        """Read to the end of its output; return whether it exited with 0."""
        assert self._process.stdout is not None
        self._lines += self._process.stdout.read().splitlines()
        return self._process.wait() == 0

    @property
    def job_id(self) -> str:
        self.read_until("job: ")
        return self._lines[0].removeprefix("job: ")

    @property
    def worked(self) -> list[str]:
        return [line for line in self._lines if not line.startswith(("job: ", "watch: "))]

    @property
    def watched(self) -> list[str]:
        return [line.removeprefix("watch: JOB_STATE_") for line in self._lines if line.startswith("watch: ")]


@pytest.fixture(scope="module", params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(language: str) -> Callable[..., Run]:
    """Build the example in a language; `run(address)` starts it."""
    if language != "python":
        task, environment = make(language)
        done = subprocess.run(task, env=environment, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        if done.returncode != 0:
            pytest.fail(f"{done.stdout}{done.stderr}\n(`make interop` installs what the examples need.)", pytrace=False)

    return lambda address, *arguments: Run(language, address, *arguments)


def test_an_example_sees_a_job_through_to_its_end(run: Callable[..., Run], service: Any) -> None:
    with run(service.address) as example:
        assert example.finish()
    assert example.worked == [*BEGINNING, *WELL, *END]
    assert example.watched == ["IN_PROGRESS", "SUCCEEDED"]

    job = service.get(example.job_id)
    assert (job.name, job.heartbeat_timeout.seconds, job.attempt, job.revision) == ("import customers", 60, 1, 6)
    assert (job.state, job.done, job.progress, dict(job.result)) == (4, True, 100, {"steps": 3})


def test_an_example_sends_its_token(
    run: Callable[..., Run], serve: Callable[..., Any], auth: AuthText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBSTATUS_TOKEN", auth.admit("robot"))
    with run(serve("--auth", str(auth.path)).address) as example:
        assert example.finish()
    assert example.worked == [*BEGINNING, *WELL, *END]


def test_an_example_sends_no_token_without_tls_to_another_machine(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBSTATUS_TOKEN", "secret")
    with run("192.0.2.1:50051") as example:  # an address for documentation, which would time out
        assert not example.finish()
    assert example.worked == []


@pytest.mark.skipif(TRANSPORT == "native", reason="the native transport has no TLS")
def test_an_example_uses_tls_with_its_client_certificate_and_token(
    run: Callable[..., Run], auth: AuthText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority()
    monkeypatch.setenv("JOBSTATUS_TOKEN", auth.admit("robot"))
    ca, (cert, key) = authority.write(tmp_path), authority.issue().write(tmp_path, "server")
    for name, path in zip(("CERT", "KEY"), authority.issue(name="client").write(tmp_path, "client"), strict=True):
        monkeypatch.setenv(f"JOBSTATUS_{name}", path)
    monkeypatch.setenv("JOBSTATUS_CA", ca)
    flags = ["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", ca, "--tls-require-client-cert"]
    with ServerProcess(*flags, "--auth", str(auth.path)) as server, run(server.address) as example:
        assert example.finish()
    assert example.worked == [*BEGINNING, *WELL, *END]


def test_an_example_heeds_a_request_to_cancel(run: Callable[..., Run], service: Any) -> None:
    with run(service.address, LONG_STEP_SECONDS) as example:
        example.read_until("second claim: ")
        service.cancel(example.job_id)
        assert example.finish()
    assert example.worked == [*BEGINNING, *CANCELLED, *END]
    assert example.watched == ["IN_PROGRESS", "CANCELLED"]

    job = service.get(example.job_id)
    assert (job.state, job.progress, dict(job.result)) == (7, 25, {"steps": 1})


def test_an_example_stops_when_it_has_lost_its_job(run: Callable[..., Run], service: Any) -> None:
    with run(service.address, LONG_STEP_SECONDS) as example:
        example.read_until("second claim: ")
        service.update(example.job_id, state="JOB_STATE_IN_PROGRESS", attempt=2)
        assert not example.finish()
    assert example.worked == BEGINNING

    job = service.get(example.job_id)
    assert (job.state, job.attempt, job.HasField("progress")) == (2, 2, False)


@pytest.mark.slow
def test_an_example_loses_nothing_when_the_server_restarts(
    run: Callable[..., Run], serve: Callable[..., Any], tmp_path: Path
) -> None:
    service = serve(store=f"sqlite:///{tmp_path}/jobs.db")
    with run(service.address, LONG_STEP_SECONDS) as example:
        example.read_until("second claim: ")
        service.process.terminate()
        time.sleep(1.2 * LONG_STEP_SECONDS)  # an outage in which the first progress is due
        service.process.start()
        example.read_until("progress: 50")
        service.process.restart()
        assert example.finish()
    assert example.worked == [*BEGINNING, *WELL, *END]
    assert example.watched == ["IN_PROGRESS", "SUCCEEDED"]
    job = service.get(example.job_id)
    assert (job.attempt, job.revision, dict(job.result)) == (1, 6, {"steps": 3})


def test_an_example_retries_by_the_service_config(run: Callable[..., Run], language: str) -> None:
    retries = [None, None] if language == "python" else ["1", "2"]  # our client has its own retries
    answers = [fail(grpc.StatusCode.UNAVAILABLE)] * 2 + [fail(grpc.StatusCode.INVALID_ARGUMENT)]
    with ScriptedServer(CreateJob=answers) as server, run(server.address) as example:
        assert not example.finish()
    assert [each.get("grpc-previous-rpc-attempts") for each in server.metadata] == [None, *retries]
