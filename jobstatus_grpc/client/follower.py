"""Iterators of what is news on streams, which survive their streams. What to do is up to an Endurance."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import grpc

from jobstatus_grpc.client.endurance import Endurance
from jobstatus_grpc.client.retry import pause
from jobstatus_grpc.client.silence import AsyncSilenceTimer, SilenceTimer, Watchdog
from jobstatus_grpc.errors import InternalError, JobStatusError, UnavailableError

News = TypeVar("News")
SelfAsync = TypeVar("SelfAsync", bound="AsyncFollower[Any]")
SelfSync = TypeVar("SelfSync", bound="Follower[Any]")
AsyncStream: TypeAlias = "grpc.aio.UnaryStreamCall[Any, Any]"


class Stream(Protocol):
    """A call of the sync client that answers with a stream."""

    def __next__(self) -> Any: ...

    def cancel(self) -> object: ...


SILENT = "the server was silent for too long"
END_SECONDS = 1.0
"""How long a server may take to end a stream after the last news."""


class AsyncFollower(AsyncIterator[News], Generic[News]):
    """Follows streams for asyncio."""

    def __init__(self, endurance: Endurance[Any, News], open_stream: Callable[[], AsyncStream]) -> None:
        self._endurance = endurance
        self._open_stream = open_stream
        self._open: tuple[AsyncStream, AsyncSilenceTimer] | None = None
        self._closing = asyncio.Event()
        self._error: JobStatusError | None = None

    async def __anext__(self) -> News:
        while not self._closing.is_set() and not self._endurance.is_over:
            try:
                news = self._more() or await self._read()
            except JobStatusError:
                self._close()
                raise
            if news is not None:
                return news
        await self.aclose()
        error, self._error = self._error, None
        raise error or StopAsyncIteration

    async def aclose(self) -> None:
        """End the watch and its stream at once. A task that waits for news meets the end of the iterator."""
        if self._open is not None and self._endurance.is_over:
            await _end_well(self._open[0])
        self._close()

    def abandon(self, error: JobStatusError) -> None:
        """As aclose, but who waits for news gets `error`."""
        self._error = error
        self._close()

    async def __aenter__(self: SelfAsync) -> SelfAsync:
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

    def _more(self) -> News | None:
        """Return what else is news in the last message: while that is worked on, nobody listens for the next."""
        news = self._endurance.more()
        if news is not None and self._open is not None:
            self._open[1].heard(self._endurance.silence_seconds)
        return news

    async def _read(self) -> News | None:
        """Return the first news in the next message, if any; after the end of a stream, wait until the next is due."""
        if self._open is None:
            stream = self._open_stream()
            self._open = stream, AsyncSilenceTimer(stream, self._endurance.silence_seconds)
        stream, timer = self._open
        cancels = _cancels_of_this_task()
        error: grpc.RpcError | JobStatusError | None = None
        try:
            message = await stream.read()
            if message is not grpc.aio.EOF:
                news = self._endurance.take(message)
                timer.heard(self._endurance.silence_seconds)
                return news
        except (grpc.RpcError, InternalError) as failure:
            error = failure
        except asyncio.CancelledError:
            if _cancels_of_this_task() > cancels or not (timer.has_fired or self._closing.is_set()):
                self._drop_stream()
                raise
            error = UnavailableError(SILENT)
        self._drop_stream()
        if not self._closing.is_set():
            await pause(self._endurance.ended(error), unless=self._closing)
        return None

    def _drop_stream(self) -> None:
        if self._open is not None:
            (stream, timer), self._open = self._open, None
            timer.cancel()
            stream.cancel()


async def _end_well(stream: AsyncStream) -> None:
    """Let the server end a stream that has told the end: if we cancelled, its log would speak of trouble."""
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


class Follower(Iterator[News], Generic[News]):
    """Follows streams for the sync client."""

    def __init__(self, endurance: Endurance[Any, News], open_stream: Callable[[], Stream], watchdog: Watchdog) -> None:
        self._endurance = endurance
        self._open_stream = open_stream
        self._watchdog = watchdog
        self._open: tuple[Stream, SilenceTimer] | None = None
        self._closing = threading.Event()
        self._error: JobStatusError | None = None

    def __next__(self) -> News:
        while not self._closing.is_set() and not self._endurance.is_over:
            try:
                news = self._more() or self._read()
            except JobStatusError:
                self.close()
                raise
            if news is not None:
                return news
        self._end_well()
        self.close()
        error, self._error = self._error, None
        raise error or StopIteration

    def close(self) -> None:
        """End the watch and its stream at once. A thread that waits for news meets the end of the iterator."""
        self._closing.set()
        self._drop_stream()

    def abandon(self, error: JobStatusError) -> None:
        """As close, but who waits for news gets `error`."""
        self._error = error
        self.close()

    def __enter__(self: SelfSync) -> SelfSync:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_well()
        self.close()

    def __del__(self) -> None:
        self._drop_stream()

    def _more(self) -> News | None:
        """As for the asyncio client."""
        news, opened = self._endurance.more(), self._open
        if news is not None and opened is not None:
            opened[1].heard(self._endurance.silence_seconds)
        return news

    def _read(self) -> News | None:
        """Return the first news in the next message, if any; after the end of a stream, wait until the next is due."""
        if self._open is None:
            stream = self._open_stream()
            self._open = stream, self._watchdog.watch_over(stream, self._endurance.silence_seconds)
            if self._closing.is_set():  # by another thread that did not see this stream
                self._drop_stream()
                return None
        stream, timer = self._open
        error: grpc.RpcError | JobStatusError | None = None
        try:
            news = self._endurance.take(next(stream))
            timer.heard(self._endurance.silence_seconds)
            return news
        except StopIteration:
            pass
        except (grpc.RpcError, InternalError) as failure:
            error = UnavailableError(SILENT) if timer.has_fired else failure
        self._drop_stream()
        if not self._closing.is_set():
            self._closing.wait(self._endurance.ended(error))
        return None

    def _end_well(self) -> None:
        """As for the asyncio client."""
        if self._open is not None and self._endurance.is_over:
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
