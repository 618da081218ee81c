"""The state of a reporter: which updates it sends, when and in which batches, by an injected clock."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import JobState, JobUpdate
from jobstatus_grpc.client.reporter import Callbacks, ReporterState
from jobstatus_grpc.client.retry import ClientClosedError
from jobstatus_grpc.client.sender import Call
from jobstatus_grpc.errors import (
    IllegalTransitionError,
    InternalError,
    InvalidArgumentError,
    JobStatusError,
    PermissionDeniedError,
    ResourceExhaustedError,
    StoreUnavailableError,
    TooManyRequestsError,
    UnavailableError,
)
from jobstatus_grpc.wire import status
from tests.support.scripted_server import a_job

AWAY = UnavailableError("away")


class Worker:
    """A ReporterState with a clock of its own, and the service that answers it."""

    def __init__(self, *, has_on_error: bool = True, max_pending: int = 1000) -> None:
        self.now = 1000.0
        self.wakes = 0
        self.refused: list[tuple[str, str]] = []
        self.jobs: list[str] = []
        self.state = ReporterState(
            Callbacks(lambda job: self.jobs.append(job.id), self.refuse if has_on_error else None),
            flush_interval_seconds=0.05,
            max_pending=max_pending,
            finish_timeout_seconds=10,
            call_timeout_seconds=10,
            clock=lambda: self.now,
        )
        self.state.wake = self.wake

    def wake(self) -> None:
        self.wakes += 1

    def refuse(self, update: JobUpdate, error: JobStatusError) -> None:
        self.refused.append((update.id, type(error).__name__))

    def give(self, id: str, **fields: Any) -> Worker:
        self.state.update(JobUpdate(id, **fields))
        return self

    def next_due(self) -> Call:
        """Advance the clock until a step is due, and return it."""
        due = self.state.due_in_seconds()
        assert due is not None
        self.now += due
        return self.state.next_call()[0]

    def send(self, *results: JobStatusError | None) -> list[pb.UpdateJobRequest]:
        """Advance the clock until a step is due, answer it, and return its updates."""
        step = self.next_due()
        updates = list(step.request.updates)  # type: ignore[attr-defined]
        response = pb.BatchUpdateJobsResponse()
        for index, update in enumerate(updates):
            error = results[index] if index < len(results) else None
            if error is not None:
                response.results.add(error=status.to_job_error(error))
            else:
                response.results.add(job=a_job(id=update.job.id))
        self.state.succeeded(step, response)
        return updates

    @property
    def is_idle(self) -> bool:
        due = self.state.due_in_seconds()
        return due is not None and due > 60


def sent(updates: list[pb.UpdateJobRequest]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (update.job.id, {path: getattr(update.job, path) for path in update.update_mask.paths}) for update in updates
    ]


def test_updates_share_a_call_after_a_little_while():
    worker = Worker().give("a", progress=1).give("b", progress=2)
    began = worker.now
    assert sent(worker.send()) == [("a", {"progress": 1}), ("b", {"progress": 2})]
    assert worker.now - began == pytest.approx(0.05)
    assert worker.is_idle


def test_a_full_batch_is_sent_at_once():
    worker = Worker()
    for number in range(501):
        worker.give(f"job-{number}", progress=1)
    began = worker.now
    assert [len(worker.send()), worker.now - began, len(worker.send())] == [500, 0, 1]


def test_the_sender_is_woken_when_there_is_something_new_to_wait_for():
    worker = Worker()
    for number in range(500):
        worker.give(f"job-{number}", progress=1)
        assert worker.wakes == (2 if number == 499 else 1)


def test_a_report_is_not_put_into_one_that_is_under_way():
    worker = Worker().give("a", progress=1)
    step = worker.next_due()
    worker.give("a", progress=2)
    worker.state.failed(step, AWAY)
    assert worker.next_due() is step
    assert sent(worker.send()) == [("a", {"progress": 1})]
    assert sent(worker.send()) == [("a", {"progress": 2})]


def test_a_batch_is_sent_again_as_it_was_with_growing_pauses(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    worker = Worker().give("a", progress=1)
    first = worker.next_due()
    began = worker.now
    for _ in range(3):
        worker.state.failed(first, AWAY)
        assert worker.next_due() is first
    assert worker.now - began == pytest.approx(0.1 + 0.2 + 0.4)


def test_a_refused_update_is_reported_and_stops_no_other():
    worker = Worker().give("a", progress=1).give("b", progress=1)
    worker.send(IllegalTransitionError())
    assert (worker.refused, worker.jobs) == ([("a", "IllegalTransitionError")], ["b"])
    assert worker.is_idle


def test_an_update_that_the_store_could_not_take_now_is_sent_again_and_first():
    worker = Worker().give("a", progress=1).give("b", progress=1).give("c", progress=1)
    first = worker.give("b", state=JobState.FAILED).send(None, StoreUnavailableError(), None, StoreUnavailableError())
    worker.give("b", progress=9)
    assert worker.send() == [first[1], first[3]]
    assert sent(worker.send()) == [("b", {"progress": 9})]
    assert worker.refused == []


def test_a_call_that_is_refused_refuses_its_updates_and_not_the_next():
    worker = Worker().give("a", progress=1).give("b", progress=1)
    worker.state.failed(worker.next_due(), PermissionDeniedError())
    assert worker.refused == [("a", "PermissionDeniedError"), ("b", "PermissionDeniedError")]
    assert sent(worker.give("a", progress=2).send()) == [("a", {"progress": 2})]


def test_a_batch_over_which_the_server_fails_again_and_again_is_given_up():
    worker = Worker().give("a", progress=1)
    first = worker.next_due()
    for _ in range(10):
        assert worker.refused == []
        worker.state.failed(first, InternalError())
    assert worker.refused == [("a", "InternalError")]
    assert sent(worker.give("b", progress=2).send()) == [("b", {"progress": 2})]


def send_all(worker: Worker, refusal: JobStatusError, is_refused: Callable[[list[str]], bool]) -> tuple[list[str], int]:
    """Send all that is pending to a server that refuses some calls; return the ids sent, and the number of calls."""
    sent_ids: list[str] = []
    calls = 0
    while not worker.is_idle:
        calls += 1
        call = worker.next_due()
        ids = [update.job.id for update in call.request.updates]  # type: ignore[attr-defined]
        if is_refused(ids):
            worker.state.failed(call, refusal)
        else:
            sent_ids += ids
            answers = [pb.BatchUpdateJobsResult(job=a_job(id=id)) for id in ids]
            worker.state.succeeded(call, pb.BatchUpdateJobsResponse(results=answers))
    return sent_ids, calls


# What the service, gRPC or a proxy says of a call that it refuses.
REFUSALS = [
    JobStatusError("Received http2 header with status: 413"),
    JobStatusError("Stream removed"),
    InternalError("RST_STREAM"),
    InvalidArgumentError("no"),
    ResourceExhaustedError("SERVER: Received message larger than max (1000 vs. 100)"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.message)
def test_a_call_that_is_refused_as_a_whole_is_halved_until_all_but_the_cause_is_sent(refusal):
    worker = Worker()
    for number in range(500):
        worker.give(str(number), progress=1)
    sent_ids, calls = send_all(worker, refusal, lambda ids: "123" in ids)
    assert worker.refused == [("123", type(refusal).__name__)]
    assert sent_ids == [str(number) for number in range(500) if number != 123]
    assert calls < 50


@pytest.mark.parametrize("refusal", [*REFUSALS, ResourceExhaustedError("no more")], ids=lambda refusal: refusal.message)
def test_a_proxy_that_allows_small_calls_only_gets_all_in_such(refusal):
    worker = Worker()
    for number in range(500):
        worker.give(str(number), state=JobState.FAILED)
    sent_ids, _ = send_all(worker, refusal, lambda ids: len(ids) > 100)
    assert (worker.refused, sent_ids) == ([], [str(number) for number in range(500)])


def test_reports_that_are_merged_into_one_that_is_too_large_are_sent():
    worker = Worker().give("a", reason="x" * 999_900)
    worker.give("a", progress=1, estimated_completion=datetime(2030, 1, 1, tzinfo=timezone.utc))
    worker.give("b", progress=1)
    assert [update.job.id for update in worker.send()] == ["a"]
    assert [update.job.id for update in worker.send()] == ["b"]


def test_a_quota_of_a_proxy_is_an_outage():
    worker, tries = Worker().give("a", progress=1).give("b", progress=1), iter(range(100))
    sent_ids, _ = send_all(worker, ResourceExhaustedError("quota"), lambda ids: next(tries) < 50)
    assert (worker.refused, sent_ids) == ([], ["a", "b"])


def test_what_the_store_could_not_take_now_comes_before_the_rest_of_a_halved_batch():
    worker = Worker()
    for percent in range(4):
        worker.give("a", progress=percent, request_id=f"r{percent}")
    worker.state.failed(worker.next_due(), InvalidArgumentError())
    assert [update.job.progress for update in worker.send(None, StoreUnavailableError())] == [0, 1]
    assert [update.job.progress for update in worker.send()] == [1, 2, 3]


def test_an_answer_that_is_not_one_counts_as_none():
    worker = Worker().give("a", progress=1)
    step = worker.next_due()
    worker.state.succeeded(step, pb.BatchUpdateJobsResponse())
    assert worker.next_due() is step


def test_a_flush_waits_for_what_was_given_before_and_for_nothing_else():
    worker, done = Worker(), []
    worker.state.flush(lambda: done.append("nothing"))
    worker.give("a", state=JobState.FAILED).state.flush(lambda: done.append("a"))
    assert (done, worker.state.due_in_seconds()) == (["nothing"], 0)
    step = worker.next_due()
    worker.give("b", progress=1).state.flush(lambda: done.append("b"))
    worker.state.succeeded(step, pb.BatchUpdateJobsResponse(results=[pb.BatchUpdateJobsResult(job=a_job())]))
    assert done == ["nothing", "a"]
    worker.send()
    assert done == ["nothing", "a", "b"]


def test_the_end_sends_what_is_left_at_once_and_takes_no_more():
    worker = Worker().give("a", progress=1)
    worker.state.finish()
    assert worker.state.due_in_seconds() == 0
    worker.give("b", progress=1).send()
    assert (worker.refused, worker.state.due_in_seconds()) == ([("b", "UnavailableError")], None)


def test_updates_unsent_at_the_end_are_reported():
    worker = Worker().give("a", progress=1).give("b", progress=1)
    worker.state.finish()
    began = worker.now
    while (due := worker.state.due_in_seconds()) is not None:
        worker.now += due
        if worker.now - began < 10:
            worker.state.failed(worker.state.next_call()[0], AWAY)
    assert worker.refused == [("a", "UnavailableError"), ("b", "UnavailableError")]
    assert worker.now - began == pytest.approx(10)


def test_a_closed_client_ends_it_all():
    worker, done = Worker().give("a", progress=1), []
    step = worker.next_due()
    worker.give("b", progress=1).state.flush(lambda: done.append(1))
    worker.state.failed(step, ClientClosedError())
    worker.give("c", progress=1)
    assert worker.refused == [(id, "ClientClosedError") for id in "abc"]
    assert (done, worker.state.due_in_seconds()) == ([1], None)


def test_without_on_error_the_log_says_what_has_no_effect(caplog):
    worker = Worker(has_on_error=False).give("a", progress=1).give("b", progress=1)
    worker.state.failed(worker.next_due(), PermissionDeniedError("no"))
    assert [record.getMessage() for record in caplog.records] == ["2 updates have no effect (jobs a, b): no"]


def test_an_outage_is_logged_once(caplog):
    caplog.set_level(logging.WARNING, "jobstatus_grpc.client")
    worker = Worker().give("a", progress=1)
    for _ in range(3):
        worker.state.failed(worker.next_due(), AWAY)
    worker.send()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["updates cannot be sent, retrying: away", "updates are sent again"]


def test_what_on_error_raises_goes_to_the_log(caplog):
    def broken(update: JobUpdate, error: JobStatusError) -> None:
        raise ValueError("broken")

    callbacks = Callbacks(None, broken)
    callbacks.refused(JobUpdate("a"), ResourceExhaustedError())
    callbacks.call()
    assert "broken" in caplog.text


def test_a_batch_fits_into_a_request():
    worker = Worker()
    for number in range(100):
        worker.give(f"job-{number}", result={"text": "x" * 60_000})
    sizes = []
    while not worker.is_idle:
        sizes.append(pb.BatchUpdateJobsRequest(updates=worker.send()).ByteSize())
    assert max(sizes) < 1024 * 1024 < sum(sizes)


def test_reports_on_one_job_become_one_and_the_newest_counts():
    worker = Worker().give("a", progress=1, reason="x").give("b", progress=5).give("a", progress=2).give("a")
    assert sent(worker.send()) == [("a", {"progress": 2, "reason": "x"}), ("b", {"progress": 5})]


@pytest.mark.parametrize(
    "other",
    [
        {"state": JobState.RETRYING},
        {"attempt": 2},
        {"expected_revision": 3},
        {"request_id": "r"},
        {"labels": {}},
        {"allow_missing": True},
    ],
)
def test_what_is_more_than_a_report_stays_as_it_is_and_in_its_place(other):
    worker = Worker().give("a", progress=1).give("a", progress=2, **other).give("a", progress=3)
    updates = worker.send()
    assert [update.job.progress for update in updates] == [1, 2, 3]
    assert len({update.request_id for update in updates}) == 3


@pytest.mark.parametrize(
    "fields", [{"result": {"a": object()}}, {"progress": "half"}, {"reason": "\ud800"}, {"result": {"a": "x" * 2**22}}]
)
def test_an_update_that_cannot_be_sent_is_reported_and_spoils_nothing(fields):
    worker = Worker().give("a", progress=1).give("a", **fields)
    assert worker.refused == [("a", "InvalidFieldError")]
    assert sent(worker.send()) == [("a", {"progress": 1})]


def test_beyond_max_pending_the_oldest_report_makes_room():
    worker = Worker(max_pending=2).give("a", state=JobState.FAILED).give("b", progress=1).give("c", progress=1)
    assert worker.refused == [("b", "ResourceExhaustedError")]
    assert [update.job.id for update in worker.send()] == ["a", "c"]


def test_beyond_max_pending_without_a_report_the_newest_is_left_out():
    worker = Worker(max_pending=1).give("a", state=JobState.FAILED).give("b", state=JobState.FAILED).give("c")
    assert worker.refused == [("b", "ResourceExhaustedError"), ("c", "ResourceExhaustedError")]
    assert [update.job.id for update in worker.send()] == ["a"]


def test_a_dropped_report_is_not_reported_into():
    worker = Worker(max_pending=1).give("a", progress=1).give("b", progress=1).give("a", progress=2)
    assert sent(worker.send()) == [("a", {"progress": 2})]


def test_the_log_says_of_drops_that_there_are_and_how_many_there_were(caplog):
    worker = Worker(has_on_error=False, max_pending=1)
    for number in range(100):
        worker.give(f"job-{number}", progress=1)
    worker.send()
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert "99 updates were dropped" in caplog.records[1].getMessage()


def limited(seconds: float) -> TooManyRequestsError:
    error = TooManyRequestsError()
    error.retry_after_seconds = seconds
    return error


def test_while_its_rate_is_limited_a_reporter_waits_as_asked_and_then_sends_less_often(caplog):
    worker = Worker()
    for number in range(100):
        worker.give("a", progress=number)
        call, asked_at = worker.next_due(), worker.now
        if number % 2:
            worker.state.failed(call, limited(2))
            call = worker.next_due()
            assert worker.now - asked_at >= 2
        worker.state.succeeded(call, pb.BatchUpdateJobsResponse(results=[pb.BatchUpdateJobsResult(job=a_job(id="a"))]))
    began_at = worker.now
    worker.give("a", progress=100).next_due()
    assert worker.now - began_at > 1
    assert worker.refused == []
    assert {record.getMessage()[:28] for record in caplog.records} == {"updates are sent more slowly"}
    assert len(caplog.records) <= 1 + (worker.now - 1000) / 60


def test_a_reporter_that_is_no_longer_limited_is_as_quick_as_before():
    worker = Worker().give("a", progress=1)
    worker.state.failed(worker.next_due(), limited(0.1))
    worker.send()
    for number in range(100):
        worker.give("a", progress=number).send()
    began_at = worker.now
    worker.give("a", progress=1).send()
    assert worker.now - began_at == pytest.approx(0.05)


def test_the_end_of_a_reporter_does_not_wait_for_its_pace():
    worker = Worker().give("a", progress=1)
    for _ in range(10):
        worker.state.failed(worker.next_due(), limited(0.1))
    worker.send()
    began_at = worker.now
    worker.give("a", progress=2).state.finish()
    worker.send()
    assert worker.now == began_at
