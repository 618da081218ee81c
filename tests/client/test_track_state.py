"""The state of a tracked job, by an injected clock: which reports it sends and when, and how it reports the end."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import JobError, JobState
from jobstatus_grpc.client.sender import Call
from jobstatus_grpc.client.track import SUCCESS, BlockOutcome, Claim, TrackState, make_error, outcome_of
from jobstatus_grpc.errors import (
    IllegalTransitionError,
    InvalidArgumentError,
    JobNotFoundError,
    JobStatusError,
    PermissionDeniedError,
    StaleAttemptError,
    TooManyRequestsError,
    UnavailableError,
)
from jobstatus_grpc.job import limits, validation
from jobstatus_grpc.wire.convert import job_from_wire
from tests.support.scripted_server import a_job

AWAY = UnavailableError("away")


class Worker:
    """A TrackState with a clock of its own, and the service that answers it."""

    def __init__(self, heartbeat_timeout_seconds: float | None = 30.0, **claim: Any) -> None:
        self.now = 1000.0
        self.wakes = 0
        settings = {"name": "n", "id": None, "labels": None, "parent_id": ""} | claim
        self.state = TrackState(
            Claim(heartbeat_timeout_seconds=heartbeat_timeout_seconds, **settings),
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            finish_timeout_seconds=10,
            call_timeout_seconds=10,
            clock=lambda: self.now,
        )
        self.state.wake = self.wake

    def wake(self) -> None:
        self.wakes += 1

    def next_due(self) -> Call:
        """Advance the clock until a step is due, and return it."""
        due = self.state.due_in_seconds()
        assert due is not None
        self.now += due
        return self.state.next_call()[0]

    def send(self, **job: Any) -> Any:
        """Advance the clock until a step is due, answer it, and return its request."""
        step = self.next_due()
        self.state.succeeded(step, pb.GetJobResponse(job=a_job(**{"attempt": 1} | job)))
        return step.request

    def open(self) -> Worker:
        self.send()
        return self


def sent(request: pb.UpdateJobRequest) -> dict[str, Any]:
    return {path: getattr(request.job, path) for path in request.update_mask.paths}


def test_a_job_is_created_in_progress_and_known_by_its_id():
    worker = Worker(labels={"a": "b"}, parent_id="p")
    request = worker.send()
    assert (request.job.state, request.job.name, request.job.parent_id) == (2, "n", "p")
    assert (dict(request.job.labels), request.job.heartbeat_timeout.seconds) == ({"a": "b"}, 30)
    assert (worker.state.claim.id, worker.state.claim.attempt) == (request.job.id, 1)


def test_a_creation_that_fails_is_sent_again_as_it_was():
    worker = Worker()
    first = worker.next_due()
    worker.state.failed(first, AWAY)
    assert worker.next_due().request is first.request


def test_a_job_that_another_claimed_before_our_creation_was_answered_is_not_ours():
    worker = Worker()
    worker.send(attempt=2)
    assert worker.send().attempt == 1


def test_heartbeats_come_at_a_third_of_the_timeout_with_the_attempt():
    worker = Worker(30).open()
    began = worker.now
    request = worker.send()
    assert (sent(request), request.attempt, request.HasField("update_mask"), request.request_id) == ({}, 1, True, "")
    assert worker.now - began == 10
    worker.send()
    assert worker.now - began == 20


def test_what_was_asked_for_later_counts_also_at_a_lower_revision():
    worker = Worker().open()
    call, began = worker.next_due(), worker.now
    worker.now += 1
    worker.state.observe(job_from_wire(a_job(5, attempt=1)), began)
    worker.state.succeeded(call, pb.UpdateJobResponse(job=a_job(4, attempt=1)))
    assert worker.state.job
    assert worker.state.job.revision == 5
    worker.send(revision=3)
    assert worker.state.job.revision == 3


def test_without_a_timeout_there_are_heartbeats_to_learn_of_cancels():
    worker = Worker(None).open()
    began = worker.now
    worker.send(cancel_requested=True)
    assert worker.now - began == 10
    assert worker.state.cancel_requested


def test_the_first_progress_is_sent_at_once():
    worker = Worker().open()
    began = worker.now
    worker.state.progress(0.5, "reading")
    assert sent(worker.send()) == {"progress": 0.5, "reason": "reading"}
    assert (worker.now, worker.wakes) == (began, 1)


def test_progress_is_sent_at_most_every_250_milliseconds_and_the_newest_wins():
    worker = Worker().open()
    worker.state.progress(1, "")
    worker.send()
    began = worker.now
    for percent in range(2, 50):
        worker.state.progress(percent, "")
    assert sent(worker.send()) == {"progress": 49}
    assert worker.now - began == 0.25
    assert worker.wakes == 2


def test_a_move_of_less_than_a_percent_waits_for_the_next_heartbeat():
    worker = Worker().open()
    worker.state.progress(10, "")
    worker.send()
    began = worker.now
    worker.state.progress(10.9, "")
    assert sent(worker.send()) == {"progress": 10.9}
    assert worker.now - began == 10


def test_a_new_reason_is_worth_a_call_and_the_same_one_is_not():
    worker = Worker().open()
    worker.state.progress(None, "reading")
    worker.send()
    worker.state.progress(None, "reading")
    assert worker.state.due_in_seconds() == 10
    worker.state.progress(None, "writing")
    assert worker.state.due_in_seconds() == 0.25


def test_what_failed_to_be_sent_is_sent_again_unless_there_is_newer():
    worker = Worker().open()
    worker.state.progress(10, "reading")
    step = worker.next_due()
    worker.state.progress(20, "")
    worker.state.failed(step, AWAY)
    assert sent(worker.send()) == {"progress": 20, "reason": "reading"}


def test_progress_is_put_right():
    worker = Worker().open()
    worker.state.progress(101, "a\x00b")
    worker.state.progress(float("nan"), "")
    assert sent(worker.send()) == {"progress": 100, "reason": "a b"}
    worker.state.progress(-1, "")
    assert sent(worker.send()) == {"progress": 0}


def test_the_end_carries_the_last_progress():
    worker = Worker().open()
    worker.state.progress(10, "")
    worker.send()
    worker.state.progress(10.1, "nearly")
    worker.state.finish(BlockOutcome(JobState.FAILED, JobError(2, "bad")), {"a": 1})
    request = worker.send()
    assert (request.job.state, request.job.error.message, request.job.progress) == (6, "bad", 10.1)
    assert (request.job.reason, dict(request.job.result), request.attempt) == ("nearly", {"a": 1}, 1)
    assert worker.state.due_in_seconds() is None


def test_the_end_is_sent_at_once_and_again_as_it_was():
    worker = Worker().open()
    worker.state.failed(worker.next_due(), AWAY)
    worker.state.finish(SUCCESS, None)
    assert worker.state.due_in_seconds() == 0
    first = worker.next_due()
    worker.state.failed(first, AWAY)
    assert worker.next_due().request is first.request


def too_many_requests(retry_after_seconds: float) -> TooManyRequestsError:
    error = TooManyRequestsError("slow down")
    error.retry_after_seconds = retry_after_seconds
    return error


def test_the_outcome_waits_as_long_as_a_limited_server_asked_the_report_before_to():
    worker = Worker().open()
    worker.state.failed(worker.next_due(), too_many_requests(3))
    refused_at = worker.now
    worker.state.finish(SUCCESS, None)
    assert sent(worker.send())["state"] == JobState.SUCCEEDED
    assert 3 <= worker.now - refused_at < 3.2


def test_the_last_try_of_an_outcome_is_before_its_time_is_over():
    worker = Worker()
    worker.state.failed(worker.next_due(), too_many_requests(60))
    worker.state.finish(SUCCESS, None)
    finished_at = worker.now
    worker.state.failed(worker.next_due(), too_many_requests(60))
    assert worker.now - finished_at == 9
    assert worker.state.due_in_seconds() == 1
    worker.now += 1
    assert worker.state.due_in_seconds() is None


def test_the_end_is_given_up_after_its_time():
    worker = Worker().open()
    worker.state.finish(SUCCESS, None)
    began = worker.now
    while (due := worker.state.due_in_seconds()) is not None:
        worker.now += due
        step, timeout = worker.state.next_call()
        assert timeout <= began + 10 - worker.now
        worker.state.failed(step, AWAY)
    assert worker.now - began == pytest.approx(10)
    assert worker.state.error is AWAY


def test_an_end_whose_result_is_refused_is_sent_without_it():
    worker = Worker().open()
    worker.state.finish(SUCCESS, {"a": "x"})
    worker.state.failed(worker.next_due(), InvalidArgumentError("too large"))
    request = worker.send()
    assert sent(request) == {"state": 4}


def test_an_end_whose_result_a_proxy_refuses_again_and_again_is_sent_without_it():
    worker = Worker().open()
    worker.state.finish(SUCCESS, {"a": "x"})
    for _ in range(5):
        worker.state.failed(worker.next_due(), JobStatusError("Received http2 header with status: 413"))
    assert sent(worker.send()) == {"state": 4}


def test_an_end_whose_result_is_not_json_is_sent_without_it():
    worker = Worker().open()
    worker.state.finish(SUCCESS, {"a": object()})
    assert sent(worker.send()) == {"state": 4}


def test_a_claim_reads_the_job_and_takes_the_next_attempt():
    worker = Worker(name="", id="a")
    assert worker.send(attempt=4).id == "a"
    step = worker.next_due()
    assert (step.request.attempt, step.request.job.state) == (5, 2)  # type: ignore[attr-defined]
    worker.state.failed(step, AWAY)
    again = worker.next_due()
    assert again.request is step.request
    worker.state.succeeded(again, pb.UpdateJobResponse(job=a_job(attempt=5)))
    assert (worker.state.is_open, worker.state.claim.attempt) == (True, 5)


def test_a_claim_of_an_unknown_job_creates_it_where_it_has_a_name():
    worker = Worker(id="a", labels={"x": "y"})
    worker.state.failed(worker.next_due(), JobNotFoundError())
    request = worker.send()
    assert (request.attempt, request.allow_missing, request.job.name) == (1, True, "n")
    assert dict(request.job.labels) == {"x": "y"}
    assert worker.state.is_open


@pytest.mark.parametrize("error", [StaleAttemptError(), IllegalTransitionError(), JobNotFoundError()])
def test_a_job_that_is_not_ours_any_more_is_left_alone(error):
    worker = Worker().open()
    worker.state.failed(worker.next_due(), error)
    assert worker.state.lost
    assert worker.state.due_in_seconds() is None


def test_a_report_that_is_refused_for_itself_is_dropped(caplog):
    worker = Worker().open()
    worker.state.progress(10, "")
    for _ in range(3):
        worker.state.failed(worker.next_due(), PermissionDeniedError())
    assert not worker.state.lost
    assert sent(worker.send()) == {}
    assert [record.levelname for record in caplog.records].count("ERROR") == 1


def test_a_job_that_was_cancelled_before_its_worker_came_says_so():
    worker = Worker(name="", id="a")
    worker.send(attempt=0)
    worker.state.failed(worker.next_due(), IllegalTransitionError(**{"from": "JOB_STATE_CANCELLED"}))
    assert (worker.state.lost, worker.state.cancel_requested) == (True, True)


# What the block raised, whether a cancel was requested, whether the block saw it → the end of its job.
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


@pytest.mark.parametrize(("exception", "cancel_requested", "saw_cancel", "state"), ENDS)
def test_the_end_of_a_block_is_a_state(exception, cancel_requested, saw_cancel, state):
    assert outcome_of(exception, cancel_requested=cancel_requested, saw_cancel=saw_cancel).state is state


def error_for(exception: BaseException) -> JobError:
    error = outcome_of(exception, cancel_requested=False, saw_cancel=False).error
    assert error is not None
    return error


def test_an_exception_is_described_by_its_text_and_its_class():
    assert error_for(ValueError("bad")) == JobError(2, "bad", "ValueError")
    assert error_for(SystemExit(3)) == JobError(2, "exit code 3", "SystemExit")
    assert error_for(asyncio.CancelledError()) == JobError(1, "CancelledError", "CancelledError")


class MuteError(Exception):
    """An exception without a text: its str() raises."""

    def __str__(self) -> str:
        raise RuntimeError


def test_an_exception_without_text_is_described_by_its_class():
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


def test_progress_that_restarts_is_cleared_before_a_lower_one_also_after_a_failure():
    worker = Worker()
    worker.send()
    worker.state.progress(90, "")
    worker.send()
    worker.state.restart_progress()
    worker.state.progress(3, "unpack")
    worker.state.failed(worker.next_due(), AWAY)
    clear, report = worker.send(), worker.send()
    assert list(clear.update_mask.paths) == ["progress"]
    assert not clear.job.HasField("progress")
    assert (report.job.progress, report.job.reason) == (3, "unpack")
