"""The client's half of the calls that list: filter → request, response → page."""

from __future__ import annotations

from dataclasses import dataclass

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.errors import InternalError
from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.record import Job, Transition
from jobstatus_grpc.state import JobState
from jobstatus_grpc.wire import convert
from jobstatus_grpc.wire.filters import filter_to_wire

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
