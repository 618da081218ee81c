"""Requests to checked commands and queries, RPC by RPC in the order of the service; `responses` is the way back.

Each function fills in the defaults, and raises InvalidFieldError with every violation in the request.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from google.protobuf import duration_pb2, struct_pb2
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Identity, Role
from jobstatus_grpc.errors import FieldViolation, InvalidFieldError, InvalidTokenError, JobStatusError
from jobstatus_grpc.job import (
    CREATION_FIELDS,
    WRITABLE_FIELDS,
    Cancel,
    Create,
    Delete,
    JobError,
    JobFilter,
    JobState,
    RequestId,
    Transition,
    Update,
    limits,
    validation,
)
from jobstatus_grpc.job.validation import Violations
from jobstatus_grpc.server.access import LEAST_ROLES
from jobstatus_grpc.server.services import SERVICES
from jobstatus_grpc.server.tokens import Scope, filter_scope, job_scope, read_token, write_token
from jobstatus_grpc.service import HistoryPlace
from jobstatus_grpc.stores.interface import Position
from jobstatus_grpc.wire import convert
from jobstatus_grpc.wire.convert import filter_from_wire

DEFAULT_PAGE_SIZE = 50
DEFAULT_HEARTBEAT_INTERVAL = timedelta(seconds=30)
DEFAULT_MIN_UPDATE_INTERVAL = timedelta(milliseconds=100)

M = TypeVar("M", bound=Message)


def parse(message_class: type[M], data: bytes) -> M:
    """Return the message in `data`; raise InvalidFieldError if it cannot be parsed."""
    try:
        return message_class.FromString(data)
    except DecodeError:
        raise _malformed(message_class) from None


def _malformed(message_class: type[Message]) -> InvalidFieldError:
    name = message_class.DESCRIPTOR.name
    what = f"is not a valid {name}: malformed, nested too deep, or a string that is not UTF-8"
    return InvalidFieldError(violations=[FieldViolation("", what)])


_NAMING_CLASSES: Mapping[str, type[Message]] = {
    method.name: GetMessageClass(method.input_type)
    for service in SERVICES
    for method in service.methods
    if not {"id", "job", "name", "request_id"}.isdisjoint(method.input_type.fields_by_name)
}
"""The requests that may name one job or have a request_id, by the RPC."""


def subject_of(method: str, data: bytes, reply: bytes | None) -> tuple[str, str]:
    """Return the job's id and the request_id of a call for the log; each is empty if the call has none, or several."""
    try:
        request: Any = _NAMING_CLASSES[method].FromString(data)
        names = request.DESCRIPTOR.fields_by_name
        if "name" in names:  # of an operation
            job_id = request.name.partition("/")[2]
        else:
            job_id = request.id if "id" in names else request.job.id if "job" in names else ""
        if not job_id and method == "CreateJob" and reply:
            job_id = pb.CreateJobResponse.FromString(reply).job.id
        return job_id, request.request_id if "request_id" in names else ""
    except (DecodeError, KeyError):
        return "", ""


def _raise_if_any(violations: Violations) -> None:
    if violations:
        raise InvalidFieldError(violations=violations)


def _request_id(value: str, request: Message) -> RequestId | None:
    """Return the request_id with a hash of the request without the job's trace_parent, None if it is empty.

    A traced client that sends a request again may do so in another span, which is then the job's trace_parent.
    """
    if not value:
        return None
    if isinstance(request, (pb.CreateJobRequest, pb.UpdateJobRequest)):
        request = _without_trace_parent(request)
    content = request.SerializeToString(deterministic=True)  # maps in the order of their keys
    digest = hashlib.blake2b(content, digest_size=16, person=request.DESCRIPTOR.name[:16].encode())
    return RequestId(value, digest.hexdigest())


