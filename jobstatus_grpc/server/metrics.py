"""Metrics for Prometheus: what is counted, and the HTTP endpoint that serves it at GET /metrics.

The module is imported only with --metrics: prometheus_client takes a while to load.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import io
import logging
import socket
import socketserver
import ssl
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.descriptor import MethodDescriptor
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.files import read_file
from jobstatus_grpc.job import JobState
from jobstatus_grpc.server.access import Access
from jobstatus_grpc.server.config import host_and_port
from jobstatus_grpc.server.held_bytes import HeldBytes
from jobstatus_grpc.server.limits import CallerLimits
from jobstatus_grpc.server.services import SERVICES
from jobstatus_grpc.stores.interface import ChangeBatch, Clock, JobStore

if TYPE_CHECKING:
    from jobstatus_grpc.server.tls import Certificates

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds of durations: those of go-grpc-prometheus, and finer ones below its first, which most calls stay under."""

COMMANDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)

CALL_LABELS = ("grpc_type", "grpc_service", "grpc_method")

GO_CODES: Mapping[str, str] = {
    **{code.name: code.name.title().replace("_", "") for code in grpc.StatusCode},
    "OK": "OK",
    "CANCELLED": "Canceled",
}
"""The codes as in Go, by their names in grpc."""


SHARED = "Every server that shares the store reports all of them: use max by (state)."


