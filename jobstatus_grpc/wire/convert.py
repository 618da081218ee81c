"""Jobs, filters, history entries and identities to protobuf and back, for the server and the clients."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from google.protobuf import duration_pb2, struct_pb2, timestamp_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Identity, Role
from jobstatus_grpc.errors import FieldViolation
from jobstatus_grpc.job import BLANK, Job, JobError, JobFilter, JobState, Transition, evolve, limits, validation
from jobstatus_grpc.job.validation import Violations

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

_SECONDS_PER_DAY = 86400
_MICROSECOND = timedelta(microseconds=1)
_LAST_MICROSECOND = datetime.max.replace(tzinfo=timezone.utc)

_STATES = {int(state): state for state in JobState}
_ROLES = {int(role): role for role in Role}


def to_state(number: int) -> JobState | int:
    """Return the state with this number on the wire, or the number if there is no such state."""
    return _STATES.get(number, number)


def job_to_wire(job: Job, message: pb.JobStatus) -> None:
    """Write `job` into `message`, which must be empty."""
    lasting_to_wire(job, message)
    report_to_wire(job, message)


def report_to_wire(job: Job, message: pb.JobStatus) -> None:
    """Write REPORT_FIELDS, and DERIVED_FIELDS of a job that has them."""
    message.revision = job.revision
    instant_to_wire(job.updated_at, message.updated_at)
    if job.reason:
        message.reason = job.reason
    if job.reports_progress:
        message.reports_progress = True
        if job.progress is not None:
            message.progress = job.progress
    if job.projected_completion is not None:
        instant_to_wire(job.projected_completion, message.projected_completion)
    if job.estimated_completion is not None:
        instant_to_wire(job.estimated_completion, message.estimated_completion)
    if job.last_heartbeat_at is not None:
        instant_to_wire(job.last_heartbeat_at, message.last_heartbeat_at)
    if job.children:
        message.children.update(job.children)
    if job.children_progress is not None:
        message.children_progress = job.children_progress


def lasting_to_wire(job: Job, message: pb.JobStatus) -> None:
    """Write the fields that a report of progress does not change."""
    message.id = job.id
    message.state = job.state  # type: ignore[assignment]  # the numbers are the enum's
    instant_to_wire(job.created_at, message.created_at)
    if job.name:
        message.name = job.name
    if job.started_at is not None:
        message.attempt = job.attempt
        instant_to_wire(job.started_at, message.started_at)
    if job.finished_at is not None:
        message.done = True
        instant_to_wire(job.finished_at, message.finished_at)
    if job.labels:
        message.labels.update(job.labels)
    if job.parent_id:
        message.parent_id = job.parent_id
    _rarer_fields_to_wire(job, message)
    if job.result is not None:
        message.result.CopyFrom(result_to_wire(job.result))


def _rarer_fields_to_wire(job: Job, message: pb.JobStatus) -> None:
    if job.cancel_requested:
        message.cancel_requested = True
    if job.cancel_reason:
        message.cancel_reason = job.cancel_reason
    if job.stalled:
        message.stalled = True
    if job.heartbeat_timeout is not None:
        message.heartbeat_timeout.CopyFrom(duration_to_wire(job.heartbeat_timeout))
    if job.expires_at is not None:
        instant_to_wire(job.expires_at, message.expires_at)
    if job.error is not None:
        message.error.CopyFrom(error_to_wire(job.error))
    if job.trace_parent:
        message.trace_parent = job.trace_parent


def job_from_wire(message: pb.JobStatus) -> Job:
    """Return the job that a server sent.

    A state that this version does not know is read as ABORTED if the job is done, as IN_PROGRESS if not.
    """
    state = _STATES.get(message.state) or (JobState.ABORTED if message.done else JobState.IN_PROGRESS)
    has = message.HasField
    return evolve(BLANK, {
        "id": message.id,
        "state": state,
        "created_at": instant_from_wire(message.created_at),
        "updated_at": instant_from_wire(message.updated_at),
        "name": message.name,
        "reason": message.reason,
        "reports_progress": message.reports_progress,
        "progress": message.progress if has("progress") else None,
        "estimated_completion":
            instant_from_wire(message.estimated_completion) if has("estimated_completion") else None,
        "error": error_from_wire(message.error) if has("error") else None,
        "started_at": instant_from_wire(message.started_at) if has("started_at") else None,
        "finished_at": instant_from_wire(message.finished_at) if has("finished_at") else None,
        "attempt": message.attempt,
        "cancel_requested": message.cancel_requested,
        "cancel_reason": message.cancel_reason,
        "stalled": message.stalled,
        "heartbeat_timeout": duration_from_wire(message.heartbeat_timeout) if has("heartbeat_timeout") else None,
        "revision": message.revision,
        "labels": dict(message.labels.items()),
        "parent_id": message.parent_id,
        "result": result_from_wire(message.result) if has("result") else None,
        "expires_at": instant_from_wire(message.expires_at) if has("expires_at") else None,
        "trace_parent": message.trace_parent,
        "last_heartbeat_at": instant_from_wire(message.last_heartbeat_at) if has("last_heartbeat_at") else None,
        "projected_completion":
            instant_from_wire(message.projected_completion) if has("projected_completion") else None,
        "children": dict(message.children.items()),
        "children_progress": message.children_progress if has("children_progress") else None,
    })  # fmt: skip


def instant_to_wire(instant: datetime, message: timestamp_pb2.Timestamp) -> None:
    """Write an aware datetime into `message`, exactly."""
    try:
        since = instant - EPOCH
    except TypeError:
        raise TypeError(f"{instant!r} must be aware: write datetime.now(timezone.utc), not datetime.now()") from None
    message.seconds = since.days * _SECONDS_PER_DAY + since.seconds
    if since.microseconds:
        message.nanos = since.microseconds * 1000
    elif not message.seconds:
        message.SetInParent()


def instant_from_wire(message: timestamp_pb2.Timestamp) -> datetime:
    """Return the instant in UTC, truncated to microseconds.

    Raises:
        ValueError: not a Timestamp as timestamp.proto defines it: years 1 to 9999, nanos 0 to 999,999,999.
    """
    nanos = message.nanos
    if not 0 <= nanos <= 999_999_999:
        raise ValueError("nanos must be 0 to 999,999,999")
    try:
        return EPOCH + timedelta(0, message.seconds, nanos // 1000)
    except OverflowError:
        raise ValueError("must be in the years 1 to 9999") from None


@functools.lru_cache(maxsize=256)  # a fleet of workers uses few different timeouts
def duration_to_wire(duration: timedelta) -> duration_pb2.Duration:
    """Return `duration` as a message, exactly. The message is shared: do not change it."""
    message = duration_pb2.Duration()
    message.FromTimedelta(duration)
    return message


def duration_from_wire(message: duration_pb2.Duration) -> timedelta:
    """Return the duration, truncated to microseconds.

    Raises:
        ValueError: not a Duration as duration.proto defines it: about ±10,000 years, nanos of the same sign.
    """
    return _duration(message.seconds, message.nanos)


@functools.lru_cache(maxsize=256)  # as duration_to_wire
def _duration(seconds: int, nanos: int) -> timedelta:
    if abs(seconds) > 315_576_000_000 or abs(nanos) > 999_999_999 or seconds * nanos < 0:
        raise ValueError("is not a valid Duration")
    return timedelta(seconds=seconds, microseconds=int(nanos / 1000))


def error_to_wire(error: JobError) -> pb.JobError:
    """Return `error` as a message."""
    return pb.JobError(code=error.code, message=error.message, reason=error.reason)


def error_from_wire(message: pb.JobError) -> JobError:
    """Return the error; code 0 becomes UNKNOWN."""
    return JobError(message.code or limits.UNKNOWN_CODE, message.message, message.reason)


def transition_to_wire(transition: Transition) -> pb.JobTransition:
    """Return `transition` as a message."""
    message = pb.JobTransition(
        to_state=transition.to_state,  # type: ignore[arg-type]  # the numbers are the enum's
        reason=transition.reason,
        attempt=transition.attempt,
        actor=transition.actor,
        revision=transition.revision,
    )
    if transition.from_state is not None:
        message.from_state = transition.from_state  # type: ignore[assignment]
    instant_to_wire(transition.transitioned_at, message.transitioned_at)
    return message


def result_to_wire(values: Mapping[str, Any]) -> struct_pb2.Struct:
    """Return a result as a message."""
    struct = struct_pb2.Struct()
    struct.update(values)
    return struct


def result_from_wire(message: struct_pb2.Struct) -> dict[str, Any]:
    """Return a result as plain dicts, lists, strings, floats, bools and None."""
    return {name: _plain(value) for name, value in message.fields.items()}


def _plain(value: struct_pb2.Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return result_from_wire(value.struct_value)
    if kind == "list_value":
        return [_plain(item) for item in value.list_value.values]
    return None if kind in ("null_value", None) else getattr(value, kind)


def identity_to_wire(identity: Identity) -> pb.CallerIdentity:
    """Return `identity` as a message."""
    message = pb.CallerIdentity(
        principal=identity.principal,
        tenant=identity.tenant,
        role=identity.role,  # type: ignore[arg-type]  # the numbers are the enum's
        only=None if identity.only is None else filter_to_wire(identity.only),
        authenticated=identity.authenticated,
    )
    if identity.expires_at is not None:
        instant_to_wire(identity.expires_at, message.expires_at)
    return message


def identity_from_wire(message: pb.CallerIdentity) -> Identity:
    """Return the identity that a server sent; a role that this version does not know is read as WATCHER."""
    return Identity(
        principal=message.principal,
        tenant=message.tenant,
        role=_ROLES.get(message.role, Role.WATCHER),
        only=filter_from_wire(message.only, []) if message.HasField("only") else None,
        expires_at=instant_from_wire(message.expires_at) if message.HasField("expires_at") else None,
        authenticated=message.authenticated,
    )


def filter_from_wire(message: pb.JobFilter, violations: Violations) -> JobFilter:
    """Return the filter without invalid values, and add a violation for each."""
    _check_values(message.ids, limits.MAX_FILTER_IDS, validation.check_id, "filter.ids", violations)
    _check_values(message.names, limits.MAX_FILTER_NAMES, _check_name, "filter.names", violations)
    _check_values(message.states, limits.MAX_FILTER_STATES, _check_state, "filter.states", violations)
    _check_name(message.name_prefix, "filter.name_prefix", violations)
    labels = dict(itertools.islice(message.labels.items(), limits.MAX_LABELS + 1))
    validation.check_labels(labels, "filter.labels", violations)
    if message.parent_id:
        validation.check_id(message.parent_id, "filter.parent_id", violations)
    has_created_after, has_created_before = message.HasField("created_after"), message.HasField("created_before")
    return JobFilter(
        ids=message.ids[: limits.MAX_FILTER_IDS],
        states=_states(message.states[: limits.MAX_FILTER_STATES]),
        names=message.names[: limits.MAX_FILTER_NAMES],
        name_prefix=message.name_prefix,
        labels=labels,
        parent_id=message.parent_id,
        created_after=_bound(message.created_after, "filter.created_after", violations) if has_created_after else None,
        created_before=(
            _bound(message.created_before, "filter.created_before", violations) if has_created_before else None
        ),
        done=message.done if message.HasField("done") else None,
        stalled=message.stalled if message.HasField("stalled") else None,
    )


def filter_to_wire(job_filter: JobFilter) -> pb.JobFilter:
    """Return `job_filter` as a message."""
    message = pb.JobFilter(
        ids=sorted(job_filter.ids),
        states=sorted(int(state) for state in job_filter.states),  # type: ignore[misc]  # the numbers are the enum's
        names=sorted(job_filter.names),
        name_prefix=job_filter.name_prefix,
        labels=job_filter.labels,
        parent_id=job_filter.parent_id,
        done=job_filter.done,
        stalled=job_filter.stalled,
    )
    if job_filter.created_after is not None:
        instant_to_wire(job_filter.created_after, message.created_after)
    if job_filter.created_before is not None:
        instant_to_wire(job_filter.created_before, message.created_before)
    return message


def _check_values(
    values: Sequence[str] | Sequence[int],
    max_values: int,
    check: Callable[..., None],
    field: str,
    violations: Violations,
) -> None:
    """Add a violation for the first invalid value, and one if there are too many."""
    if len(values) > max_values:
        violations.append(FieldViolation(field, f"must be at most {max_values} values, are {len(values)}"))
    for number, value in enumerate(values[:max_values], start=1):
        found: Violations = []
        check(value, field, found)
        if found:
            violations.append(FieldViolation(field, f"{found[0].description}; value {number} is not"))
            return


def _check_name(value: str, field: str, violations: Violations) -> None:
    validation.check_text(value, limits.MAX_NAME_BYTES, field, violations)


def _check_state(value: int, field: str, violations: Violations) -> None:
    if not isinstance(to_state(value), JobState):
        violations.append(FieldViolation(field, f"must be one of {validation.STATE_NAMES}"))


def _states(numbers: Sequence[int]) -> list[JobState]:
    states = (to_state(number) for number in numbers)
    return [state for state in states if isinstance(state, JobState)]


def _bound(message: timestamp_pb2.Timestamp, field: str, violations: Violations) -> datetime | None:
    """Return the instant rounded up to microseconds, the precision of created_at."""
    try:
        instant = instant_from_wire(message)
        # Java's greatest Timestamp, used for "no bound", lies within the last microsecond: there is nothing above it.
        return instant + _MICROSECOND if message.nanos % 1000 and instant < _LAST_MICROSECOND else instant
    except (ValueError, OverflowError):
        violations.append(FieldViolation(field, "must be in the years 1 to 9999, with nanos of 0 to 999,999,999"))
        return None