def _without_trace_parent(request: pb.CreateJobRequest | pb.UpdateJobRequest) -> Message:
    paths = request.update_mask.paths if isinstance(request, pb.UpdateJobRequest) else ()
    if not request.job.trace_parent and "trace_parent" not in paths:
        return request
    bare = deepcopy(request)
    bare.job.ClearField("trace_parent")
    if isinstance(bare, pb.UpdateJobRequest):
        bare.update_mask.paths[:] = [path for path in paths if path != "trace_parent"]
    return bare


def to_create(request: pb.CreateJobRequest, caller: Identity) -> Create:
    """Return the command; its id is empty if the service has to choose one."""
    violations: Violations = []
    command = Create(
        **{"id": "", **_set_fields(request.job, CREATION_FIELDS, violations)},
        request=_request_id(request.request_id, request),
        tenant=caller.tenant,
        actor=caller.principal,
        only=caller.only,
    )
    validation.check_create(command, violations)
    if request.job.HasField("error"):
        violations.append(FieldViolation("job.error", "a new job has no error"))
    _raise_if_any(violations)
    return command


def to_job_id(request: pb.GetJobRequest) -> str:
    """Return the id of the job to read."""
    violations: Violations = []
    validation.check_id(request.id, "id", violations)
    _raise_if_any(violations)
    return request.id


def to_update(request: pb.UpdateJobRequest, caller: Identity) -> Update:
    """Return the command; its changes are the fields in the mask, without one the writable fields that are set."""
    violations: Violations = []
    job = request.job
    has_mask = request.HasField("update_mask")
    changes = _masked_fields(request, violations) if has_mask else _set_fields(job, WRITABLE_FIELDS, violations)
    request_id = request.request_id
    command = Update(
        id=job.id,
        changes=changes,
        attempt=request.attempt,
        expected_revision=request.expected_revision,
        request=_request_id(request_id, request) if request_id else None,
        tenant=caller.tenant,
        actor=caller.principal,
        only=caller.only,
    )
    if request.allow_missing:
        labels = changes.get("labels") or _labels(job, violations)
        command = command._replace(allow_missing=True, name=job.name, parent_id=job.parent_id, labels_if_missing=labels)
    validation.check_update(command, violations)
    _raise_if_any(violations)
    return command


def _set_fields(job: pb.JobStatus, names: Collection[str], violations: Violations) -> dict[str, Any]:
    """Return the values of those fields among `names` that are set."""
    fields: dict[str, Any] = {}
    for field, value in job.ListFields():
        name = field.name
        if name in names:
            read = _READERS.get(name)
            fields[name] = value if read is None else read(job, violations)
    return fields


_NAME_OF_PATH: Mapping[str, str] = {
    re.sub("[A-Z]", lambda upper: f"_{upper[0].lower()}", field.json_name): field.name
    for field in pb.JobStatus.DESCRIPTOR.fields
}
"""The field that each path of a mask written in JSON stands for: a JSON reader makes `foo_bar` of `fooBar`, by spelling
alone, which is not the field's name where its json_name is declared."""


def _masked_fields(request: pb.UpdateJobRequest, violations: Violations) -> dict[str, Any]:
    paths = request.update_mask.paths
    if len(paths) > limits.MAX_MASK_PATHS:
        what = f"must be at most {limits.MAX_MASK_PATHS} paths, are {len(paths)}"
        violations.append(FieldViolation("update_mask", what))
        return {}
    names = [_NAME_OF_PATH.get(path, path) for path in paths]
    # check_update refuses a path that is not writable.
    return {name: _read_field(request.job, name, violations) if name in WRITABLE_FIELDS else None for name in names}


def _read_field(job: pb.JobStatus, name: str, violations: Violations) -> Any:
    """Return the value to write to the field."""
    if name in _READERS:
        return _READERS[name](job, violations)
    if name == "progress" and not job.HasField("progress"):
        return None
    return getattr(job, name)


def _state(job: pb.JobStatus, violations: Violations) -> JobState | int:
    return convert.to_state(job.state)


def _estimated_completion(job: pb.JobStatus, violations: Violations) -> datetime | None:
    if not job.HasField("estimated_completion"):
        return None
    try:
        return convert.instant_from_wire(job.estimated_completion)
    except ValueError as error:
        violations.append(FieldViolation("job.estimated_completion", str(error)))
        return None


