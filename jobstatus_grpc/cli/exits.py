"""Exit codes, and the lines that commands print on stderr."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import termios
from typing import TYPE_CHECKING, TextIO

from jobstatus_grpc import errors
from jobstatus_grpc.cli.text import one_line
from jobstatus_grpc.job import JobState

if TYPE_CHECKING:
    from collections.abc import Iterable

SUCCEEDED = 0

FAILED = 1
"""The job failed, or the call was refused."""

USAGE = 2

STOPPED = 3
"""The job was aborted or cancelled."""

UNREACHABLE = 4
"""Of the server, or of a store's database: the same command may succeed later."""

NO_SUCH_JOB = 5
"""The job does not exist, or has expired: so `wait` on a wrong id differs from a failed job."""

TIMED_OUT = 124
"""As timeout(1) has it."""

INTERRUPTED = 130
"""As a shell reports Ctrl-C."""

CLOSED_PIPE = 141
"""As a shell reports SIGPIPE: the reader of our output has closed it."""

NOT_EXECUTABLE = 126
"""run: the command exists, but cannot be started; as a shell, env(1) and timeout(1) have it."""

NO_SUCH_COMMAND = 127
"""run: the command does not exist."""

OF_STATE = {
    JobState.SUCCEEDED: SUCCEEDED,
    JobState.FAILED: FAILED,
    JobState.ABORTED: STOPPED,
    JobState.CANCELLED: STOPPED,
}


def of_jobs(states: Iterable[JobState]) -> int:
    """Return the exit code of several done jobs: failed counts most, then aborted or cancelled."""
    codes = {OF_STATE[state] for state in states}
    return next((code for code in (FAILED, STOPPED) if code in codes), SUCCEEDED)


def of_error(error: errors.JobStatusError) -> int:
    """Return the exit code of a call that failed."""
    if isinstance(error, (errors.UnavailableError, errors.DeadlineExceededError)):
        return UNREACHABLE
    if isinstance(error, errors.NotFoundError):
        return NO_SUCH_JOB
    return USAGE if isinstance(error, errors.InvalidArgumentError) else FAILED


def of_refused_start(error: errors.CannotStartError) -> int:
    """Return the exit code of a server or a store that could not start."""
    return UNREACHABLE if isinstance(error, errors.StoreUnreachableError) else USAGE


def of_command(code: int) -> int:
    """Return what a shell reports for a command that ended with `code`, which is negative if a signal ended it."""
    return 128 - code if code < 0 else code


def of_start_error(error: OSError) -> int:
    """Return what a shell reports for a command that could not be started."""
    return NO_SUCH_COMMAND if error.errno == errno.ENOENT else NOT_EXECUTABLE


def say_error(message: str) -> None:
    """Print `message` on stderr as an error."""
    say(f"error: {message}")


def say(message: str) -> None:
    """Print `message` as one line on stderr; no error if stderr is closed."""
    with contextlib.suppress(OSError, ValueError):
        print(one_line(message), file=sys.stderr, end=_line_end(), flush=True)


def drop_unwritten(*streams: TextIO) -> None:
    """Drop what streams of ours cannot write: at exit Python would try again, print an error, and exit with 120."""
    for stream in streams:
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _line_end() -> str:
    """Return the end of a line for stderr: a terminal in raw mode, in which `run` passes a command's output on, needs
    the carriage return."""
    try:
        modes = termios.tcgetattr(sys.stderr.fileno())
    except (termios.error, OSError, ValueError):
        return "\n"
    return "\n" if modes[1] & termios.OPOST else "\r\n"


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"jobstatus: {record.getMessage()}")


def print_logged_warnings() -> None:
    """Print the warnings that our own modules log on stderr, such as an interrupted watch."""
    log = logging.getLogger("jobstatus_grpc")
    if not log.handlers:
        log.addHandler(_StderrHandler(logging.WARNING))
        log.propagate = False
