"""How a tracked block of work ended: the state and the error that its job gets."""

from __future__ import annotations

import concurrent.futures
import re
from dataclasses import dataclass

from jobstatus_grpc import limits
from jobstatus_grpc.record import JobError
from jobstatus_grpc.state import JobState

CANCELLED_CODE = 1
UNKNOWN_CODE = 2
"""Of google.rpc.Code."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_CONTROL_BUT_WHITESPACE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a job."""

    state: JobState
    error: JobError | None = None
    reason: str = ""
    """Empty: the job keeps the one it has."""


SUCCESS = Outcome(JobState.SUCCEEDED)


def outcome_of(exception: BaseException | None, *, cancel_requested: bool, was_told: bool) -> Outcome:
    """Return what a block that says nothing about its outcome means by how it ended.

    Args:
        exception: what it raised.
        cancel_requested: whether somebody asked for the job's end.
        was_told: whether the block looked and knew: then its end, however it came, is the answer to that.
    """
    if isinstance(exception, SystemExit) and not exception.code:
        exception = None
    if exception is None:
        return Outcome(JobState.CANCELLED) if was_told else SUCCESS
    # What is no Exception stops a block from outside: KeyboardInterrupt, asyncio.CancelledError, GeneratorExit.
    was_stopped = isinstance(exception, concurrent.futures.CancelledError) or not isinstance(
        exception, (Exception, SystemExit)
    )
    error = error_of(exception, CANCELLED_CODE if was_stopped else UNKNOWN_CODE)
    if was_told or (was_stopped and cancel_requested):
        return Outcome(JobState.CANCELLED, error)
    return Outcome(JobState.ABORTED if was_stopped else JobState.FAILED, error)


def error_of(exception: BaseException, code: int) -> JobError:
    """Return an exception as a job's error: its text, and its class's name as the reason."""
    kind = type(exception).__name__
    if isinstance(exception, SystemExit):
        return make_error(f"exit code {exception.code}", kind, code)
    try:
        message = str(exception)
    except Exception:
        message = ""
    return make_error(message or kind, kind, code)


def make_error(message: str, reason: str = "", code: int = UNKNOWN_CODE) -> JobError:
    """Return an error that the service accepts, whatever the texts hold."""
    return JobError(
        code if 1 <= code <= limits.MAX_ERROR_CODE else UNKNOWN_CODE,
        clean_text(message, limits.MAX_ERROR_MESSAGE_BYTES, multiline=True),
        clean_text(reason, limits.MAX_ERROR_REASON_BYTES),
    )


def clean_text(text: str, max_bytes: int, *, multiline: bool = False) -> str:
    """Return `text` without what the service refuses: control characters, lone surrogates, and all beyond its limit."""
    plain = (_CONTROL_BUT_WHITESPACE if multiline else _CONTROL).sub(" ", str(text))
    return plain.encode("utf-8", "replace")[:max_bytes].decode("utf-8", "ignore")
