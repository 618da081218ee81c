"""What an asyncio client keeps: its channel, the calls and the watches on it."""

from __future__ import annotations

import asyncio
import atexit
import sys
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from jobstatus_grpc.client.retry import Tries, pause
from jobstatus_grpc.client.sender import Step
from jobstatus_grpc.client.watch import (
    AsyncFollower,
    AsyncJobsWatch,
    AsyncWatch,
    Follower,
    JobsWatch,
    JobsWatching,
    Stream,
    Watch,
    Watchdog,
    Watching,
)
from jobstatus_grpc.errors import JobStatusError, UnavailableError
from jobstatus_grpc.wire import status

if TYPE_CHECKING:
    from jobstatus.v1 import job_status_pb2 as pb
    from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceAsyncStub

USER_AGENT = "jobstatus-grpc"

DEFAULT_TIMEOUT_SECONDS = 10.0

_SCHEMES = ("dns:", "unix:", "unix-abstract:", "ipv4:", "ipv6:", "vsock:", "xds:")

CHANNEL_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.primary_user_agent", USER_AGENT),
    # Notice within half a minute that the server's machine is gone, also between calls, so that the next call does not
    # run into its deadline. The server allows a ping every 10 s.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default the third ping without data in between is not sent, and a watch that is silent is not looked after.
    ("grpc.http2.max_pings_without_data", 0),
    # The largest reply: 500 results of a batch, each with all its labels and texts.
    ("grpc.max_receive_message_length", 32 * 1024 * 1024),
    # A server that restarts is found again at once; by default the pauses grow from 1 s to 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Despite its name also how long one attempt to connect may take, by default 20 s: a host that drops packets.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # A new address of a server that has moved is looked up when it is needed; by default at most every 30 s.
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    # By default all channels of a process to one address share a connection: a thousand watches of one client would
    # hold up the calls of another, and closing one would not close its connection.
    ("grpc.use_local_subchannel_pool", 1),
]


class ClientClosedError(UnavailableError):
    """The client is closed."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the server is and who calls; opens channels."""

    target: str
    credentials: grpc.ChannelCredentials | None = None
    """None: without TLS."""
    metadata: tuple[tuple[str, str], ...] | None = None
    """What each call carries."""

    def open(self) -> grpc.Channel:
        """Return a new channel; it connects with the first call."""
        if self.credentials is None:
            return grpc.insecure_channel(self.target, CHANNEL_OPTIONS)
        return grpc.secure_channel(self.target, self.credentials, CHANNEL_OPTIONS)

    def open_aio(self) -> grpc.aio.Channel:
        """Return a new channel of the running event loop; it connects with the first call."""
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.target, CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(self.target, self.credentials, CHANNEL_OPTIONS)


def endpoint(
    address: str,
    *,
    token: str | None = None,
    ca_file: str | None = None,
    cert_file: str | None = None,
    key_file: str | None = None,
) -> Endpoint:
    """Return the endpoint that a client's arguments name.

    Raises:
        ValueError: they do not make sense; the message says what to write.
        OSError: a file cannot be read.
    """
    metadata = None
    if token is not None:
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError("the token must be printable ASCII without spaces")
        metadata = (("authorization", f"Bearer {token}"),)
    return Endpoint(_target(address), _credentials(ca_file, cert_file, key_file), metadata)


def _target(address: str) -> str:
    if address.startswith(_SCHEMES):
        return address
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not an address; write HOST:PORT, dns:///HOST:PORT or unix:/path")
    return address


def _credentials(ca_file: str | None, cert_file: str | None, key_file: str | None) -> grpc.ChannelCredentials | None:
    """Return credentials for TLS where any file is named; without a CA, the public ones that grpc brings count."""
    if (cert_file is None) != (key_file is None):
        raise ValueError("cert_file and key_file go together")
    if ca_file is None and cert_file is None:
        return None
    return grpc.ssl_channel_credentials(_read(ca_file), _read(key_file), _read(cert_file))


def _read(file: str | None) -> bytes | None:
    return None if file is None else Path(file).read_bytes()


Request = TypeVar("Request")

Response = TypeVar("Response")


