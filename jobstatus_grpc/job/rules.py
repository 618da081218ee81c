"""What a command does to a job, or why it is refused. `apply` is called by every store, within its transaction.

A command comes with its values checked by `validation`; here it is checked against the job. In the order of the calls:
`apply`, one function for each command, the checks of an update, the changes it makes, the next revision.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from jobstatus_grpc import errors
from jobstatus_grpc.errors import FieldViolation
from jobstatus_grpc.job.commands import (
    CREATION_FIELDS,
    Cancel,
    Command,
    Create,
    Delete,
    Expire,
    Stall,
    Update,
)
from jobstatus_grpc.job.filter import JobFilter
from jobstatus_grpc.job.ids import time_in
from jobstatus_grpc.job.limits import CLOCK_TOLERANCE, DEADLINE_EXCEEDED_CODE, MAX_REQUEST_AGE, UNKNOWN_CODE
from jobstatus_grpc.job.model import (
    BLANK,
    ERROR_STATES,
    TERMINAL_STATES,
    TRANSITIONS,
    Job,
    JobError,
    JobState,
    RequestId,
    Tombstone,
    Transition,
    evolve,
)

Found: TypeAlias = Job | Tombstone | None
"""What is stored under an id; None: it was never used, or its tombstone has been removed."""

Outcome: TypeAlias = Job | errors.JobStatusError
"""The result of a command: the job as stored, or the error that refused it."""


class Applied(NamedTuple):
    """What a store has to write: nothing if `job` is the one found; a change for the feed if its revision rose."""

    job: Job
    transition: Transition | None = None
    """The entry to add to the job's history."""
    removed: bool = False
    """The job is to be replaced by a tombstone."""
    request: RequestId | None = None
    """The request to remember for this job."""


def apply(
    found: Found, command: Command, *, now: datetime, retention: timedelta, known_payload: str | None = None
) -> Applied:
    """Apply `command` to what is stored under its id.

    Args:
        now: the store's clock; a job's updated_at never goes back behind it.
        retention: how long a job is kept after its end.
        known_payload: the hash of the payload with which the job remembers the command's request_id; None: it does not.

    Raises:
        errors.JobStatusError: the command is refused; nothing is to be written.
    """
    only = command.only
    if only is None:
        return _apply(found, command, now, retention, known_payload)
    seen = visible(found, only)
    applied = _apply(seen, command, now, retention, known_payload)
    _check_within(only, applied.job)
    if seen is not found:  # the command creates a job under the id of one that the caller does not see
        raise _already_exists(command.id)
    return applied


def _apply(found: Found, command: Command, now: datetime, retention: timedelta, known_payload: str | None) -> Applied:
    clock_now = now
    request = command.request
    if isinstance(found, Job):
        if now < found.updated_at:
            now = found.updated_at
        if request is not None and _is_replay(found, request, known_payload):
            return Applied(found)
    match command:
        case Update():
            return _update(found, command, now, clock_now, retention)
        case Create():
            return _create(found, command, now, clock_now)
        case Cancel():
            return _cancel(found, command, now, clock_now, retention)
        case Delete():
            return _delete(found, command)
        case Stall():
            return _stall(found, command, now, retention)
        case Expire():
            return _expire(found, command, now, clock_now, retention)


def _create(found: Found, command: Create, now: datetime, clock_now: datetime) -> Applied:
    _check_age(command.id, command.request, clock_now)
    if found is not None:
        raise _already_exists(command.id)
    started = command.state is JobState.IN_PROGRESS
    fields: dict[str, Any] = {name: getattr(command, name) for name in CREATION_FIELDS}
    if command.progress is not None:
        fields["reports_progress"] = True
        if started:
            fields |= {"first_progress": command.progress, "first_progress_at": now}
    job = Job(
        **fields,
        created_at=now,
        updated_at=now,
        started_at=now if started else None,
        attempt=1 if started else 0,
        last_heartbeat_at=now if started and command.heartbeat_timeout is not None else None,
        tenant=command.tenant,
        creation_request=command.request,
    )
    return Applied(job, _transition(None, job, command.reason, command.actor, command.request))


