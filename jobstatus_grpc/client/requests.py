"""The client's half of the wire: arguments to requests, responses to values. No I/O."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from datetime import datetime, timezone
from operator import attrgetter
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, TypeVar

from google.protobuf.message import Message
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Identity
from jobstatus_grpc.client import values
from jobstatus_grpc.errors import (
    MAX_LISTED_VIOLATIONS,
    DataLossError,
    FieldViolation,
    InternalError,
    InvalidFieldError,
    JobStatusError,
)
from jobstatus_grpc.job import Job, JobError, JobFilter, JobState, Transition, limits, to_state
from jobstatus_grpc.job.ids import new_uuid7
from jobstatus_grpc.job.model import ERROR_STATES, TERMINAL_STATES
from jobstatus_grpc.job.validation import Violations, clean_text
from jobstatus_grpc.wire import convert, status

LARGEST_PAGE = 1000
"""Entries: the service puts no more into one page."""

MAX_CALL_BYTES = 1_000_000
"""Of one call that writes. Proxies refuse larger bodies: nginx by default those beyond 1 MiB with gRPC's framing."""

MAX_FIELD_HEADER_BYTES = 5
"""The tag and length of an update in its batch."""


class Unset(enum.Enum):
    """The type of UNSET: an argument that was left out, where None has another meaning."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


@dataclass(frozen=True, slots=True)
class JobUpdate:
    """One update of a job: the arguments of the clients' `update`, which explains each.

    A field left out is not written; None (or "" or {}) clears it.
    """

    id: str
    _: KW_ONLY
    state: JobState | str | Unset = UNSET
    reason: str | Unset | None = UNSET
    reports_progress: bool | Unset | None = UNSET
    progress: float | Unset | None = UNSET
    estimated_completion: datetime | Unset | None = UNSET
    error: JobError | str | Unset | None = UNSET
    heartbeat_timeout_seconds: float | Unset | None = UNSET
    labels: Mapping[str, str] | Unset | None = UNSET
    result: Mapping[str, Any] | Unset | None = UNSET
    trace_parent: str | Unset | None = UNSET
    attempt: int = 0
    expected_revision: int = 0
    request_id: str | None = None
    allow_missing: bool = False
    name: str = ""
    parent_id: str = ""


# An alias, because in the clients `list` is a method, which some type checkers would take for the type.
BatchResults: TypeAlias = list[Job | JobStatusError]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPage:
    """A page of the jobs that match, newest created first. It may be short or empty without being the last."""

    jobs: tuple[Job, ...]
    next_page_token: str
    """"": this is the last page."""
    resume_token: str
    """For `watch_jobs` with the same filter: changes since before the first page was read."""
    unreachable: tuple[str, ...] = ()
    """The ids of jobs that are left out because what is stored of them is damaged; "" where the id cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionPage:
    """A page of a job's history, oldest first."""

    transitions: tuple[Transition, ...]
    next_page_token: str
    """"": this is the last page."""


class JobChangeType(enum.IntEnum):
    """The kind of a JobChange. The numbers are those of the API's JobEventType."""

    SNAPSHOT = 1
    """The job as it was when the watch began."""
    UPDATED = 2
    """The job after a change, or a job that now matches the filter."""
    REMOVED = 3
    """The job no longer matches the filter, was deleted, or has expired."""
    SYNCED = 4
    """All snapshots, or all changes missed during an interruption, have been delivered; what follows is new."""
    RESET = 6
    """Discard all jobs: snapshots of those that still exist follow."""


@dataclass(frozen=True, slots=True)
class JobChange:
    """A change of one of the jobs that match."""

    type: JobChangeType
    id: str = ""
    """"" in SYNCED and RESET."""
    revision: int = 0
    """The job's; for a deleted or expired job its last plus one. 0 in SYNCED and RESET."""
    job: Job | None = None
    """None in SYNCED and RESET, and where the job was deleted or has expired."""


def _field_of(argument: str) -> str:
    return argument.removesuffix("_seconds")


_MASKED_ARGUMENTS = tuple(field.name for field in fields(JobUpdate) if field.default is UNSET)
"""The arguments whose fields an update_mask names if they are given."""

_masked_values_of = attrgetter(*_MASKED_ARGUMENTS)


