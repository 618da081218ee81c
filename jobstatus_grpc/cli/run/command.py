"""`jobstatus run`: run a command as a job. If reporting fails, the command runs anyway.

The command runs in a Child; a client's tracked job reports it in the background. Output passes through and is read for
progress and for the last error line. CancelWatcher stops the command when the job is cancelled.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import re
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from jobstatus_grpc import errors
from jobstatus_grpc.cli import exits, options, parsers
from jobstatus_grpc.cli.connection import connected
from jobstatus_grpc.cli.options import duration_flag, flag
from jobstatus_grpc.cli.run.child import Child, faults_blocked
from jobstatus_grpc.cli.run.progress import LastLine, PercentReader, Phases
from jobstatus_grpc.cli.target import Connection
from jobstatus_grpc.cli.text import one_line
from jobstatus_grpc.job import JobState, validation

if TYPE_CHECKING:
    from jobstatus_grpc.client import JobStatusClient, TrackedJob
    from jobstatus_grpc.job import Job

OUTCOME_TIMEOUTS = 6
"""How many call timeouts (--timeout) reporting the outcome may take: an outcome that is not reported leaves the job
IN_PROGRESS until it is stalled."""

UNCLAIMED_FINISH_SECONDS = 2.0
"""How long reporting the outcome may take if the server has never answered: it is probably not running."""

OUTPUT_LOST = "OUTPUT_LOST"
"""The error's reason if the command succeeded but its output could not be passed on. The exit code is 1 then: run
directly, the command would have failed to write."""

REFUSALS = (
    errors.FailedPreconditionError,
    errors.InvalidArgumentError,
    errors.JobAlreadyExistsError,
    errors.NotFoundError,
)
"""Errors that mean the job cannot be this worker's, so the command must not run. After any other error it runs."""