def _update(found: Found, command: Update, now: datetime, clock_now: datetime, retention: timedelta) -> Applied:
    if found is None and command.allow_missing:
        _check_age(command.id, command.request, clock_now)
        return _create_by_update(command, now, retention)
    job = require_job(found, command.id)
    if _is_same_end(job, command):
        return Applied(job, request=command.request)
    _check_age(command.id, command.request, clock_now, job if _shows_its_effect(command) else None)
    check_allowed(job, command)
    changes = changed_fields(job, command, now, retention)
    if not changes:
        # A heartbeat that is sent again is a heartbeat again: remembering it would cost a write each time.
        return Applied(job, request=command.request if command.changes else None)
    _note_heartbeat(job, changes, now)
    reason = command.changes.get("reason", "")
    if "stalled" in changes and not reason and "state" not in changes and "attempt" not in changes:
        reason = "an update came: no longer stalled"
    return _next_revision(job, changes, now, command.request, command.actor, reason)


def _create_by_update(command: Update, now: datetime, retention: timedelta) -> Applied:
    """Create and update as one change: revision 1, one entry in the history."""
    blank = evolve(
        BLANK,
        {
            "id": command.id,
            "created_at": now,
            "updated_at": now,
            "name": command.name,
            "revision": 0,
            "labels": command.labels_if_missing,
            "parent_id": command.parent_id,
            "tenant": command.tenant,
            "creation_request": command.request,
        },
    )
    check_allowed(blank, command)
    changes = changed_fields(blank, command, now, retention)
    changes["revision"] = 1
    _note_heartbeat(blank, changes, now)
    job = evolve(blank, changes)
    reason = job.reason or (job.error.message if job.error else "")
    return Applied(job, _transition(None, job, reason, command.actor, command.request))


def _cancel(found: Found, command: Cancel, now: datetime, clock_now: datetime, retention: timedelta) -> Applied:
    job = require_job(found, command.id)
    _check_age(command.id, command.request, clock_now)
    is_forced = command.force and job.stalled
    if job.done or (job.cancel_requested and not is_forced):
        return Applied(job, request=command.request)
    changes: dict[str, Any] = {}
    reason = command.reason
    if command.reason:
        changes["cancel_reason"] = command.reason
    if job.state is JobState.IN_PROGRESS and not is_forced:
        changes["cancel_requested"] = True
        reason = f"cancel requested: {command.reason}" if command.reason else "cancel requested"
    else:
        changes |= {"state": JobState.CANCELLED, "stalled": False, **_end_times(now, retention)}
        if command.reason:
            changes["reason"] = command.reason
    return _next_revision(job, changes, now, command.request, command.actor, reason)


def _delete(found: Found, command: Delete) -> Applied:
    job = require_job(found, command.id)
    _check_revision(job, command.expected_revision)
    if not job.done:
        raise errors.JobNotDoneError(f"job {job.id!r} is {job.state.word}; cancel it, or wait for its end", id=job.id)
    return Applied(job, removed=True)


def _stall(found: Found, command: Stall, now: datetime, retention: timedelta) -> Applied:
    job = require_job(found, command.id)
    timeout = job.heartbeat_timeout
    if job.state is not JobState.IN_PROGRESS or timeout is None or command.silent_for < timeout:
        return Applied(job)
    changes: dict[str, Any] = {"stalled": True}
    reason = f"stalled: no update came for {command.silent_for.total_seconds():.0f} s"
    if command.fail_after is not None and command.silent_for >= timeout + command.fail_after:
        message = f"no update came for {command.silent_for.total_seconds():.0f} s"
        error, reason = JobError(DEADLINE_EXCEEDED_CODE, message, "STALLED"), ""
        changes = {"state": JobState.FAILED, "stalled": False, "error": error, **_end_times(now, retention)}
    elif job.stalled:
        return Applied(job)
    return _next_revision(job, changes, now, None, command.actor, reason)


def _expire(found: Found, command: Expire, now: datetime, clock_now: datetime, retention: timedelta) -> Applied:
    """Remove a job whose time has come; take back the end of one that ended while the clock was wrong."""
    job = require_job(found, command.id)
    if job.expires_at is not None and job.expires_at <= now:
        return Applied(job, removed=True)
    if job.finished_at is not None and job.finished_at > clock_now + CLOCK_TOLERANCE:
        return _next_revision(job, _end_times(clock_now, retention), now, None, command.actor, "")
    return Applied(job)


def has_heartbeats(job: Job) -> bool:
    """Return whether the job stalls if its worker is silent."""
    return job.state is JobState.IN_PROGRESS and job.heartbeat_timeout is not None


def with_heartbeat(job: Job, at: datetime | None) -> Job:
    """Return the job with the time of a heartbeat, which changed nothing else; None: there was none."""
    if at is None or not has_heartbeats(job):
        return job
    if job.last_heartbeat_at is not None and at <= job.last_heartbeat_at:
        return job
    return evolve(job, {"last_heartbeat_at": at})


