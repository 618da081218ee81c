"""The watches that clients return: iterators of jobs that survive their streams. What to do is up to Watching."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Protocol, TypeAlias

import grpc
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.client.retry import pause
from jobstatus_grpc.client.silence import AsyncSilenceTimer, SilenceTimer, Watchdog
from jobstatus_grpc.client.watching import Watching
from jobstatus_grpc.errors import InternalError, JobStatusError, UnavailableError
from jobstatus_grpc.record import Job

AsyncStream: TypeAlias = "grpc.aio.UnaryStreamCall[pb.WatchJobRequest, pb.WatchJobResponse]"


class Stream(Protocol):
    """The call of a watch of the sync client."""

    def __next__(self) -> pb.WatchJobResponse: ...

    def cancel(self) -> object: ...


SILENT = "the server was silent for too long"
END_SECONDS = 1.0
"""How long a server may take to end a stream after the done job."""


class AsyncWatch(AsyncIterator[Job]):
    """An async iterator of a job's states; also a context manager. Ends after the done job, or with `aclose`.

    An `anext` that is cancelled loses nothing: the next one goes on.
    """

    def __init__(self, watching: Watching, open_stream: Callable[[], AsyncStream]) -> None:
        self._watching = watching
        self._open_stream = open_stream
        self._open: tuple[AsyncStream, AsyncSilenceTimer] | None = None
        self._closing = asyncio.Event()
        self._error: JobStatusError | None = None

    async def __anext__(self) -> Job:
        while not self._closing.is_set() and not self._watching.is_over:
            try:
                job = await self._read()
            except JobStatusError:
                self._close()
                raise
            if job is not None:
                return job
        await self.aclose()
        error, self._error = self._error, None
        raise error or StopAsyncIteration

    async def aclose(self) -> None:
        """End the watch and its stream at once. A task that waits for a job meets the end of the iterator."""
        if self._open is not None and self._watching.is_over:
            await _end_well(self._open[0])
        self._close()

    def abandon(self, error: JobStatusError) -> None:
        """As aclose, but who waits for a job gets `error`."""
        self._error = error
        self._close()

    async def __aenter__(self) -> AsyncWatch:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # `break` merely drops the iterator: without this its stream would live until the timer fires.
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._drop_stream()

    def _close(self) -> None:
        self._closing.set()
        self._drop_stream()

    async def _read(self) -> Job | None:
        """Return the job in the next message if it is news; after the end of a stream, wait until the next is due."""
        if self._open is None:
            stream = self._open_stream()
            self._open = stream, AsyncSilenceTimer(stream, self._watching.silence_seconds)
        stream, timer = self._open
        cancels = _cancels_of_this_task()
        error: grpc.RpcError | JobStatusError | None = None
        try:
            message = await stream.read()
            if message is not grpc.aio.EOF:
                job = self._watching.take(message)  # type: ignore[arg-type]  # EOF is not told from it
                timer.heard(self._watching.silence_seconds)
                return job
        except (grpc.RpcError, InternalError) as failure:
            error = failure
        except asyncio.CancelledError:
            if _cancels_of_this_task() > cancels or not (timer.has_fired or self._closing.is_set()):
                self._drop_stream()
                raise
            error = UnavailableError(SILENT)
        self._drop_stream()
        if not self._closing.is_set():
            await pause(self._watching.ended(error), unless=self._closing)
        return None

    def _drop_stream(self) -> None:
        if self._open is not None:
            (stream, timer), self._open = self._open, None
            timer.cancel()
            stream.cancel()


async def _end_well(stream: AsyncStream) -> None:
    """Let the server end a stream that has told its job's end: if we cancelled, its log would speak of trouble."""
    reading = asyncio.ensure_future(stream.read())
    try:
        await asyncio.wait({reading}, timeout=END_SECONDS)
    finally:
        if not reading.cancel() and not reading.cancelled():
            reading.exception()  # asked for, or asyncio complains that nobody did


def _cancels_of_this_task() -> int:
    """Return how often the running task was asked to cancel itself; 0 before Python 3.11, which does not count."""
    if sys.version_info >= (3, 11):
        task = asyncio.current_task()
        return 0 if task is None else task.cancelling()
    return 0


class Watch(Iterator[Job]):
    """An iterator of a job's states; also a context manager. Ends after the done job, or with `close`."""

    def __init__(self, watching: Watching, open_stream: Callable[[], Stream], watchdog: Watchdog) -> None:
        self._watching = watching
        self._open_stream = open_stream
        self._watchdog = watchdog
        self._open: tuple[Stream, SilenceTimer] | None = None
        self._closing = threading.Event()
        self._error: JobStatusError | None = None

    def __next__(self) -> Job:
        while not self._closing.is_set() and not self._watching.is_over:
            try:
                job = self._read()
            except JobStatusError:
                self.close()
                raise
            if job is not None:
                return job
        self._end_well()
        self.close()
        error, self._error = self._error, None
        raise error or StopIteration

    def close(self) -> None:
        """End the watch and its stream at once. A thread that waits for a job meets the end of the iterator."""
        self._closing.set()
        self._drop_stream()

    def abandon(self, error: JobStatusError) -> None:
        """As close, but who waits for a job gets `error`."""
        self._error = error
        self.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_well()
        self.close()

    def __del__(self) -> None:
        self._drop_stream()

    def _read(self) -> Job | None:
        """Return the job in the next message if it is news; after the end of a stream, wait until the next is due."""
        if self._open is None:
            stream = self._open_stream()
            self._open = stream, self._watchdog.watch_over(stream, self._watching.silence_seconds)
            if self._closing.is_set():  # by another thread that did not see this stream
                self._drop_stream()
                return None
        stream, timer = self._open
        error: grpc.RpcError | JobStatusError | None = None
        try:
            job = self._watching.take(next(stream))
            timer.heard(self._watching.silence_seconds)
            return job
        except StopIteration:
            pass
        except (grpc.RpcError, InternalError) as failure:
            error = UnavailableError(SILENT) if timer.has_fired else failure
        self._drop_stream()
        if not self._closing.is_set():
            self._closing.wait(self._watching.ended(error))
        return None

    def _end_well(self) -> None:
        """As for the asyncio client."""
        if self._open is not None and self._watching.is_over:
            stream, _ = self._open
            timer = self._watchdog.watch_over(stream, END_SECONDS)
            with contextlib.suppress(StopIteration, grpc.RpcError):
                next(stream)
            timer.cancel()

    def _drop_stream(self) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            stream, timer = opened
            timer.cancel()
            stream.cancel()
