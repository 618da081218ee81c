"""The connections of the HTTP gateway: uvicorn with h11 in the server's event loop, TLS, time limits, drain."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jobstatus_grpc.web.http import PROBLEM_TYPE, HttpError, problem_of

HEADER_SECONDS = 10.0
"""Time for a request's header, from the opening of the connection, or from its first byte for those after the first.
A TLS handshake comes before it, and may take the 60 s of asyncio."""

IDLE_SECONDS = 60
"""Time without a request after which a connection is closed."""

STALL_SECONDS = 60.0
"""Time in which a client may take nothing of what is sent to it."""

STALL_CHECKS = 10
"""Checks in that time. They are counted, not the time: a process that was suspended does not close all connections."""

MAX_HEADER_BYTES = 16 * 1024
"""As of gRPC's metadata."""

MAX_HEADER_FIELDS = 100
"""Fields in the header of a request, as in Apache: browsers send about 20, and proxies add some."""

MAX_JOINED_BYTES = 64 * 1024
"""Written before it is sent: only what the transport has counts for its flow control."""

BACKLOG = 4096
"""Connections that wait to be accepted: all browsers of a site return at once after a restart."""


class WebListener:
    """Serves an ASGI application on sockets that are bound."""

    def __init__(
        self,
        application: Any,
        sockets: Sequence[socket.socket],
        *,
        tls_context: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        """Take what returns the TLS context of the next connection; None: no TLS."""
        self._sockets = sockets
        self._server = _Server(
            uvicorn.Config(
                application,
                http=_Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=IDLE_SECONDS,
            )
        )
        self._tls_context = tls_context
        self._serving: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """The address, as a browser takes it."""
        host, port = self._sockets[0].getsockname()[:2]
        return f"http{'s' if self._tls_context else ''}://{f'[{host}]' if ':' in host else host}:{port}"

    async def start(self) -> None:
        """Begin to accept connections."""
        # It logs a line for each request that is not HTTP, and the state of its own life.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        config = self._server.config
        config.load()
        config.ssl = None if self._tls_context is None else _CurrentContext.of(self._tls_context)
        self._serving = asyncio.create_task(self._server.serve(list(self._sockets)))
        while not self._server.started and not self._serving.done():  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0)
        if self._serving.done():
            self._serving.result()

    async def stop(self, grace_seconds: float) -> None:
        """Accept no more connections, give the running requests `grace_seconds`, then cut them off."""
        if self._serving is None:
            for each in self._sockets:
                each.close()
            return
        self._server.config.timeout_graceful_shutdown = grace_seconds  # type: ignore[assignment]  # it takes any number
        self._server.should_exit = True
        await self._serving
        for connection in list(self._server.server_state.connections):
            connection.abort()  # type: ignore[union-attr]  # each is a _Connection


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the server of which this is a part."""
        yield


class _Parser(h11.Connection):
    """Parses requests. Their header has to be within the limits, also where it comes at once: h11 checks only the size
    of a header that is not complete yet."""

    refusal = h11.RemoteProtocolError("")
    """Why the last request was refused."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        bytes_before = len(self.trailing_data[0]) if self.their_state is h11.IDLE else 0
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                if bytes_before - len(self.trailing_data[0]) > MAX_HEADER_BYTES:
                    raise h11.RemoteProtocolError("too many bytes", error_status_hint=431)
                if len(event.headers) > MAX_HEADER_FIELDS:
                    raise h11.RemoteProtocolError("too many fields", error_status_hint=431)
                if not event.http_version.startswith(b"1."):
                    text = "this address has no HTTP/2; gRPC is at that of --listen"
                    raise h11.RemoteProtocolError(text, error_status_hint=505)
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise
        return event


