"""The rules of every command: create, update, cancel, stall, delete, expire."""

from __future__ import annotations

import contextlib
import itertools
import math
import uuid
from datetime import timedelta
from typing import Any

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import (
    CREATION_STATES,
    Cancel,
    Command,
    Create,
    Delete,
    Expire,
    Job,
    JobError,
    JobState,
    RequestId,
    Stall,
    Tombstone,
    Update,
    apply,
    evolve,
    is_urgent,
    projection_of,
)
from jobstatus_grpc.job.ids import new_uuid7
from jobstatus_grpc.job.model import ERROR_STATES, TERMINAL_STATES, TRANSITIONS
from tests.support.jobs import LATER, RETENTION, START, S, job_in, update


@pytest.mark.parametrize("state", list(S))
def test_cancel_does_what_its_state_allows(state: JobState) -> None:
    job = job_in(state)
    applied = apply(job, Cancel(id="a", reason="enough", actor="me"), now=LATER, retention=RETENTION)
    if state in TERMINAL_STATES:
        assert applied.job is job
        assert applied.transition is None
        return
    assert applied.transition is not None
    reason = "cancel requested: enough" if state is S.IN_PROGRESS else "enough"
    assert (applied.transition.reason, applied.transition.actor) == (reason, "me")
    if state is S.IN_PROGRESS:
        assert applied.job.cancel_requested
        assert (applied.transition.from_state, applied.transition.to_state) == (state, state)
    else:
        assert (applied.job.state, applied.job.reason, applied.job.finished_at) == (S.CANCELLED, "enough", LATER)


@pytest.mark.parametrize("state", sorted(set(S) - TERMINAL_STATES))
def test_the_reason_of_a_cancel_is_on_the_job(state: JobState) -> None:
    job = apply(job_in(state), Cancel(id="a", reason="enough"), now=LATER, retention=RETENTION).job
    assert job.cancel_reason == "enough"


@pytest.mark.parametrize("asked", [False, True])
def test_a_forced_cancel_ends_a_stalled_job(asked: bool) -> None:
    job = job_in(S.IN_PROGRESS, stalled=True, cancel_requested=asked, cancel_reason="first" if asked else "")
    applied = apply(job, Cancel(id="a", reason="it is gone", force=True), now=LATER, retention=RETENTION)
    ended = applied.job
    assert (ended.state, ended.stalled, ended.finished_at) == (S.CANCELLED, False, LATER)
    assert (ended.reason, ended.cancel_reason, ended.revision) == ("it is gone", "it is gone", job.revision + 1)
    assert applied.transition is not None
    assert (applied.transition.from_state, applied.transition.to_state) == (S.IN_PROGRESS, S.CANCELLED)


def test_a_forced_cancel_leaves_a_job_that_is_not_stalled_to_its_worker() -> None:
    job = apply(job_in(S.IN_PROGRESS), Cancel(id="a", force=True), now=LATER, retention=RETENTION).job
    assert (job.state, job.cancel_requested) == (S.IN_PROGRESS, True)


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


@pytest.mark.parametrize("found", [None, job_in(S.PENDING)])
def test_a_first_report_may_be_that_an_attempt_failed_and_counts_that_attempt(found: Job | None) -> None:
    command = Update(id="a", changes={"state": S.RETRYING, "error": JobError(2, "timed out")}, allow_missing=True)
    job = apply(found, command, now=LATER, retention=RETENTION).job
    assert (job.state, job.attempt, job.started_at, job.error) == (S.RETRYING, 1, LATER, command.changes["error"])