def create_request(request_id: str | None, **arguments: Any) -> pb.CreateJobRequest:
    """Return a request that creates a job with these arguments of the clients' `create`; UNSET is the same as None.

    Its request_id is a new one unless one is given.

    Raises:
        InvalidFieldError: some values cannot be sent.
    """
    violations: Violations = []
    request = pb.CreateJobRequest()
    _set_request_id(request, request_id, violations)
    _write_fields(request.job, arguments.items(), violations)
    _check_size(request, violations)
    values.raise_if_any(violations)
    return request


def update_request(update: JobUpdate) -> pb.UpdateJobRequest:
    """Return a request that writes the fields given in `update`, with a new request_id unless one is given.

    Its update_mask is always set, so that a field left out stays as it is.

    Raises:
        InvalidFieldError: some values cannot be sent.
    """
    request, violations = sendable_update(update)
    values.raise_if_any(violations)
    return request


def set_trace_parent(request: pb.UpdateJobRequest, trace_parent: str) -> None:
    """Write `trace_parent` too, unless it is empty, or the request writes one, or nothing: that is a heartbeat."""
    paths = request.update_mask.paths
    if trace_parent and paths and "trace_parent" not in paths:
        request.job.trace_parent = trace_parent
        paths.append("trace_parent")


def sendable_update(update: JobUpdate) -> tuple[pb.UpdateJobRequest, Violations]:
    """Return a request for what can be sent of `update`, and what is wrong with the rest."""
    violations: Violations = []
    request = pb.UpdateJobRequest()
    _set_request_id(request, update.request_id, violations)
    request.update_mask.SetInParent()
    values.set_field(request, "attempt", update.attempt, violations)
    values.set_field(request, "expected_revision", update.expected_revision, violations)
    values.set_field(request.job, "id", update.id, violations)
    if update.allow_missing:
        request.allow_missing = True
        values.set_field(request.job, "name", update.name, violations)
        values.set_field(request.job, "parent_id", update.parent_id, violations)
    masked = zip(_MASKED_ARGUMENTS, _masked_values_of(update), strict=True)
    request.update_mask.paths.extend(_write_fields(request.job, masked, violations))
    _check_size(request, violations)
    return request, violations


def _check_size(request: pb.CreateJobRequest | pb.UpdateJobRequest, violations: Violations) -> None:
    """Add a violation for the largest field of a request that is too large to be sent."""
    size = request.ByteSize() + MAX_FIELD_HEADER_BYTES
    if size <= MAX_CALL_BYTES:
        return
    sizes = {
        field.name: _size_of(message, field.name)
        for message in (request, request.job)
        for field, _ in message.ListFields()
        if field.name != "job"
    }
    largest = max(sizes, key=sizes.__getitem__)
    what = f"is too large: {sizes[largest]} bytes, and a call may have {MAX_CALL_BYTES}; put large data behind a URL"
    violations.append(FieldViolation(largest, what))


def _size_of(message: Message, field: str) -> int:
    rest = type(message)()
    rest.CopyFrom(message)
    rest.ClearField(field)
    return message.ByteSize() - rest.ByteSize()


def _set_request_id(request: Message, request_id: str | None, violations: Violations) -> None:
    if request_id is None or request_id == "":
        request_id = new_request_id()
    values.set_field(request, "request_id", request_id, violations)


def _write_fields(job: pb.JobStatus, arguments: Iterable[tuple[str, Any]], violations: Violations) -> list[str]:
    """Write the arguments that can be sent into their fields; return the paths. None leaves a field unset."""
    paths = []
    for argument, value in arguments:
        if value is not UNSET:
            path = _field_of(argument)
            if value is None or _write_field(job, path, value, violations):
                paths.append(path)
    return paths


def _write_field(job: pb.JobStatus, path: str, value: Any, violations: Violations) -> bool:
    if path in ("reason", "error") and job.state in _ENDS:  # an end must not be refused because of a text
        value = _cleaned(value, path)
    if path in _WRITERS:
        return _WRITERS[path](job, value, violations)
    return values.set_field(job, path, value, violations)


_ENDS = frozenset(map(int, ERROR_STATES | TERMINAL_STATES))


def _set_state(job: pb.JobStatus, state: object, violations: Violations) -> bool:
    try:
        job.state = int(to_state(state))  # type: ignore[assignment]  # the numbers are the enum's
    except Exception:
        names = ", ".join(JobState.__members__)
        violations.append(FieldViolation("state", f"must be one of {names}, is {values.describe(state)}"))
        return False
    return True


