"""Attempts fence workers: of many claimants one wins, and a worker that lost its job cannot write to it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

CLAIMANTS = 16


def claim(service, job, attempt, **fields):
    return service.update(job.id, state="JOB_STATE_IN_PROGRESS", attempt=attempt, **fields)


@pytest.mark.parametrize("state", ["PENDING", "IN_PROGRESS", "RETRYING"])
def test_of_16_claimants_at_once_exactly_one_wins(any_service, refusal, new_id, state):
    job = any_service.job_in(state, id=new_id())
    ready = threading.Barrier(CLAIMANTS)

    def try_to_claim(number):
        ready.wait()
        try:
            return claim(any_service, job, job.attempt + 1, request_id=f"worker-{number}", reason=f"by {number}")
        except grpc.RpcError as error:
            return refusal(error)

    with ThreadPoolExecutor(CLAIMANTS) as pool:
        answers = list(pool.map(try_to_claim, range(CLAIMANTS)))
    (won,) = [answer for answer in answers if isinstance(answer, pb.JobStatus)]
    lost = [answer.kind for answer in answers if not isinstance(answer, pb.JobStatus)]
    assert lost == [("FAILED_PRECONDITION", "STALE_ATTEMPT")] * (CLAIMANTS - 1)
    assert (won.attempt, won.revision) == (job.attempt + 1, job.revision + 1)
    assert won.reason == f"by {answers.index(won)}"
    assert any_service.get(job.id) == won


def test_a_retried_claim_is_known_by_its_request_id(any_service, refused, new_id):
    job = any_service.create(id=new_id())
    won = claim(any_service, job, 1, request_id="me")
    assert claim(any_service, job, 1, request_id="me") == won
    assert refused(claim, any_service, job, 1, request_id="you").reason == "STALE_ATTEMPT"


def test_a_retry_of_a_claim_that_was_lost_since_shows_the_newer_attempt(any_service, new_id):
    job = any_service.create(id=new_id())
    claim(any_service, job, 1, request_id="me")
    newer = claim(any_service, job, 2)
    assert claim(any_service, job, 1, request_id="me") == newer


@pytest.mark.parametrize(
    "fields", [{}, {"progress": 50}, {"state": "JOB_STATE_SUCCEEDED"}, {"state": "JOB_STATE_RETRYING"}, {"mask": []}]
)
@pytest.mark.parametrize("attempt", [1, 3])
def test_a_worker_that_lost_its_job_cannot_write_to_it(service, refused, new_id, fields, attempt):
    job = claim(service, service.job_in("IN_PROGRESS", id=new_id()), 2)
    refusal = refused(service.update, job.id, attempt=attempt, **fields)
    assert refusal.kind == ("FAILED_PRECONDITION", "STALE_ATTEMPT")
    assert refusal.metadata == {"id": job.id, "attempt": "2"}
    assert service.get(job.id) == job


def test_a_claim_begins_anew_what_belongs_to_an_attempt(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id(), labels={"a": "b"})
    any_service.update(job.id, progress=40, estimated_completion={"seconds": 2_000_000_000})
    failed = any_service.update(job.id, state="JOB_STATE_RETRYING", error={"code": 14}, reason="again")
    again = claim(any_service, job, 2)
    assert (again.attempt, again.reports_progress, again.HasField("progress")) == (2, True, False)
    assert not again.HasField("error")
    assert not again.HasField("estimated_completion")
    assert (again.started_at, dict(again.labels)) == (again.updated_at, {"a": "b"})
    assert again.revision == failed.revision + 1


@pytest.mark.parametrize("state", ["SUCCEEDED", "ABORTED", "FAILED", "CANCELLED"])
def test_a_done_job_cannot_be_claimed(any_service, refused, new_id, state):
    job = any_service.job_in(state, id=new_id())
    refusal = refused(claim, any_service, job, job.attempt + 1)
    assert refusal.kind == ("FAILED_PRECONDITION", "ILLEGAL_TRANSITION")
    assert any_service.get(job.id) == job


def test_a_job_whose_cancel_was_requested_cannot_be_claimed(any_service, refused, new_id):
    job = any_service.cancel(any_service.job_in("IN_PROGRESS", id=new_id()).id)
    refusal = refused(claim, any_service, job, 2)
    assert refusal.kind == ("FAILED_PRECONDITION", "ILLEGAL_TRANSITION")
    assert any_service.get(job.id) == job


def test_of_two_ends_reported_at_once_one_is_kept(any_service, refusal, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    ends = ["SUCCEEDED", "FAILED", "ABORTED", "CANCELLED"] * 4
    ready = threading.Barrier(len(ends))

    def end(state):
        ready.wait()
        try:
            return any_service.update(job.id, state=f"JOB_STATE_{state}")
        except grpc.RpcError as error:
            return refusal(error).kind

    with ThreadPoolExecutor(len(ends)) as pool:
        answers = list(pool.map(end, ends))
    kept = any_service.get(job.id)
    assert kept.revision == job.revision + 1
    for state, answer in zip(ends, answers, strict=True):
        same = pb.JobState.Value(f"JOB_STATE_{state}") == kept.state
        assert answer == (kept if same else ("FAILED_PRECONDITION", "ILLEGAL_TRANSITION"))