@pytest.mark.parametrize(
    ("found", "fields", "error"),
    [
        (Tombstone("default", "a", 3), {}, errors.JobExpiredError),
        (None, {"expected_revision": 1}, errors.RevisionMismatchError),
        (None, {"attempt": 2, "changes": {"state": S.IN_PROGRESS}}, errors.StaleAttemptError),
        (None, {"attempt": 1, "changes": {"state": S.RETRYING}}, errors.StaleAttemptError),
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


def test_a_stall_is_in_the_history() -> None:
    job = job_in(S.IN_PROGRESS, heartbeat_timeout=TIMEOUT)
    applied = apply(job, Stall(id="a", silent_for=TIMEOUT), now=LATER, retention=RETENTION)
    entry = applied.transition
    assert entry is not None
    assert (entry.from_state, entry.to_state, entry.actor) == (S.IN_PROGRESS, S.IN_PROGRESS, "server")
    assert entry.reason == f"stalled: no update came for {TIMEOUT.total_seconds():.0f} s"


def test_a_job_without_a_timeout_never_stalls() -> None:
    job = job_in(S.IN_PROGRESS)
    assert stall(job, timedelta(days=365)) is job


def test_a_job_that_stays_stalled_fails_where_the_server_is_configured_so() -> None:
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
    assert projection_of(job) == START + timedelta(seconds=40)
    assert projection_of(update(job_in(S.IN_PROGRESS), progress=0.5)) is None
    assert projection_of(update(job, state=S.FAILED)) is None


@pytest.mark.parametrize("claimed_with", [{}, {"progress": 80.0}])
def test_the_projection_of_a_resumed_attempt_follows_its_own_progress(claimed_with: dict[str, float]) -> None:
    job = job_in(S.RETRYING, reports_progress=True, progress=80.0)
    job = update(job, START, state=S.IN_PROGRESS, attempt=job.attempt + 1, **claimed_with)
    resumed = update(job, START, progress=80.0)
    assert (resumed.progress, projection_of(resumed)) == (80.0, None)
    later = update(resumed, progress=85.0)
    assert projection_of(later) == START + timedelta(seconds=40)
    assert update(later, state=S.IN_PROGRESS, attempt=later.attempt + 1).first_progress_at is None


@pytest.mark.parametrize("cleared", [{"progress": None}, {"reports_progress": False}])
def test_the_projection_of_progress_that_was_cleared_begins_anew(cleared: dict[str, Any]) -> None:
    job = update(job_in(S.IN_PROGRESS, progress=90.0, reports_progress=True), START, **cleared)
    assert projection_of(update(job, progress=25.0)) == START + timedelta(seconds=40)


def test_a_job_that_is_created_with_progress_is_projected_from_there() -> None:
    created = apply(None, Create(id="a", state=S.IN_PROGRESS, progress=80.0), now=START, retention=RETENTION).job
    assert projection_of(created) is None
    assert projection_of(update(created, progress=90.0)) == START + timedelta(seconds=20)


def test_only_progress_reason_and_estimates_can_wait() -> None:
    before = job_in(S.IN_PROGRESS)
    minor = {"progress": 5.0, "reports_progress": True, "reason": "r", "estimated_completion": LATER, "revision": 6}
    assert not is_urgent(before, evolve(before, {**minor, "updated_at": LATER}))
    for field, value in (("state", S.RETRYING), ("stalled", True), ("cancel_requested", True), ("labels", {"a": "b"})):
        assert is_urgent(before, evolve(before, {field: value})), field


def test_nan_is_not_equal_to_itself_so_it_must_never_get_in() -> None:
    from jobstatus_grpc.job import validation

    for value in (math.nan, math.inf, -math.inf, -0.1, 100.1):
        violations: list[errors.FieldViolation] = []
        validation.check_progress(value, "job.progress", violations)
        assert len(violations) == 1, value


# As in docs/api.md, row by row; a claim names its attempt, so it has a column of its own.
ALLOWED = {
    S.PENDING: {S.PENDING, S.IN_PROGRESS, S.RETRYING, S.SUCCEEDED, S.ABORTED, S.FAILED, S.CANCELLED},
    S.IN_PROGRESS: {S.IN_PROGRESS, S.RETRYING, S.SUCCEEDED, S.ABORTED, S.FAILED, S.CANCELLED},
    S.RETRYING: {S.IN_PROGRESS, S.RETRYING, S.ABORTED, S.FAILED, S.CANCELLED},
    S.SUCCEEDED: {S.SUCCEEDED},
    S.ABORTED: {S.ABORTED},
    S.FAILED: {S.FAILED},
    S.CANCELLED: {S.CANCELLED},
}


def test_the_table_of_transitions_is_as_documented() -> None:
    open_rows = {state: set(allowed) for state, allowed in TRANSITIONS.items() if state not in TERMINAL_STATES}
    assert open_rows == {state: allowed for state, allowed in ALLOWED.items() if state not in TERMINAL_STATES}
    assert all(not TRANSITIONS[state] for state in TERMINAL_STATES)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(S, S)))
def test_a_job_moves_only_along_the_table(before: JobState, after: JobState) -> None:
    if after in ALLOWED[before]:
        assert update(job_in(before), state=after).state is after
    else:
        with pytest.raises(errors.IllegalTransitionError) as caught:
            update(job_in(before), state=after)
        assert caught.value.metadata["from"] == f"JOB_STATE_{before.name}"
        assert caught.value.metadata["to"] == f"JOB_STATE_{after.name}"