_WRITERS: Mapping[str, Callable[[pb.JobStatus, Any, Violations], bool]] = {
    "state": _set_state,
    "estimated_completion": values.set_estimated_completion,
    "error": values.set_error,
    "heartbeat_timeout": values.set_heartbeat_timeout,
    "labels": values.set_labels,
    "result": values.set_result,
}
"""The fields that are converted when they are written; the others are written as they are."""


def _cleaned(value: Any, field: str) -> Any:
    """Return a text, or an error with its texts, as the service accepts it; anything else as it is."""
    if isinstance(value, str):
        is_error = field == "error"
        return clean_text(
            value, limits.MAX_ERROR_MESSAGE_BYTES if is_error else limits.MAX_REASON_BYTES, multiline=True
        )
    if isinstance(value, JobError):
        reason: Any = value.reason
        if isinstance(reason, str):
            reason = clean_text(reason, limits.MAX_ERROR_REASON_BYTES)
        return replace(value, message=_cleaned(value.message, "error"), reason=reason)
    return value


def new_request_id() -> str:
    """Return a unique request_id: a UUIDv7, so that the service can tell its age when it has forgotten the request."""
    return new_uuid7(datetime.now(timezone.utc))


Request = TypeVar("Request", bound=Message)


def request_of(kind: type[Request], **arguments: object) -> Request:
    """Return a request whose scalar fields are the arguments of these names.

    Raises:
        InvalidFieldError: an argument has the wrong type.
    """
    request = kind()
    violations: Violations = []
    for name, value in arguments.items():
        values.set_field(request, name, value, violations)
    values.raise_if_any(violations)
    return request


def cancel_request(id: str, reason: str, force: bool, cascade: bool, request_id: str | None) -> pb.CancelJobRequest:
    """Return a request that cancels a job, with a new request_id unless one is given.

    Raises:
        InvalidFieldError: an argument has the wrong type.
    """
    violations: Violations = []
    request = pb.CancelJobRequest()
    values.set_field(request, "id", id, violations)
    values.set_field(request, "reason", reason, violations)
    values.set_field(request, "force", force, violations)
    values.set_field(request, "cascade", cascade, violations)
    _set_request_id(request, request_id, violations)
    values.raise_if_any(violations)
    return request


def list_request(filter: JobFilter | None, page_size: int, page_token: str) -> pb.ListJobsRequest:
    """Return a request for a page of jobs; a filter of None matches all.

    Raises:
        InvalidFieldError: an argument has the wrong type.
    """
    request = request_of(pb.ListJobsRequest, page_size=page_size, page_token=page_token)
    _set_filter(request.filter, filter)
    return request


def watch_request(
    id: str, heartbeat_interval_seconds: float | None, min_update_interval_seconds: float | None
) -> pb.WatchJobRequest:
    """Return a request that watches a job; an interval of None is the server's default.

    Raises:
        InvalidFieldError: an argument has the wrong type.
    """
    request = request_of(pb.WatchJobRequest, id=id)
    _write_intervals(request, heartbeat_interval_seconds, min_update_interval_seconds)
    return request


def watch_jobs_request(
    filter: JobFilter | None, heartbeat_interval_seconds: float | None, min_update_interval_seconds: float | None
) -> pb.WatchJobsRequest:
    """Return a request that watches the jobs that match, without its resume_token.

    Raises:
        InvalidFieldError: an argument has the wrong type.
    """
    request = pb.WatchJobsRequest()
    _set_filter(request.filter, filter)
    _write_intervals(request, heartbeat_interval_seconds, min_update_interval_seconds)
    return request


def _set_filter(message: pb.JobFilter, filter: Any) -> None:
    if filter is None:
        return
    try:
        message.CopyFrom(convert.filter_to_wire(filter))
    except Exception:
        if not isinstance(filter, JobFilter):
            what = f"must be a JobFilter, is {values.describe(filter)}"
            raise InvalidFieldError(violations=[FieldViolation("filter", what)]) from None
        raise InvalidFieldError(violations=_wrong_fields_of(filter)) from None


def _wrong_fields_of(filter: JobFilter) -> Iterable[FieldViolation]:
    for field in fields(JobFilter):
        value = getattr(filter, field.name)
        try:
            convert.filter_to_wire(JobFilter(**{field.name: value}))
        except Exception:
            yield FieldViolation(f"filter.{field.name}", f"must be {field.type}, is {values.describe(value)}")


