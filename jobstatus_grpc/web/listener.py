"""The connections of the web side: uvicorn with httptools in the server's event loop, TLS, time limits, drain."""

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

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

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
        config.ssl = None if self._tls_context is None else _following(self._tls_context)
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


class _Connection(HttpToolsProtocol):
    """A connection, which is closed if the header of a request does not arrive in time. Requests that arrive while
    others are answered are answered in turn, as far as they are valid."""

    certificate: bytes | None = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.lost_callbacks: set[Callable[[], None]] = set()
        self._unparsed = bytearray()
        self._is_in_header = False
        self._arrived_header_bytes = 0
        self._parsed_header_bytes = 0
        self._refusal: HttpError | None = None
        self._open_requests = 0
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._joined = _Joined(transport)
        self._joined.resume_reading = self._resume_reading
        super().connection_made(self._joined)  # type: ignore[arg-type]  # it has what uvicorn needs
        self._resume_transport = transport.resume_reading
        self.app_state = {"connection": self}
        tls = transport.get_extra_info("ssl_object")
        der = None if tls is None else tls.getpeercert(binary_form=True)
        if der:
            self.certificate = ssl.DER_cert_to_PEM_cert(der).encode()
        self._await_header()

    def data_received(self, data: bytes) -> None:
        if not self._open_requests:
            self._await_header()
        self._unparsed += data
        self._parse()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_timer()
        super().connection_lost(exc)
        self._unparsed.clear()
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

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_header = True
        self._arrived_header_bytes = self._parsed_header_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._parsed_header_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_header:  # else it is a trailer, which is no field of the request
            super().on_header(name, value.strip(b" \t"))
            self._parsed_header_bytes += len(name) + len(value) + 4  # with ": " and CRLF

    def on_headers_complete(self) -> None:
        self._is_in_header = False
        self._check_header()
        self._open_requests += 1
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        self._open_requests -= 1
        super().on_response_complete()
        if self._joined.is_closing():
            return
        if self._refusal is None:
            self._parse()
        elif not self._open_requests:
            self._send_refusal()

    def abort(self) -> None:
        """Close the connection at once, and drop what is not sent."""
        self.transport.abort()

    def _parse(self) -> None:
        """Parse what has arrived, until requests wait for their turn: then no more is read from the client."""
        while self._unparsed and not self.pipeline and self._refusal is None:
            self._unset_keepalive_if_required()
            part = bytes(self._unparsed[:MAX_HEADER_BYTES])
            del self._unparsed[:MAX_HEADER_BYTES]
            try:
                self.parser.feed_data(part)
            except httptools.HttpParserUpgrade as upgrade:
                self._unparsed[:0] = part[upgrade.args[0] :]  # It is ignored, as RFC 9110 allows.
            except httptools.HttpParserError as error:
                reason = error.__context__
                text = f"the request is not valid HTTP/1.1: {error}"
                self._refuse(reason if isinstance(reason, HttpError) else HttpError(HTTPStatus.BAD_REQUEST, text))
            if self._is_in_header:
                # With what came before it in the same part: a header that takes two parts is too large anyhow.
                self._arrived_header_bytes += len(part)
                if self._arrived_header_bytes > MAX_HEADER_BYTES:
                    self._refuse(_header_too_large())
        if self._unparsed:
            self.transport.pause_reading()
        elif not self.flow.read_paused:
            self._resume_transport()
        if self._open_requests:
            self._end_timer()
        elif self._is_in_header:
            self._await_header()

    def _resume_reading(self) -> None:
        """Read on, unless what has arrived is not parsed yet."""
        if not self._unparsed:
            self._resume_transport()

    def _check_header(self) -> None:
        """Check what the parser leaves to the server.

        Raises:
            HttpError: the request is refused.
        """
        version = self.parser.get_http_version()
        line_bytes = len(self.parser.get_method()) + len("  HTTP/1.1") + 4  # with CRLF, and that after the fields
        if self._parsed_header_bytes + line_bytes > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADER_FIELDS:
            raise _header_too_large()
        if not version.startswith("1."):
            if version == "2.0":
                text = "this address has no HTTP/2; gRPC is at that of --listen"
                raise HttpError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, text)
            raise HttpError(HTTPStatus.BAD_REQUEST, f"this address has no HTTP/{version}; send HTTP/1.1")
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            raise HttpError(HTTPStatus.BAD_REQUEST, f"the request has {hosts} header fields host; send one")
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings and codings != [b"chunked"]:
            raise HttpError(HTTPStatus.NOT_IMPLEMENTED, "the only transfer-encoding is chunked, once")
        if not self.url.startswith(b"/"):
            text = f"nothing is at {self.url[:200].decode('ascii', 'replace')}: send a path"
            raise HttpError(HTTPStatus.NOT_FOUND, text)

    def _refuse(self, refusal: HttpError) -> None:
        """Answer with an error once the requests before are answered, and parse no more."""
        self._refusal = refusal
        self._is_in_header = False
        self._unparsed.clear()
        cycle = self.cycle  # the last request
        if not self._open_requests:
            self._send_refusal()
        elif cycle.more_body and self.pipeline:
            self.pipeline.popleft()  # Its body broke off before its turn.
            self._open_requests -= 1
        elif cycle.more_body:
            # The body broke off while the request is answered: else its answer is sent after this one, or between.
            cycle.disconnected = True
            cycle.message_event.set()
            self._call_lost_callbacks()
            if cycle.response_started:
                self.abort()
            else:
                self._send_refusal()

    def _send_refusal(self) -> None:
        assert self._refusal is not None
        body = json.dumps(problem_of(self._refusal)).encode()
        code = self._refusal.code
        fields = f"content-type: {PROBLEM_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(f"HTTP/1.1 {code:d} {HTTPStatus(code).phrase}\r\n{fields}".encode() + body)
        self.transport.close()

    def _call_lost_callbacks(self) -> None:
        for callback in [*self.lost_callbacks]:
            callback()

    def _await_header(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.abort)

    def _end_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def _header_too_large() -> HttpError:
    text = f"the header is larger than {MAX_HEADER_BYTES} bytes, or has more than {MAX_HEADER_FIELDS} fields"
    return HttpError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text)


def _following(tls_context: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """Return a context that uses, for each handshake, the one that `tls_context` returns then."""
    first = tls_context()

    def use_current(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = tls_context()

    first.sni_callback = use_current
    return first