@click.command(context_settings={"allow_interspersed_args": False})
@flag("--name TEXT", "The job's name. Default: the command's.", default="")
@flag("--id ID", "Claim this job; create it if it does not exist. Default: a new job.", default="")
@options.labels("A label of the job if it is created. May be repeated.")
@options.parent(
    "The parent of the job if it is created. Default: the job of the command that this command is run by.",
    envvar=("JOBSTATUS_PARENT", "JOBSTATUS_JOB_ID"),
)
@options.heartbeat_timeout(default="30s")
@duration_flag(
    "--kill-after DURATION",
    "Time from SIGTERM to SIGKILL when a cancelled command does not end.",
    default="10s",
    longest=timedelta(days=1),
)
@flag("--no-progress", "Do not read NN% in the output as progress.")
@flag(
    "--progress-regex REGEX",
    "What is progress in a line of output, instead of NN%: a regular expression with one group, the percentage, or two "
    "groups, the part that is done and the whole, such as '(\\d+) of (\\d+) files'.",
    to="pattern",
    type=parsers.progress_regex,
)
@flag("--exit-outcome", "Exit with the job's outcome, as wait does, instead of the command's exit code.")
@flag(
    "--otel",
    "Make an OpenTelemetry span of the command, and export it as the variables OTEL_… say. Needs the extra `otel`. "
    "Without it, the job gets the trace in TRACEPARENT all the same.",
)
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
    pattern: re.Pattern[str] | None,
    exit_outcome: bool,
    otel: bool,
    quiet: bool,
) -> None:
    """Run a command as a job, and exit with its exit code.

    Standard input and output are passed through; in a terminal the command gets one of its own. Exit code 0 means
    SUCCEEDED; any other means FAILED, with the last line of stderr (in a terminal: of all output) as the error. NN% in
    the output is reported as progress. If the job is cancelled, the command and all its child processes get SIGTERM.
    Signals are forwarded; a command that they end is ABORTED. If the server cannot be reached, the command runs anyway.

    \b
    Exit codes:
      as the command's, with or without a server
      128 + N  signal N ended the command
      127      the command does not exist
      126      the command cannot be started
    """

    if no_progress and pattern:
        raise click.UsageError("--no-progress contradicts --progress-regex.")
    reader = None if no_progress else functools.partial(PercentReader, pattern)

    has_ended = False

    def print_report_error(problem: str, error: Exception) -> None:
        # Until the job is claimed or the command has ended, the line that _print_start prints says all of it.
        if tracked.attempt or has_ended:
            exits.say(f"jobstatus: {problem}")

    with (
        faults_blocked(),
        _trace_of(name or _name_of(command[0]), otel=otel) as (trace, has_span),
        connection.open(tracing=has_span) as client,
    ):
        tracked = client.track(
            name or _name_of(command[0]),
            id=id or None,
            labels=dict(labels),
            parent_id=parent_id,
            trace_parent=trace.get("TRACEPARENT"),
            heartbeat_timeout_seconds=heartbeat_timeout.total_seconds() if heartbeat_timeout else None,
            finish_timeout_seconds=OUTCOME_TIMEOUTS * connection.timeout_seconds,
            on_report_error=print_report_error,
        )
        with tracked:
            if isinstance(tracked.error, REFUSALS):
                ctx.exit(_refuse(tracked.error, tracked.job))
            _print_start(tracked, connection.address, quiet=quiet)
            try:
                state, code = _run_to_end(
                    command,
                    _environment(connection, tracked) | trace,
                    client,
                    tracked,
                    kill_after.total_seconds(),
                    reader,
                )
            except OSError as error:
                message = f"{command[0]}: {error.strerror}"
                tracked.fail(message, reason="NOT_STARTED")
                exits.say_error(message)
                ctx.exit(exits.USAGE if exit_outcome else exits.of_start_error(error))
            finally:
                has_ended = True
                if not tracked.attempt and _is_away(tracked.error):
                    tracked.finish_timeout_seconds = UNCLAIMED_FINISH_SECONDS
    if not exit_outcome:
        ctx.exit(code)
    # The stored state decides; if it is not known, how the command ended.
    ctx.exit(exits.OF_STATE[tracked.job.state if tracked.job and tracked.job.done else state])


@contextlib.contextmanager
def _trace_of(name: str, *, otel: bool) -> Iterator[tuple[dict[str, str], bool]]:
    """Return the variables with the trace of the command: ours, or with `otel` a span in it, which ends with the block;
    and whether there is this span.

    A TRACEPARENT that is not valid is left out. If OpenTelemetry cannot be set up, there is no span.
    """
    found = {key: os.environ[key] for key in ("TRACEPARENT", "TRACESTATE") if key in os.environ}
    if not validation.is_trace_parent(found.get("TRACEPARENT", "")):
        found = {}
    if not otel:
        yield found, False
        return
    has_span = False
    with contextlib.ExitStack() as stack:
        try:
            from jobstatus_grpc import telemetry

            found = stack.enter_context(telemetry.program_span("jobstatus run", name, found))
            has_span = True
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("opentelemetry"):
                raise
            raise click.UsageError("--otel needs an extra; pip install 'jobstatus-grpc[otel]'") from None
        except Exception as error:  # the SDK raises several classes, some already when it is imported
            exits.say(
                f"jobstatus: --otel: OpenTelemetry refuses the value of a variable OTEL_…: {error}; "
                "the command runs without a span"
            )
        yield found, has_span


def _name_of(program: str) -> str:
    return one_line(os.path.basename(program).encode(errors="replace").decode())[:64] or "command"


def _refuse(error: errors.JobStatusError, job: Job | None) -> int:
    """Print why the command is not run; return the exit code."""
    exits.say_error(f"{error}; the command was not run")
    was_stopped = job is not None and (job.cancel_requested or exits.OF_STATE.get(job.state) == exits.STOPPED)
    return exits.STOPPED if was_stopped else exits.of_error(error)


