"""The rules of UpdateJob: whether a worker may write, and what its update changes. Called by `job.apply`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from jobstatus_grpc import errors
from jobstatus_grpc.commands import Update
from jobstatus_grpc.errors import FieldViolation
from jobstatus_grpc.record import Job, JobError
from jobstatus_grpc.state import ERROR_STATES, TERMINAL_STATES, TRANSITIONS, JobState

UNKNOWN_CODE = 2
"""google.rpc.Code UNKNOWN."""


def is_same_end(job: Job, command: Update) -> bool:
    """Tell whether a done job is given its own end again, with an equal reason, error and result where carried."""
    changes = command.changes
    if not job.done or changes.get("state") is not job.state:
        return False
    return (
        changes.get("reason", job.reason) == job.reason
        and ("error" not in changes or _end_error(job, changes) == job.error)
        and changes.get("result", job.result) == job.result
    )


def check_update(job: Job, command: Update) -> None:
    """Check the attempt, the expected revision and the transition, in this order.

    Raises:
        StaleAttemptError, RevisionMismatchError, IllegalTransitionError: the update is refused.
        InvalidFieldError: it carries an error, and the job's state has none.
    """
    _check_attempt(job, command)
    check_revision(job, command.expected_revision)
    _check_transition(job, command)


def effect(job: Job, command: Update, now: datetime, retention: timedelta) -> dict[str, Any]:
    """Return the fields that the update really changes."""
    changes = dict(command.changes)
    progress_before = job.progress
    if _begins_attempt(job, command):
        progress_before = None
        fresh = {"progress": None, "error": None, "estimated_completion": None}
        changes = {**fresh, **changes, "attempt": job.attempt + 1, "started_at": now}
    progress = changes.get("progress")
    if progress is not None:
        changes["has_progress"] = True
        if progress_before is not None and progress < progress_before:
            changes["progress"] = progress_before
    elif changes.get("has_progress") is False:
        changes["progress"] = None
    if job.stalled:
        changes["stalled"] = False
    if "state" in changes:
        _add_end(changes, job, now, retention)
    values = vars(job)
    return {name: value for name, value in changes.items() if value != values[name]}


def _add_end(changes: dict[str, Any], job: Job, now: datetime, retention: timedelta) -> None:
    """Add what a job gets at its end, where `changes` bring it there."""
    state = changes["state"]
    if state in TERMINAL_STATES:
        changes.update(end_times(now, retention))
        if state is JobState.SUCCEEDED and changes.get("has_progress", job.has_progress):
            changes["progress"] = 100.0
        if state is JobState.FAILED:
            changes["error"] = _end_error(job, changes)


def _check_attempt(job: Job, command: Update) -> None:
    if not command.attempt:
        return
    is_claim = command.changes.get("state") is JobState.IN_PROGRESS
    if command.attempt != job.attempt + is_claim:
        wanted = f"a claim must name attempt {job.attempt + 1}" if is_claim else "another worker may own the job now"
        raise errors.StaleAttemptError(
            f"job {job.id!r} is at attempt {job.attempt}, the update named {command.attempt}; {wanted}",
            id=job.id,
            attempt=str(job.attempt),
        )


def _begins_attempt(job: Job, command: Update) -> bool:
    """Tell whether this is a claim, or an unfenced start."""
    starts = command.changes.get("state") is JobState.IN_PROGRESS
    return starts and (command.attempt > 0 or job.state is not JobState.IN_PROGRESS)


def check_revision(job: Job, expected: int) -> None:
    """Raise RevisionMismatchError unless the job is at the revision expected; 0 expects none."""
    if expected > 0 and expected != job.revision:
        raise errors.RevisionMismatchError(
            f"job {job.id!r} is at revision {job.revision}, not {expected}; read it again",
            id=job.id,
            revision=str(job.revision),
        )


def _check_transition(job: Job, command: Update) -> None:
    state = command.changes.get("state", job.state)
    cancelled = job.cancel_requested and (_begins_attempt(job, command) or state is JobState.RETRYING)
    if state not in TRANSITIONS[job.state] or cancelled:
        why = "; a cancel was requested" if cancelled else ""
        what = f"cannot go from {job.state.word} to {state.word}{why}"
        if job.done:
            what = f"is {job.state.word}; a done job never changes"
        raise errors.IllegalTransitionError(
            f"job {job.id!r} {what}",
            **{"id": job.id, "from": f"JOB_STATE_{job.state.name}", "to": f"JOB_STATE_{state.name}"},
        )
    if command.changes.get("error") is not None and state not in ERROR_STATES:
        allowed = "is allowed in retrying, aborted, failed and cancelled only"
        raise errors.InvalidFieldError(violations=[FieldViolation("job.error", allowed)])


def _end_error(job: Job, changes: Mapping[str, Any]) -> JobError | None:
    """Return the error of a job at its end: a failed one always has one."""
    error: JobError | None = changes.get("error", job.error)
    if error is None and changes["state"] is JobState.FAILED:
        return JobError(UNKNOWN_CODE, changes.get("reason") or job.reason)
    return error


def end_times(now: datetime, retention: timedelta) -> dict[str, datetime]:
    """Return the instants that a job gets at its end."""
    return {"finished_at": now, "expires_at": now + retention}