class Histogram:
    """Counts values by the smallest of its bounds that they do not exceed."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Take the upper bounds in rising order; a last bucket without a bound is added."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str] = ()) -> None:
        """Add the buckets to a family, cumulated as Prometheus expects."""
        buckets, below = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            below += count
            buckets.append((bound, float(below)))
        family.add_metric(labels, buckets, self._sum)


class CallTally:
    """Counts the calls of one method."""

    __slots__ = ("_handled", "_is_stream", "_seconds", "labels", "sent", "started")

    def __init__(self, method: MethodDescriptor) -> None:
        is_stream = method.server_streaming
        self.labels = ("server_stream" if is_stream else "unary", method.containing_service.full_name, method.name)
        self.started = 0
        self.sent = 0
        """Messages of streams, counted where they are sent. A unary call has sent one if its code is OK."""
        self._is_stream = is_stream
        self._handled = dict.fromkeys(GO_CODES, 0)
        self._seconds = Histogram(SECONDS)

    def end(self, code: str, seconds: float) -> None:
        """Count a call that has ended; `code` is the name of a grpc.StatusCode."""
        self._handled[code] += 1
        self._seconds.observe(seconds)

    @property
    def open(self) -> int:
        """The number of calls in progress."""
        return self.started - sum(self._handled.values())

    def add_to(
        self,
        started: CounterMetricFamily,
        handled: CounterMetricFamily,
        received: CounterMetricFamily,
        sent: CounterMetricFamily,
        seconds: HistogramMetricFamily,
    ) -> None:
        """Add the counts to the families; each call receives one message, with which it starts."""
        started.add_metric(self.labels, self.started)
        for code, count in self._handled.items():
            handled.add_metric((*self.labels, GO_CODES[code]), count)
        received.add_metric(self.labels, self.started)
        sent.add_metric(self.labels, self.sent if self._is_stream else self._handled["OK"])
        self._seconds.add_to(seconds, self.labels)


class Metrics(Collector):
    """Everything that a server counts, and gauges that it reads when it is scraped. Counts on one event loop."""

    def __init__(
        self,
        store: JobStore,
        *,
        clock: Clock,
        log_lines_dropped: Callable[[], int] = int,
        access: Access | None = None,
        certificates: Certificates | None = None,
        caller_limits: CallerLimits | None = None,
        held: HeldBytes | None = None,
        max_watchers: int | None = None,
    ) -> None:
        """Take the store, a clock in step with that of the store, a count of the log, and what else counts, if used."""
        self._caller_limits = caller_limits
        self._store = store
        self._access = access
        self._clock = clock
        self._log_lines_dropped = log_lines_dropped
        self._certificates = certificates
        self._held = held
        self._max_watchers = max_watchers
        self.calls: Mapping[str, CallTally] = {
            method.name: CallTally(method) for service in SERVICES for method in service.methods
        }
        """By the method's name: all methods, so that each series starts at zero."""
        self._commit_commands = Histogram(COMMANDS)
        self._commit_seconds = Histogram(SECONDS)
        self._feed_lag = Histogram(SECONDS)
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        PlatformCollector(registry=self._process)
        GCCollector(registry=self._process)
        self._build_info = GaugeMetricFamily("jobstatus_build_info", "The version that runs.", labels=("version",))
        self._build_info.add_metric((version("jobstatus-grpc"),), 1)

    def observe_commit(self, commands: int, seconds: float) -> None:
        """Count a commit that succeeded."""
        self._commit_commands.observe(commands)
        self._commit_seconds.observe(seconds)

    def observe_batch(self, batch: ChangeBatch) -> None:
        """Count the time from a batch's oldest change to its publication; removals have no time."""
        made_at = min((change.job.updated_at for change in batch.changes if change.job is not None), default=None)
        if made_at is not None:
            self._feed_lag.observe(max(0.0, (self._clock() - made_at).total_seconds()))

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics; called by prometheus_client in any thread."""
        yield from self._of_the_store()
        yield self._watchers()
        if self._max_watchers is not None:
            yield GaugeMetricFamily(
                "jobstatus_max_watchers", "The limit of open watches, --max-watchers.", value=self._max_watchers
            )
        if self._certificates is not None:
            yield from _of_certificates(self._certificates)
        yield from self._counted()

    def _counted(self) -> Iterator[Metric]:
        """Yield the counts, the use of the process, and its version."""
        yield from self._of_calls()
        for name, text, histogram in (
            ("jobstatus_commit_commands", "Commands committed together.", self._commit_commands),
            ("jobstatus_commit_seconds", "How long commits took, those that failed left out.", self._commit_seconds),
            ("jobstatus_feed_lag_seconds", "From a change to its publication, the oldest of a batch.", self._feed_lag),
        ):
            family = HistogramMetricFamily(name, text, labels=())
            histogram.add_to(family)
            yield family
        yield CounterMetricFamily(
            "jobstatus_log_lines_dropped",
            "Log lines that were not written: stderr was not read, or could not be written.",
            value=self._log_lines_dropped(),
        )
        if self._access is not None:
            yield from _of_access(self._access)
        if self._held is not None:
            yield from _of_held_bytes(self._held)
        if self._caller_limits is not None:
            yield _of_limits(self._caller_limits)
        yield from self._process.collect()
        yield self._build_info

    def _of_calls(self) -> Iterable[Metric]:
        started = CounterMetricFamily("grpc_server_started", "RPCs started on the server.", labels=CALL_LABELS)
        handled = CounterMetricFamily(
            "grpc_server_handled",
            "RPCs completed on the server, regardless of success or failure.",
            labels=(*CALL_LABELS, "grpc_code"),
        )
        received = CounterMetricFamily(
            "grpc_server_msg_received", "RPC messages received on the server.", labels=CALL_LABELS
        )
        sent = CounterMetricFamily("grpc_server_msg_sent", "RPC messages sent by the server.", labels=CALL_LABELS)
        seconds = HistogramMetricFamily(
            "grpc_server_handling_seconds", "How long the server took to handle RPCs.", labels=CALL_LABELS
        )
        for tally in self.calls.values():
            tally.add_to(started, handled, received, sent, seconds)
        return started, handled, received, sent, seconds

    def _of_the_store(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("jobstatus_jobs", f"Jobs in the store. {SHARED}", labels=("state",))
        counts = self._store.jobs_by_state()
        for state in JobState:
            jobs.add_metric((state.word,), counts.get(state, 0))
        yield jobs
        yield GaugeMetricFamily("jobstatus_jobs_stalled", "Stalled jobs.", value=self._store.stalled_jobs())
        yield GaugeMetricFamily(
            "jobstatus_store_writable", "Whether the last write went through, 1 or 0.", value=self._store.writable
        )
        yield GaugeMetricFamily(
            "jobstatus_store_damaged_rows",
            "Rows found damaged since the start: calls for their jobs fail with DATA_LOSS.",
            value=self._store.damaged_rows(),
        )

    def _watchers(self) -> Metric:
        watchers = GaugeMetricFamily("jobstatus_watchers", "Open watches: of one job, of many jobs.", labels=("kind",))
        watchers.add_metric(("job",), self.calls["WatchJob"].open + self.calls["WaitOperation"].open)
        watchers.add_metric(("jobs",), self.calls["WatchJobs"].open)
        return watchers


def _of_held_bytes(held: HeldBytes) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "jobstatus_held_bytes", "Memory counted for open calls; --max-held-mib limits it.", value=held.total
    )
    yield GaugeMetricFamily(
        "jobstatus_max_held_bytes", "The limit of jobstatus_held_bytes, --max-held-mib in bytes.", value=held.limit
    )
    yield CounterMetricFamily(
        "jobstatus_held_bytes_refusals", "Calls refused or ended by --max-held-mib.", value=held.refusals
    )


def _of_limits(caller_limits: CallerLimits) -> Metric:
    refusals = CounterMetricFamily(
        "jobstatus_limit_refusals",
        "Calls refused by [limits], by the limit, and by its scope: a principal's own, or that of its tenant.",
        labels=("limit", "scope"),
    )
    for labels, count in caller_limits.refusals.items():
        refusals.add_metric(labels, count)
    return refusals


def _of_access(access: Access) -> Iterator[Metric]:
    refusals = CounterMetricFamily(
        "jobstatus_auth_refusals",
        "Calls refused for their credentials or their caller's role, by the reason of the error.",
        labels=("reason",),
    )
    for reason, count in access.refusals.items():
        refusals.add_metric((reason,), count)
    yield refusals
    if access.watches is not None:
        ended = CounterMetricFamily(
            "jobstatus_auth_ended_watches",
            "Watches that were ended because of their caller, by the reason of the error.",
            labels=("reason",),
        )
        for reason, count in access.watches.ended.items():
            ended.add_metric((reason,), count)
        yield ended
    if access.file is not None:
        reloads = CounterMetricFamily(
            "jobstatus_auth_reloads", "Changes of the file of --auth: used, or refused.", labels=("result",)
        )
        for result, count in access.file.reloads.items():
            reloads.add_metric((result,), count)
        yield reloads


def _of_certificates(certificates: Certificates) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "jobstatus_tls_certificate_expires_at_seconds",
        "When the certificate in use expires, or one of the CAs sent with it if that is earlier, in Unix time.",
        value=certificates.current.expires_at.timestamp(),
    )
    reloads = CounterMetricFamily(
        "jobstatus_tls_reloads", "Changes of the TLS files that were taken, and that were refused.", labels=("result",)
    )
    for result, number in certificates.reloads.items():
        reloads.add_metric((result,), number)
    yield reloads


log = logging.getLogger("jobstatus_grpc.server")

PATH = "/metrics"

CONNECTION_SECONDS = 10.0
"""Time for a request and its response, after which a client is disconnected: Prometheus waits no longer."""

MAX_CONNECTIONS = 20
"""Connections that are served at once, each in a thread. For a further one, the oldest that has not sent its request is
closed: silent clients cannot keep others out."""

MAX_HEAD_BYTES = 16 * 1024
"""Of a request: its line and its headers."""

POLL_SECONDS = 0.1


class MetricsEndpoint:
    """Answers scrapes in threads of its own, which end with the process at the latest."""

    def __init__(
        self,
        address: str,
        collector: Collector,
        *,
        connection_seconds: float = CONNECTION_SECONDS,
        https_context: Callable[[], ssl.SSLContext] | None = None,
        token_file: str | None = None,
    ) -> None:
        """Take `host:port`, and a collector that can be read in any thread.

        Args:
            address: where to listen.
            collector: what is served.
            connection_seconds: see CONNECTION_SECONDS.
            https_context: returns the context of the next connection; None: HTTP.
            token_file: a file with the bearer token that a request needs, read for each; None: it needs none.
        """
        self._address = address
        self._collector = collector
        self._connection_seconds = connection_seconds
        self._https_context = https_context
        self._token = None if token_file is None else TokenFile(token_file)
        self._server: _Server | None = None
        self.url = ""
        """The URL of the metrics, once started."""

    async def start(self) -> None:
        """Listen.

        Raises:
            CannotStartError: the address cannot be listened on, or there is no token or certificate.
        """
        if self._token is not None:
            self._token.read()
        if self._https_context is not None:
            self._https_context()
        host, port = host_and_port(self._address)
        try:
            places = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, _, _, _, place = min(places)  # IPv4 before IPv6, where a name has both
            self._server = self._bind(family, place)
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or "no host has this name"
            advice = "choose another --metrics HOST:PORT"
            raise CannotStartError(f"cannot serve metrics on {self._address}: {why}; {advice}") from None
        bound_host, bound_port = map(str, self._server.socket.getsockname()[:2])
        scheme = "http" if self._https_context is None else "https"
        self.url = f"{scheme}://{f'[{bound_host}]' if ':' in bound_host else bound_host}:{bound_port}{PATH}"
        serve = threading.Thread(target=self._server.serve_forever, args=(POLL_SECONDS,), name="metrics", daemon=True)
        serve.start()
        log.info("metrics on %s", self.url)

    async def close(self) -> None:
        """Stop listening."""
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.shutdown)
            server.server_close()

    def _bind(self, family: int, place: tuple[object, ...]) -> _Server:
        endpoint = self

        class Server(_Server):
            address_family = family
            connection_seconds = endpoint._connection_seconds
            https_context = staticmethod(endpoint._https_context) if endpoint._https_context else None

        class Handler(_Handler):
            timeout = endpoint._connection_seconds
            collector = endpoint._collector
            token = endpoint._token

        return Server(place, Handler)


class TokenFile:
    """A file with a bearer token."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._last = ""

    def read(self) -> str:
        """Return the token, as last read if the file has none now.

        Raises:
            CannotStartError: it never had one.
        """
        try:
            token = read_file(self._path).decode("ascii").strip()
            why = "is empty"
        except (OSError, ValueError) as error:
            token, why = "", f"cannot be read: {getattr(error, 'strerror', None) or 'it is not ASCII'}"
        self._last = token or self._last
        if not self._last:
            raise CannotStartError(f"--metrics-token-file {self._path} {why}; write a token of your choice to it")
        return self._last

    def is_in(self, header: str | None) -> bool:
        """Return whether an `Authorization` header has the token."""
        scheme, _, given = (header or "").partition(" ")
        # In constant time, so that the time of a refusal says nothing about the token.
        is_right = hmac.compare_digest(given.strip().encode(), self.read().encode())
        return is_right and scheme.lower() == "bearer"


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    opened_at: float
    has_request: bool = False
    """Whether the whole request has arrived."""

    def cut_off(self) -> None:
        """End it: its thread gets the end of the input, or an OSError."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a silent client must not delay the end
    request_queue_size = 128  # with the default of 5, connections that come together wait for a second
    connection_seconds: float
    https_context: Callable[[], ssl.SSLContext] | None

    def __init__(self, *arguments: Any) -> None:
        self._lock = threading.Lock()
        self._connections: dict[object, _Connection] = {}
        """By the client's address, in the order of their beginning."""
        super().__init__(*arguments)

    def server_bind(self) -> None:
        # HTTPServer's own asks the DNS for this host's full name, which is not used here and may take long.
        socketserver.TCPServer.server_bind(self)

    def verify_request(self, request: Any, client_address: object) -> bool:
        """Return whether there is a place for a connection, and make one if a client has not sent its request."""
        with self._lock:
            if len(self._connections) >= MAX_CONNECTIONS:
                waiting = (each for each, connection in self._connections.items() if not connection.has_request)
                oldest = next(waiting, None)
                if oldest is None:
                    return False
                self._connections.pop(oldest).cut_off()
            self._connections[client_address] = _Connection(request, time.monotonic())
        return True

    def service_actions(self) -> None:
        """Cut off clients that are too slow; called by `serve_forever` every POLL_SECONDS."""
        too_old = time.monotonic() - self.connection_seconds
        with self._lock:
            for connection in self._connections.values():
                if connection.opened_at < too_old:
                    connection.cut_off()

    def note_request(self, client_address: object) -> None:
        """Record that the whole request of a client has arrived."""
        with self._lock:
            if (connection := self._connections.get(client_address)) is not None:
                connection.has_request = True

    def finish_request(self, request: Any, client_address: Any) -> None:
        try:
            if self.https_context is None:
                super().finish_request(request, client_address)
            else:
                self._finish_secure(request, client_address)
        finally:
            with self._lock:
                self._connections.pop(client_address, None)

    def _finish_secure(self, request: Any, client_address: Any) -> None:
        assert self.https_context is not None
        # In the request's thread: a client that is silent in the handshake must not stop others from connecting.
        request.settimeout(self.connection_seconds)
        secure = self.https_context().wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        try:
            with self._lock:
                if (connection := self._connections.get(client_address)) is None:
                    return
                connection.socket = secure
            secure.do_handshake()
            super().finish_request(secure, client_address)
        finally:
            self.shutdown_request(secure)

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that leaves, or a failed handshake, is an OSError.
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception("a request for metrics from %s failed", client_address)