def _print_start(tracked: TrackedJob, address: str, *, quiet: bool) -> None:
    """Print the job's id, and why it is not reported if it is not."""
    # A job whose claim is refused for good will never exist.
    if not quiet and (tracked.error is None or _may_be_reported(tracked.error)):
        exits.say(f"job {tracked.id}")
    if not tracked.attempt:
        exits.say(f"jobstatus: {_why_not_reported(tracked.error, address)}; the command runs anyway")


def _why_not_reported(error: Exception | None, address: str) -> str:
    if error is None:
        return f"no answer from {address}"
    if _is_away(error):
        return f"no answer from {address}: {error}"
    return f"the job is {'reported late' if _may_be_reported(error) else 'not reported'}: {error}"


def _may_be_reported(error: Exception) -> bool:
    from jobstatus_grpc.client.retry import is_transient  # imports grpc

    return is_transient(error)


def _is_away(error: Exception | None) -> bool:
    """Return whether this is no answer of the server; None: there is none yet."""
    if error is None:
        return True
    return isinstance(error, (errors.UnavailableError, errors.DeadlineExceededError)) and not error.reason


def _environment(connection: Connection, tracked: TrackedJob) -> dict[str, str]:
    """Return the command's variables, by which it finds the server and its job.

    Variables that describe this job are left out: the command's own `jobstatus run` would claim the job a second time.
    """
    own = {
        "ADDRESS": connection.address,
        "TOKEN": connection.token,
        "TOKEN_FILE": connection.token_file and os.path.abspath(connection.token_file),
        "TOKEN_COMMAND": _in_shell_words(connection.token_command),
        "TENANT": connection.tenant,
        "CA": connection.ca_file and os.path.abspath(connection.ca_file),
        "CERT": connection.cert_file and os.path.abspath(connection.cert_file),
        "KEY": connection.key_file and os.path.abspath(connection.key_file),
        "SERVER_NAME": connection.server_name,
        "INSECURE": "1" if connection.insecure else None,
        "JOB_ID": tracked.id,
        "ATTEMPT": str(tracked.attempt) if tracked.attempt else None,
        **dict.fromkeys(("ID", "NAME", "PARENT", "PROFILE")),
    }
    merged = {**os.environ, **{f"JOBSTATUS_{name}": value for name, value in own.items()}}
    return {name: value for name, value in merged.items() if value is not None}


def _in_shell_words(command: str | Sequence[str] | None) -> str | None:
    return command if command is None or isinstance(command, str) else shlex.join(command)


def _run_to_end(
    command: Sequence[str],
    environment: Mapping[str, str],
    client: JobStatusClient,
    tracked: TrackedJob,
    kill_after_seconds: float,
    new_reader: Callable[[], PercentReader] | None,
) -> tuple[JobState, int]:
    """Run the command and set the outcome that the end of the tracked block reports; return the job's final state, and
    the exit code that a shell would report for the command.

    Raises:
        OSError: the command cannot be started.
    """
    last_line = LastLine()
    stdout, stderr, terminal = ([_progress_reader(tracked, new_reader())] if new_reader else [] for _ in range(3))
    child = Child(
        command,
        environment=environment,
        stdout=stdout,
        stderr=[last_line.feed, *stderr],
        terminal=[last_line.feed, *terminal],
        kill_after_seconds=kill_after_seconds,
    )
    with child:
        cancel_watcher = CancelWatcher(client, tracked, child)
        code = child.wait()
    result = result_of(
        code,
        was_stopped=child.was_stopped,
        interrupted_by=child.interrupted_by(code),
        last_line=last_line.read(),
        lost_output=child.lost_output,
    )
    if result.reason == OUTPUT_LOST:
        exits.say_error(result.message)
    if result.state is JobState.SUCCEEDED:
        tracked.succeed()
    elif result.state is JobState.FAILED:
        tracked.fail(result.message, reason=result.reason)
    else:
        tracked.abort(result.message)
    state = cancel_watcher.job.state if cancel_watcher.job and cancel_watcher.job.done else result.state
    return state, exits.FAILED if result.reason == OUTPUT_LOST else exits.of_command(code)


