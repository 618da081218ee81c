"""The client's half of the wire: arguments to requests, responses to values. No I/O."""

from __future__ import annotations

import enum
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, TypeVar

from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.errors import InternalError, JobStatusError
from jobstatus_grpc.job import Job, JobError, JobFilter, JobState, Transition
from jobstatus_grpc.wire import convert, status

LARGEST_PAGE = 1000
"""Entries: the service puts no more into one page."""


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
    state: JobState | Unset = UNSET
    reason: str | Unset | None = UNSET
    has_progress: bool | Unset | None = UNSET
    progress: float | Unset | None = UNSET
    estimated_completion: datetime | Unset | None = UNSET
    error: JobError | Unset | None = UNSET
    heartbeat_timeout_seconds: float | Unset | None = UNSET
    labels: Mapping[str, str] | Unset | None = UNSET
    result: Mapping[str, Any] | Unset | None = UNSET
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

_MASKED_FIELDS = tuple(map(_field_of, _MASKED_ARGUMENTS))

_masked_values_of = attrgetter(*_MASKED_ARGUMENTS)


def create_request(request_id: str | None, **fields: Any) -> pb.CreateJobRequest:
    """Return a request that creates a job with these arguments of the clients' `create`; UNSET is the same as None.

    Its request_id is a new one unless one is given.
    """
    request = pb.CreateJobRequest(request_id=request_id or new_request_id())
    for argument, value in fields.items():
        if value is not UNSET:
            _write_field(request.job, _field_of(argument), value)
    return request


def update_request(update: JobUpdate) -> pb.UpdateJobRequest:
    """Return a request that writes the fields given in `update`, with a new request_id unless one is given.

    Its update_mask is always set, so that a field left out stays as it is.
    """
    request = pb.UpdateJobRequest(request_id=update.request_id or new_request_id())
    request.update_mask.SetInParent()
    if update.attempt:
        request.attempt = update.attempt
    if update.expected_revision:
        request.expected_revision = update.expected_revision
    job = request.job
    job.id = update.id
    if update.allow_missing:
        request.allow_missing = True
        job.name, job.parent_id = update.name, update.parent_id
    paths = []
    for path, value in zip(_MASKED_FIELDS, _masked_values_of(update), strict=True):
        if value is not UNSET:
            paths.append(path)
            _write_field(job, path, value)
    request.update_mask.paths.extend(paths)
    return request


def _write_field(job: pb.JobStatus, name: str, value: Any) -> None:
    """Write the value of an argument into its field. None leaves the field unset."""
    if value is None:
        return
    if name in _WRITERS:
        _WRITERS[name](job, value)
    else:
        setattr(job, name, value)


def _write_result(job: pb.JobStatus, result: Mapping[str, Any]) -> None:
    job.result.SetInParent()  # an empty result is one too
    job.result.update(result)


_WRITERS: Mapping[str, Callable[[pb.JobStatus, Any], None]] = {
    "estimated_completion": lambda job, instant: convert.instant_to_wire(instant, job.estimated_completion),
    "error": lambda job, error: job.error.CopyFrom(convert.error_to_wire(error)),
    "heartbeat_timeout": lambda job, seconds: job.heartbeat_timeout.CopyFrom(_duration(seconds)),
    "labels": lambda job, labels: job.labels.update(labels),
    "result": _write_result,
}
"""The fields that are converted when they are written; the others are written as they are."""


def new_request_id() -> str:
    """Return a unique request_id: 32 hexadecimal digits."""
    return secrets.token_hex(16)


def list_request(filter: JobFilter | None, page_size: int, page_token: str) -> pb.ListJobsRequest:
    """Return a request for a page of jobs; a filter of None matches all."""
    request = pb.ListJobsRequest(page_size=page_size, page_token=page_token)
    if filter is not None:
        request.filter.CopyFrom(convert.filter_to_wire(filter))
    return request


def watch_request(
    id: str, heartbeat_interval_seconds: float | None, min_update_interval_seconds: float | None
) -> pb.WatchJobRequest:
    """Return a request that watches a job; an interval of None is the server's default."""
    request = pb.WatchJobRequest(id=id)
    _write_intervals(request, heartbeat_interval_seconds, min_update_interval_seconds)
    return request


def watch_jobs_request(
    filter: JobFilter | None, heartbeat_interval_seconds: float | None, min_update_interval_seconds: float | None
) -> pb.WatchJobsRequest:
    """Return a request that watches the jobs that match, without its resume_token."""
    request = pb.WatchJobsRequest()
    if filter is not None:
        request.filter.CopyFrom(convert.filter_to_wire(filter))
    _write_intervals(request, heartbeat_interval_seconds, min_update_interval_seconds)
    return request


def _write_intervals(
    request: pb.WatchJobRequest | pb.WatchJobsRequest,
    heartbeat_interval_seconds: float | None,
    min_update_interval_seconds: float | None,
) -> None:
    if heartbeat_interval_seconds is not None:
        request.heartbeat_interval.CopyFrom(_duration(heartbeat_interval_seconds))
    if min_update_interval_seconds is not None:
        request.min_update_interval.CopyFrom(_duration(min_update_interval_seconds))


def _duration(seconds: float) -> duration_pb2.Duration:
    return convert.duration_to_wire(timedelta(seconds=seconds))


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


def jobs_in(response: pb.ListJobsResponse | None) -> JobPage:
    """Return the page in a response.

    Raises:
        InternalError: it is not valid.
    """

    def read(response: pb.ListJobsResponse) -> JobPage:
        jobs = tuple(map(convert.job_from_wire, response.jobs))
        return JobPage(jobs=jobs, next_page_token=response.next_page_token, resume_token=response.resume_token)

    return _read(response, read)


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


def batch_results(response: pb.BatchUpdateJobsResponse | None, count: int) -> BatchResults:
    """Return the results of `count` updates, in their order.

    Raises:
        InternalError: the response has another number of results, or one is not valid.
    """
    return [
        status.from_job_error(result.error) if result.HasField("error") else job_in(result)
        for result in results_in(response, count)
    ]


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

    def is_after(self, other: Version) -> bool:
        """Return whether this is newer than `other`, of the same id: a job created again begins with revision 1."""
        if self.created_at is not None and self.created_at != other.created_at:
            return True
        return self.revision > other.revision


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
    version = Version((message.created_at.seconds, message.created_at.nanos), message.revision)
    return JobChange(type, message.id, message.revision, job_in(event)), version
