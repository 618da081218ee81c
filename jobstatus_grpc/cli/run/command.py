"""`jobstatus run`: a command as a job. The command comes first: where reporting fails, it runs all the same."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from jobstatus_grpc import errors
from jobstatus_grpc.cli import exits, options
from jobstatus_grpc.cli.connection import Connection, connected
from jobstatus_grpc.cli.options import duration_flag, flag
from jobstatus_grpc.cli.run.child import Child
from jobstatus_grpc.cli.run.progress import LastLine, PercentReader
from jobstatus_grpc.cli.text import one_line
from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.job import JobState

if TYPE_CHECKING:
    from jobstatus_grpc.cli.run.child import Child
    from jobstatus_grpc.client import JobStatusClient, TrackedJob
    from jobstatus_grpc.job import Job


@dataclass(frozen=True, slots=True)
class Verdict:
    """The end of a job; message and reason are its error's, for people and for machines."""

    state: JobState
    message: str = ""
    reason: str = ""


def judge(
    code: int,
    *,
    was_stopped: bool = False,
    interrupted_by: signal.Signals | None = None,
    last_line: str = "",
    lost_output: str = "",
) -> Verdict:
    """Return what the end of a command means.

    Args:
        code: its exit code, negative where a signal ended it.
        was_stopped: it was told to end because the job was to.
        interrupted_by: the signal by which a person or the system ended it.
        last_line: the last line of its stderr.
        lost_output: why some of its output went nowhere; without us it would have met that error itself.
    """
    if was_stopped:
        return Verdict(JobState.CANCELLED)
    if code == 0 and lost_output:
        return Verdict(JobState.FAILED, lost_output, "OUTPUT_LOST")
    if code == 0:
        return Verdict(JobState.SUCCEEDED)
    if interrupted_by is not None:
        return Verdict(JobState.ABORTED, f"interrupted by {interrupted_by.name}")
    if code < 0:
        killer = f"killed by {_name(-code)}"
        return Verdict(JobState.FAILED, f"{killer}: {last_line}" if last_line else killer, f"KILLED_BY_{_name(-code)}")
    return Verdict(JobState.FAILED, last_line or f"exit code {code}", f"EXIT_CODE_{code}")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGNAL_{number}"


PAUSE_SECONDS = 1.0

SELDOM_SECONDS = 60.0
"""Progress is of no interest here."""


class Overseer:
    """Watches a tracked job in a thread of its own, and stops `child` where the job asks for it.

    The tracked job itself learns that with its next heartbeat only.
    """

    THREAD_NAME = "overseer"

    def __init__(self, client: JobStatusClient, tracked: TrackedJob, child: Child) -> None:
        self._client = client
        self._tracked = tracked
        self._child = child
        self._leaving = threading.Event()
        self.job: Job | None = None
        """The job for which the command was stopped."""
        threading.Thread(target=self._oversee, name=self.THREAD_NAME, daemon=True).start()

    def leave(self) -> None:
        """Stop nothing from now on."""
        self._leaving.set()

    def _oversee(self) -> None:
        was_away = not self._tracked.attempt
        while not self._leaving.is_set() and not self._must_stop():
            if self._tracked.attempt:
                if was_away:
                    exits.say(f"jobstatus: job {self._tracked.id} is reported from now on")
                was_away = False
                self._watch()
            self._leaving.wait(PAUSE_SECONDS)
        if self._must_stop():
            self._child.stop()

    def _must_stop(self) -> bool:
        return not self._leaving.is_set() and (self.job is not None or self._tracked.lost)

    def _watch(self) -> None:
        """Watch until the job is to end; errors that a watch does not survive are left to the next try."""
        try:
            for job in self._client.watch(self._tracked.id, min_update_interval_seconds=SELDOM_SECONDS):
                if self._leaving.is_set():
                    return
                if job.done or job.cancel_requested or job.attempt > self._tracked.attempt:
                    self.job = job
                    exits.say(f"jobstatus: {_why(job)}; stopping the command")
                    # Also brings the tracked job the answer in which it learns that.
                    self._tracked.progress(reason=f"stopping: {_why(job)}")
                    self._child.stop()
                    return
        except JobStatusError:
            return


