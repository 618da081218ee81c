"""The client's half of WatchJobs: filter → request, events → what happened to which job."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.errors import InternalError
from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.record import Job
from jobstatus_grpc.wire import calls
from jobstatus_grpc.wire.filters import filter_to_wire


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
    calls.write_intervals(request, heartbeat_interval_seconds, min_update_interval_seconds)
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
    return JobChange(type, message.id, message.revision, calls.job_in(event)), version
