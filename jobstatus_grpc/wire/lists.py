"""ListJobs and ListJobTransitions: requests → queries, pages → replies as bytes. A page ends at 1 MiB."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import limits
from jobstatus_grpc.errors import FieldViolation, InvalidFieldError, InvalidTokenError
from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.limits import Violations
from jobstatus_grpc.record import Transition
from jobstatus_grpc.stores.interface import Page, Position
from jobstatus_grpc.wire import convert
from jobstatus_grpc.wire.filters import filter_from_wire
from jobstatus_grpc.wire.render import field_1, render_job
from jobstatus_grpc.wire.requests import Caller
from jobstatus_grpc.wire.tokens import Scope, filter_scope, job_scope, read_token, write_token

DEFAULT_PAGE_SIZE = 50
JOBS_PER_TURN = 64
"""So many jobs are rendered before other calls get a turn of the event loop."""


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


async def jobs_reply(query: JobsQuery, position: Position, page: Page) -> bytes:
    """Return a ListJobsResponse with as many of the page's jobs as fit; `position` is the one before the first page."""
    parts: list[bytes] = []
    size, next_cursor = 0, page.next_cursor
    for number, (job, cursor) in enumerate(zip(page.jobs, page.cursors, strict=True), start=1):
        parts.append(field_1(render_job(job)))
        size += len(parts[-1])
        if size >= limits.MAX_RESPONSE_BYTES and number < len(page.jobs):
            next_cursor = cursor
            break
        if number % JOBS_PER_TURN == 0:
            await asyncio.sleep(0)
    tokens = pb.ListJobsResponse(resume_token=write_token("resume", query.scope, position))
    if next_cursor:
        tokens.next_page_token = write_token("page", query.scope, json.dumps([next_cursor, position]))
    return b"".join((*parts, tokens.SerializeToString()))


def to_history_query(request: pb.ListJobTransitionsRequest, caller: Caller) -> HistoryQuery:
    """Return the query. Raises as `to_jobs_query`."""
    violations: Violations = []
    limits.check_id(request.id, "id", violations)
    limit = _limit(request.page_size, violations)
    if violations:
        raise InvalidFieldError(violations=violations)
    scope = job_scope(caller.tenant, request.id)
    after_revision = _read_history_token(scope, request.page_token) if request.page_token else 0
    return HistoryQuery(id=request.id, limit=limit, after_revision=after_revision, scope=scope)


def history_reply(query: HistoryQuery, transitions: Sequence[Transition]) -> bytes:
    """Return a ListJobTransitionsResponse; `transitions` are one more than the page's where others follow."""
    response = pb.ListJobTransitionsResponse()
    size = 0
    for entry in transitions[: query.limit]:
        if size >= limits.MAX_RESPONSE_BYTES:
            break
        message = convert.transition_to_wire(entry)
        size += message.ByteSize()
        response.transitions.append(message)
    sent = len(response.transitions)
    if sent < len(transitions):
        response.next_page_token = write_token("history", query.scope, str(transitions[sent - 1].revision))
    return response.SerializeToString()


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