def _write_intervals(
    request: pb.WatchJobRequest | pb.WatchJobsRequest,
    heartbeat_interval_seconds: float | None,
    min_update_interval_seconds: float | None,
) -> None:
    violations: Violations = []
    intervals = {"heartbeat_interval": heartbeat_interval_seconds, "min_update_interval": min_update_interval_seconds}
    for field, seconds in intervals.items():
        if seconds is not None:
            values.set_duration(request, field, seconds, violations, f"{field}_seconds")
    values.raise_if_any(violations)


class HasJob(Protocol):
    """A response with a job in it."""

    @property
    def job(self) -> pb.JobStatus:
        """The job."""


Response = TypeVar("Response")
Value = TypeVar("Value")


def _read(response: Response | None, read: Callable[[Response], Value]) -> Value:
    """Return what `read` makes of a response; grpc.aio gives None for one that it could not parse.

    Raises:
        InternalError: there is none, or `read` raised ValueError.
    """
    if response is None:
        raise InternalError("the server's reply cannot be parsed")
    try:
        return read(response)
    except ValueError as error:
        raise InternalError(f"the server's reply is not valid: {error}") from error


def job_in(response: HasJob | None) -> Job:
    """Return the job in a response.

    Raises:
        InternalError: it holds no valid job.
    """
    return _read(response, lambda response: convert.job_from_wire(response.job))


def identity_in(response: pb.GetCallerIdentityResponse | None) -> Identity:
    """Return the identity in a response.

    Raises:
        InternalError: it holds no valid identity.
    """
    return _read(response, lambda response: convert.identity_from_wire(response.identity))


def jobs_in(response: pb.ListJobsResponse | None) -> JobPage:
    """Return the page in a response.

    Raises:
        InternalError: it is not valid.
    """

    def read(response: pb.ListJobsResponse) -> JobPage:
        jobs = tuple(map(convert.job_from_wire, response.jobs))
        return JobPage(
            jobs=jobs,
            next_page_token=response.next_page_token,
            resume_token=response.resume_token,
            unreachable=tuple(response.unreachable),
        )

    return _read(response, read)


def left_out(unreachable: Sequence[str]) -> DataLossError:
    """Return the error of a list that lacks damaged jobs."""
    names = ", ".join(job_id or "(unknown)" for job_id in unreachable[:MAX_LISTED_VIOLATIONS])
    return DataLossError(f"{len(unreachable)} damaged jobs are left out: {names}")


def transitions_in(response: pb.ListJobTransitionsResponse | None) -> TransitionPage:
    """Return the page in a response.

    Raises:
        InternalError: it is not valid.
    """

    def read(response: pb.ListJobTransitionsResponse) -> TransitionPage:
        transitions = tuple(map(_transition, response.transitions))
        return TransitionPage(transitions=transitions, next_page_token=response.next_page_token)

    return _read(response, read)


def _transition(message: pb.JobTransition) -> Transition:
    return Transition(
        from_state=_state(message.from_state) if message.from_state else None,
        to_state=_state(message.to_state),
        reason=message.reason,
        transitioned_at=convert.instant_from_wire(message.transitioned_at),
        attempt=message.attempt,
        actor=message.actor,
        revision=message.revision,
    )


def _state(number: int) -> JobState:
    """Return a state; one that this version does not define is read as IN_PROGRESS."""
    state = convert.to_state(number)
    return state if isinstance(state, JobState) else JobState.IN_PROGRESS


class BatchRoom:
    """The room in one call for updates: for MAX_BATCH_UPDATES, and for MAX_CALL_BYTES."""

    def __init__(self) -> None:
        self._count = self._bytes = 0

    def take(self, update: pb.UpdateJobRequest) -> bool:
        """Use the room that an update needs; return False if there is not enough. There always is for the first."""
        size = self._bytes + update.ByteSize() + MAX_FIELD_HEADER_BYTES
        if self._count and (self._count == limits.MAX_BATCH_UPDATES or size > MAX_CALL_BYTES):
            return False
        self._count, self._bytes = self._count + 1, size
        return True