def _why(job: Job) -> str:
    if job.done:
        return f"the job was ended by somebody else, as {job.state.word}"
    return "cancel requested" if job.cancel_requested else "another worker has the job now"


REFUSALS = (
    errors.FailedPreconditionError,
    errors.InvalidArgumentError,
    errors.JobAlreadyExistsError,
    errors.NotFoundError,
)
"""The job is not for us: its command must not run. Other errors say nothing about the job, and the command runs."""

OUTCOME_TIMEOUTS = 6
"""How much longer than another call it may take to report the outcome: without it the job would end as stalled."""

TOLD_WITHIN_SECONDS = 2.0

AWAY_SECONDS = 2.0
"""How long the end is held up for a server that has never answered."""


@click.command(context_settings={"allow_interspersed_args": False})
@flag("--name TEXT", "Default: the command's.", default="")
@flag("--id ID", "Claim this job, or create it where it is unknown. Default: a new one.", default="")
@options.labels("May be repeated; for a job that is created.")
@flag("--parent ID", "The job that this one is part of; for a job that is created.", to="parent_id", default="")
@options.heartbeat_timeout(default="30s")
@duration_flag(
    "--kill-after DURATION",
    "How long after SIGTERM a cancelled command is killed.",
    default="10s",
    longest=timedelta(days=1),
)
@flag("--no-progress", "Do not take NN% in the output for progress.")
@flag("-q --quiet", "Do not print the job's id.")
@click.argument("command", metavar="COMMAND [ARGS]...", nargs=-1, required=True, type=click.UNPROCESSED)
@connected
@click.pass_context
def run(
    ctx: click.Context,
    /,
    *,
    connection: Connection,
    command: tuple[str, ...],
    name: str,
    id: str,
    labels: tuple[tuple[str, str], ...],
    parent_id: str,
    heartbeat_timeout: timedelta | None,
    kill_after: timedelta,
    no_progress: bool,
    quiet: bool,
) -> None:
    """Run a command as a job, and exit with the job's outcome.

    Its input and output are its own. Exit code 0 is SUCCEEDED, another FAILED with the last line of stderr as the
    error; NN% in its output is progress. A cancel is SIGTERM for it and all that it started. SIGINT and SIGTERM are
    passed on; a command that ends by them is ABORTED. Without a server it runs all the same.
    """
    if problem := _why_not_runnable(command[0]):
        exits.say_error(f"{command[0]}: {problem}")
        ctx.exit(exits.USAGE)
    with connection.open() as client:
        tracked = client.track(
            name or _name_of(command[0]),
            id=id or None,
            labels=dict(labels),
            parent_id=parent_id,
            heartbeat_timeout_seconds=heartbeat_timeout.total_seconds() if heartbeat_timeout else None,
            finish_timeout_seconds=OUTCOME_TIMEOUTS * connection.timeout_seconds,
        )
        with _quiet_while_unknown(tracked), tracked:
            _say_begin(tracked, connection.address, quiet=quiet)
            state = _work(command, client, tracked, kill_after.total_seconds(), reads_progress=not no_progress)
    # What is stored is the outcome; where that is not known, it is how the command ended.
    ctx.exit(exits.OF_STATE[tracked.job.state if tracked.job and tracked.job.done else state])


@contextlib.contextmanager
def _quiet_while_unknown(tracked: TrackedJob) -> Iterator[None]:
    """Until the server knows the job, all that the client could log is what `_say_begin` says in one line.

    What the overseer's watch logs, the reports' own log says too.
    """
    log = logging.getLogger("jobstatus_grpc.client")

    def is_news(record: logging.LogRecord) -> bool:
        return tracked.attempt > 0 and record.threadName != Overseer.THREAD_NAME

    log.addFilter(is_news)
    try:
        yield
    finally:
        log.removeFilter(is_news)