@pytest.mark.parametrize("state", list(S))
def test_a_claim_begins_the_next_attempt_of_every_open_job(state: JobState) -> None:
    job = job_in(state, reports_progress=True, progress=40.0)
    if state in TERMINAL_STATES:
        with pytest.raises(errors.IllegalTransitionError):
            update(job, state=S.IN_PROGRESS, attempt=job.attempt + 1)
        return
    claimed = update(job, state=S.IN_PROGRESS, attempt=job.attempt + 1)
    assert (claimed.state, claimed.attempt, claimed.started_at) == (S.IN_PROGRESS, job.attempt + 1, LATER)
    assert (claimed.progress, claimed.error, claimed.estimated_completion) == (None, None, None)


@pytest.mark.parametrize("attempt", [1, 3])
def test_a_claim_of_another_attempt_than_the_next_is_stale(attempt: int) -> None:
    with pytest.raises(errors.StaleAttemptError):
        update(job_in(S.IN_PROGRESS), state=S.IN_PROGRESS, attempt=attempt)


@pytest.mark.parametrize("changes", [{}, {"progress": 1.0}, {"state": S.SUCCEEDED}, {"state": S.RETRYING}])
@pytest.mark.parametrize("attempt", [1, 3])
def test_a_replaced_worker_cannot_write(changes: dict[str, Any], attempt: int) -> None:
    with pytest.raises(errors.StaleAttemptError):
        update(job_in(S.IN_PROGRESS, attempt=2), attempt=attempt, **changes)


def test_a_claim_is_in_the_history_though_the_state_stays() -> None:
    command = Update(id="a", changes={"state": S.IN_PROGRESS}, attempt=2, actor="w2")
    transition = apply(job_in(S.IN_PROGRESS), command, now=LATER, retention=RETENTION).transition
    assert transition is not None
    assert (transition.from_state, transition.to_state, transition.attempt) == (S.IN_PROGRESS, S.IN_PROGRESS, 2)
    assert (transition.actor, transition.revision, transition.transitioned_at) == ("w2", 6, LATER)


@pytest.mark.parametrize("state", [S.PENDING, S.RETRYING])
def test_an_unfenced_start_raises_the_attempt(state: JobState) -> None:
    job = job_in(state)
    assert update(job, state=S.IN_PROGRESS).attempt == job.attempt + 1


def test_unfenced_in_progress_on_a_job_in_progress_is_no_new_attempt() -> None:
    job = job_in(S.IN_PROGRESS, reports_progress=True, progress=40.0)
    assert update(job, state=S.IN_PROGRESS) is job


@pytest.mark.parametrize("changes", [{"state": S.IN_PROGRESS, "attempt": 2}, {"state": S.RETRYING}])
def test_once_a_cancel_was_requested_no_attempt_follows(changes: dict[str, Any]) -> None:
    with pytest.raises(errors.IllegalTransitionError, match="cancel"):
        update(job_in(S.IN_PROGRESS, cancel_requested=True), **changes)


def test_a_worker_may_still_succeed_after_a_cancel_was_asked() -> None:
    assert update(job_in(S.IN_PROGRESS, cancel_requested=True), state=S.SUCCEEDED, attempt=1).state is S.SUCCEEDED


@pytest.mark.parametrize("state", sorted(TERMINAL_STATES))
def test_a_done_job_rejects_updates(state: JobState) -> None:
    updates: list[dict[str, Any]] = [{}, {"progress": 1.0}, {"reason": "x"}, {"result": {}}, {"labels": {"a": "b"}}]
    for changes in updates:
        with pytest.raises(errors.IllegalTransitionError):
            update(job_in(state), **changes)


@pytest.mark.parametrize("state", sorted(TERMINAL_STATES))
def test_the_same_end_again_is_fine_and_changes_nothing(state: JobState) -> None:
    error = JobError(8, "no memory", "OUT_OF_MEMORY") if state in ERROR_STATES else None
    job = job_in(state, reason="why", error=error, result={"rows": 1.0}, attempt=2)
    again = {"state": state, "reason": "why", "error": error, "result": {"rows": 1.0}}
    assert update(job, **again, progress=3.0, estimated_completion=LATER, expected_revision=99, attempt=1) is job
    assert update(job, state=state) is job