def _error(job: pb.JobStatus, violations: Violations) -> JobError | None:
    return convert.error_from_wire(job.error) if job.HasField("error") else None


def _heartbeat_timeout(job: pb.JobStatus, violations: Violations) -> timedelta | None:
    if not job.HasField("heartbeat_timeout"):
        return None
    return _duration(job.heartbeat_timeout, "job.heartbeat_timeout", violations)


def _labels(job: pb.JobStatus, violations: Violations) -> dict[str, str]:
    """Return the labels; of too many only one more than allowed, which the check refuses."""
    if len(job.labels) <= limits.MAX_LABELS:
        return dict(job.labels.items())  # without items() it takes seven times as long
    return dict(itertools.islice(job.labels.items(), limits.MAX_LABELS + 1))


def _result(job: pb.JobStatus, violations: Violations) -> dict[str, Any] | None:
    if not job.HasField("result"):
        return None
    result: struct_pb2.Struct = job.result
    if result.ByteSize() > limits.MAX_RESULT_BYTES:
        what = f"must be at most {limits.MAX_RESULT_BYTES} bytes; put a large result behind a URL"
        violations.append(FieldViolation("job.result", what))
        return None
    return convert.result_from_wire(result)


_READERS: Mapping[str, Callable[[pb.JobStatus, Violations], Any]] = {
    "state": _state,
    "estimated_completion": _estimated_completion,
    "error": _error,
    "heartbeat_timeout": _heartbeat_timeout,
    "labels": _labels,
    "result": _result,
}
"""The fields that are converted or checked when they are read; the others are read as they are."""


def to_updates(data: bytes, caller: Identity) -> list[Update | JobStatusError]:
    """Return each update of a BatchUpdateJobsRequest as a command, or as the error that refuses it.

    Raises:
        InvalidFieldError: there are too many updates, or the bytes are not a batch.
    """
    updates = _parse_batch(data)
    if len(updates) > limits.MAX_BATCH_UPDATES:
        what = f"must be at most {limits.MAX_BATCH_UPDATES} updates; send them in several batches"
        raise InvalidFieldError(violations=[FieldViolation("updates", what)])
    commands: list[Update | JobStatusError] = []
    for update in updates:
        try:
            update = parse(pb.UpdateJobRequest, update) if isinstance(update, bytes) else update
            commands.append(to_update(update, caller))
        except InvalidFieldError as error:
            commands.append(error)
    return commands


UNCOUNTED_BYTES = 64 * 1024
"""Of a batch: one that is not larger is parsed without counting its updates before."""

MAX_UNKNOWN_FIELDS = 100
"""Of a batch that is larger than UNCOUNTED_BYTES, beside its updates: a newer client may send some."""


def _parse_batch(data: bytes) -> Sequence[pb.UpdateJobRequest | bytes]:
    """Return the updates, or the bytes of each if the batch cannot be parsed: a bad one must not refuse the rest.

    If there are too many, those of one more than a batch may have.
    """
    # Parsing a million empty updates would take 270 MB.
    if len(data) > UNCOUNTED_BYTES:
        first = _bodies(data)
        if first is None:
            raise _malformed(pb.BatchUpdateJobsRequest)
        if len(first) > limits.MAX_BATCH_UPDATES:
            return first
    try:
        return parse(pb.BatchUpdateJobsRequest, data).updates
    except InvalidFieldError:
        bodies = _bodies(data)
        if bodies is None:
            raise
        return bodies


