"""The client's half of WatchJobs: filter → request, events → what happened to which job."""

from __future__ import annotations

import enum
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.errors import InternalError, JobStatusError
from jobstatus_grpc.job import Job, JobError, JobFilter, JobState, Transition
from jobstatus_grpc.wire import convert, status
from jobstatus_grpc.wire.convert import filter_to_wire


class Unset(enum.Enum):
    """The type of UNSET, which stands for an argument that was left out, where None means something else."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


@dataclass(frozen=True, slots=True)
class JobUpdate:
    """One update of a job, with the arguments of the clients' `update`, where each is explained.

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


# A name for it, because in the clients `list` is a method, which some type checkers would take for the type.
BatchResults: TypeAlias = list[Job | JobStatusError]


class HasJob(Protocol):
    """A response with a job in it."""

    @property
    def job(self) -> pb.JobStatus:
        """The job."""


def new_request_id() -> str:
    """Return a request_id that no other request has: 32 hexadecimal digits."""
    return secrets.token_hex(16)


def create_request(
    *,
    id: str = "",
    name: str = "",
    state: JobState = JobState.PENDING,
    reason: str = "",
    has_progress: bool = False,
    progress: float | None = None,
    estimated_completion: datetime | None = None,
    heartbeat_timeout_seconds: float | None = None,
    labels: Mapping[str, str] | None = None,
    parent_id: str = "",
    result: Mapping[str, Any] | None = None,
    request_id: str | None = None,
) -> pb.CreateJobRequest:
    """Return a request that creates a job; it makes a request_id where none is given."""
    request = pb.CreateJobRequest(request_id=request_id or new_request_id())
    job = request.job
    job.id, job.name, job.parent_id = id, name, parent_id
    job.state = state  # type: ignore[assignment]  # the numbers are the enum's
    job.reason = reason
    job.has_progress = has_progress
    if progress is not None:
        job.progress = progress
    if heartbeat_timeout_seconds is not None:
        job.heartbeat_timeout.CopyFrom(_duration(heartbeat_timeout_seconds))
    if labels:
        job.labels.update(labels)
    _write_messages(job, estimated_completion, None, result)
    return request


def get_request(id: str) -> pb.GetJobRequest:
    """Return a request that reads a job."""
    return pb.GetJobRequest(id=id)


def update_request(update: JobUpdate) -> pb.UpdateJobRequest:
    """Return a request that writes what `update` gives; it makes a request_id where none is given.

    Its update_mask is always set: what is left out stays as it is, also where it has the zero value.
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
    _write_changes(update, job, request.update_mask.paths.append)
    return request


def _write_changes(update: JobUpdate, job: pb.JobStatus, name: Any) -> None:
    """Write what `update` gives into `job`, and call `name` with the path of each."""
    if update.state is not UNSET:
        name("state")
        job.state = update.state or 0  # type: ignore[assignment]  # the numbers are the enum's
    if update.reason is not UNSET:
        name("reason")
        job.reason = update.reason or ""
    if update.has_progress is not UNSET:
        name("has_progress")
        job.has_progress = update.has_progress or False
    if update.progress is not UNSET:
        name("progress")
        if update.progress is not None:
            job.progress = update.progress
    if update.heartbeat_timeout_seconds is not UNSET:
        name("heartbeat_timeout")
        if update.heartbeat_timeout_seconds is not None:
            job.heartbeat_timeout.CopyFrom(_duration(update.heartbeat_timeout_seconds))
    if update.labels is not UNSET:
        name("labels")
        job.labels.update(update.labels or {})
    for path, value in (
        ("estimated_completion", update.estimated_completion),
        ("error", update.error),
        ("result", update.result),
    ):
        if value is not UNSET:
            name(path)
            _write_messages(job, **{path: value})  # type: ignore[arg-type]


def _write_messages(
    job: pb.JobStatus,
    estimated_completion: datetime | None = None,
    error: JobError | None = None,
    result: Mapping[str, Any] | None = None,
) -> None:
    if estimated_completion is not None:
        convert.instant_to_wire(estimated_completion, job.estimated_completion)
    if error is not None:
        job.error.CopyFrom(convert.error_to_wire(error))
    if result is not None:
        job.result.SetInParent()
        job.result.update(result)


def batch_request(updates: Iterable[JobUpdate]) -> pb.BatchUpdateJobsRequest:
    """Return a request that sends many updates, each with a request_id of its own."""
    return pb.BatchUpdateJobsRequest(updates=[update_request(update) for update in updates])


def cancel_request(id: str, reason: str = "", request_id: str | None = None) -> pb.CancelJobRequest:
    """Return a request that cancels a job; it makes a request_id where none is given."""
    return pb.CancelJobRequest(id=id, reason=reason, request_id=request_id or new_request_id())


def delete_request(id: str, expected_revision: int = 0) -> pb.DeleteJobRequest:
    """Return a request that deletes a job."""
    return pb.DeleteJobRequest(id=id, expected_revision=expected_revision)


def watch_request(
    id: str, heartbeat_interval_seconds: float | None = None, min_update_interval_seconds: float | None = None
) -> pb.WatchJobRequest:
    """Return a request that opens a watch; None leaves an interval to the server."""
    request = pb.WatchJobRequest(id=id)
    write_intervals(request, heartbeat_interval_seconds, min_update_interval_seconds)
    return request


def write_intervals(
    request: pb.WatchJobRequest | pb.WatchJobsRequest,
    heartbeat_interval_seconds: float | None,
    min_update_interval_seconds: float | None,
) -> None:
    """Write a watch's intervals into its request; None leaves one to the server."""
    if heartbeat_interval_seconds is not None:
        request.heartbeat_interval.CopyFrom(_duration(heartbeat_interval_seconds))
    if min_update_interval_seconds is not None:
        request.min_update_interval.CopyFrom(_duration(min_update_interval_seconds))


