"""UpdateJob: transitions, and refused updates."""

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import Any

import pytest
from google.protobuf import timestamp_pb2
from jobstatus.v1 import job_status_pb2 as pb

STATES = ["PENDING", "IN_PROGRESS", "RETRYING", "SUCCEEDED", "ABORTED", "FAILED", "CANCELLED"]
DONE = ["SUCCEEDED", "ABORTED", "FAILED", "CANCELLED"]
ALLOWED = {
    "PENDING": ["PENDING", "IN_PROGRESS", "RETRYING", *DONE],
    "IN_PROGRESS": ["IN_PROGRESS", "RETRYING", *DONE],
    "RETRYING": ["RETRYING", "IN_PROGRESS", "ABORTED", "FAILED", "CANCELLED"],
    **{state: [state] for state in DONE},
}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STATES, STATES)))
def test_a_job_moves_only_along_the_table(service, refused, new_id, before, after):
    job = service.job_in(before, id=new_id())
    if after in ALLOWED[before]:
        moved = service.update(job.id, state=f"JOB_STATE_{after}")
        assert pb.JobState.Name(moved.state) == f"JOB_STATE_{after}"
        assert moved.revision == job.revision + (before != after)
        return
    refusal = refused(service.update, job.id, state=f"JOB_STATE_{after}")
    assert refusal.kind == ("FAILED_PRECONDITION", "ILLEGAL_TRANSITION")
    assert refusal.metadata == {"id": job.id, "from": f"JOB_STATE_{before}", "to": f"JOB_STATE_{after}"}
    assert service.get(job.id) == job


@pytest.mark.parametrize("state", STATES)
def test_what_was_read_can_be_sent_back_and_changes_nothing(any_service, new_id, state):
    job = any_service.job_in(state, id=new_id(), name="n", parent_id="p", labels={"a": "b"}, reason="r", progress=10.0)
    request = pb.UpdateJobRequest(job=job, attempt=0)
    assert any_service.stub.UpdateJob(request).job == job
    assert any_service.get(job.id) == job


def test_what_only_the_service_or_the_creator_sets_is_ignored_in_an_update(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id(), name="mine", parent_id="p")
    forged = timestamp_pb2.Timestamp(seconds=1)
    instants = ("created_at", "updated_at", "started_at", "finished_at", "expires_at", "projected_completion")
    updated = any_service.update(
        job.id, name="yours", parent_id="q", done=True, cancel_requested=True, stalled=True, revision=99,
        reason="x", **dict.fromkeys(instants, forged),
    )  # fmt: skip
    expected = pb.JobStatus()
    expected.CopyFrom(job)
    expected.reason, expected.revision = "x", job.revision + 1
    expected.updated_at.CopyFrom(updated.updated_at)
    assert updated == expected


def test_the_attempt_inside_the_job_is_no_fence(any_service, new_id):
    request = pb.UpdateJobRequest(job=any_service.job_in("IN_PROGRESS", id=new_id()))
    request.job.attempt = 7
    assert any_service.stub.UpdateJob(request).job.attempt == 1


UNCHANGING: list[dict[str, Any]] = [{}, {"attempt": 1}, {"labels": {"a": "b"}}, {"expected_revision": 2}, {"mask": []}]


@pytest.mark.parametrize("fields", UNCHANGING)
def test_an_update_that_changes_nothing_is_a_heartbeat(any_service, new_id, fields):
    job = any_service.job_in("IN_PROGRESS", id=new_id(), labels={"a": "b"})
    assert any_service.update(job.id, **fields) == job
    assert any_service.get(job.id) == job