class Connection:
    """A channel that may be shared by threads, and is closed once."""

    def __init__(self, endpoint: Endpoint, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._metadata = endpoint.metadata
        self._channel = endpoint.open()
        self._stub = JobStatusServiceStub(self._channel)
        self._closing = threading.Event()
        self._watches: weakref.WeakSet[Follower[Any]] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._watchdog = Watchdog()
        _opened.add(self)

    @property
    def stub(self) -> JobStatusServiceStub:
        """The service's methods.

        Raises:
            ClientClosedError: the client is closed.
        """
        if self._closing.is_set():
            raise ClientClosedError
        return self._stub

    def call(
        self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request, timeout_seconds: float | None
    ) -> Response:
        """Call `method` until it answers, as `Tries` allows; a timeout of None is the client's."""
        return self.call_within(self.tries(timeout_seconds), method, request)

    def tries(self, timeout_seconds: float | None) -> Tries:
        """Return the tries of a call that begins now; a timeout of None is the client's."""
        return Tries(self.timeout_seconds if timeout_seconds is None else timeout_seconds)

    def call_within(
        self, tries: Tries, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request
    ) -> Response:
        """Call `method` until it answers, as `tries` allows."""
        while True:
            try:
                return method(request, tries.left_seconds, self._metadata)
            except grpc.RpcError as error:
                pause_seconds = 0.0 if self._closing.is_set() else tries.pause_seconds(error)
            if self._closing.wait(pause_seconds):
                raise ClientClosedError

    def report(self, step: Step, timeout_seconds: float) -> Any:
        """Send a tracked job's next report, once."""
        try:
            return getattr(self.stub, step.method)(step.request, timeout_seconds, self._metadata)
        except grpc.RpcError as error:
            raise self._error(error) from error

    def watch(self, watching: Watching) -> Watch:
        """Return a watch that opens its streams here."""

        def open_stream() -> Stream:
            return self.stub.WatchJob(watching.request, watching.begin(), self._metadata)

        watch = Watch(watching, open_stream, self._watchdog)
        with self._lock:
            self._watches.add(watch)
        return watch

    def watch_jobs(self, watching: JobsWatching) -> JobsWatch:
        """Return a watch of many jobs that opens its streams here."""

        def open_stream() -> Stream:
            return self.stub.WatchJobs(watching.request, watching.begin(), self._metadata)

        watch = JobsWatch(watching, open_stream, self._watchdog)
        with self._lock:
            self._watches.add(watch)
        return watch

    def close(self) -> None:
        """End all calls and watches with ClientClosedError, and let no other begin."""
        self._closing.set()
        with self._lock:
            watches = list(self._watches)
        for watch in watches:
            watch.abandon(ClientClosedError())
        self._channel.close()

    def _error(self, error: grpc.RpcError) -> JobStatusError:
        return ClientClosedError() if self._closing.is_set() else status.from_rpc_error(error)


_opened: weakref.WeakSet[Connection] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close what was left open: grpc may hang at the end of the interpreter where calls are still open."""
    for connection in list(_opened):
        connection.close()


class AsyncConnection:
    """A channel that opens with its first call, in the event loop of that call, and is closed once."""

    def __init__(self, endpoint: Endpoint, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._endpoint = endpoint
        self._metadata = endpoint.metadata
        self._channel: grpc.aio.Channel | None = None
        self._stub: JobStatusServiceAsyncStub | None = None
        self._closing = asyncio.Event()
        self._watches: weakref.WeakSet[AsyncFollower[Any]] = weakref.WeakSet()

    @property
    def stub(self) -> JobStatusServiceAsyncStub:
        """The service's methods.

        Raises:
            ClientClosedError: the client is closed.
        """
        if self._stub is None:
            if self._closing.is_set():
                raise ClientClosedError
            self._channel = self._endpoint.open_aio()
            self._stub = JobStatusServiceStub(self._channel)
        return self._stub

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        timeout_seconds: float | None,
    ) -> Response:
        """Call `method` until it answers, as `Tries` allows; a timeout of None is the client's."""
        return await self.call_within(self.tries(timeout_seconds), method, request)

    def tries(self, timeout_seconds: float | None) -> Tries:
        """Return the tries of a call that begins now; a timeout of None is the client's."""
        return Tries(self.timeout_seconds if timeout_seconds is None else timeout_seconds)

    async def call_within(
        self, tries: Tries, method: grpc.aio.UnaryUnaryMultiCallable[Request, Response], request: Request
    ) -> Response:
        """Call `method` until it answers, as `tries` allows."""
        while True:
            try:
                return await method(request, timeout=tries.left_seconds, metadata=self._metadata)
            except grpc.RpcError as error:
                pause_seconds = tries.pause_seconds(error)
            except asyncio.CancelledError:
                self._raise_if_closed_under_us()
                raise
            await pause(pause_seconds, unless=self._closing)
            if self._closing.is_set():
                raise ClientClosedError

    async def report(self, step: Step, timeout_seconds: float) -> Any:
        """Send a tracked job's next report, once."""
        try:
            method = getattr(self.stub, step.method)
            return await method(step.request, timeout=timeout_seconds, metadata=self._metadata)
        except grpc.RpcError as error:
            raise status.from_rpc_error(error) from error
        except asyncio.CancelledError:
            self._raise_if_closed_under_us()
            raise

    def watch(self, watching: Watching) -> AsyncWatch:
        """Return a watch that opens its streams here."""

        def open_stream() -> grpc.aio.UnaryStreamCall[pb.WatchJobRequest, pb.WatchJobResponse]:
            return self.stub.WatchJob(watching.request, timeout=watching.begin(), metadata=self._metadata)

        watch = AsyncWatch(watching, open_stream)
        self._watches.add(watch)
        return watch

    def watch_jobs(self, watching: JobsWatching) -> AsyncJobsWatch:
        """Return a watch of many jobs that opens its streams here."""

        def open_stream() -> grpc.aio.UnaryStreamCall[pb.WatchJobsRequest, pb.WatchJobsResponse]:
            return self.stub.WatchJobs(watching.request, timeout=watching.begin(), metadata=self._metadata)

        watch = AsyncJobsWatch(watching, open_stream)
        self._watches.add(watch)
        return watch

    async def close(self) -> None:
        """End all calls and watches with ClientClosedError, and let no other begin."""
        self._closing.set()
        self._stub = None
        for watch in list(self._watches):
            watch.abandon(ClientClosedError())
        if self._channel is not None:
            await self._channel.close()

    def _raise_if_closed_under_us(self) -> None:
        """Tell a call that `close` cancelled from a task that was cancelled; Python 3.10 cannot."""
        task = asyncio.current_task()
        if self._closing.is_set() and task is not None and sys.version_info >= (3, 11) and not task.cancelling():
            raise ClientClosedError from None