def job_in(response: HasJob | None) -> Job:
    """Return the job in a response; grpc.aio gives None for one that it could not parse.

    Raises:
        InternalError: it holds no job that makes sense.
    """
    if response is None:
        raise InternalError("the server's reply cannot be read")
    try:
        return convert.job_from_wire(response.job)
    except ValueError as error:
        raise InternalError(f"the server's reply makes no sense: {error}") from error


def batch_results(response: pb.BatchUpdateJobsResponse | None, count: int) -> BatchResults:
    """Return what became of each of `count` updates, in their order.

    Raises:
        InternalError: the response does not answer that many.
    """
    if response is None or len(response.results) != count:
        raise InternalError("the server's reply does not answer each update of the batch")
    return [
        status.from_job_error(result.error) if result.HasField("error") else job_in(result)
        for result in response.results
    ]


def _duration(seconds: float) -> duration_pb2.Duration:
    return convert.duration_to_wire(timedelta(seconds=seconds))


LARGEST_PAGE = 1000
"""As many as the service puts into one page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPage:
    """Some of the jobs that match, the newest created first. May be short, even empty, and not the last."""

    jobs: tuple[Job, ...]
    next_page_token: str
    """"": this is the last page."""
    resume_token: str
    """For `watch_jobs` with the same filter: what changed since before the first page was read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionPage:
    """Some of a job's history, the oldest first."""

    transitions: tuple[Transition, ...]
    next_page_token: str
    """"": this is the last page."""


def list_request(filter: JobFilter | None, page_size: int, page_token: str) -> pb.ListJobsRequest:
    """Return a request for a page of jobs; a filter of None matches all."""
    request = pb.ListJobsRequest(page_size=page_size, page_token=page_token)
    if filter is not None:
        request.filter.CopyFrom(filter_to_wire(filter))
    return request


def history_request(id: str, page_size: int, page_token: str) -> pb.ListJobTransitionsRequest:
    """Return a request for a page of a job's history."""
    return pb.ListJobTransitionsRequest(id=id, page_size=page_size, page_token=page_token)