@pytest.mark.parametrize(
    "other", [{"reason": "other"}, {"error": JobError(3)}, {"result": {"rows": 2.0}}, {"result": None}]
)
def test_the_same_end_with_other_fields_is_refused(other: dict[str, Any]) -> None:
    job = job_in(S.FAILED, reason="why", error=JobError(8, "m"), result={"rows": 1.0})
    with pytest.raises(errors.IllegalTransitionError):
        update(job, state=S.FAILED, **other)


def test_a_failure_repeated_without_its_error_is_the_same_end() -> None:
    failed = update(job_in(S.IN_PROGRESS), state=S.FAILED, reason="disk")
    assert update(failed, state=S.FAILED, reason="disk", error=None) is failed


@pytest.mark.parametrize(
    ("before", "changes", "error"),
    [
        ({}, {"reason": "disk"}, JobError(2, "disk")),
        ({"reason": "old"}, {}, JobError(2, "old")),
        ({}, {}, JobError(2, "")),
        ({"error": JobError(8, "m")}, {"reason": "x"}, JobError(8, "m")),
        ({"error": JobError(8, "m")}, {"reason": "x", "error": None}, JobError(2, "x")),
        ({}, {"error": JobError(5, "gone", "G")}, JobError(5, "gone", "G")),
    ],
)
def test_a_failed_job_always_has_an_error(before: dict[str, Any], changes: dict[str, Any], error: JobError) -> None:
    assert update(job_in(S.RETRYING, **before), state=S.FAILED, **changes).error == error


@pytest.mark.parametrize("state", list(S))
def test_an_error_is_kept_only_where_one_belongs(state: JobState) -> None:
    if state in TERMINAL_STATES:
        return
    if state in ERROR_STATES:
        assert update(job_in(state), error=JobError(3)).error == JobError(3)
    else:
        with pytest.raises(errors.InvalidFieldError) as caught:
            update(job_in(state), error=JobError(3))
        assert caught.value.violations[0].field == "job.error"


def test_progress_never_goes_back_within_an_attempt_but_the_rest_counts() -> None:
    job = update(job_in(S.IN_PROGRESS, reports_progress=True, progress=40.0), progress=30.0, reason="late")
    assert (job.progress, job.reason) == (40.0, "late")
    assert update(job, state=S.IN_PROGRESS, attempt=2, progress=5.0).progress == 5.0


def test_progress_can_be_cleared_alone_or_with_its_flag() -> None:
    job = job_in(S.IN_PROGRESS, reports_progress=True, progress=40.0)
    assert (update(job, progress=None).reports_progress, update(job, progress=None).progress) == (True, None)
    assert (update(job, reports_progress=False).reports_progress, update(job, reports_progress=False).progress) == (
        False,
        None,
    )


def test_the_first_progress_says_that_there_is_progress() -> None:
    assert update(job_in(S.IN_PROGRESS), progress=0.0).reports_progress


@pytest.mark.parametrize("state", sorted(TERMINAL_STATES))
def test_only_success_completes_the_bar(state: JobState) -> None:
    ended = update(job_in(S.IN_PROGRESS, reports_progress=True, progress=40.0), state=state)
    assert ended.progress == (100.0 if state is S.SUCCEEDED else 40.0)
    assert update(job_in(S.IN_PROGRESS), state=state).progress is None
    assert update(job_in(S.IN_PROGRESS), state=S.SUCCEEDED, progress=7.0).progress == 100.0


@pytest.mark.parametrize("state", sorted(TERMINAL_STATES))
def test_an_end_has_its_times(state: JobState) -> None:
    ended = update(job_in(S.IN_PROGRESS, stalled=True), state=state)
    assert (ended.done, ended.finished_at, ended.expires_at) == (True, LATER, LATER + RETENTION)
    assert not ended.stalled


def test_an_update_that_changes_nothing_is_a_heartbeat() -> None:
    job = job_in(S.IN_PROGRESS, reason="r", labels={"a": "b"})
    assert update(job, attempt=1) is job
    assert update(job, attempt=1, reason="r", labels={"a": "b"}) is job


def test_a_heartbeat_of_a_stalled_job_is_a_change() -> None:
    woken = update(job_in(S.IN_PROGRESS, stalled=True), attempt=1)
    assert (woken.stalled, woken.revision, woken.updated_at) == (False, 6, LATER)


def test_each_change_raises_the_revision_by_one() -> None:
    assert update(job_in(S.IN_PROGRESS), progress=1.0).revision == 6


def test_updated_at_never_goes_back() -> None:
    earlier = START - timedelta(hours=1)
    ended = update(job_in(S.IN_PROGRESS), earlier, state=S.SUCCEEDED)
    assert (ended.updated_at, ended.finished_at) == (START, START)


