"""The rules of a job's life around its updates: how it is created, cancelled, deleted, given up, forgotten."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import (
    CREATION_STATES,
    Cancel,
    Create,
    Delete,
    Expire,
    Job,
    JobState,
    RequestId,
    Stall,
    Tombstone,
    Update,
    apply,
    evolve,
    is_urgent,
)
from jobstatus_grpc.job.model import TERMINAL_STATES
from tests.jobs import LATER, RETENTION, START, S, job_in, update


@pytest.mark.parametrize("state", list(S))
def test_cancel_does_what_its_state_allows(state: JobState) -> None:
    job = job_in(state)
    applied = apply(job, Cancel(id="a", reason="enough", actor="me"), now=LATER, retention=RETENTION)
    if state in TERMINAL_STATES:
        assert applied.job is job
        assert applied.transition is None
        return
    assert applied.transition is not None
    assert (applied.transition.reason, applied.transition.actor) == ("enough", "me")
    if state is S.IN_PROGRESS:
        assert applied.job.cancel_requested
        assert (applied.transition.from_state, applied.transition.to_state) == (state, state)
    else:
        assert (applied.job.state, applied.job.reason, applied.job.finished_at) == (S.CANCELLED, "enough", LATER)


def test_a_second_cancel_changes_nothing() -> None:
    job = job_in(S.IN_PROGRESS, cancel_requested=True)
    assert apply(job, Cancel(id="a", reason="again"), now=LATER, retention=RETENTION).job is job


@pytest.mark.parametrize("state", sorted(CREATION_STATES))
def test_a_job_is_created_pending_or_in_progress(state: JobState) -> None:
    applied = apply(None, Create(id="a", state=state, actor="me"), now=START, retention=RETENTION)
    started = state is S.IN_PROGRESS
    assert (applied.job.attempt, applied.job.started_at) == ((1, START) if started else (0, None))
    assert applied.job.revision == 1
    assert applied.transition is not None
    assert (applied.transition.from_state, applied.transition.to_state) == (None, state)


@pytest.mark.parametrize("found", [job_in(S.PENDING), job_in(S.SUCCEEDED), Tombstone("default", "a", 3)])
def test_an_id_in_use_or_lately_used_is_not_free(found: Job | Tombstone) -> None:
    with pytest.raises(errors.JobAlreadyExistsError):
        apply(found, Create(id="a", request=RequestId("r", "h")), now=LATER, retention=RETENTION)


def test_a_retried_create_meets_its_job() -> None:
    request = RequestId("r", "h")
    job = apply(None, Create(id="a", request=request), now=START, retention=RETENTION).job
    assert apply(job, Create(id="a", request=request), now=LATER, retention=RETENTION).job is job
    with pytest.raises(errors.RequestIdReusedError):
        apply(job, Create(id="a", request=RequestId("r", "other")), now=LATER, retention=RETENTION)


def missing(**fields: Any) -> Update:
    labels = {"team": "ml"}
    return Update(id="a", allow_missing=True, name="n", parent_id="p", labels_if_missing=labels, **fields)


def test_allow_missing_creates_and_updates_as_one_change() -> None:
    command = missing(changes={"state": S.SUCCEEDED, "progress": 3.0}, actor="me")
    applied = apply(None, command, now=START, retention=RETENTION)
    job = applied.job
    assert (job.revision, job.state, job.progress, job.name, job.parent_id) == (1, S.SUCCEEDED, 100.0, "n", "p")
    assert job.labels == {"team": "ml"}
    assert applied.transition is not None
    assert (applied.transition.from_state, applied.transition.to_state) == (None, S.SUCCEEDED)


@pytest.mark.parametrize(
    ("found", "fields", "error"),
    [
        (Tombstone("default", "a", 3), {}, errors.JobExpiredError),
        (None, {"expected_revision": 1}, errors.RevisionMismatchError),
        (None, {"attempt": 2, "changes": {"state": S.IN_PROGRESS}}, errors.StaleAttemptError),
        (None, {"changes": {"state": S.RETRYING}}, errors.IllegalTransitionError),
    ],
)
def test_allow_missing_forgives_nothing_else(found: Any, fields: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        apply(found, missing(**fields), now=START, retention=RETENTION)


def test_allow_missing_on_a_job_that_exists_is_an_update() -> None:
    job = apply(job_in(S.PENDING, name="mine"), missing(changes={"reason": "r"}), now=LATER, retention=RETENTION).job
    assert (job.name, job.labels, job.reason) == ("mine", {}, "r")


@pytest.mark.parametrize("state", list(S))
def test_only_done_jobs_can_be_deleted(state: JobState) -> None:
    if state in TERMINAL_STATES:
        assert apply(job_in(state), Delete(id="a"), now=LATER, retention=RETENTION).removed
    else:
        with pytest.raises(errors.JobNotDoneError):
            apply(job_in(state), Delete(id="a"), now=LATER, retention=RETENTION)


def test_delete_heeds_existence_and_revision() -> None:
    for found, revision, error in (
        (None, 0, errors.JobNotFoundError),
        (Tombstone("default", "a", 3), 0, errors.JobExpiredError),
        (job_in(S.PENDING), 4, errors.RevisionMismatchError),
    ):
        with pytest.raises(error):
            apply(found, Delete(id="a", expected_revision=revision), now=LATER, retention=RETENTION)


TIMEOUT = timedelta(seconds=30)


def stall(job: Job, silence: timedelta, fail_after: timedelta | None = None) -> Job:
    command = Stall(id="a", silent_for=silence, fail_after=fail_after)
    return apply(job, command, now=LATER, retention=RETENTION).job


@pytest.mark.parametrize("state", list(S))
def test_only_a_job_in_progress_can_stall(state: JobState) -> None:
    assert stall(job_in(state, heartbeat_timeout=TIMEOUT), TIMEOUT).stalled is (state is S.IN_PROGRESS)


def test_a_job_stalls_once_it_was_silent_for_its_timeout() -> None:
    job = job_in(S.IN_PROGRESS, heartbeat_timeout=TIMEOUT)
    assert stall(job, TIMEOUT - timedelta(microseconds=1)) is job
    stalled = stall(job, TIMEOUT)
    assert (stalled.stalled, stalled.revision) == (True, 6)
    assert stall(stalled, TIMEOUT * 2) is stalled


def test_a_job_without_a_timeout_never_stalls() -> None:
    job = job_in(S.IN_PROGRESS)
    assert stall(job, timedelta(days=365)) is job


def test_a_job_that_stays_stalled_fails_where_the_server_is_told_so() -> None:
    job = job_in(S.IN_PROGRESS, heartbeat_timeout=TIMEOUT, stalled=True)
    assert stall(job, TIMEOUT * 2, fail_after=TIMEOUT * 2) is job
    failed = stall(job, TIMEOUT * 3, fail_after=TIMEOUT * 2)
    assert (failed.state, failed.stalled, failed.finished_at) == (S.FAILED, False, LATER)
    assert failed.error is not None
    assert failed.error.code == 4


@pytest.mark.parametrize("state", list(S))
def test_a_job_expires_when_it_is_done_and_its_time_has_come(state: JobState) -> None:
    job = job_in(state)
    for now, is_due in ((START + RETENTION - timedelta(seconds=1), False), (START + RETENTION, True)):
        removed = apply(job, Expire(id="a"), now=now, retention=RETENTION).removed
        assert removed is (is_due and state in TERMINAL_STATES)


def test_the_projection_follows_the_pace_of_the_attempt() -> None:
    job = update(job_in(S.IN_PROGRESS), progress=25.0)
    assert job.projected_completion == START + timedelta(seconds=40)
    assert update(job_in(S.IN_PROGRESS), progress=0.5).projected_completion is None
    assert update(job, state=S.FAILED).projected_completion is None


def test_only_progress_reason_and_estimates_can_wait() -> None:
    before = job_in(S.IN_PROGRESS)
    minor = {"progress": 5.0, "has_progress": True, "reason": "r", "estimated_completion": LATER, "revision": 6}
    assert not is_urgent(before, evolve(before, {**minor, "updated_at": LATER}))
    for field, value in (("state", S.RETRYING), ("stalled", True), ("cancel_requested", True), ("labels", {"a": "b"})):
        assert is_urgent(before, evolve(before, {field: value})), field


def test_nan_is_not_equal_to_itself_so_it_must_never_get_in() -> None:
    from jobstatus_grpc.job import validation

    for value in (math.nan, math.inf, -math.inf, -0.1, 100.1):
        violations: list[errors.FieldViolation] = []
        validation.check_progress(value, "job.progress", violations)
        assert len(violations) == 1, value
