"""Jobs as plain JSON, `/v1/jobs…`: the task API's form, or the content queue's.

Each request becomes a call of the API, so that callers, limits, log and errors are those of gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode

from google.protobuf.message import Message
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.errors import FieldViolation, InvalidFieldError, InvalidTokenError
from jobstatus_grpc.vocabularies import read_flag, read_text
from jobstatus_grpc.web.calls import Call, CallEndedError, run
from jobstatus_grpc.web.gateway import Gateway
from jobstatus_grpc.web.http import UNCOUNTED_BODY_BYTES, HttpError, Request, Route, problem_of
from jobstatus_grpc.web.vocabulary import (
    TAG_HASH_DIGITS,
    Vocabulary,
    document_in,
    dumped,
    event_of,
    vocabulary_of,
)
from jobstatus_grpc.wire import status

JSON = "application/json"

MERGE_PATCH = "application/merge-patch+json"

EVENT_STREAM = "text/event-stream"

MAX_DOCUMENT_BYTES = UNCOUNTED_BODY_BYTES
"""Of the body of a request here, which is parsed before its caller is identified: 64 KiB take 8 ms at most. The longest
document within the limits of a job, with each character as \\uXXXX, has 27 KB; longer reasons and errors are cut."""

MAX_WAIT_SECONDS = 60
"""Of `Prefer: wait=N`: proxies end requests that take longer."""

HEARTBEAT_SECONDS = 15
"""Silence on a stream of events after which a comment is sent, so that proxies keep the connection."""

UNREACHABLE = "x-jobstatus-unreachable"
"""The header field that names the jobs which a list leaves out because they are damaged."""

MAX_NAMED_UNREACHABLE = 20
"""Ids in it: clients limit the header of a response. The log of the server has all."""

Query: TypeAlias = Mapping[str, str]

M = TypeVar("M", bound=Message)

_SERVICE_PATH = "/jobstatus.v1.JobStatusService"

_ETAG = re.compile(r'\s*((?:W/)?"[^"\s]*")\s*')

_HASH = f"[0-9a-f]{{{TAG_HASH_DIGITS}}}"

_REVISION = re.compile(rf'"([1-9]\d{{0,17}})(?:-{_HASH})?"', re.ASCII)

_EVENT_ID = re.compile(rf"\d{{1,18}}(?:-{_HASH})?", re.ASCII)
"""Of an event of a job: its tag, or the revision alone, which earlier versions sent."""

_EVENT_NAMES: Mapping[int, str] = {
    pb.JOB_EVENT_TYPE_SNAPSHOT: "snapshot",
    pb.JOB_EVENT_TYPE_UPDATED: "updated",
    pb.JOB_EVENT_TYPE_REMOVED: "removed",
    pb.JOB_EVENT_TYPE_SYNCED: "synced",
    pb.JOB_EVENT_TYPE_RESET: "reset",
}

FILTERS: Mapping[str, str] = {
    "id": "ids",
    "state": "states",
    "name": "names",
    "namePrefix": "name_prefix",
    "label": "labels",
    "parentId": "parent_id",
    "createdAfter": "created_after",
    "createdBefore": "created_before",
    "done": "done",
    "stalled": "stalled",
}
"""Parameters of a query, and the fields of JobFilter."""

REPEATED = frozenset({"id", "state", "name", "label"})
"""Parameters that a query may have several times."""

CANCEL_FIELDS: Mapping[str, Callable[[Any], Any]] = {"reason": read_text, "cascade": read_flag}
"""Fields of the body of `:cancel`, and what checks the value of each."""

FLAGS = {"true": True, "false": False}


class JobsApi:
    """Answers requests for `/v1/jobs…`."""

    def __init__(self, gateway: Gateway) -> None:
        """Take what has the methods."""
        self._gateway = gateway

    def routes_of(self, path: str) -> Mapping[str, Route] | None:
        """Return the routes of a path, by their HTTP method; None: it is not one of these.

        An id that is `events`, or ends in `:cancel`, needs a character of these to be percent-encoded.
        """
        if not path.startswith("/v1/jobs"):
            return None
        rest = path.removeprefix("/v1/jobs")
        if not rest:
            return {"GET": self._list, "POST": self._create}
        if rest == "/events":
            return {"GET": self._watch_all}
        parts = rest.split("/")[1:]
        if not rest.startswith("/") or len(parts) > 2 or not parts[0]:
            return None
        if len(parts) == 2:
            return {"GET": self._of(parts[0], self._watch)} if parts[1] == "events" else None
        if parts[0].endswith(":cancel"):
            return {"POST": self._of(parts[0].removesuffix(":cancel"), self._cancel)}
        return {
            "GET": self._of(parts[0], self._get),
            "PATCH": self._of(parts[0], self._update),
            "DELETE": self._of(parts[0], self._delete),
        }

    def _of(self, part: str, answer: Callable[[Request, str], Awaitable[None]]) -> Route:
        async def answer_for_job(request: Request) -> None:
            try:
                job_id = unquote(part, errors="strict")
            except UnicodeDecodeError:
                raise HttpError(HTTPStatus.BAD_REQUEST, "the path is not UTF-8") from None
            await answer(request, job_id)

        return answer_for_job

    async def _get(self, request: Request, job_id: str) -> None:
        query = _query_of(request)
        vocabulary = vocabulary_of(request, query)
        known, wait_seconds = request.header("if-none-match"), _wait_seconds(request)
        job = (await self._call("GetJob", request, pb.GetJobRequest(id=job_id), pb.GetJobResponse)).job
        tag, document = vocabulary.tagged(job)
        waited: list[tuple[str, str]] = []
        if wait_seconds and _is_known(tag, known):
            waited = [("preference-applied", f"wait={wait_seconds}")]
            tag, document = await self._changed(request, vocabulary, job.id, (tag, document), wait_seconds)
        # Else a browser would ask for the whole job each time.
        fields = [("etag", f'"{tag}"'), ("cache-control", "private, no-cache"), ("vary", "Accept"), *waited]
        if _is_known(tag, known):
            await request.respond(HTTPStatus.NOT_MODIFIED, fields=fields)
        else:
            await request.respond(HTTPStatus.OK, JSON, document, fields)

    async def _list(self, request: Request) -> None:
        query = _query_of(request, *FILTERS, "pageSize", "pageToken")
        vocabulary = vocabulary_of(request, query)
        message = pb.ListJobsRequest(
            filter=_filter_of(request, vocabulary),
            page_size=_number(query, "pageSize"),
            page_token=query.get("pageToken", ""),
        )
        page = await self._call("ListJobs", request, message, pb.ListJobsResponse)
        fields = [("vary", "Accept")]
        if page.next_page_token:
            pairs = [(key, value) for key, value in _pairs_of(request) if key != "pageToken"]
            following = urlencode([*pairs, ("pageToken", page.next_page_token)])
            fields.append(("link", f'</v1/jobs?{following}>; rel="next"'))
        if page.unreachable:
            named = [job_id or "?" for job_id in page.unreachable[:MAX_NAMED_UNREACHABLE]]
            fields.append((UNREACHABLE, ", ".join(named + ["..."] * (len(named) < len(page.unreachable)))))
        # In a thread, as the gateway does: a page may have 1,000 jobs.
        body = await asyncio.to_thread(lambda: dumped([vocabulary.to_document(job) for job in page.jobs]))
        await request.respond(HTTPStatus.OK, JSON, body, fields)

    async def _create(self, request: Request) -> None:
        vocabulary = vocabulary_of(request, _query_of(request))
        document = await _document_of(request, JSON)
        job, _ = vocabulary.to_message(document)
        message = pb.CreateJobRequest(job=job, request_id=_idempotency_key(request))
        created = (await self._call("CreateJob", request, message, pb.CreateJobResponse)).job
        await self._respond_job(HTTPStatus.CREATED, request, vocabulary, created, [("location", _path_of(created.id))])

    async def _update(self, request: Request, job_id: str) -> None:
        query = _query_of(request, "attempt")
        vocabulary = vocabulary_of(request, query)
        document = await _document_of(request, JSON, MERGE_PATCH)
        job, mask = vocabulary.to_message(document)
        if job.id not in ("", job_id):
            raise InvalidFieldError(violations=[FieldViolation("id", "must be that of the path, or absent")])
        job.id = job_id
        message = pb.UpdateJobRequest(
            job=job,
            attempt=_number(query, "attempt"),
            expected_revision=_expected_revision(request),
            request_id=_idempotency_key(request),
        )
        message.update_mask.paths.extend(mask)
        updated = (await self._call("UpdateJob", request, message, pb.UpdateJobResponse)).job
        await self._respond_job(HTTPStatus.OK, request, vocabulary, updated)

    async def _cancel(self, request: Request, job_id: str) -> None:
        vocabulary = vocabulary_of(request, _query_of(request))
        if request.header("if-match") not in (None, "*"):
            text = "a cancellation takes no revision: it is of the job as it is; send it without If-Match, or with *"
            raise HttpError(HTTPStatus.BAD_REQUEST, text)
        document = await _document_of(request, JSON) if await request.body(max_bytes=MAX_DOCUMENT_BYTES) else {}
        values: dict[str, Any] = {}
        for name, value in document.items():
            if name not in CANCEL_FIELDS:
                text = f"is no field of a cancellation, which has {', '.join(CANCEL_FIELDS)}"
                raise InvalidFieldError(violations=[FieldViolation(name[:100], text)])
            try:
                values[name] = None if value is None else CANCEL_FIELDS[name](value)
            except ValueError as error:
                raise InvalidFieldError(violations=[FieldViolation(name, str(error))]) from None
        message = pb.CancelJobRequest(id=job_id, request_id=_idempotency_key(request), **values)
        cancelled = (await self._call("CancelJob", request, message, pb.CancelJobResponse)).job
        await self._respond_job(HTTPStatus.OK, request, vocabulary, cancelled)

    async def _delete(self, request: Request, job_id: str) -> None:
        vocabulary_of(request, _query_of(request))
        message = pb.DeleteJobRequest(id=job_id, expected_revision=_expected_revision(request))
        await self._call("DeleteJob", request, message, pb.DeleteJobResponse)
        await request.respond(HTTPStatus.NO_CONTENT)

    async def _watch(self, request: Request, job_id: str) -> None:
        vocabulary = vocabulary_of(request, _query_of(request))
        last_seen = request.header("last-event-id")
        if last_seen and not _EVENT_ID.fullmatch(last_seen):
            raise InvalidTokenError("Last-Event-ID is not the id of an event of a job")
        stream = _EventStream(request)

        async def send(message: bytes) -> None:
            kind, tag, document, is_done = event_of(vocabulary.name, message)
            if kind in _EVENT_NAMES and tag != last_seen:
                await stream.send(_EVENT_NAMES[kind], document, event_id=tag)
            elif not is_done:  # after the end that the client has seen, the stream ends without a response: 204
                await stream.comment()

        message = pb.WatchJobRequest(id=job_id)
        message.heartbeat_interval.seconds = HEARTBEAT_SECONDS
        await self._stream("WatchJob", request, message, send, stream)

    async def _watch_all(self, request: Request) -> None:
        query = _query_of(request, *FILTERS)
        vocabulary = vocabulary_of(request, query)
        stream = _EventStream(request)

        async def send(data: bytes) -> None:
            message = pb.WatchJobsResponse.FromString(data)
            events = [each for each in message.events if each.type in _EVENT_NAMES]
            for number, event in enumerate(events, start=1):
                document = vocabulary.to_json(event.job) if event.HasField("job") else b"{}"
                # The token covers all events of the message.
                token = message.resume_token if number == len(events) else ""
                await stream.send(_EVENT_NAMES[event.type], document, event_id=token)
            if not events:
                await stream.comment(event_id=message.resume_token)

        watch = pb.WatchJobsRequest(
            filter=_filter_of(request, vocabulary), resume_token=request.header("last-event-id") or ""
        )
        watch.heartbeat_interval.seconds = HEARTBEAT_SECONDS
        await self._stream("WatchJobs", request, watch, send, stream)

    async def _call(self, name: str, request: Request, message: Message, reply: type[M]) -> M:
        """Make a unary call, and return its response."""
        await request.body()
        method = self._gateway.rpcs[f"{_SERVICE_PATH}/{name}"].method
        try:
            return reply.FromString(await run(method, message.SerializeToString(), Call(request), request))
        except CallEndedError as error:
            raise status.from_rpc_error(error) from None  # type: ignore[arg-type]  # it has the methods of one

    async def _stream(
        self, name: str, request: Request, message: Message, send: Callable[[bytes], Awaitable[None]], to: _EventStream
    ) -> None:
        """Send the events of a stream until it ends; of a HEAD, only the status and the header fields."""
        await request.body()
        if request.method == "HEAD":
            opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            async def send_first(data: bytes) -> None:
                if not opened.done():
                    await send(data)
                    opened.set_result(None)

            await self._watch_until(opened, name, request, message, send_first)
            await to.end()
            return
        method = self._gateway.rpcs[f"{_SERVICE_PATH}/{name}"].method
        call = Call(request, send=send)
        data = message.SerializeToString()
        try:
            await run(method, data, call, request, max_seconds=self._gateway.max_stream_seconds)
        except CallEndedError as error:
            refusal = status.from_rpc_error(error)  # type: ignore[arg-type]  # it has the methods of one
            if not request.is_started:
                raise refusal from None
            await to.send("problem", dumped(problem_of(refusal)))
        await to.end()

    async def _changed(
        self, request: Request, vocabulary: Vocabulary, job_id: str, known: tuple[str, bytes], seconds: int
    ) -> tuple[str, bytes]:
        """Return a job's tag and document once they are others than `known`; `known` when the time is over."""
        found: asyncio.Future[tuple[str, bytes]] = asyncio.get_running_loop().create_future()

        async def send(message: bytes) -> None:
            kind, tag, document, _ = event_of(vocabulary.name, message)
            if kind in _EVENT_NAMES and tag != known[0] and not found.done():
                found.set_result((tag, document))

        await self._watch_until(found, "WatchJob", request, pb.WatchJobRequest(id=job_id), send, seconds=seconds)
        return found.result() if found.done() else known

    async def _watch_until(
        self,
        found: asyncio.Future[Any],
        name: str,
        request: Request,
        message: Message,
        send: Callable[[bytes], Awaitable[None]],
        *,
        seconds: int | None = None,
    ) -> None:
        """Watch until `send` has made `found` done, the watch ends, or the time is over.

        Raises:
            JobStatusError: the watch was refused or cut off before.
        """
        method = self._gateway.rpcs[f"{_SERVICE_PATH}/{name}"].method
        watch = asyncio.create_task(run(method, message.SerializeToString(), Call(request, send=send), request))
        try:
            await asyncio.wait((watch, found), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if watch.done() and not found.done():
                watch.result()
        except CallEndedError as error:
            raise status.from_rpc_error(error) from None  # type: ignore[arg-type]  # it has the methods of one
        finally:
            watch.cancel()
            with contextlib.suppress(Exception):
                await watch

    async def _respond_job(
        self,
        code: int,
        request: Request,
        vocabulary: Vocabulary,
        job: pb.JobStatus,
        fields: Sequence[tuple[str, str]] = (),
    ) -> None:
        tag, document = vocabulary.tagged(job)
        await request.respond(code, JSON, document, [("etag", f'"{tag}"'), ("vary", "Accept"), *fields])


class _EventStream:
    """A response of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

    def __init__(self, request: Request) -> None:
        self._request = request

    async def send(self, name: str, data: bytes, *, event_id: str = "") -> None:
        """Send an event; JSON has no line breaks."""
        await self._write(b"".join([f"event: {name}\n".encode(), _id_line(event_id), b"data: ", data, b"\n\n"]))

    async def comment(self, *, event_id: str = "") -> None:
        """Send a sign of life, which is no event."""
        await self._write(b":\n" + _id_line(event_id) + b"\n")

    async def end(self) -> None:
        """End the response. A client that has seen the last event already gets 204, which ends its retries."""
        if self._request.is_started:
            await self._request.write(b"", is_last=True)
        else:
            await self._request.respond(HTTPStatus.NO_CONTENT)

    async def _write(self, data: bytes) -> None:
        if not self._request.is_started:
            # The second is for nginx, which would hold events back.
            fields = [("content-type", EVENT_STREAM), ("x-accel-buffering", "no")]
            await self._request.start(HTTPStatus.OK, fields)
        await self._request.write(data)


def _id_line(event_id: str) -> bytes:
    return f"id: {event_id}\n".encode() if event_id else b""


def _path_of(job_id: str) -> str:
    """Return the path of a job; of an id that would be another path, a character is percent-encoded."""
    part = quote(job_id, safe=":")
    if part == "events":
        part = "%65vents"
    elif part.endswith(":cancel"):
        part = f"{part.removesuffix(':cancel')}%3Acancel"
    return f"/v1/jobs/{part}"


def _pairs_of(request: Request) -> list[tuple[str, str]]:
    try:
        return parse_qsl(request.query, keep_blank_values=True, errors="strict", max_num_fields=2000)
    except (UnicodeDecodeError, ValueError):
        raise HttpError(HTTPStatus.BAD_REQUEST, "the query is not UTF-8, or has more than 2,000 parameters") from None


def _query_of(request: Request, *names: str) -> Query:
    """Return the parameters of a request's query, the last of those that may be repeated.

    Raises:
        HttpError: one is not known here, or is there twice.
    """
    allowed = {"vocabulary", *names}
    query: dict[str, str] = {}
    for name, value in _pairs_of(request):
        if name not in allowed:
            text = f"there is no parameter {name[:100]} here; there are {', '.join(sorted(allowed))}"
            raise HttpError(HTTPStatus.BAD_REQUEST, text)
        if name in query and name not in REPEATED:
            raise HttpError(HTTPStatus.BAD_REQUEST, f"the parameter {name} is there twice")
        query[name] = value
    return query


def _filter_of(request: Request, vocabulary: Vocabulary) -> pb.JobFilter:
    message = pb.JobFilter()
    violations = []
    for name, value in _pairs_of(request):
        if name not in FILTERS:
            continue
        try:
            _add_criterion(message, name, value, vocabulary)
        except ValueError as error:
            violations.append(FieldViolation(name, str(error)))
    if violations:
        raise InvalidFieldError(violations=violations)
    return message


def _add_criterion(message: pb.JobFilter, name: str, value: str, vocabulary: Vocabulary) -> None:
    field = FILTERS[name]
    if not value and name != "name":
        raise ValueError("must not be empty")  # in a filter of the API that is no criterion: all jobs match
    if name == "state":
        states = vocabulary.states_of(value)
        if not states:
            raise ValueError(f"must be one of {', '.join(dict.fromkeys(vocabulary.words.values()))}")
        message.states.extend(map(int, states))  # type: ignore[arg-type]  # the numbers are the enum's
    elif name == "label":
        key, equals, text = value.partition("=")
        if not equals:
            raise ValueError("must be KEY=VALUE")
        if message.labels.get(key, text) != text:
            raise ValueError(f"has two values for {key[:100]}; a job has one")
        message.labels[key] = text
    elif name in REPEATED:
        getattr(message, field).append(value)
    elif name in ("createdAfter", "createdBefore"):
        try:
            getattr(message, field).FromJsonString(value)
        except (ValueError, OverflowError):
            raise ValueError("must be a time such as 2026-01-31T12:00:00Z") from None
    elif name in ("done", "stalled"):
        if value not in FLAGS:
            raise ValueError("must be true or false")
        setattr(message, field, FLAGS[value])
    else:
        setattr(message, field, value)


def _number(query: Query, name: str) -> int:
    text = query.get(name, "0")
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise InvalidFieldError(violations=[FieldViolation(name, "must be a number of at most 9 digits")])
    return int(text)


async def _document_of(request: Request, *types: str) -> Mapping[str, Any]:
    if request.content_type() not in types:
        field = "accept-patch" if request.method == "PATCH" else "accept-post"
        text = f"the body must be {' or '.join(types)}"
        raise HttpError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, text, fields=[(field, ", ".join(types))])
    return document_in(await request.body(max_bytes=MAX_DOCUMENT_BYTES))


def _is_known(tag: str, known: str | None) -> bool:
    """Return whether an If-None-Match names a tag."""
    if known is None:
        return False
    return known.strip() == "*" or any(each.strip().removeprefix("W/") == f'"{tag}"' for each in known.split(","))


def _expected_revision(request: Request) -> int:
    """Return the revision of an If-Match, with or without the hash of an ETag; 0: any.

    Raises:
        HttpError: it can match no job, or several revisions.
    """
    text = request.header("if-match")
    if text is None or text.strip() == "*":
        return 0
    if (found := _ETAG.fullmatch(text)) is None:
        raise HttpError(HTTPStatus.BAD_REQUEST, 'If-Match must be the one ETag of a job, such as "7", or *')
    revision = _REVISION.fullmatch(found[1])
    if revision is None:
        raise HttpError(HTTPStatus.PRECONDITION_FAILED, f"no revision of a job has the ETag {text[:100]}")
    return int(revision[1])


def _idempotency_key(request: Request) -> str:
    """Return the key, which is a string in quotes in the draft of the IETF, and often written without."""
    given = request.header("idempotency-key")
    text = (given or "").strip()
    key = text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
    if given is not None and not key:
        raise InvalidFieldError(violations=[FieldViolation("Idempotency-Key", "must not be empty")])
    return key


def _wait_seconds(request: Request) -> int:
    """Return the time of a `Prefer: wait=N` (RFC 7240), at most MAX_WAIT_SECONDS; 0: there is none."""
    found = re.search(r'(?:^|[,;\s])wait\s*=\s*"?(\d{1,9})"?', request.header("prefer") or "", re.ASCII | re.IGNORECASE)
    return 0 if found is None else min(int(found[1]), MAX_WAIT_SECONDS)