class _Head(io.BufferedIOBase):
    """The input of a connection up to MAX_HEAD_BYTES."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self._left = MAX_HEAD_BYTES

    def readline(self, size: int | None = -1, /) -> bytes:
        line = self._file.readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise ConnectionError("the head of a request is too large")
        return line

    def close(self) -> None:
        self._file.close()


class _Handler(BaseHTTPRequestHandler):
    collector: Collector
    token: TokenFile | None
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.rfile = _Head(self.rfile)

    def parse_request(self) -> bool:
        """Read the headers, and return whether they are valid; otherwise the response is sent."""
        is_valid = super().parse_request()
        self.server.note_request(self.client_address)
        return is_valid

    def do_GET(self) -> None:
        if not self._is_path_right() or not self._is_allowed():
            return
        try:
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        except TypeError:  # the version in the Accept header is not a number
            encode, content_type = choose_encoder("")
        self._answer(HTTPStatus.OK, encode(self.collector), **{"Content-Type": content_type})

    def _refuse(self) -> None:
        if self._is_path_right():
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET is allowed\n", Allow="GET")

    do_DELETE = do_HEAD = do_OPTIONS = do_PATCH = do_POST = do_PUT = _refuse

    def _is_allowed(self) -> bool:
        is_allowed = self.token is None or self.token.is_in(self.headers.get("Authorization"))
        if not is_allowed:
            text = b"the bearer token of --metrics-token-file is missing\n"
            self._answer(HTTPStatus.UNAUTHORIZED, text, **{"WWW-Authenticate": "Bearer"})
        return is_allowed

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
        """Log nothing: scrapes come every few seconds."""
