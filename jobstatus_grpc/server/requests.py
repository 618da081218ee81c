"""BatchUpdateJobs → commands: each update on its own, also where one of them cannot even be parsed."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from google.protobuf import duration_pb2, struct_pb2
from google.protobuf.message import DecodeError, Message
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.errors import FieldViolation, InvalidFieldError, InvalidTokenError, JobStatusError
from jobstatus_grpc.job import (
    DEFAULT_TENANT,
    WRITABLE_FIELDS,
    Cancel,
    Create,
    Delete,
    JobFilter,
    JobState,
    RequestId,
    Update,
    limits,
    validation,
)
from jobstatus_grpc.job.validation import Violations
from jobstatus_grpc.server.tokens import Scope, filter_scope, job_scope, read_token
from jobstatus_grpc.stores.interface import Position
from jobstatus_grpc.wire import convert
from jobstatus_grpc.wire.convert import filter_from_wire

DEFAULT_HEARTBEAT_INTERVAL = timedelta(seconds=30)

DEFAULT_MIN_UPDATE_INTERVAL = timedelta(milliseconds=100)

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf a request is made."""

    actor: str
    """The principal, or the peer's address; goes into the history."""
    tenant: str = DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class WatchRequest:
    """What WatchJob asks for."""

    id: str
    heartbeat_interval: timedelta
    min_update_interval: timedelta


def parse(message_class: type[M], data: bytes) -> M:
    """Return the message in `data`.

    Raises:
        InvalidFieldError: the bytes are no such message; strings must be UTF-8.
    """
    try:
        return message_class.FromString(data)
    except DecodeError:
        name = message_class.DESCRIPTOR.name
        what = f"is not a valid {name}: malformed, nested too deep, or a string that is not UTF-8"
        raise InvalidFieldError(violations=[FieldViolation("", what)]) from None


def to_create(request: pb.CreateJobRequest, caller: Caller) -> Create:
    """Return the command; its id is empty where the service must choose one."""
    violations: Violations = []
    job = request.job
    state = convert.to_state(job.state) or JobState.PENDING
    command = Create(
        id=job.id,
        state=state,  # type: ignore[arg-type]  # an unknown number is found by the check below
        name=job.name,
        reason=job.reason,
        has_progress=job.has_progress,
        progress=_progress(job, violations),
        estimated_completion=_estimated_completion(job, violations),
        heartbeat_timeout=_heartbeat_timeout(job, violations),
        labels=_labels(job),
        parent_id=job.parent_id,
        result=_result(job, violations),
        request=_request_id(request.request_id, request),
        tenant=caller.tenant,
        actor=caller.actor,
    )
    validation.check_create(command, violations)
    if job.HasField("error"):
        violations.append(FieldViolation("job.error", "a new job has no error"))
    _raise_if_any(violations)
    return command


def to_update(request: pb.UpdateJobRequest, caller: Caller) -> Update:
    """Return the command; what its mask names, or without one the writable fields that are set, are its changes."""
    violations: Violations = []
    job = request.job
    changes = _masked_fields(request, violations) if request.HasField("update_mask") else _set_fields(job, violations)
    request_id = request.request_id
    command = Update(
        id=job.id,
        changes=changes,
        attempt=request.attempt,
        expected_revision=request.expected_revision,
        request=_request_id(request_id, request) if request_id else None,
        tenant=caller.tenant,
        actor=caller.actor,
    )
    if request.allow_missing:
        labels = changes.get("labels") or _labels(job)
        command = command._replace(allow_missing=True, name=job.name, parent_id=job.parent_id, labels_if_missing=labels)
    validation.check_update(command, violations)
    if violations:
        _raise_if_any(violations)
    return command


def to_cancel(request: pb.CancelJobRequest, caller: Caller) -> Cancel:
    """Return the command."""
    violations: Violations = []
    command = Cancel(
        id=request.id,
        reason=request.reason,
        request=_request_id(request.request_id, request),
        tenant=caller.tenant,
        actor=caller.actor,
    )
    validation.check_cancel(command, violations)
    _raise_if_any(violations)
    return command


def to_delete(request: pb.DeleteJobRequest, caller: Caller) -> Delete:
    """Return the command."""
    violations: Violations = []
    command = Delete(
        id=request.id, expected_revision=request.expected_revision, tenant=caller.tenant, actor=caller.actor
    )
    validation.check_delete(command, violations)
    _raise_if_any(violations)
    return command


def to_job_id(request: pb.GetJobRequest) -> str:
    """Return the id that a request names."""
    violations: Violations = []
    validation.check_id(request.id, "id", violations)
    _raise_if_any(violations)
    return request.id


def to_watch(request: pb.WatchJobRequest) -> WatchRequest:
    """Return what to watch and how, with the defaults filled in."""
    violations: Violations = []
    validation.check_id(request.id, "id", violations)
    watch = WatchRequest(request.id, *watch_intervals(request, violations))
    _raise_if_any(violations)
    return watch


