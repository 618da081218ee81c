"""The connections of the web side: uvicorn with h11 in the server's event loop, TLS, time limits, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
"""Time for a request's header, from the opening of the connection, or from its first byte for those after the first.
A TLS handshake comes before it, and may take the 60 s of asyncio."""

IDLE_SECONDS = 60
"""Time without a request after which a connection is closed."""

MAX_HEADER_BYTES = 16 * 1024
"""As of gRPC's metadata."""

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
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
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


class _Connection(H11Protocol):
    """A connection, which is closed if the header of a request does not arrive in time."""

    certificate: bytes | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
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

    def send_400_response(self, msg: str) -> None:
        if self._has_request():
            # The body broke off while the request is answered: else its answer is sent after this one, or between.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.abort()
                return
        super().send_400_response(msg)

    def abort(self) -> None:
        """Close the connection at once, and drop what is not sent."""
        self.transport.abort()

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


def _following(tls_context: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """Return a context that uses, for each handshake, the one that `tls_context` returns then."""
    first = tls_context()

    def use_current(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = tls_context()

    first.sni_callback = use_current
    return first
