"""A call of an RPC that came over HTTP: what its handler sees of it, its deadline, and how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import grpc

from jobstatus_grpc.errors import DrainingError
from jobstatus_grpc.web.http import Cutter, DisconnectedError, Request
from jobstatus_grpc.wire import status


class Method(Protocol):
    """An RPC of the server, with all that the server puts around it."""

    @property
    def path(self) -> str:
        """Such as `/jobstatus.v1.JobStatusService/GetJob`."""
        ...

    @property
    def is_stream(self) -> bool:
        """Whether the response is a stream."""
        ...

    @property
    def behaviour(self) -> Callable[[bytes, Any], Awaitable[bytes | None]]:
        """From a request's bytes and a Call to the response, or to None at the end of a stream."""
        ...


class CallEndedError(Exception):
    """A call has ended with a status other than OK. Has the methods of a grpc.Call, for `status.from_rpc_error`."""

    def __init__(self, code: grpc.StatusCode, message: str = "", trailers: Sequence[tuple[str, Any]] = ()) -> None:
        super().__init__(message)
        self._code = code
        self._message = message
        self._trailers = trailers

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._message

    def trailing_metadata(self) -> Sequence[tuple[str, Any]]:
        return self._trailers

    @property
    def status_bytes(self) -> bytes | None:
        """The google.rpc.Status of the error, None if it has no details."""
        return next((value for key, value in self._trailers if key == status.DETAILS_KEY), None)


class Call:
    """The context of a call, as the server's methods take it. `send` is of streams: it sends a message."""

    try_send = None

    def __init__(
        self,
        request: Request,
        *,
        seconds: float | None = None,
        send: Callable[[bytes], Awaitable[None]] | None = None,
    ) -> None:
        """Take the time until the deadline of the client; None: it has none."""
        self._request = request
        self._ends_at = None if seconds is None else time.monotonic() + seconds
        self._send = send

    def peer(self) -> str:
        return self._request.peer

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return self._request.fields

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        certificate = self._request.connection.certificate
        return {} if certificate is None else {"x509_pem_cert": [certificate]}

    def time_remaining(self) -> float | None:
        return None if self._ends_at is None else max(self._ends_at - time.monotonic(), 0.0)

    def add_done_callback(self, callback: Callable[[Any], None], /) -> None:
        self._request.done_callbacks.append(callback)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        if code is grpc.StatusCode.UNAUTHENTICATED and self._request.ignored_cookie:
            details = f"{self._request.ignored_cookie}; {details}"
        raise CallEndedError(code, details, trailing_metadata)

    async def write(self, message: bytes) -> None:
        assert self._send is not None
        await self._send(message)

    async def flush(self) -> None:
        pass  # there is no try_send


async def run(method: Method, data: bytes, call: Call, request: Request, *, max_seconds: float | None = None) -> bytes:
    """Make a call in the current task, and return its response, empty for a stream.

    Args:
        method: the RPC.
        data: its request.
        call: its context.
        request: what it came with; its body has been read.
        max_seconds: time after which the connection is closed: the reader of a stream may never read. None: no limit.

    Raises:
        CallEndedError: it ended with another status than OK, or was cut off by its deadline or a drain.
        DisconnectedError: the client has left.
    """
    request.free_body()
    with Cutter() as cutter:
        if (seconds := call.time_remaining()) is not None:
            cutter.after(seconds, CallEndedError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))
        if max_seconds is not None:
            cutter.after(max_seconds, DisconnectedError(), request.connection.abort)
        cutter.when_lost(request.connection)
        try:
            return await method.behaviour(data, call) or b""
        except asyncio.CancelledError:
            raise cutter.error or CallEndedError(*status.status_of(DrainingError())) from None