def watch_intervals(
    request: pb.WatchJobRequest | pb.WatchJobsRequest, violations: Violations
) -> tuple[timedelta, timedelta]:
    """Return heartbeat_interval and min_update_interval, with the defaults filled in, and add what is wrong."""
    heartbeat = _interval(request, "heartbeat_interval", DEFAULT_HEARTBEAT_INTERVAL, violations)
    min_update = _interval(request, "min_update_interval", DEFAULT_MIN_UPDATE_INTERVAL, violations)
    longest = limits.MAX_WATCH_INTERVAL
    validation.check_duration(heartbeat, limits.MIN_HEARTBEAT_INTERVAL, longest, "heartbeat_interval", violations)
    validation.check_duration(min_update, timedelta(0), longest, "min_update_interval", violations)
    return heartbeat, min_update


def _raise_if_any(violations: Violations) -> None:
    if violations:
        raise InvalidFieldError(violations=violations)


def _request_id(value: str, request: Message) -> RequestId | None:
    """Return the request's id with a hash of its kind and content; maps are hashed in the order of their keys."""
    if not value:
        return None
    content = request.SerializeToString(deterministic=True)
    digest = hashlib.blake2b(content, digest_size=16, person=request.DESCRIPTOR.name[:16].encode())
    return RequestId(value, digest.hexdigest())


def _set_fields(job: pb.JobStatus, violations: Violations) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for field, value in job.ListFields():
        name = field.name
        if name in _PLAIN_FIELDS:
            changes[name] = value
        elif name in WRITABLE_FIELDS:
            changes[name] = _masked(job, name, violations)
    return changes


def _masked_fields(request: pb.UpdateJobRequest, violations: Violations) -> dict[str, Any]:
    paths = request.update_mask.paths
    if len(paths) > limits.MAX_MASK_PATHS:
        what = f"must be at most {limits.MAX_MASK_PATHS} paths, are {len(paths)}"
        violations.append(FieldViolation("update_mask", what))
        return {}
    return {path: _masked(request.job, path, violations) for path in paths}


def _masked(job: pb.JobStatus, path: str, violations: Violations) -> Any:
    """Return what `path` is set to in `job`; a path that is not writable is left for the check."""
    if path in _RARER_FIELDS:
        return _RARER_FIELDS[path](job, violations)
    if path == "progress":
        return _progress(job, violations)
    if path == "state":
        return convert.to_state(job.state)
    if path == "labels":
        return _labels(job)
    return getattr(job, path) if path in WRITABLE_FIELDS else None


def _progress(job: pb.JobStatus, violations: Violations) -> float | None:
    return job.progress if job.HasField("progress") else None


def _labels(job: pb.JobStatus) -> dict[str, str]:
    """Return the labels, or of a crowd of them one more than is allowed, for the check to find."""
    if len(job.labels) <= limits.MAX_LABELS:
        return dict(job.labels)
    return dict(itertools.islice(job.labels.items(), limits.MAX_LABELS + 1))


def _estimated_completion(job: pb.JobStatus, violations: Violations) -> datetime | None:
    if not job.HasField("estimated_completion"):
        return None
    try:
        return convert.instant_from_wire(job.estimated_completion)
    except ValueError as error:
        violations.append(FieldViolation("job.estimated_completion", str(error)))
        return None


def _heartbeat_timeout(job: pb.JobStatus, violations: Violations) -> timedelta | None:
    if not job.HasField("heartbeat_timeout"):
        return None
    return _duration(job.heartbeat_timeout, "job.heartbeat_timeout", violations)


def _error(job: pb.JobStatus, violations: Violations) -> Any:
    return convert.error_from_wire(job.error) if job.HasField("error") else None


def _result(job: pb.JobStatus, violations: Violations) -> dict[str, Any] | None:
    if not job.HasField("result"):
        return None
    result: struct_pb2.Struct = job.result
    if result.ByteSize() > limits.MAX_RESULT_BYTES:
        what = f"must be at most {limits.MAX_RESULT_BYTES} bytes; put a large result behind a URL"
        violations.append(FieldViolation("job.result", what))
        return None
    return convert.result_from_wire(result)


_PLAIN_FIELDS = frozenset({"reason", "has_progress", "progress"})

_RARER_FIELDS: dict[str, Callable[[pb.JobStatus, Violations], Any]] = {
    "estimated_completion": _estimated_completion,
    "error": _error,
    "heartbeat_timeout": _heartbeat_timeout,
    "result": _result,
}


def _duration(message: duration_pb2.Duration, field: str, violations: Violations) -> timedelta | None:
    try:
        return convert.duration_from_wire(message)
    except ValueError as error:
        violations.append(FieldViolation(field, str(error)))
        return None


def _interval(
    request: pb.WatchJobRequest | pb.WatchJobsRequest, field: str, default: timedelta, violations: Violations
) -> timedelta:
    if not request.HasField(field):  # type: ignore[arg-type]
        return default
    duration = _duration(getattr(request, field), field, violations)
    return default if duration is None else duration