def projection_of(job: Job) -> datetime | None:
    """Return when the job ends at the pace of its attempt; None unless that has made progress of 1 % or more."""
    first, since = job.first_progress or 0.0, job.first_progress_at or job.started_at
    if job.progress is None or job.progress < first + 1 or job.state is not JobState.IN_PROGRESS or since is None:
        return None
    return since + (job.updated_at - since) * ((100 - first) / (job.progress - first))


def visible(found: Found, only: JobFilter | None) -> Found:
    """Return what a caller limited to `only` sees of what was found: a job that matches, or nothing.

    A tombstone does not say what the job was.
    """
    return found if only is None or (isinstance(found, Job) and only.matches(found)) else None


def _check_within(only: JobFilter, job: Job) -> None:
    """Raise PermissionDeniedError, which names what is missing, unless `job` matches."""
    if only.matches(job):
        return
    missing = [f"the label {key}={value}" for key, value in only.labels.items() if job.labels.get(key) != value]
    if not job.name.startswith(only.name_prefix):
        missing.append(f"a name that begins with {only.name_prefix!r}")
    raise errors.PermissionDeniedError(
        f"your identity is limited to some jobs; to be one of them, job {job.id!r} needs "
        f"{' and '.join(missing) or 'other values'}",
        id=job.id,
    )


def _already_exists(job_id: str) -> errors.JobAlreadyExistsError:
    return errors.JobAlreadyExistsError(f"job {job_id!r} exists, or did within the last 24 hours", id=job_id)


def require_job(found: Found, job_id: str) -> Job:
    """Return the job that was found.

    Raises:
        JobNotFoundError: the id was never used, or its tombstone has been removed.
        JobExpiredError: the job was deleted or has expired.
    """
    if isinstance(found, Job):
        return found
    if found is None:
        raise errors.JobNotFoundError(f"no job has the id {job_id!r}", id=job_id)
    raise errors.JobExpiredError(f"job {job_id!r} was deleted or has expired", id=job_id)


def _is_replay(job: Job, request: RequestId, known_payload: str | None) -> bool:
    """Return whether `request` was accepted for `job` before."""
    if known_payload is None:
        for known in (job.creation_request, *job.requests):
            if known is not None and known.value == request.value:
                known_payload = known.payload_hash
    if known_payload is None:
        return False
    if known_payload != request.payload_hash:
        raise errors.RequestIdReusedError(id=job.id, request_id=request.value)
    return True


def _shows_its_effect(command: Update) -> bool:
    """Return whether the update could not take effect twice on one job: it ends or claims it, or names its revision."""
    state = command.changes.get("state")
    is_claim = state is JobState.IN_PROGRESS and command.attempt > 0
    return state in TERMINAL_STATES or is_claim or command.expected_revision > 0


def _check_age(job_id: str, request: RequestId | None, clock_now: datetime, only_job: Job | None = None) -> None:
    """Raise RequestIdTooOldError if the request, which is not known, may be one that is forgotten.

    Unless it can take effect on `only_job` once, and was made when that existed: not for one before it of the same id.
    """
    made_at = None if request is None else time_in(request.value)
    if request is None or made_at is None or clock_now - made_at <= MAX_REQUEST_AGE:
        return
    if only_job is not None and made_at >= only_job.created_at:
        return
    raise errors.RequestIdTooOldError(
        f"the request_id is of {made_at:%Y-%m-%d %H:%M} UTC, and request_ids are remembered for 24 hours: the request "
        "may have taken effect; read the job, and use a new request_id (if this one is new, the clock of the machine "
        "that made it, or of the server, is wrong)",
        id=job_id,
        request_id=request.value,
    )


def _is_same_end(job: Job, command: Update) -> bool:
    """Return whether a done job is given its own end again: reason, error and result equal, as far as they are sent."""
    changes = command.changes
    if not job.done or changes.get("state") is not job.state:
        return False
    return (
        changes.get("reason", job.reason) == job.reason
        and ("error" not in changes or _end_error(job, changes) == job.error)
        and changes.get("result", job.result) == job.result
    )


def check_allowed(job: Job, command: Update) -> None:
    """Check the update's attempt, expected revision and transition against the job, in this order.

    Raises:
        StaleAttemptError, RevisionMismatchError, IllegalTransitionError: the update is refused.
        InvalidFieldError: it sets an error in a state that has none.
    """
    _check_attempt(job, command)
    _check_revision(job, command.expected_revision)
    _check_transition(job, command)


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


