"""A test run as a job."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobstatus_grpc import Job, JobFilter, JobState, JobStatusClient
from tests.support.service import Service

TESTS = """
import pytest

@pytest.mark.parametrize("number", range(6))
def test_number(number):
    if number == 4:
        pytest.skip("odd")
    assert number < LIMIT
"""

ENVIRONMENT = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
"""Without all the plugins of this environment, which take two seconds to load: -p names ours, as its entry point."""


@pytest.fixture
def run(service: Service, client: JobStatusClient, tmp_path: Path) -> Callable[..., Job]:
    """Run pytest on six tests, and return its job."""

    def run(*arguments: str, limit: int = 10) -> Job:
        (tmp_path / "test_numbers.py").write_text(f"LIMIT = {limit}\n{TESTS}")
        command = [sys.executable, "-m", "pytest", "-p", "jobstatus", "-p", "xdist"]
        command += ["--jobstatus", service.address, "--jobstatus-name", tmp_path.name, *arguments]
        subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=False)
        (job,) = client.list(JobFilter(names=[tmp_path.name])).jobs
        return client.get(job.id)

    return run


@pytest.mark.parametrize("arguments", [[], ["-n", "2"]], ids=["one process", "xdist"])
def test_a_run_is_a_job(run, arguments):
    job = run(*arguments)
    assert (job.state, job.progress) == (JobState.SUCCEEDED, 100)
    assert job.result == {"passed": 5, "skipped": 1, "exit_code": 0}


def test_a_run_with_a_failed_test_fails(run):
    job = run(limit=5)
    assert (job.state, job.error.reason) == (JobState.FAILED, "TESTS_FAILED")
    assert job.error.message == "1 of 6 tests failed\ntest_numbers.py::test_number[5]"


def test_a_run_that_is_interrupted_is_aborted(run, tmp_path):
    (tmp_path / "conftest.py").write_text("def pytest_runtest_setup(item): raise KeyboardInterrupt")
    assert run().state is JobState.ABORTED


def test_an_exit_code_of_the_projects_own_is_kept(run, tmp_path):
    (tmp_path / "conftest.py").write_text("def pytest_runtest_setup(item): pytest.exit('stop', 42)\nimport pytest")
    job = run()
    assert (job.state, job.result) == (JobState.FAILED, {"exit_code": 42})
    assert (job.error.message, job.error.reason) == ("pytest ended with exit code 42", "")


@pytest.mark.parametrize(
    ("hook", "exit_code", "reason"),
    [
        ("pytest_sessionstart(session): 1 / 0", 3, "INTERNAL_ERROR"),
        ("pytest_sessionstart(session): pytest.exit('no database', 42)", 42, ""),
        ("pytest_sessionfinish(session): session.exitstatus = 5", 5, "NO_TESTS_COLLECTED"),
        ("pytest_sessionfinish(session): 1 / 0", 0, "ZeroDivisionError"),
    ],
)
def test_a_run_ends_as_hooks_of_the_session_decide(run, tmp_path, hook, exit_code, reason):
    (tmp_path / "conftest.py").write_text(f"import pytest\ndef {hook}")
    job = run()
    assert (job.state, job.error.reason, job.result["exit_code"]) == (JobState.FAILED, reason, exit_code)


@pytest.mark.parametrize(
    ("arguments", "total"),
    [([], 6), (["-x"], 0), (["--continue-on-collection-errors"], 6), (["-n", "2"], 6)],
    ids=["default", "exitfirst", "continue", "xdist"],
)
def test_a_file_that_cannot_be_imported_is_named(run, tmp_path, arguments, total):
    (tmp_path / "test_bad.py").write_text("import no_such_module")
    job = run(*arguments)
    assert (job.state, job.error.reason, job.result["collection_errors"]) == (JobState.FAILED, "TESTS_FAILED", 1)
    assert job.error.message == f"0 of {total} tests failed, collection errors: 1\ntest_bad.py"


def test_a_run_fails_without_a_failed_test_by_its_exit_code(run, tmp_path):
    (tmp_path / "conftest.py").write_text("def pytest_sessionfinish(session): session.exitstatus = 1")
    job = run()
    assert (job.error.message, job.error.reason) == ("pytest ended with exit code 1", "TESTS_FAILED")


def test_a_run_without_a_server_is_as_without_the_option(tmp_path):
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass")
    command = [sys.executable, "-m", "pytest", "-p", "jobstatus", "--jobstatus", "127.0.0.1:1"]
    assert subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=False).returncode == 0
