"""The rules of a job's life, and the one place that decides. Plain Python without I/O.

A store loads what is under an id, calls `apply`, and writes what comes back. The names that the rules speak of are
exported from here too.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeAlias

from jobstatus_grpc import errors
from jobstatus_grpc.commands import Cancel, Command, Create, Delete, Expire, RequestId, Stall, Update
from jobstatus_grpc.limits import REQUEST_IDS_KEPT
from jobstatus_grpc.record import Job, JobError, Tombstone, Transition, evolve
from jobstatus_grpc.state import TERMINAL_STATES, TRANSITIONS, JobState
from jobstatus_grpc.update_rules import check_revision, check_update, effect, end_times, is_same_end

__all__ = [
    "TERMINAL_STATES",
    "TRANSITIONS",
    "Applied",
    "Cancel",
    "Command",
    "Create",
    "Delete",
    "Expire",
    "Found",
    "Job",
    "JobError",
    "JobState",
    "Outcome",
    "RequestId",
    "Stall",
    "Tombstone",
    "Transition",
    "Update",
    "apply",
    "require_job",
]

DEADLINE_EXCEEDED_CODE = 4
"""google.rpc.Code DEADLINE_EXCEEDED."""

Outcome: TypeAlias = Job | errors.JobStatusError
"""What became of a command: the job as stored, or the error that refused it."""

Found: TypeAlias = Job | Tombstone | None


class Applied(NamedTuple):
    """What a store has to write: `job` if it is not the one found, a change if its revision rose, the transition."""

    job: Job
    transition: Transition | None = None
    removed: bool = False
    """The job is gone; write a tombstone."""


def apply(found: Found, command: Command, *, now: datetime, retention: timedelta) -> Applied:
    """Judge `command` against what is stored under its id.

    Args:
        found: the job, its tombstone, or None where the id was never used.
        now: the store's clock.
        retention: how long a job is kept once it is done.

    Raises:
        errors.JobStatusError: the command is refused; nothing is to be written.
    """
    if isinstance(found, Job) and now < found.updated_at:
        now = found.updated_at
    match command:
        case Update():
            return _update(found, command, now, retention)
        case Create():
            return _create(found, command, now)
        case Cancel():
            return _cancel(found, command, now, retention)
        case Delete():
            return _delete(found, command)
        case Stall():
            return _stall(found, command, now, retention)
        case Expire():
            return _expire(found, command, now)


def _create(found: Found, command: Create, now: datetime) -> Applied:
    if isinstance(found, Job) and _is_replay(found, command.request):
        return Applied(found)
    if found is not None:
        raise errors.JobAlreadyExistsError(f"job {command.id!r} exists, or did within the last 24 hours", id=command.id)
    started = command.state is JobState.IN_PROGRESS
    job = Job(
        id=command.id,
        state=command.state,
        created_at=now,
        updated_at=now,
        name=command.name,
        reason=command.reason,
        has_progress=command.has_progress or command.progress is not None,
        progress=command.progress,
        estimated_completion=command.estimated_completion,
        started_at=now if started else None,
        attempt=1 if started else 0,
        heartbeat_timeout=command.heartbeat_timeout,
        labels=command.labels,
        parent_id=command.parent_id,
        result=command.result,
        tenant=command.tenant,
        creation_request=command.request,
    )
    return Applied(job, _transition(None, job, command.reason, command.actor))


def _update(found: Found, command: Update, now: datetime, retention: timedelta) -> Applied:
    if found is None and command.allow_missing:
        return _create_by_update(command, now, retention)
    job = require_job(found, command.id)
    if _is_replay(job, command.request) or is_same_end(job, command):
        return Applied(job)
    check_update(job, command)
    changes = effect(job, command, now, retention)
    if not changes:
        return Applied(job)
    return _changed(job, changes, now, command.request, command.actor, command.changes.get("reason", ""))


def _create_by_update(command: Update, now: datetime, retention: timedelta) -> Applied:
    """As one change: revision 1, one entry in the history."""
    blank = Job(
        id=command.id,
        state=JobState.PENDING,
        created_at=now,
        updated_at=now,
        name=command.name,
        labels=command.labels_if_missing,
        parent_id=command.parent_id,
        tenant=command.tenant,
        creation_request=command.request,
    )
    check_update(evolve(blank, {"revision": 0}), command)
    job = evolve(blank, effect(blank, command, now, retention))
    return Applied(job, _transition(None, job, job.reason, command.actor))


def _cancel(found: Found, command: Cancel, now: datetime, retention: timedelta) -> Applied:
    job = require_job(found, command.id)
    if _is_replay(job, command.request) or job.done or job.cancel_requested:
        return Applied(job)
    if job.state is JobState.IN_PROGRESS:
        changes: dict[str, Any] = {"cancel_requested": True}
    else:
        changes = {"state": JobState.CANCELLED, **end_times(now, retention)}
        if command.reason:
            changes["reason"] = command.reason
    return _changed(job, changes, now, command.request, command.actor, command.reason)


def _delete(found: Found, command: Delete) -> Applied:
    job = require_job(found, command.id)
    check_revision(job, command.expected_revision)
    if not job.done:
        raise errors.JobNotDoneError(f"job {job.id!r} is {job.state.word}; cancel it, or wait for its end", id=job.id)
    return Applied(job, removed=True)


def _stall(found: Found, command: Stall, now: datetime, retention: timedelta) -> Applied:
    job = require_job(found, command.id)
    timeout = job.heartbeat_timeout
    if job.state is not JobState.IN_PROGRESS or timeout is None or command.silent_for < timeout:
        return Applied(job)
    changes: dict[str, Any] = {"stalled": True}
    if command.fail_after is not None and command.silent_for >= timeout + command.fail_after:
        message = f"no update came for {command.silent_for.total_seconds():.0f} s"
        error = JobError(DEADLINE_EXCEEDED_CODE, message, "STALLED")
        changes = {"state": JobState.FAILED, "stalled": False, "error": error, **end_times(now, retention)}
    elif job.stalled:
        return Applied(job)
    return _changed(job, changes, now, None, command.actor, "")


def _expire(found: Found, command: Expire, now: datetime) -> Applied:
    job = require_job(found, command.id)
    return Applied(job, removed=job.expires_at is not None and job.expires_at <= now)


def require_job(found: Found, job_id: str) -> Job:
    """Return the job that was found.

    Raises:
        JobNotFoundError: the id was never used, or its tombstone is gone.
        JobExpiredError: the job was deleted or has expired.
    """
    if isinstance(found, Job):
        return found
    if found is None:
        raise errors.JobNotFoundError(f"no job has the id {job_id!r}", id=job_id)
    raise errors.JobExpiredError(f"job {job_id!r} was deleted or has expired", id=job_id)


def _is_replay(job: Job, request: RequestId | None) -> bool:
    """Tell whether `request` has taken effect on `job` before."""
    if request is None:
        return False
    for known in (job.creation_request, *job.requests):
        if known is not None and known.value == request.value:
            if known.payload_hash != request.payload_hash:
                raise errors.RequestIdReusedError(id=job.id, request_id=request.value)
            return True
    return False


def _changed(
    job: Job, changes: dict[str, Any], now: datetime, request: RequestId | None, actor: str, reason: str
) -> Applied:
    """Return the next revision of `job`, and the entry in its history where the change deserves one."""
    changes["revision"] = job.revision + 1
    changes["updated_at"] = now
    if request is not None:
        changes["requests"] = (*job.requests, request)[-REQUEST_IDS_KEPT:]
    after = evolve(job, changes)
    if "state" in changes or "attempt" in changes or "cancel_requested" in changes:
        return Applied(after, _transition(job.state, after, reason, actor))
    return Applied(after)


def _transition(from_state: JobState | None, job: Job, reason: str, actor: str) -> Transition:
    return Transition(
        from_state=from_state,
        to_state=job.state,
        reason=reason,
        transitioned_at=job.updated_at,
        attempt=job.attempt,
        actor=actor,
        revision=job.revision,
    )
