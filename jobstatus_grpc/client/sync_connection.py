"""What a sync client keeps: its channel, the calls and the watches on it."""

from __future__ import annotations

import atexit
import threading
import weakref
from typing import Any, TypeVar

import grpc
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from jobstatus_grpc.client.channel import ClientClosedError, Endpoint
from jobstatus_grpc.client.claim import Step
from jobstatus_grpc.client.follower import Follower, Stream
from jobstatus_grpc.client.jobs_watching import JobsWatching
from jobstatus_grpc.client.retry import Tries
from jobstatus_grpc.client.silence import Watchdog
from jobstatus_grpc.client.watch import JobsWatch, Watch
from jobstatus_grpc.client.watching import Watching
from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.wire import status

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
