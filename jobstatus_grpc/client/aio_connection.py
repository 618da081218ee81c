"""What an asyncio client keeps: its channel, the calls and the watches on it."""

from __future__ import annotations

import asyncio
import sys
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from jobstatus_grpc.client.channel import ClientClosedError, Endpoint
from jobstatus_grpc.client.claim import Step
from jobstatus_grpc.client.follower import AsyncFollower
from jobstatus_grpc.client.jobs_watching import JobsWatching
from jobstatus_grpc.client.retry import Tries, pause
from jobstatus_grpc.client.watch import AsyncJobsWatch, AsyncWatch
from jobstatus_grpc.client.watching import Watching
from jobstatus_grpc.wire import status

if TYPE_CHECKING:
    from jobstatus.v1 import job_status_pb2 as pb
    from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceAsyncStub

Request = TypeVar("Request")
Response = TypeVar("Response")


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
