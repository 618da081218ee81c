"""A test run as a job: `pytest --jobstatus ADDRESS`. With pytest-xdist the controller reports, for all workers.

pytest loads this plugin wherever both are installed: nothing else is imported without the option.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

try:
    import pytest
except ImportError as error:
    raise ImportError("jobstatus_grpc.contrib.pytest needs pytest: pip install 'jobstatus-grpc[pytest]'") from error

if TYPE_CHECKING:
    from jobstatus_grpc.client import JobStatusClient, TrackedJob

DEFAULT_NAME = "pytest"

FINISH_TIMEOUT_SECONDS = 2.0
"""How long the end of a run waits for the answer to its outcome: people wait for it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("jobstatus", "report the run as a job")
    group.addoption("--jobstatus", metavar="ADDRESS", help="the job status server, host:port")
    group.addoption("--jobstatus-name", metavar="NAME", default=DEFAULT_NAME, help="of the job; default: %(default)s")


def pytest_configure(config: pytest.Config) -> None:
    address = config.getoption("jobstatus")
    if address and not hasattr(config, "workerinput"):
        from jobstatus_grpc.client import JobStatusClient

        try:
            client = JobStatusClient(address)
        except (OSError, TypeError, ValueError) as error:
            raise pytest.UsageError(f"--jobstatus {address}: {error}") from error
        config.pluginmanager.register(TestRun(client, config.getoption("jobstatus_name")), "jobstatus-run")


class TestRun:
    """Reports one run: tests that are done as progress, their numbers as the result."""

    __test__ = False

    def __init__(self, client: JobStatusClient, name: str) -> None:
        self._client = client
        self._name = name
        self._job: TrackedJob | None = None
        self._session: pytest.Session | None = None
        self._handled: BaseException | None = None
        """What the program that called pytest handles."""
        self._total = 0
        self._done = 0
        self._outcomes: dict[str, str] = {}
        """By test: the worst of its phases."""
        self._uncollected: dict[str, None] = {}
        """Files and classes whose collection failed, in order."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session
        self._handled = sys.exc_info()[1]
        self._job = self._client.track(self._name, finish_timeout_seconds=FINISH_TIMEOUT_SECONDS)
        self._job.__enter__()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._total = max(self._total, len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._total = max(self._total, len(ids))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._uncollected[report.nodeid] = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self._job is None or self._session is None:
            return
        if self._outcomes.get(report.nodeid) != "failed" and (report.when == "call" or report.outcome != "passed"):
            self._outcomes[report.nodeid] = report.outcome
        if report.when == "teardown":
            self._done += 1
            percent = 100 * self._done / self._total if self._total else None
            self._job.progress(percent, ", ".join(f"{count} {word}" for word, count in self._counts().items()))
        if self._job.cancelled:
            self._session.shouldstop = "the end of its job was requested"

    # Not pytest_sessionfinish: it is not called if the session could not start, and others change the exit code in it.
    def pytest_unconfigure(self) -> None:
        if self._job is not None and self._session is not None:
            self._end(self._job, int(self._session.exitstatus))
        self._client.close()

    def _end(self, job: TrackedJob, exit_code: int) -> None:
        failed = [nodeid for nodeid, outcome in self._outcomes.items() if outcome == "failed"]
        uncollected = list(self._uncollected)
        job.result = {
            **self._counts(),
            **({"collection_errors": len(uncollected)} if uncollected else {}),
            "exit_code": exit_code,
        }
        # pytest interrupts itself after collection errors.
        if exit_code == pytest.ExitCode.INTERRUPTED and (job.cancelled or not uncollected):
            if not job.cancelled:
                job.abort("interrupted")
        elif exit_code in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED) and (failed or uncollected):
            summary = f"{len(failed)} of {self._total} tests failed"
            if uncollected:
                summary += f", collection errors: {len(uncollected)}"
            job.fail("\n".join([summary, *uncollected, *failed]), reason="TESTS_FAILED")
        elif exit_code != pytest.ExitCode.OK:
            # A number of the project's own has no name.
            names = {int(code): code.name for code in pytest.ExitCode}
            job.fail(f"pytest ended with exit code {exit_code}", reason=names.get(exit_code, ""))
        # With what a hook raised, which ends pytest after this.
        raised = sys.exc_info()
        job.__exit__(*(raised if raised[1] is not self._handled else (None, None, None)))

    def _counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for outcome in self._outcomes.values():
            counts[outcome] = counts.get(outcome, 0) + 1
        return counts