def jobs_in(response: pb.ListJobsResponse | None) -> JobPage:
    """Return the page in a response.

    Raises:
        InternalError: it makes no sense; grpc.aio gives None for one that it could not parse.
    """
    if response is None:
        raise InternalError("the server's reply cannot be read")
    try:
        jobs = tuple(map(convert.job_from_wire, response.jobs))
    except ValueError as error:
        raise InternalError(f"the server's reply makes no sense: {error}") from error
    return JobPage(jobs=jobs, next_page_token=response.next_page_token, resume_token=response.resume_token)


def transitions_in(response: pb.ListJobTransitionsResponse | None) -> TransitionPage:
    """Return the page in a response.

    Raises:
        InternalError: as `jobs_in`.
    """
    if response is None:
        raise InternalError("the server's reply cannot be read")
    try:
        transitions = tuple(map(_transition, response.transitions))
    except ValueError as error:
        raise InternalError(f"the server's reply makes no sense: {error}") from error
    return TransitionPage(transitions=transitions, next_page_token=response.next_page_token)


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
    """Return a state; one that this version does not know is read as IN_PROGRESS."""
    state = convert.to_state(number)
    return state if isinstance(state, JobState) else JobState.IN_PROGRESS


class JobChangeType(enum.IntEnum):
    """What a JobChange says. The numbers are those of the API's JobEventType."""

    SNAPSHOT = 1
    """The job as it was when the watch began."""
    UPDATED = 2
    """The job after a change, or new among those that match."""
    REMOVED = 3
    """The job matches the filter no longer, or is gone."""
    SYNCED = 4
    """All that was there has been told; what follows is new. Comes again where the watch was cut and went on."""
    RESET = 6
    """Forget all jobs: those that are there still follow as snapshots."""


@dataclass(frozen=True, slots=True)
class JobChange:
    """What happened to one of the jobs that match."""

    type: JobChangeType
    id: str = ""
    """"" in SYNCED and RESET."""
    revision: int = 0
    """The job's; that of a job deleted or expired is its last plus one. 0 in SYNCED and RESET."""
    job: Job | None = None
    """None in SYNCED and RESET, and where the job was deleted or has expired."""


class Version(NamedTuple):
    """How new an event on a job is."""

    created_at: tuple[int, int] | None
    """None where the job is gone: such an event names its revision only."""
    revision: int

    def is_after(self, other: Version) -> bool:
        """Tell whether this is news to who knows `other`, of the same id: a job made anew begins with revision 1."""
        if self.created_at is not None and self.created_at != other.created_at:
            return True
        return self.revision > other.revision


_TYPES = {int(type): type for type in JobChangeType}

_OF_NO_JOB = {JobChangeType.SYNCED, JobChangeType.RESET}


def watch_jobs_request(
    filter: JobFilter | None,
    heartbeat_interval_seconds: float | None = None,
    min_update_interval_seconds: float | None = None,
) -> pb.WatchJobsRequest:
    """Return a request that opens a watch of many jobs; it lacks its resume_token. None leaves an interval as it is."""
    request = pb.WatchJobsRequest()
    if filter is not None:
        request.filter.CopyFrom(filter_to_wire(filter))
    write_intervals(request, heartbeat_interval_seconds, min_update_interval_seconds)
    return request


def events_in(message: pb.WatchJobsResponse | None) -> list[tuple[JobChange, Version]]:
    """Return the events in a message, but for heartbeats and kinds that this version does not know.

    Raises:
        InternalError: they make no sense; grpc.aio gives None for a message that it could not parse.
    """
    if message is None:
        raise InternalError("a message of the server cannot be read")
    return [_change(_TYPES[event.type], event) for event in message.events if event.type in _TYPES]


def _change(type: JobChangeType, event: pb.JobEvent) -> tuple[JobChange, Version]:
    if type in _OF_NO_JOB:
        return JobChange(type), Version(None, 0)
    message = event.job
    if not message.id:
        raise InternalError("the server's message tells of a job without an id")
    if not message.HasField("created_at"):
        if type is not JobChangeType.REMOVED:
            raise InternalError("the server's message tells of a job without its creation")
        return JobChange(type, message.id, message.revision), Version(None, message.revision)
    version = Version((message.created_at.seconds, message.created_at.nanos), message.revision)
    return JobChange(type, message.id, message.revision, job_in(event)), version