def test_an_expected_revision_must_be_the_jobs() -> None:
    assert update(job_in(S.IN_PROGRESS), expected_revision=5, progress=1.0).revision == 6
    with pytest.raises(errors.RevisionMismatchError):
        update(job_in(S.IN_PROGRESS), expected_revision=4, progress=1.0)


def test_checks_come_in_their_documented_order() -> None:
    request = RequestId("r", "h")
    bad: dict[str, Any] = {"state": S.PENDING, "attempt": 9, "expected_revision": 9, "request": request}
    with pytest.raises(errors.JobNotFoundError):
        update(None, **bad)
    assert update(job_in(S.IN_PROGRESS, requests=(request,)), **bad).revision == 5
    with pytest.raises(errors.StaleAttemptError):
        update(job_in(S.IN_PROGRESS), **bad)
    with pytest.raises(errors.RevisionMismatchError):
        update(job_in(S.IN_PROGRESS), **{**bad, "attempt": 1})
    with pytest.raises(errors.IllegalTransitionError):
        update(job_in(S.IN_PROGRESS), **{**bad, "attempt": 1, "expected_revision": 5})


def test_a_request_has_one_effect_and_its_replay_answers_with_the_job_as_it_is() -> None:
    request = RequestId("r", "h")
    newer = update(update(job_in(S.IN_PROGRESS), reason="a", request=request), reason="b")
    assert update(newer, reason="a", request=request, known_payload="h") is newer


def test_a_request_id_with_another_payload_is_refused() -> None:
    once = update(job_in(S.IN_PROGRESS), reason="a", request=RequestId("r", "h"))
    with pytest.raises(errors.RequestIdReusedError):
        update(once, reason="b", request=RequestId("r", "other"), known_payload="h")


def test_the_request_of_the_creation_is_kept_with_the_job() -> None:
    creation = RequestId("creation", "h")
    job = apply(None, Create(id="a", request=creation), now=START, retention=RETENTION).job
    assert update(job, reason="x", request=creation) is job


@pytest.mark.parametrize(
    "fields",
    [
        {"state": S.FAILED},
        {"state": S.IN_PROGRESS, "attempt": 2},
        {"reason": "a", "expected_revision": 5},
    ],
)
def test_an_old_request_that_cannot_take_effect_twice_is_not_refused(fields: dict[str, Any]) -> None:
    late, request = START + timedelta(days=3), RequestId(new_uuid7(START), "h")
    assert update(job_in(S.IN_PROGRESS), late, **fields, request=request).revision == 6
    with pytest.raises(errors.RequestIdTooOldError):
        update(evolve(job_in(S.IN_PROGRESS), {"created_at": LATER}), late, **fields, request=request)


@pytest.mark.parametrize(
    ("command", "is_remembered"),
    [
        (Update(id="a", changes={"reason": "new"}, request=RequestId("r", "h")), True),
        (Update(id="a", changes={"reason": ""}, request=RequestId("r", "h")), True),
        (Cancel(id="a", request=RequestId("r", "h")), True),
        (Update(id="a", request=RequestId("r", "h")), False),
        (Update(id="a", changes={"reason": "new"}), False),
    ],
)
def test_all_accepted_requests_but_heartbeats_are_to_be_remembered(command: Command, is_remembered: bool) -> None:
    applied = apply(job_in(S.IN_PROGRESS), command, now=LATER, retention=RETENTION)
    assert (applied.request is not None) is is_remembered


@pytest.mark.parametrize(
    ("request_id", "is_refused"),
    [
        (new_uuid7(LATER - timedelta(hours=24)), False),
        (new_uuid7(LATER - timedelta(hours=24, milliseconds=1)), True),
        (new_uuid7(LATER - timedelta(hours=25)).upper(), True),
        (new_uuid7(LATER + timedelta(days=365)), False),
        (new_uuid7(LATER - timedelta(hours=25)).replace("-", ""), False),
        (str(uuid.UUID(int=0, version=4)), False),
        ("a request", False),
    ],
    ids=["a day old", "older", "in capitals", "a year ahead", "without hyphens", "another version", "a text"],
)
def test_a_uuid7_is_refused_as_request_id_when_it_is_older_than_the_memory(request_id: str, is_refused: bool) -> None:
    fields: dict[str, Any] = {"reason": "a", "request": RequestId(request_id, "h")}
    with pytest.raises(errors.RequestIdTooOldError) if is_refused else contextlib.nullcontext():
        update(job_in(S.IN_PROGRESS), **fields)