def test_each_change_raises_the_revision_by_one_and_moves_updated_at(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    for progress in range(1, 20):
        after = any_service.update(job.id, progress=progress)
        assert (after.revision, after.progress) == (job.revision + 1, progress)
        assert after.updated_at.ToNanoseconds() >= job.updated_at.ToNanoseconds()
        job = after


def test_a_late_report_does_not_move_the_bar_back_but_the_rest_of_it_counts(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    any_service.update(job.id, progress=60)
    late = any_service.update(job.id, progress=40, reason="late")
    assert (late.progress, late.reason) == (60, "late")


def test_success_completes_the_bar_of_a_job_that_has_one(any_service, new_id):
    with_bar = any_service.job_in("IN_PROGRESS", id=new_id(), progress=1.0)
    assert any_service.update(with_bar.id, state="JOB_STATE_SUCCEEDED").progress == 100
    without = any_service.job_in("IN_PROGRESS", id=new_id())
    assert not any_service.update(without.id, state="JOB_STATE_SUCCEEDED").HasField("progress")


@pytest.mark.parametrize("state", DONE)
def test_an_end_is_dated_and_says_when_the_job_is_forgotten(any_service, new_id, state):
    job = any_service.job_in(state, id=new_id())
    assert job.done
    assert job.finished_at == job.updated_at
    assert job.expires_at.ToDatetime() - job.finished_at.ToDatetime() == timedelta(days=7)
    assert not job.HasField("projected_completion")


def test_a_failure_has_an_error_even_if_none_was_given(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    failed = any_service.update(job.id, state="JOB_STATE_FAILED", reason="disk full")
    assert failed.error == pb.JobError(code=2, message="disk full")


def test_an_error_without_a_code_is_unknown(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    error = pb.JobError(message="out of memory", reason="OUT_OF_MEMORY")
    failed = any_service.update(job.id, state="JOB_STATE_FAILED", error=error)
    assert failed.error == pb.JobError(code=2, message="out of memory", reason="OUT_OF_MEMORY")


@pytest.mark.parametrize("state", ["RETRYING", "ABORTED", "FAILED", "CANCELLED"])
def test_an_error_belongs_to_a_job_that_went_wrong(any_service, new_id, state):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    error = pb.JobError(code=8, message="m", reason="R")
    assert any_service.update(job.id, state=f"JOB_STATE_{state}", error=error).error == error


@pytest.mark.parametrize(
    ("before", "fields"),
    [
        ("PENDING", {}),
        ("IN_PROGRESS", {}),
        ("PENDING", {"state": "JOB_STATE_IN_PROGRESS"}),
        ("IN_PROGRESS", {"state": "JOB_STATE_SUCCEEDED"}),
        ("RETRYING", {"state": "JOB_STATE_IN_PROGRESS", "attempt": 2}),
    ],
)
def test_an_error_does_not_belong_to_a_job_that_goes_well(service, refused, new_id, before, fields):
    job = service.job_in(before, id=new_id())
    refusal = refused(service.update, job.id, error=pb.JobError(code=8), **fields)
    assert (refusal.kind, refusal.fields) == (("INVALID_ARGUMENT", "INVALID_FIELD"), ["job.error"])
    assert service.get(job.id) == job


def test_the_projection_follows_the_pace_of_the_attempt(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    assert not any_service.update(job.id, progress=0.5).HasField("projected_completion")
    job = any_service.update(job.id, progress=20)
    started, updated = job.started_at.ToNanoseconds(), job.updated_at.ToNanoseconds()
    assert abs(job.projected_completion.ToNanoseconds() - (started + (updated - started) * 5)) <= 1000


def test_a_resumed_attempt_is_projected_from_where_it_began(any_service, new_id):
    job = any_service.job_in("RETRYING", id=new_id())
    any_service.update(job.id, state="JOB_STATE_IN_PROGRESS", attempt=2)
    first = any_service.update(job.id, progress=80)
    job = any_service.update(job.id, progress=90)
    since, updated = first.updated_at.ToNanoseconds(), job.updated_at.ToNanoseconds()
    assert not first.HasField("projected_completion")
    assert abs(job.projected_completion.ToNanoseconds() - (since + (updated - since) * 2)) <= 1000
    assert any_service.get(job.id) == job


def test_the_same_end_again_is_fine_and_changes_nothing(any_service, new_id):
    error = pb.JobError(code=8, message="m", reason="R")
    end = {"state": "JOB_STATE_FAILED", "reason": "why", "error": error, "result": {"rows": 1}}
    job = any_service.job_in("IN_PROGRESS", id=new_id(), progress=5.0)
    failed = any_service.update(job.id, **end, attempt=1)
    for again in (end, {"state": "JOB_STATE_FAILED"}, {**end, "progress": 1, "attempt": 9, "expected_revision": 77}):
        assert any_service.update(job.id, **again) == failed
    assert any_service.get(job.id) == failed


@pytest.mark.parametrize(
    "other",
    [
        {"reason": "other"},
        {"error": {"code": 3}},
        {"result": {"rows": 2}},
        {"result": {}},
        {"mask": ["state", "reason"]},
    ],
)
def test_the_same_end_with_other_fields_is_refused(any_service, refused, new_id, other):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    end = {"state": "JOB_STATE_FAILED", "reason": "why", "error": {"code": 8}, "result": {"rows": 1}}
    failed = any_service.update(job.id, **end)
    fields = {"state": "JOB_STATE_FAILED", **other}
    assert refused(any_service.update, job.id, **fields).kind == ("FAILED_PRECONDITION", "ILLEGAL_TRANSITION")
    assert any_service.get(job.id) == failed


def test_an_expected_revision_must_be_the_jobs(any_service, refused, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    refusal = refused(any_service.update, job.id, reason="x", expected_revision=job.revision + 1)
    assert refusal.kind == ("ABORTED", "REVISION_MISMATCH")
    assert refusal.metadata == {"id": job.id, "revision": str(job.revision)}
    assert any_service.update(job.id, reason="x", expected_revision=job.revision).revision == job.revision + 1


def test_an_update_of_an_unknown_job_is_not_found(any_service, refused, new_id):
    assert refused(any_service.update, new_id(), progress=1).kind == ("NOT_FOUND", "JOB_NOT_FOUND")


def test_checks_come_in_their_documented_order(any_service, refused, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    any_service.update(job.id, progress=1, request_id="r")
    wrong = {"state": "JOB_STATE_PENDING", "attempt": 9, "expected_revision": 9, "request_id": "r", "progress": 101}
    assert refused(any_service.update, "unknown", **wrong).reason == "INVALID_FIELD"
    del wrong["progress"]
    assert refused(any_service.update, "unknown", **wrong).reason == "JOB_NOT_FOUND"
    for repaired, reason in (
        ({}, "REQUEST_ID_REUSED"),
        ({"request_id": ""}, "STALE_ATTEMPT"),
        ({"attempt": 1}, "REVISION_MISMATCH"),
        ({"expected_revision": 0}, "ILLEGAL_TRANSITION"),
    ):
        wrong.update(repaired)
        assert refused(any_service.update, job.id, **wrong).reason == reason