def _progress_reader(tracked: TrackedJob, reader: PercentReader) -> Callable[[bytes], None]:
    phases = Phases()

    def read(data: bytes) -> None:
        found = reader.feed(data)
        if found is None:
            return
        if phases.begins(found.percent):
            tracked.restart_progress()
        phase = f"phase {phases.number}" if phases.number > 1 else ""
        tracked.progress(found.percent, ": ".join(filter(None, [phase, found.text])))

    return read


class CancelWatcher:
    """Stops the command once its job is cancelled, or belongs to another worker. Runs in a thread until then, or until
    the tracked block ends."""

    def __init__(self, client: JobStatusClient, tracked: TrackedJob, child: Child) -> None:
        self.job: Job | None = None
        """The job at the moment when the command was stopped; None if it was not stopped, or the job is deleted."""
        self._client = client
        self._tracked = tracked
        self._child = child
        # With the context of the caller, so that its calls are in the trace of the command.
        run, arguments = contextvars.copy_context().run, (self._watch,)
        threading.Thread(target=run, args=arguments, name="cancel watcher", daemon=True).start()

    def _watch(self) -> None:
        tracked = self._tracked
        if not tracked.attempt and tracked.wait_claimed():
            exits.say(f"jobstatus: job {tracked.id} is reported from now on")
        if not tracked.wait_cancelled() or not self._child.is_running:
            return
        self.job = self._read_job()
        why = self._why()
        exits.say(f"jobstatus: {why}; stopping the command")
        if tracked.cancelled:
            tracked.progress(reason=f"stopping: {why}")
        self._child.stop()

    def _read_job(self) -> Job | None:
        """Return the job as it is now; `tracked.job` may be older if a refused report is how the loss was noticed."""
        tracked = self._tracked
        job = tracked.job
        if tracked.cancelled or (job is not None and (job.done or job.attempt > tracked.attempt)):
            return job
        try:
            return self._client.get(tracked.id)
        except errors.JobStatusError:
            return None

    def _why(self) -> str:
        if self.job is None:
            return str(self._tracked.error)
        if self.job.done:
            return f"another client ended the job as {self.job.state.word}"
        return "cancel requested" if self.job.cancel_requested else "another worker has the job now"


@dataclass(frozen=True, slots=True)
class RunResult:
    """What the end of a command means for its job; `message` and `reason` are the error's."""

    state: JobState
    message: str = ""
    reason: str = ""


def result_of(
    code: int,
    *,
    was_stopped: bool = False,
    interrupted_by: int | None = None,
    last_line: str = "",
    lost_output: str = "",
) -> RunResult:
    """Return the result of a command.

    Args:
        code: its exit code, negative if a signal ended it.
        was_stopped: CancelWatcher stopped it.
        interrupted_by: the forwarded signal, or SIGINT from the terminal, that it ended after.
        last_line: the last line of its stderr.
        lost_output: the error of writing its output on; if it ran directly, it would have got that error itself.
    """
    if was_stopped:
        return RunResult(JobState.CANCELLED)
    if code == 0 and lost_output:
        return RunResult(JobState.FAILED, lost_output, OUTPUT_LOST)
    if code == 0:
        return RunResult(JobState.SUCCEEDED)
    if interrupted_by is not None:
        return RunResult(JobState.ABORTED, f"interrupted by {_signal_name(interrupted_by)}")
    if code < 0:
        name = _signal_name(-code)
        message = f"killed by {name}: {last_line}" if last_line else f"killed by {name}"
        return RunResult(JobState.FAILED, message, f"KILLED_BY_{name}")
    return RunResult(JobState.FAILED, last_line or f"exit code {code}", f"EXIT_CODE_{code}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGNAL_{number}"
