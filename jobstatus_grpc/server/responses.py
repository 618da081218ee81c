"""Jobs, pages and events to responses as bytes, RPC by RPC in the order of the service; the way back from `requests`.

Responses are put together from rendered jobs, so that one rendering of a job serves its update's response, its readers
and all its watchers.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Identity
from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.job import Job, Outcome, Transition, evolve, lasting_values_of, limits, projection_of
from jobstatus_grpc.server.requests import HistoryQuery, JobsQuery, JobsWatchRequest, write_history_token
from jobstatus_grpc.server.tokens import write_token
from jobstatus_grpc.stores.interface import Change, Page, Position
from jobstatus_grpc.wire import convert, status

MAX_CUT_RESULT_BYTES = 320
"""The most that a result takes in a BatchUpdateJobsResponse once its texts are cut."""

_TEXT_FIELDS: dict[str, Any] = {
    "name": "", "reason": "", "cancel_reason": "", "error": None, "labels": {}, "parent_id": "",
}  # fmt: skip

JOBS_PER_TURN = 64
"""Jobs of a page that are rendered before other calls get a turn of the event loop."""

MAX_RENDERED_JOBS = 10_000
"""Number of jobs of which a rendering is kept. At MAX_KEPT_BYTES, twice per job, they take 40 MB at most."""

MAX_KEPT_BYTES = 2048
"""Size of the largest rendering that is kept: memory is for jobs."""


def job_reply(job: Job) -> bytes:
    """Return a CreateJobResponse, GetJobResponse, UpdateJobResponse or CancelJobResponse: `job` is field 1 of each."""
    return field_1(render_job(job))


def batch_reply(outcomes: Sequence[Outcome]) -> bytes:
    """Return a BatchUpdateJobsResponse with one result per outcome, in order; jobs without their results.

    Results that would take the response beyond 1 MiB have their texts cut: state, attempt and revision stay.
    """
    room = limits.MAX_RESPONSE_BYTES - MAX_CUT_RESULT_BYTES * len(outcomes)
    results: list[bytes] = []
    size = 0
    for outcome in outcomes:
        result = field_1(_batch_result(outcome, is_cut=size >= room))
        size += len(result)
        results.append(result)
    return b"".join(results)


def _batch_result(outcome: Outcome, *, is_cut: bool) -> bytes:
    """Return a BatchUpdateJobsResult."""
    if isinstance(outcome, JobStatusError):
        error = status.to_job_error(outcome)
        if is_cut:
            error.ClearField("message")
        return pb.BatchUpdateJobsResult(error=error).SerializeToString()
    if is_cut:
        outcome = evolve(outcome, _TEXT_FIELDS)
    if outcome.result is not None:
        outcome = evolve(outcome, {"result": None})
    return field_1(render_job(outcome))


async def jobs_reply(query: JobsQuery, position: Position, page: Page) -> bytes:
    """Return a ListJobsResponse with as many of the page's jobs as fit.

    Args:
        position: the position of the feed before the first page was read.
    """
    parts, next_cursor = await fitting_part(page, render_job)
    tokens = pb.ListJobsResponse(
        resume_token=write_token("resume", query.scope, position),
        next_page_token=page_token(query, position, next_cursor),
        unreachable=(error.metadata.get("id", "") for error in page.damaged),
    )
    return b"".join((*parts, tokens.SerializeToString()))


async def fitting_part(page: Page, render: Callable[[Job], bytes]) -> tuple[list[bytes], str]:
    """Return as many of the page's jobs as fit, each rendered as field 1 of a response, and the cursor behind them."""
    parts: list[bytes] = []
    size = 0
    for number, (job, cursor) in enumerate(zip(page.jobs, page.cursors, strict=True), start=1):
        parts.append(field_1(render(job)))
        size += len(parts[-1])
        if size >= limits.MAX_RESPONSE_BYTES and number < len(page.jobs):
            return parts, cursor
        if number % JOBS_PER_TURN == 0:
            await asyncio.sleep(0)
    return parts, page.next_cursor


def page_token(query: JobsQuery, position: Position, cursor: str) -> str:
    """Return the token of the page behind a cursor; empty: there is none."""
    return write_token("page", query.scope, json.dumps([cursor, position])) if cursor else ""


def history_reply(query: HistoryQuery, transitions: Sequence[Transition]) -> bytes:
    """Return a ListJobTransitionsResponse; `transitions` has one more than the page if others follow."""
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
        response.next_page_token = write_history_token(query.scope, transitions[sent - 1])
    return response.SerializeToString()


