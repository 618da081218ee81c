"""A request, read within limits, and the responses to it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
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
HoldBody: TypeAlias = Callable[[int], Awaitable[Callable[[], None]]]
"""Counts the bytes of a body, and returns what frees them; raises the error that refuses its caller."""
Fields: TypeAlias = Iterable[tuple[str, str]]

BODY_SECONDS = 30.0
"""Time for a request's body to arrive whole: 4 MiB at 140 kB a second."""

UNCOUNTED_BODY_BYTES = 64 * 1024
"""Received of a body from any client. More is received from callers that are admitted, and counted."""

DISCARD_SECONDS = 5.0
"""Time for which the rest of a body is taken, and ignored, after a response that did not need it."""

MAX_DISCARDED_BYTES = 2 * limits.MAX_REQUEST_BYTES
"""The bytes of the rest that are taken, at most."""

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
    lost_callbacks: set[Callable[[], None]]
    """Called when the client has closed it, or sent what is not HTTP."""

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
    """The body is over its limit; the rest of it is not read."""

    def __init__(self, max_bytes: int) -> None:
        text = f"the body is larger than {max_bytes} bytes"
        super().__init__(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)


class BodyTimeoutError(HttpError):
    """The body has not arrived in time."""

    def __init__(self) -> None:
        text = f"the body has not arrived within {BODY_SECONDS:g} s; send it again, faster"
        super().__init__(HTTPStatus.REQUEST_TIMEOUT, text)


class Cutter:
    """Cancels the task that runs the block, for the first of several reasons. For one event loop."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        """Why the block was cut off; None: it was not, or by another."""
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Cutter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()
        self._task = None

    def after(self, seconds: float, error: Exception, act: Callable[[], None] | None = None) -> None:
        """Cut the block off after a time; first call `act`."""
        self._undo.callback(self._loop.call_later(seconds, self._cut, error, act).cancel)

    def when_lost(self, connection: Connection) -> None:
        """Cut the block off with a DisconnectedError when the connection is lost."""
        callback = functools.partial(self._cut, DisconnectedError())
        connection.lost_callbacks.add(callback)
        self._undo.callback(connection.lost_callbacks.discard, callback)

    def _cut(self, error: Exception, act: Callable[[], None] | None = None) -> None:
        if self._task is None or self.error is not None:
            return
        if act is not None:
            act()
        self.error = error
        self._task.cancel()


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
        self.hold_body: HoldBody | None = None
        """Called before more than UNCOUNTED_BODY_BYTES are received."""
        self._free_body: Callable[[], None] | None = None
        self.ignored_cookie = ""
        """Why the cookie of a login does not count, if it has one that does not."""
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

    async def body(self, *, max_bytes: int = limits.MAX_REQUEST_BYTES) -> bytes:
        """Read the body, or return it if it has been read.

        Raises:
            HttpError: it is too large, or did not arrive within BODY_SECONDS.
            JobStatusError: it is large, and its caller is refused.
            DisconnectedError: the client has left.
        """
        if self._body is not None:
            return self._body
        length = self.header("content-length")
        if length is not None and int(length) > max_bytes:  # h11 has checked that it is a number
            raise TooLargeError(max_bytes)
        with Cutter() as cutter:
            cutter.after(BODY_SECONDS, BodyTimeoutError())
            try:
                self._body = await self._read(max_bytes)
            except asyncio.CancelledError:
                raise cutter.error or asyncio.CancelledError from None
        return self._body

    async def _read(self, max_bytes: int) -> bytes:
        body = bytearray()
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise DisconnectedError
            body += message["body"]
            if len(body) > max_bytes:
                raise TooLargeError(max_bytes)
            if len(body) > UNCOUNTED_BODY_BYTES and self._free_body is None and self.hold_body is not None:
                self._free_body = await self.hold_body(int(self.header("content-length") or limits.MAX_REQUEST_BYTES))
                self.done_callbacks.append(lambda _: self.free_body())
            if not message["more_body"]:
                self._is_read = True
                return bytes(body)

    def free_body(self) -> None:
        """Count the bytes of the body no more: the call that has them begins, and counts them."""
        if self._free_body is not None:
            self._free_body()

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
        if not self._is_read:
            await self.write(body)
            await self._discard_body()
            body = b""
        await self.write(body, is_last=True)

    async def _discard_body(self) -> None:
        """Take a part of what is left of the body: a client that still sends it when the connection is closed may not
        see the response."""
        self.free_body()
        left = MAX_DISCARDED_BYTES
        with contextlib.suppress(asyncio.TimeoutError):
            ends_at = asyncio.get_running_loop().time() + DISCARD_SECONDS
            while left > 0 and (seconds := ends_at - asyncio.get_running_loop().time()) > 0:
                message = await asyncio.wait_for(self.receive(), seconds)
                if message["type"] == "http.disconnect" or not message["more_body"]:
                    return
                left -= len(message["body"])


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