class _Joined:
    """A transport that sends together what is written in one turn of the loop: the header of a response and its body
    are two writes, and a system call for each costs more than parsing the request. It is aborted if the client takes
    nothing for STALL_SECONDS: also after `close`, which waits until all is taken."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._pending = bytearray()
        self._unsent_bytes = 0
        self._checks_without_progress = 0
        self._stall_timer: asyncio.TimerHandle | None = None
        self.is_closing = transport.is_closing
        self.abort = transport.abort
        self.get_extra_info = transport.get_extra_info
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.get_write_buffer_size = transport.get_write_buffer_size

    def write(self, data: bytes) -> None:
        if data and not self._pending:
            asyncio.get_running_loop().call_soon(self._flush)
        self._pending += data
        if len(self._pending) > MAX_JOINED_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        if not self._transport.is_closing():
            self._transport.close()
            # Also if nothing seems to be left: of TLS, the buffer of the transport below is not counted.
            self._watch_progress()

    def end_timer(self) -> None:
        """Stop watching the client: the connection is lost."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _flush(self) -> None:
        if self._pending and not self._transport.is_closing():
            self._note_progress()
            self._transport.write(bytes(self._pending))
            self._unsent_bytes = self._transport.get_write_buffer_size()
            if self._unsent_bytes:
                self._watch_progress()
        self._pending.clear()

    def _note_progress(self) -> None:
        unsent_bytes = self._transport.get_write_buffer_size()
        if unsent_bytes < self._unsent_bytes:
            self._checks_without_progress = 0
        self._unsent_bytes = unsent_bytes

    def _watch_progress(self) -> None:
        if self._stall_timer is None:
            self._checks_without_progress = 0
            self._check_later()

    def _check_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._stall_timer = loop.call_later(STALL_SECONDS / STALL_CHECKS, self._check_progress)

    def _check_progress(self) -> None:
        self._stall_timer = None
        self._checks_without_progress += 1
        self._note_progress()
        if self._checks_without_progress >= STALL_CHECKS:
            self.abort()
        elif self._unsent_bytes or self._transport.is_closing():
            self._check_later()


class _Connection(H11Protocol):
    """A connection, which is closed if the header of a request does not arrive in time."""

    certificate: bytes | None = None
    conn: _Parser

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn = _Parser()
        self.lost_callbacks: set[Callable[[], None]] = set()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._joined = _Joined(transport)
        super().connection_made(self._joined)  # type: ignore[arg-type]  # it has what uvicorn needs
        self.app_state = {"connection": self}
        tls = transport.get_extra_info("ssl_object")
        der = None if tls is None else tls.getpeercert(binary_form=True)
        if der:
            self.certificate = ssl.DER_cert_to_PEM_cert(der).encode()
        self._header_timer: asyncio.TimerHandle | None = None
        self._await_header()

    def data_received(self, data: bytes) -> None:
        if not self._has_request():
            self._await_header()
        super().data_received(data)
        if self._has_request():
            self._end_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_timer()
        super().connection_lost(exc)
        self._joined.end_timer()
        self._call_lost_callbacks()

    def timeout_keep_alive_handler(self) -> None:
        if self._joined.get_write_buffer_size() and not self._joined.is_closing():
            # The client still reads the last response: to close TLS would cut it off after 30 s.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
            return
        super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        if self._has_request():
            # The body broke off while the request is answered: else its answer is sent after this one, or between.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._call_lost_callbacks()
            if self.cycle.response_started:
                self.abort()
                return
        # Not through h11, which would refuse a body of an answer to HEAD.
        self.transport.write(_response_to(self.conn.refusal))
        self.transport.close()

    def abort(self) -> None:
        """Close the connection at once, and drop what is not sent."""
        self.transport.abort()

    def _call_lost_callbacks(self) -> None:
        for callback in [*self.lost_callbacks]:
            callback()

    def _has_request(self) -> bool:
        cycle: Any = self.cycle  # None before the first
        return cycle is not None and not cycle.response_complete

    def _await_header(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.abort)

    def _end_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def _response_to(refusal: h11.RemoteProtocolError) -> bytes:
    """Return the whole response to what is not a request of HTTP, or is beyond a limit."""
    code = refusal.error_status_hint
    text = f"the request is not valid HTTP/1.1: {refusal}"
    if code == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
        text = f"the header is larger than {MAX_HEADER_BYTES} bytes, or has more than {MAX_HEADER_FIELDS} fields"
    body = json.dumps(problem_of(HttpError(code, text))).encode()
    fields = f"content-type: {PROBLEM_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return f"HTTP/1.1 {code} {HTTPStatus(code).phrase}\r\n{fields}".encode() + body


class _CurrentContext(ssl.SSLContext):
    """A context of which each connection has the one that `current` returns when it opens.

    A callback for the name (SNI) would exchange the context too late: sessions of the first one could be resumed for
    ever, also by clients whose CA is no longer trusted.
    """

    current: Callable[[], ssl.SSLContext]

    @classmethod
    def of(cls, current: Callable[[], ssl.SSLContext]) -> _CurrentContext:
        context = cls(ssl.PROTOCOL_TLS_SERVER)
        context.current = current
        return context

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        return self.current().wrap_bio(*arguments, **options)