def _bodies(data: bytes) -> Sequence[bytes] | None:
    """Return the bytes of each update, up to one more than a batch may have; None: they are not a batch."""
    bodies: list[bytes] = []
    position = unknown_fields = 0
    while position < len(data) and len(bodies) <= limits.MAX_BATCH_UPDATES:
        key, position = _varint(data, position)
        wire_type = key & 7
        size = _FIXED_SIZES.get(wire_type, 0)
        if wire_type == _LENGTH_DELIMITED:
            size, position = _varint(data, position)
        elif wire_type == _VARINT:
            _, position = _varint(data, position)
        elif not size:
            return None
        unknown_fields += key != _UPDATES_TAG
        if key < _FIRST_KEY or position + size > len(data) or unknown_fields > MAX_UNKNOWN_FIELDS:
            return None
        if key == _UPDATES_TAG:
            bodies.append(data[position : position + size])
        position += size
    return bodies


def updates_in(method: str, data: bytes) -> int:
    """Return the number of changes that a request of an RPC asks for."""
    if method != "BatchUpdateJobs":
        return int(LEAST_ROLES[method] > Role.WATCHER)
    try:
        return min(len(_parse_batch(data)), limits.MAX_BATCH_UPDATES)
    except InvalidFieldError:
        return 1


_VARINT = 0

_LENGTH_DELIMITED = 2

_FIXED_SIZES = {1: 8, 5: 4}
"""By the wire type. The others are those of groups, which proto3 does not have."""

_FIRST_KEY = 1 << 3
"""Of field 1, the lowest."""