def identity_reply(caller: Identity) -> bytes:
    """Return a GetCallerIdentityResponse."""
    return pb.GetCallerIdentityResponse(identity=convert.identity_to_wire(caller)).SerializeToString()


def render_job_event(event_type: int, job: Job) -> bytes:
    """Return a WatchJobResponse without its server_time."""
    return job_event(event_type, render_job(job))


def stamp_job_message(now: datetime) -> bytes:
    """Return a WatchJobResponse with only its server_time, to append to another one.

    Parsers merge concatenated messages: https://protobuf.dev/programming-guides/encoding/#last-one-wins
    """
    response = pb.WatchJobResponse()
    convert.instant_to_wire(now, response.server_time)
    return response.SerializeToString()


def render_event(event_type: int, change: Change | None) -> bytes:
    """Return a WatchJobsResponse with one event; concatenated, several are one response with all their events."""
    if change is None:
        return job_event(event_type, None)
    if change.job is None:
        return job_event(event_type, pb.JobStatus(id=change.id, revision=change.revision).SerializeToString())
    return job_event(event_type, render_job(change.job))


def stamp_jobs_message(now: datetime) -> bytes:
    """Return a WatchJobsResponse with only its server_time, to append as in `stamp_job_message`."""
    response = pb.WatchJobsResponse()
    convert.instant_to_wire(now, response.server_time)
    return response.SerializeToString()


def with_token(
    write: Callable[[bytes], Awaitable[None]], watch: JobsWatchRequest
) -> Callable[[bytes, Position | None], Awaitable[None]]:
    """Return a function that writes a message with the resume token of its position; None: that of the one before."""
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


def each_millisecond(make: Callable[[], bytes]) -> Callable[[], bytes]:
    """Return a function that calls `make` at most once a millisecond, and returns its last result in between.

    Row `change`, native: with a call for each message, a change takes 15 % longer to reach 1,000 watchers.
    """
    made_at, made = -1, b""

    def stamp() -> bytes:
        nonlocal made_at, made
        now = time.time_ns() // 1_000_000
        if now != made_at:
            made_at, made = now, make()
        return made

    return stamp


# By tenant and id: the job that was rendered last, those of its values that a report of progress does not change, these
# as bytes, and the whole as bytes.
_renderings: dict[tuple[str, str], tuple[Job | None, tuple[Any, ...] | None, bytes, bytes]] = {}
_NOT_RENDERED = (None, None, b"", b"")


def render_job(job: Job) -> bytes:
    """Return `job` as the bytes of a JobStatus.

    Row `batch`: without the bytes of the fields that a report leaves alone, a sixth fewer updates are made.
    """
    key = job.tenant, job.id
    known_job, known_values, lasting, whole = _renderings.get(key, _NOT_RENDERED)
    if known_job is job:
        return whole
    values = lasting_values_of(job)
    if values != known_values:
        lasting = _lasting_fields(job)
    whole = lasting + _report_fields(job)
    if len(whole) <= MAX_KEPT_BYTES:
        if len(_renderings) >= MAX_RENDERED_JOBS:
            _renderings.clear()
        _renderings[key] = job, values, lasting, whole
    return whole


def _lasting_fields(job: Job) -> bytes:
    message = pb.JobStatus()
    convert.lasting_to_wire(job, message)
    return message.SerializeToString()


def _report_fields(job: Job) -> bytes:
    message = pb.JobStatus()
    convert.report_to_wire(job, message)
    projected = projection_of(job)
    if projected is not None:
        convert.instant_to_wire(projected, message.projected_completion)
    return message.SerializeToString()


def job_event(event_type: int, job: bytes | None) -> bytes:
    """Return a WatchJobResponse or WatchJobsResponse with one event: it is field 1 of both."""
    event = b"\x08%c" % event_type  # JobEvent.type, a varint
    if job is not None:
        event += b"\x12" + field_1(job)[1:]  # JobEvent.job is field 2
    return field_1(event)


def field_1(message: bytes) -> bytes:
    """Return a message that has only field 1, which is the message in `message`.

    A tag, the length as a base-128 varint, the bytes: https://protobuf.dev/programming-guides/encoding/#length-types
    """
    size = len(message)
    if size < 0x80:
        return b"\x0a%c%b" % (size, message)
    if size < 0x4000:
        return b"\x0a%c%c%b" % (size & 0x7F | 0x80, size >> 7, message)
    length = bytearray(b"\x0a")
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return bytes(length) + message