def _check_revision(job: Job, expected: int) -> None:
    if expected > 0 and expected != job.revision:
        raise errors.RevisionMismatchError(
            f"job {job.id!r} is at revision {job.revision}, not {expected}; read it again",
            id=job.id,
            revision=str(job.revision),
        )


def _check_transition(job: Job, command: Update) -> None:
    state = command.changes.get("state", job.state)
    cancelled = job.cancel_requested and (_starts_attempt(job, command) or state is JobState.RETRYING)
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


def _starts_attempt(job: Job, command: Update) -> bool:
    """Return whether the update is a claim, starts the job without naming an attempt, or reports its first failure."""
    state = command.changes.get("state")
    if state is JobState.RETRYING:
        return job.state is JobState.PENDING
    return state is JobState.IN_PROGRESS and (command.attempt > 0 or job.state is not JobState.IN_PROGRESS)


_FRESH: Mapping[str, Any] = MappingProxyType(
    dict.fromkeys(("progress", "error", "estimated_completion", "first_progress", "first_progress_at"))
)
"""The values of fields at the start of an attempt, unless its update sets them."""


def changed_fields(job: Job, command: Update, now: datetime, retention: timedelta) -> dict[str, Any]:
    """Return the fields that the update changes, itself or by the rules; empty for a heartbeat."""
    changes = dict(command.changes)
    progress_before, first_at = job.progress, job.first_progress_at
    starts = _starts_attempt(job, command)
    if starts:
        progress_before = first_at = None
        changes = {**_FRESH, **changes, "attempt": job.attempt + 1, "started_at": now}
    progress = changes.get("progress")
    if progress is not None:
        changes["reports_progress"] = True
        if progress_before is not None and progress < progress_before:
            changes["progress"] = progress_before
        elif progress_before is None and first_at is None and (starts or job.attempt > 1):
            changes |= {"first_progress": progress, "first_progress_at": now}
    elif changes.get("reports_progress") is False:
        changes["progress"] = None
    if progress_before is not None and changes.get("progress", progress_before) is None:
        changes |= {"first_progress": 0.0, "first_progress_at": now}
    if job.stalled:
        changes["stalled"] = False
    state = changes.get("state")
    if state in TERMINAL_STATES:
        changes.update(_end_times(now, retention))
        if state is JobState.SUCCEEDED and changes.get("reports_progress", job.reports_progress):
            changes["progress"] = 100.0
        if state is JobState.FAILED:
            changes["error"] = _end_error(job, changes)
    return {name: value for name, value in changes.items() if value != getattr(job, name)}


def _note_heartbeat(job: Job, changes: dict[str, Any], now: datetime) -> None:
    """Add last_heartbeat_at to the changes of an update, where the job has a heartbeat_timeout and has been started."""
    if changes.get("heartbeat_timeout", job.heartbeat_timeout) is None:
        if job.last_heartbeat_at is not None:
            changes["last_heartbeat_at"] = None
    elif changes.get("started_at", job.started_at) is not None:
        changes["last_heartbeat_at"] = now


def _end_error(job: Job, changes: Mapping[str, Any]) -> JobError | None:
    """Return the error of a job at its end; a failed job always has one."""
    error: JobError | None = changes.get("error", job.error)
    if error is None and changes["state"] is JobState.FAILED:
        return JobError(UNKNOWN_CODE, changes.get("reason") or job.reason)
    return error


def _end_times(now: datetime, retention: timedelta) -> dict[str, datetime]:
    return {"finished_at": now, "expires_at": now + retention}


def _next_revision(
    job: Job, changes: dict[str, Any], now: datetime, request: RequestId | None, actor: str, reason: str
) -> Applied:
    """Return the job with `changes`, and an entry for its history if state, attempt, cancel request or stall differ."""
    changes["revision"] = job.revision + 1
    changes["updated_at"] = now
    after = evolve(job, changes)
    error = changes.get("error")
    reason = reason or (error.message if error is not None else "")
    transition = None
    if "state" in changes or "attempt" in changes or "cancel_requested" in changes or "stalled" in changes:
        transition = _transition(job.state, after, reason, actor, request)
    return Applied(after, transition, request=request)


def _transition(
    from_state: JobState | None, job: Job, reason: str, actor: str, request: RequestId | None
) -> Transition:
    return Transition(
        from_state=from_state,
        to_state=job.state,
        reason=reason,
        transitioned_at=job.updated_at,
        attempt=job.attempt,
        actor=actor,
        revision=job.revision,
        request_id=request.value if request else "",
    )
