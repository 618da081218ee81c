"""WatchJobs: requests → what to watch, and events as bytes, ready to be sent to many."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.errors import InvalidFieldError
from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.limits import Violations
from jobstatus_grpc.stores.interface import Change, Position
from jobstatus_grpc.wire import convert
from jobstatus_grpc.wire.filters import filter_from_wire
from jobstatus_grpc.wire.render import job_event, render_job
from jobstatus_grpc.wire.requests import Caller, watch_intervals
from jobstatus_grpc.wire.tokens import Scope, filter_scope, read_token, write_token


@dataclass(frozen=True, slots=True, kw_only=True)
class JobsWatch:
    """What WatchJobs asks for."""

    filter: JobFilter
    after: Position | None
    """What its resume_token stands for; None: it gave none."""
    heartbeat_interval: timedelta
    min_update_interval: timedelta
    scope: Scope
    resume_token: str


def to_jobs_watch(request: pb.WatchJobsRequest, caller: Caller) -> JobsWatch:
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
    return JobsWatch(
        filter=job_filter,
        after=read_token("resume", scope, token) if token else None,
        heartbeat_interval=heartbeat,
        min_update_interval=min_update,
        scope=scope,
        resume_token=token,
    )


def render_event(event_type: int, change: Change | None) -> bytes:
    """Return a WatchJobsResponse with one event; those of a message with several are put one behind the other."""
    return job_event(event_type, None if change is None else _job_of(change))


def stamp(now: datetime) -> bytes:
    """Return a WatchJobsResponse with nothing but its server_time, to append; see events.stamp."""
    response = pb.WatchJobsResponse()
    convert.instant_to_wire(now, response.server_time)
    return response.SerializeToString()


def with_token(
    write: Callable[[bytes], Awaitable[None]], watch: JobsWatch
) -> Callable[[bytes, Position | None], Awaitable[None]]:
    """Return what writes messages with the token of their position, and with the token before where they have none."""
    known: Position | None = None
    field = _token_field(watch.resume_token)

    async def send(message: bytes, position: Position | None) -> None:
        nonlocal known, field
        if position is not None and position != known:
            known, field = position, _token_field(write_token("resume", watch.scope, position))
        await write(message + field)

    return send


def _token_field(token: str) -> bytes:
    return pb.WatchJobsResponse(resume_token=token).SerializeToString()


def _job_of(change: Change) -> bytes:
    if change.job is None:
        return pb.JobStatus(id=change.id, revision=change.revision).SerializeToString()
    return render_job(change.job)
