"""How a block's end reads as a job's."""

from __future__ import annotations

import asyncio
import concurrent.futures

import pytest

from jobstatus_grpc import JobError, JobState
from jobstatus_grpc.client.track import make_error, outcome_of
from jobstatus_grpc.job import limits, validation

# What the block raised, whether a cancel was requested, whether it knew → the end of its job.
ENDS = [
    (None, False, False, JobState.SUCCEEDED),
    (None, True, False, JobState.SUCCEEDED),
    (None, True, True, JobState.CANCELLED),
    (ValueError("bad"), False, False, JobState.FAILED),
    (ValueError("bad"), True, False, JobState.FAILED),
    (ValueError("bad"), True, True, JobState.CANCELLED),
    (KeyboardInterrupt(), False, False, JobState.ABORTED),
    (KeyboardInterrupt(), True, False, JobState.CANCELLED),
    (asyncio.CancelledError(), False, False, JobState.ABORTED),
    (asyncio.CancelledError(), True, True, JobState.CANCELLED),
    (concurrent.futures.CancelledError(), False, False, JobState.ABORTED),
    (GeneratorExit(), False, False, JobState.ABORTED),
    (SystemExit(), False, False, JobState.SUCCEEDED),
    (SystemExit(0), False, False, JobState.SUCCEEDED),
    (SystemExit(3), False, False, JobState.FAILED),
    (SystemExit("usage"), False, False, JobState.FAILED),
]


@pytest.mark.parametrize(("exception", "cancel_requested", "was_told", "state"), ENDS)
def test_the_end_of_a_block_is_a_state(exception, cancel_requested, was_told, state):
    assert outcome_of(exception, cancel_requested=cancel_requested, was_told=was_told).state is state


def error_for(exception: BaseException) -> JobError:
    error = outcome_of(exception, cancel_requested=False, was_told=False).error
    assert error is not None
    return error


def test_an_exception_is_told_by_its_text_and_its_class():
    assert error_for(ValueError("bad")) == JobError(2, "bad", "ValueError")
    assert error_for(SystemExit(3)) == JobError(2, "exit code 3", "SystemExit")
    assert error_for(asyncio.CancelledError()) == JobError(1, "CancelledError", "CancelledError")


class MuteError(Exception):
    """One that fails to tell itself."""

    def __str__(self) -> str:
        raise RuntimeError


def test_an_exception_without_words_is_told_by_its_class():
    assert error_for(ValueError()).message == "ValueError"
    assert error_for(MuteError()).message == "MuteError"


@pytest.mark.parametrize("text", ["\x1b[31mred\x00", "\ud800 alone", "é" * 5000, "a\r\nb\tc", "\x85\x9b"])
def test_any_text_becomes_one_that_the_service_accepts(text):
    error = make_error(text, text)
    violations: list = []
    validation.check_text(error.message, limits.MAX_ERROR_MESSAGE_BYTES, "message", violations, multiline=True)
    validation.check_text(error.reason, limits.MAX_ERROR_REASON_BYTES, "reason", violations)
    error.message.encode()
    assert violations == []


def test_lines_and_tabs_are_kept_in_a_message():
    assert make_error("a\n\tb", "a\nb") == JobError(2, "a\n\tb", "a b")