_UPDATES_TAG = 1 << 3 | _LENGTH_DELIMITED
"""Field 1, length-delimited."""


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the base-128 varint at `position`, 0 if there is none, and the position after it."""
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
    return 0, position


def to_cancel(request: pb.CancelJobRequest, caller: Identity) -> Cancel:
    """Return the command."""
    violations: Violations = []
    command = Cancel(
        id=request.id,
        reason=request.reason,
        force=request.force,
        cascade=request.cascade,
        request=_request_id(request.request_id, request),
        tenant=caller.tenant,
        actor=caller.principal,
        only=caller.only,
    )
    validation.check_cancel(command, violations)
    _raise_if_any(violations)
    return command


def to_delete(request: pb.DeleteJobRequest, caller: Identity) -> Delete:
    """Return the command."""
    violations: Violations = []
    command = Delete(
        id=request.id,
        expected_revision=request.expected_revision,
        tenant=caller.tenant,
        actor=caller.principal,
        only=caller.only,
    )
    validation.check_delete(command, violations)
    _raise_if_any(violations)
    return command


@dataclass(frozen=True, slots=True, kw_only=True)
class JobsQuery:
    """A ListJobsRequest."""

    filter: JobFilter
    limit: int
    cursor: str
    """The end of the previous page; empty: this is the first."""
    position: Position
    """The position of the feed before the first page was read; empty: this is the first."""
    scope: Scope


def to_jobs_query(request: pb.ListJobsRequest, caller: Identity) -> JobsQuery:
    """Return the query; raise InvalidTokenError if the page token was made for another filter."""
    violations: Violations = []
    job_filter = filter_from_wire(request.filter, violations)
    return jobs_query(job_filter, request.page_size, request.page_token, caller, violations)


def jobs_query(
    job_filter: JobFilter, page_size: int, page_token: str, caller: Identity, violations: Violations
) -> JobsQuery:
    """Return the query for a page of the jobs that match and that the caller may see; raise InvalidFieldError with the
    violations found so far, if any, and those found here.
    """
    limit = _limit(page_size, violations)
    _raise_if_any(violations)
    if caller.only is not None:
        job_filter &= caller.only
    scope = filter_scope(caller.tenant, job_filter)
    cursor, position = _read_page_token(scope, page_token) if page_token else ("", "")
    return JobsQuery(filter=job_filter, limit=limit, cursor=cursor, position=position, scope=scope)


def _read_page_token(scope: Scope, token: str) -> tuple[str, Position]:
    try:
        cursor, position = json.loads(read_token("page", scope, token))
        return str(cursor), str(position)
    except (ValueError, TypeError, RecursionError):  # forged: the server makes no such token
        raise InvalidTokenError from None


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryQuery:
    """A ListJobTransitionsRequest."""

    id: str
    limit: int
    after: HistoryPlace | None
    scope: Scope


def to_history_query(request: pb.ListJobTransitionsRequest, caller: Identity) -> HistoryQuery:
    """Return the query; raise InvalidTokenError if the page token was made for another job."""
    violations: Violations = []
    validation.check_id(request.id, "id", violations)
    limit = _limit(request.page_size, violations)
    _raise_if_any(violations)
    scope = job_scope(caller.tenant, request.id)
    after = _read_history_token(scope, request.page_token) if request.page_token else None
    return HistoryQuery(id=request.id, limit=limit, after=after, scope=scope)


def _read_history_token(scope: Scope, token: str) -> HistoryPlace:
    revision, _, transitioned_at = read_token("history", scope, token).partition(" ")
    try:
        if not (revision.isascii() and revision.isdigit() and len(revision) < 19):
            raise ValueError
        return HistoryPlace(int(revision), datetime.fromisoformat(transitioned_at))
    except ValueError:
        raise InvalidTokenError from None


def write_history_token(scope: Scope, entry: Transition) -> str:
    """Return the page token for the history after `entry`."""
    return write_token("history", scope, f"{entry.revision} {entry.transitioned_at.isoformat()}")


def _limit(page_size: int, violations: Violations) -> int:
    if page_size < 0:
        violations.append(FieldViolation("page_size", f"must be 0 (for {DEFAULT_PAGE_SIZE}) or above"))
    return min(page_size or DEFAULT_PAGE_SIZE, limits.MAX_PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class WatchRequest:
    """A WatchJobRequest."""

    id: str
    heartbeat_interval: timedelta
    min_update_interval: timedelta


def to_watch(request: pb.WatchJobRequest) -> WatchRequest:
    """Return the job to watch and the intervals."""
    violations: Violations = []
    validation.check_id(request.id, "id", violations)
    watch = WatchRequest(request.id, *_intervals(request, violations))
    _raise_if_any(violations)
    return watch


@dataclass(frozen=True, slots=True, kw_only=True)
class JobsWatchRequest:
    """A WatchJobsRequest."""

    filter: JobFilter
    after: Position | None
    """The position in the resume_token; None: it is empty."""
    heartbeat_interval: timedelta
    min_update_interval: timedelta
    scope: Scope
    resume_token: str


def to_jobs_watch(request: pb.WatchJobsRequest, caller: Identity) -> JobsWatchRequest:
    """Return the jobs to watch and the intervals; raise InvalidTokenError if the token was made for another filter."""
    violations: Violations = []
    job_filter = filter_from_wire(request.filter, violations)
    heartbeat, min_update = _intervals(request, violations)
    _raise_if_any(violations)
    if caller.only is not None:
        job_filter &= caller.only
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


def _intervals(
    request: pb.WatchJobRequest | pb.WatchJobsRequest, violations: Violations
) -> tuple[timedelta, timedelta]:
    """Return heartbeat_interval and min_update_interval."""
    heartbeat = _interval(request, "heartbeat_interval", DEFAULT_HEARTBEAT_INTERVAL, violations)
    min_update = _interval(request, "min_update_interval", DEFAULT_MIN_UPDATE_INTERVAL, violations)
    longest = limits.MAX_WATCH_INTERVAL
    validation.check_duration(heartbeat, limits.MIN_HEARTBEAT_INTERVAL, longest, "heartbeat_interval", violations)
    validation.check_duration(min_update, timedelta(0), longest, "min_update_interval", violations)
    return heartbeat, min_update


def _interval(
    request: pb.WatchJobRequest | pb.WatchJobsRequest, field: str, default: timedelta, violations: Violations
) -> timedelta:
    if not request.HasField(field):  # type: ignore[arg-type]
        return default
    duration = _duration(getattr(request, field), field, violations)
    return default if duration is None else duration


def _duration(message: duration_pb2.Duration, field: str, violations: Violations) -> timedelta | None:
    try:
        return convert.duration_from_wire(message)
    except ValueError as error:
        violations.append(FieldViolation(field, str(error)))
        return None
