"""CancelJob."""

from __future__ import annotations

import time

import pytest
from jobstatus.v1 import job_status_pb2 as pb


@pytest.mark.parametrize("state", ["PENDING", "RETRYING"])
def test_a_job_without_a_worker_is_cancelled_at_once(any_service, new_id, state):
    job = any_service.job_in(state, id=new_id())
    cancelled = any_service.cancel(job.id, reason="no longer\nneeded")
    assert (cancelled.state, cancelled.done, cancelled.reason) == (pb.JOB_STATE_CANCELLED, True, "no longer\nneeded")
    assert (cancelled.revision, cancelled.finished_at) == (job.revision + 1, cancelled.updated_at)
    assert any_service.get(job.id) == cancelled


def test_a_worker_is_asked_to_stop_and_meets_it_in_the_reply_to_its_next_update(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    asked = any_service.cancel(job.id, reason="please")
    assert (asked.state, asked.cancel_requested, asked.done) == (pb.JOB_STATE_IN_PROGRESS, True, False)
    assert any_service.update(job.id, attempt=1, progress=5).cancel_requested
    stopped = any_service.update(job.id, attempt=1, state="JOB_STATE_CANCELLED")
    assert (stopped.state, stopped.cancel_requested) == (pb.JOB_STATE_CANCELLED, True)


def test_the_reason_of_a_cancel_reaches_the_worker_and_get(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    assert any_service.cancel(job.id, reason="too slow").cancel_reason == "too slow"
    assert any_service.update(job.id, attempt=1, progress=5).cancel_reason == "too slow"
    any_service.update(job.id, attempt=1, state="JOB_STATE_ABORTED")
    assert any_service.get(job.id).cancel_reason == "too slow"


def test_a_forced_cancel_ends_a_stalled_job(any_service, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id(), heartbeat_timeout={"seconds": 1})
    while not any_service.get(job.id).stalled:
        time.sleep(0.1)
    assert any_service.cancel(job.id).state == pb.JOB_STATE_IN_PROGRESS
    ended = any_service.cancel(job.id, force=True, reason="its host is gone")
    assert (ended.state, ended.stalled, ended.reason) == (pb.JOB_STATE_CANCELLED, False, "its host is gone")


def test_a_worker_may_still_succeed_after_a_cancel_was_asked(any_service, new_id):
    job = any_service.cancel(any_service.job_in("IN_PROGRESS", id=new_id()).id)
    assert any_service.update(job.id, attempt=1, state="JOB_STATE_SUCCEEDED").state == pb.JOB_STATE_SUCCEEDED


def test_once_a_cancel_was_requested_no_attempt_follows(any_service, refused, new_id):
    job = any_service.cancel(any_service.job_in("IN_PROGRESS", id=new_id()).id)
    refusal = refused(any_service.update, job.id, state="JOB_STATE_RETRYING")
    assert refusal.kind == ("FAILED_PRECONDITION", "ILLEGAL_TRANSITION")


@pytest.mark.parametrize("state", ["SUCCEEDED", "ABORTED", "FAILED", "CANCELLED"])
def test_a_done_job_stays_as_it_is(any_service, new_id, state):
    job = any_service.job_in(state, id=new_id())
    assert any_service.cancel(job.id, reason="too late") == job
    assert any_service.get(job.id) == job


def test_a_second_cancel_changes_nothing(any_service, new_id):
    asked = any_service.cancel(any_service.job_in("IN_PROGRESS", id=new_id()).id, reason="one")
    assert any_service.cancel(asked.id, reason="two") == asked


def test_an_unknown_job_cannot_be_cancelled(any_service, refused, new_id):
    assert refused(any_service.cancel, new_id()).kind == ("NOT_FOUND", "JOB_NOT_FOUND")


def test_a_retried_cancel_has_one_effect(any_service, refused, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())
    any_service.cancel(job.id, reason="a", request_id="r")
    done = any_service.update(job.id, state="JOB_STATE_SUCCEEDED")
    assert any_service.cancel(job.id, reason="a", request_id="r") == done
    refusal = refused(any_service.cancel, job.id, reason="b", request_id="r")
    assert refusal.kind == ("INVALID_ARGUMENT", "REQUEST_ID_REUSED")