class Batch:
    """The calls for several updates. One that cannot be sent is left out of them; its result is the error."""

    def __init__(self, updates: Any, trace_parent: str = "") -> None:
        """Make the requests; for `trace_parent` see `set_trace_parent`.

        Raises:
            InvalidFieldError: `updates` holds what is no JobUpdate, or cannot be read.
        """
        self.requests: list[pb.BatchUpdateJobsRequest] = []
        """As few calls as the updates fit in, to be made in this order."""
        self._errors: list[JobStatusError | None] = []
        self._results: BatchResults = []
        if not isinstance(updates, Iterable):
            what = f"must be a collection of JobUpdate, is {values.describe(updates)}"
            raise InvalidFieldError(violations=[FieldViolation("updates", what)])
        room = BatchRoom()
        for index, update in enumerate(updates):
            if not isinstance(update, JobUpdate):
                what = f"must be a JobUpdate, is {values.describe(update)}"
                raise InvalidFieldError(violations=[FieldViolation(f"updates[{index}]", what)])
            try:
                request = update_request(update)
                set_trace_parent(request, trace_parent)
            except InvalidFieldError as error:
                self._errors.append(error)
                continue
            self._errors.append(None)
            if not self.requests or not room.take(request):
                room = BatchRoom()
                room.take(request)
                self.requests.append(pb.BatchUpdateJobsRequest())
            self.requests[-1].updates.append(request)

    def answered(self, request: pb.BatchUpdateJobsRequest, response: pb.BatchUpdateJobsResponse | None) -> None:
        """Take the response to one of the requests.

        Raises:
            InternalError: it has another number of results, or one is not valid.
        """
        self._results += [_batch_result(result) for result in results_in(response, len(request.updates))]

    def failed(self, error: JobStatusError) -> None:
        """Take the error of a call after which no other is made.

        Raises:
            JobStatusError: the error itself, if no call before it succeeded.
        """
        if not self._results:
            raise error
        self._results += [error] * (self._errors.count(None) - len(self._results))

    @property
    def results(self) -> BatchResults:
        """The results of all updates, in their order."""
        results = iter(self._results)
        return [error or next(results) for error in self._errors]


def _batch_result(result: pb.BatchUpdateJobsResult) -> Job | JobStatusError:
    return status.from_job_error(result.error) if result.HasField("error") else job_in(result)


def results_in(response: pb.BatchUpdateJobsResponse | None, count: int) -> Iterable[pb.BatchUpdateJobsResult]:
    """Return the results in a response.

    Raises:
        InternalError: there are not `count` of them.
    """
    if response is None or len(response.results) != count:
        raise InternalError("the server's reply does not have one result for each update of the batch")
    return response.results


class Version(NamedTuple):
    """How new an event on a job is."""

    created_at: tuple[int, int] | None
    """Seconds and nanoseconds. None where the job was deleted or has expired: such an event has a revision only."""
    revision: int
    updated_at: tuple[int, int] = (0, 0)
    children: tuple[tuple[str, int], ...] = ()
    children_progress: float = 0.0

    @classmethod
    def of(cls, job: pb.JobStatus) -> Version:
        """Return the version of a job. No two of its states share one, also if the store was set back between them."""
        created_at, updated_at = job.created_at, job.updated_at
        return cls(
            (created_at.seconds, created_at.nanos),
            job.revision,
            (updated_at.seconds, updated_at.nanos),
            tuple(sorted(job.children.items())) if job.children else (),
            job.children_progress,
        )

    def is_after(self, other: Version) -> bool:
        """Return whether this is newer than `other`, of the same id.

        A job created again begins with revision 1. If the store is set back to an earlier state, the job continues with
        a lower revision, and with a later time: within one history neither ever goes back.
        """
        if self.created_at is not None and self.created_at != other.created_at:
            return True
        if self.revision > other.revision or self.updated_at > other.updated_at:
            return True
        # The numbers of children have no order. Only those of an open job are sent with the same revision.
        return self[:3] == other[:3] and self != other


_CHANGE_TYPES = {int(type): type for type in JobChangeType}


def changes_in(message: pb.WatchJobsResponse | None) -> list[tuple[JobChange, Version]]:
    """Return the changes in a message, without heartbeats and event types that this version does not define.

    Raises:
        InternalError: the message is not valid; grpc.aio gives None for one that it could not parse.
    """
    if message is None:
        raise InternalError("a message of the server cannot be parsed")
    return [_change(_CHANGE_TYPES[event.type], event) for event in message.events if event.type in _CHANGE_TYPES]


def _change(type: JobChangeType, event: pb.JobEvent) -> tuple[JobChange, Version]:
    if type in (JobChangeType.SYNCED, JobChangeType.RESET):
        return JobChange(type), Version(None, 0)
    message = event.job
    if not message.id:
        raise InternalError("the server's message has a job without an id")
    if not message.HasField("created_at"):
        if type is not JobChangeType.REMOVED:
            raise InternalError("the server's message has a job without created_at")
        return JobChange(type, message.id, message.revision), Version(None, message.revision)
    return JobChange(type, message.id, message.revision, job_in(event)), Version.of(message)
