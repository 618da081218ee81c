"""Serves the metrics over HTTP on an address of their own: GET /metrics and nothing else."""

from __future__ import annotations

import asyncio
import logging
import socket
import socketserver
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.server.config import host_and_port

log = logging.getLogger("jobstatus_grpc.server")

PATH = "/metrics"
SILENCE_SECONDS = 10.0
"""A client that sends or reads nothing for so long is dropped."""
POLL_SECONDS = 0.1


class MetricsEndpoint:
    """Answers scrapes in threads of its own, which end with the process."""

    def __init__(self, address: str, collector: Collector, *, silence_seconds: float = SILENCE_SECONDS) -> None:
        """Take `host:port`, and what collects the metrics, in any thread."""
        self._address = address
        self._collector = collector
        self._silence_seconds = silence_seconds
        self._server: _Server | None = None
        self.url = ""
        """Where it answers, once it was started."""

    async def start(self) -> None:
        """Listen.

        Raises:
            CannotStartError: the address cannot be listened on.
        """
        host, port = host_and_port(self._address)
        try:
            places = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, _, _, _, place = min(places)  # IPv4 before IPv6, where a name has both
            self._server = _server(family, place, self._collector, self._silence_seconds)
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or "no host has this name"
            advice = "choose another --metrics HOST:PORT"
            raise CannotStartError(f"cannot serve metrics on {self._address}: {why}; {advice}") from None
        bound_host, bound_port = map(str, self._server.socket.getsockname()[:2])
        self.url = f"http://{f'[{bound_host}]' if ':' in bound_host else bound_host}:{bound_port}{PATH}"
        serve = threading.Thread(target=self._server.serve_forever, args=(POLL_SECONDS,), name="metrics", daemon=True)
        serve.start()
        log.info("metrics on %s", self.url)

    async def close(self) -> None:
        """Stop listening."""
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.shutdown)
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a silent client holds up no end

    def server_bind(self) -> None:
        # HTTPServer's own asks the DNS for this host's full name, which nobody needs and which may take long.
        socketserver.TCPServer.server_bind(self)


def _server(family: int, place: tuple[object, ...], metrics: Collector, silence_seconds: float) -> _Server:
    class Server(_Server):
        address_family = family

    class Handler(_Handler):
        timeout = silence_seconds
        collector = metrics

    return Server(place, Handler)  # type: ignore[arg-type]  # an IPv6 address has four parts


class _Handler(BaseHTTPRequestHandler):
    collector: Collector

    def do_GET(self) -> None:
        if not self._is_path_right():
            return
        try:
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        except TypeError:  # a version that is no number
            encode, content_type = choose_encoder("")
        self._answer(HTTPStatus.OK, encode(self.collector), **{"Content-Type": content_type})

    def _refuse(self) -> None:
        if self._is_path_right():
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET is allowed\n", Allow="GET")

    do_DELETE = do_HEAD = do_OPTIONS = do_PATCH = do_POST = do_PUT = _refuse

    def _is_path_right(self) -> bool:
        is_right = urlsplit(self.path).path == PATH
        if not is_right:
            self._answer(HTTPStatus.NOT_FOUND, f"only {PATH} is here\n".encode())
        return is_right

    def _answer(self, status: HTTPStatus, body: bytes, **fields: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "text/plain; charset=utf-8", **fields}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes come every few seconds; the log is for others."""
