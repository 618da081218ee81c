"""A request, read within limits, and the responses to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any, Protocol, TypeAlias

from jobstatus_grpc.errors import InvalidFieldError, JobStatusError, RetryableError
from jobstatus_grpc.job import limits
from jobstatus_grpc.wire import status

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Fields: TypeAlias = Iterable[tuple[str, str]]

BODY_SECONDS = 30.0
"""Time for a request's body to arrive whole: 4 MiB at 140 kB a second."""

HTTP_STATUS_OF_CODE: Mapping[str, int] = {
    "CANCELLED": 499,
    "UNKNOWN": 500,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DATA_LOSS": 500,
    "UNAUTHENTICATED": 401,
}
"""By the name of the gRPC code, as the Connect protocol has it."""


class Connection(Protocol):
    """The connection of a request."""

    certificate: bytes | None
    """The client's certificate (PEM), which TLS has verified."""

    def abort(self) -> None:
        """Close it at once, and drop what is not sent."""
        ...


class HttpError(Exception):
    """A request that gets an error of HTTP."""

    def __init__(self, code: int, detail: str, *, fields: Fields = ()) -> None:
        """Take an HTTP status, one line that says what to do, and more header fields."""
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.fields = fields


class DisconnectedError(Exception):
    """The client has closed the connection: nothing can be answered."""


class TooLargeError(HttpError):
    """The body is over the limit of requests; the rest of it is not read."""

    def __init__(self) -> None:
        text = f"the body is larger than {limits.MAX_REQUEST_BYTES} bytes"
        super().__init__(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)


Route: TypeAlias = Callable[["Request"], Awaitable[None]]
"""Answers a request."""


class Request:
    """A request of HTTP."""

    def __init__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["raw_path"].decode("ascii")
        """As sent, percent-encoded."""
        self.query: str = scope["query_string"].decode("ascii")
        self.is_https = scope["scheme"] == "https"
        self.connection: Connection = scope["state"]["connection"]
        self.peer = _peer_of(scope["client"])
        """The client's address as gRPC writes it."""
        self.fields: list[tuple[str, str]] = [
            (key.decode(), value.decode("latin-1")) for key, value in scope["headers"]
        ]
        """Header fields, their names in lower case."""
        self.receive = receive
        self.send = send
        self.is_started = False
        """Whether a response has begun."""
        self.done_callbacks: list[Callable[[Any], None]] = []
        """Called with something once the request is answered: the response is sent, or with the connection to be."""
        self._body: bytes | None = None
        self._is_read = not any(key in ("content-length", "transfer-encoding") for key, _ in self.fields)

    def header(self, name: str) -> str | None:
        """Return the value of a header field that a request has once; None: it has none.

        Raises:
            HttpError: it has several.
        """
        values = [value for key, value in self.fields if key == name]
        if len(values) > 1:
            raise HttpError(HTTPStatus.BAD_REQUEST, f"the request has {len(values)} header fields {name}; send one")
        return values[0] if values else None

    def content_type(self) -> str:
        """Return the media type of the body, without parameters; empty if none."""
        return (self.header("content-type") or "").partition(";")[0].strip().lower()

    async def body(self) -> bytes:
        """Read the body, or return it if it has been read.

        Raises:
            HttpError: it is too large, or did not arrive within BODY_SECONDS.
            DisconnectedError: the client has left.
        """
        if self._body is not None:
            return self._body
        length = self.header("content-length")
        if length is not None and int(length) > limits.MAX_REQUEST_BYTES:  # h11 has checked that it is a number
            raise TooLargeError
        try:
            self._body = await asyncio.wait_for(self._read(), BODY_SECONDS)
        except asyncio.TimeoutError:
            text = f"the body has not arrived within {BODY_SECONDS:g} s; send it again, faster"
            raise HttpError(HTTPStatus.REQUEST_TIMEOUT, text) from None
        return self._body

    async def _read(self) -> bytes:
        body = bytearray()
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise DisconnectedError
            body += message["body"]
            if len(body) > limits.MAX_REQUEST_BYTES:
                raise TooLargeError
            if not message["more_body"]:
                self._is_read = True
                return bytes(body)

    async def until_disconnected(self) -> None:
        """Wait until the client closes the connection; only after the body has been read."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def start(self, code: int, fields: Fields) -> None:
        """Send the status and the header fields of the response."""
        self.is_started = True
        if not self._is_read:
            # Else the connection would take the rest of the body, however long, before the next request.
            fields = [*(each for each in fields if each[0] != "connection"), ("connection", "close")]
        headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in fields]
        await self.send({"type": "http.response.start", "status": int(code), "headers": headers})

    async def write(self, data: bytes, *, is_last: bool = False) -> None:
        """Send a part of the body of the response."""
        await self.send({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def respond(self, code: int, content_type: str = "", body: bytes = b"", fields: Fields = ()) -> None:
        """Send a whole response."""
        typed = [("content-type", content_type)] if content_type else []
        # RFC 9110: a response without content by its status has no length.
        length = (
            [] if code in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED) else [("content-length", str(len(body)))]
        )
        await self.start(code, [*typed, *length, *fields])
        await self.write(body, is_last=True)


def _peer_of(client: tuple[str, int] | None) -> str:
    if client is None:
        return "unknown:0"
    host, port = client
    return f"ipv6:%5B{host}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"


PROBLEM_TYPE = "application/problem+json"


async def respond_problem(request: Request, error: HttpError | JobStatusError) -> None:
    """Send an error as a problem (RFC 9457)."""
    problem = problem_of(error)
    if isinstance(error, HttpError):
        fields = [*error.fields]
    else:
        fields = []
        if isinstance(error, RetryableError):
            fields.append(("retry-after", str(max(round(error.retry_after_seconds), 1))))
        if problem["status"] == HTTPStatus.UNAUTHORIZED:
            fields.append(("www-authenticate", "Bearer"))
    await request.respond(problem["status"], PROBLEM_TYPE, json.dumps(problem).encode(), fields)


def problem_of(error: HttpError | JobStatusError) -> dict[str, Any]:
    """Return an error as a problem; that of a call has the reason, metadata and violations that gRPC has."""
    if isinstance(error, HttpError):
        return {"title": HTTPStatus(error.code).phrase, "status": int(error.code), "detail": error.detail}
    code = http_status_of(error)
    problem = {"title": HTTPStatus(code).phrase, "status": code, "detail": error.message}
    if error.reason:
        problem["reason"] = error.reason
    if error.metadata:
        problem["metadata"] = error.metadata
    if isinstance(error, InvalidFieldError) and error.violations:
        problem["violations"] = [{"field": each.field, "description": each.description} for each in error.violations]
    return problem


def http_status_of(error: JobStatusError) -> int:
    """Return the HTTP status of a problem."""
    code = status.code_of(error).name
    return _PROBLEM_STATUS.get(code, HTTP_STATUS_OF_CODE[code])


_PROBLEM_STATUS: Mapping[str, int] = {"FAILED_PRECONDITION": 409, "ABORTED": 412}
"""Where HTTP has a better one than Connect: the state of the job forbids it; If-Match names another revision."""