def to_updates(data: bytes, caller: Caller) -> list[Update | JobStatusError]:
    """Return each update of a BatchUpdateJobsRequest as a command, or as the error that its own call would have got.

    Raises:
        InvalidFieldError: there are too many, or the bytes are no batch.
    """
    updates = _parse_batch(data)
    count = len(updates)
    if count > limits.MAX_BATCH_UPDATES:
        what = f"must be at most {limits.MAX_BATCH_UPDATES} updates, are {count}; send them in several batches"
        raise InvalidFieldError(violations=[FieldViolation("updates", what)])
    commands: list[Update | JobStatusError] = []
    for update in updates:
        try:
            update = parse(pb.UpdateJobRequest, update) if isinstance(update, bytes) else update
            commands.append(to_update(update, caller))
        except InvalidFieldError as error:
            commands.append(error)
    return commands


def _parse_batch(data: bytes) -> Sequence[pb.UpdateJobRequest | bytes]:
    """Return the updates; where the batch cannot be parsed, the bytes of each: one that is bad must not stop others."""
    try:
        return parse(pb.BatchUpdateJobsRequest, data).updates
    except InvalidFieldError:
        bodies: list[bytes] = []
        position = 0
        while position < len(data) and len(bodies) <= limits.MAX_BATCH_UPDATES:
            key, position = _varint(data, position)
            size, position = _varint(data, position)
            if key != _UPDATES_KEY or position + size > len(data):
                raise
            bodies.append(data[position : position + size])
            position += size
        return bodies


# Field 1, length-delimited.
_UPDATES_KEY = 1 << 3 | 2


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return a base-128 varint, and the position behind it; 0 where there is none."""
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
    return 0, position


DEFAULT_PAGE_SIZE = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class JobsQuery:
    """What ListJobs asks for."""

    filter: JobFilter
    limit: int
    cursor: str
    """What the page follows; empty: nothing, it is the first."""
    position: Position
    """Where the feed stood before the first page was read; empty: this is the first."""
    scope: Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryQuery:
    """What ListJobTransitions asks for."""

    id: str
    limit: int
    after_revision: int
    scope: Scope


def to_jobs_query(request: pb.ListJobsRequest, caller: Caller) -> JobsQuery:
    """Return the query.

    Raises:
        InvalidFieldError: with every violation.
        InvalidTokenError: the token is not of a list with this filter.
    """
    violations: Violations = []
    job_filter = filter_from_wire(request.filter, violations)
    limit = _limit(request.page_size, violations)
    if violations:
        raise InvalidFieldError(violations=violations)
    scope = filter_scope(caller.tenant, job_filter)
    cursor, position = _read_page_token(scope, request.page_token) if request.page_token else ("", "")
    return JobsQuery(filter=job_filter, limit=limit, cursor=cursor, position=position, scope=scope)


def to_history_query(request: pb.ListJobTransitionsRequest, caller: Caller) -> HistoryQuery:
    """Return the query. Raises as `to_jobs_query`."""
    violations: Violations = []
    validation.check_id(request.id, "id", violations)
    limit = _limit(request.page_size, violations)
    if violations:
        raise InvalidFieldError(violations=violations)
    scope = job_scope(caller.tenant, request.id)
    after_revision = _read_history_token(scope, request.page_token) if request.page_token else 0
    return HistoryQuery(id=request.id, limit=limit, after_revision=after_revision, scope=scope)


def _limit(page_size: int, violations: Violations) -> int:
    if page_size < 0:
        violations.append(FieldViolation("page_size", f"must be 0 (for {DEFAULT_PAGE_SIZE}) or above"))
    return min(page_size or DEFAULT_PAGE_SIZE, limits.MAX_PAGE_SIZE)


def _read_page_token(scope: Scope, token: str) -> tuple[str, Position]:
    try:
        cursor, position = json.loads(read_token("page", scope, token))
        return str(cursor), str(position)
    except (ValueError, TypeError, RecursionError):  # forged: no token of ours holds this
        raise InvalidTokenError from None


def _read_history_token(scope: Scope, token: str) -> int:
    revision = read_token("history", scope, token)
    if not (revision.isascii() and revision.isdigit() and len(revision) < 19):
        raise InvalidTokenError
    return int(revision)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobsWatchRequest:
    """What WatchJobs asks for."""

    filter: JobFilter
    after: Position | None
    """What its resume_token stands for; None: it gave none."""
    heartbeat_interval: timedelta
    min_update_interval: timedelta
    scope: Scope
    resume_token: str


def to_jobs_watch(request: pb.WatchJobsRequest, caller: Caller) -> JobsWatchRequest:
    """Return what to watch and how, with the defaults filled in.

    Raises:
        InvalidFieldError: with every violation.
        InvalidTokenError: the token is not one for this tenant and filter.
    """
    violations: Violations = []
    job_filter = filter_from_wire(request.filter, violations)
    heartbeat, min_update = watch_intervals(request, violations)
    if violations:
        raise InvalidFieldError(violations=violations)
    scope = filter_scope(caller.tenant, job_filter)
    token = request.resume_token
    return JobsWatchRequest(
        filter=job_filter,
        after=read_token("resume", scope, token) if token else None,
        heartbeat_interval=heartbeat,
        min_update_interval=min_update,
        scope=scope,
        resume_token=token,
    )