def _why_not_runnable(program: str) -> str:
    """Return what is wrong with a command, before there is a job for it; empty where nothing is."""
    if shutil.which(program) is not None:
        return ""
    return "not executable" if os.path.dirname(program) and os.path.exists(program) else "command not found"


def _name_of(program: str) -> str:
    return one_line(os.path.basename(program).encode(errors="replace").decode())[:64] or "command"


def _say_begin(tracked: TrackedJob, address: str, *, quiet: bool) -> None:
    """Say which job it is and whether it is reported; raise what forbids to run the command."""
    error = tracked.error
    if isinstance(error, REFUSALS):
        exits.say_error(f"{error}; the command was not run")
        job = tracked.job
        was_stopped = job is not None and (job.cancel_requested or exits.OF_STATE.get(job.state) == exits.STOPPED)
        click.get_current_context().exit(exits.STOPPED if was_stopped else exits.of_error(error))
    if not quiet:
        exits.say(f"job {tracked.id}")
    if not tracked.attempt:
        is_away = error is None or isinstance(error, (errors.UnavailableError, errors.DeadlineExceededError))
        why = f"no answer from {address}" if is_away else f"not reported: {error}"
        exits.say(f"jobstatus: {why}; the command runs all the same")


def _work(
    command: Sequence[str],
    client: JobStatusClient,
    tracked: TrackedJob,
    kill_after_seconds: float,
    *,
    reads_progress: bool,
) -> JobState:
    """Run the command to its end and tell the tracked job how that came; return the state that it means."""
    last_line = LastLine()
    child = Child(
        command,
        stdout=[_progress_reader(tracked)] if reads_progress else [],
        stderr=[last_line.feed, *([_progress_reader(tracked)] if reads_progress else [])],
        kill_after_seconds=kill_after_seconds,
    )
    try:
        with child:
            overseer = Overseer(client, tracked, child)
            code = child.wait()
            overseer.leave()
    except OSError as error:
        message = f"{command[0]}: {error.strerror}"
        tracked.fail(message, reason="NOT_STARTED")
        exits.say_error(message)
        click.get_current_context().exit(exits.USAGE)
    verdict = judge(
        code,
        was_stopped=child.was_stopped,
        interrupted_by=child.interrupted_by(code),
        last_line=last_line.read(),
        lost_output=child.lost_output,
    )
    if verdict.reason == "OUTPUT_LOST":
        exits.say_error(verdict.message)
    _tell(tracked, verdict, cancel_was_asked=overseer.job is not None and overseer.job.cancel_requested)
    if not tracked.attempt:
        threading.Timer(AWAY_SECONDS, client.close).start()
    return overseer.job.state if overseer.job and overseer.job.done else verdict.state


def _progress_reader(tracked: TrackedJob) -> Callable[[bytes], None]:
    reader = PercentReader()

    def read(data: bytes) -> None:
        found = reader.feed(data)
        if found is not None:
            tracked.progress(found.percent, found.text)

    return read


def _tell(tracked: TrackedJob, verdict: Verdict, *, cancel_was_asked: bool) -> None:
    """Set the outcome that the end of the tracked block reports."""
    if verdict.state is JobState.SUCCEEDED:
        tracked.succeed()
    elif verdict.state is JobState.FAILED:
        tracked.fail(verdict.message, reason=verdict.reason)
    else:
        # To be stopped is CANCELLED to a tracked job that knows of the cancel, and ABORTED to one that does not yet.
        told_by = time.monotonic() + TOLD_WITHIN_SECONDS
        while cancel_was_asked and not (tracked.cancelled or tracked.lost) and time.monotonic() < told_by:
            time.sleep(0.01)
        tracked.abort(verdict.message)
