"""The connections that only read the SQLite store's file, each in a thread of its own."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Concatenate, ParamSpec, TypeVar

from jobstatus_grpc.stores.sqlite.database import SqliteFile

P = ParamSpec("P")

T = TypeVar("T")


class Worker:
    """Runs functions in its own thread, one after another; what comes of each is told on the event loop."""

    def __init__(self, name: str) -> None:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]] | None]
        self._calls = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], T], done: Callable[[T, BaseException | None], None]) -> None:
        """Run `function` after those before it, then `done(result, error)` on the event loop."""
        self._calls.put((function, done))

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `function` returns. Cancelling the wait does not stop it."""
        waiter: asyncio.Future[T] = self._loop.create_future()

        def done(result: T, error: BaseException | None) -> None:
            resolve(waiter, result, error)

        self.submit(lambda: function(*args, **kwargs), done)
        return await waiter

    async def stop(self) -> None:
        """Run what was submitted, then end the thread."""
        if self._thread.is_alive():
            ended = self.call(lambda: self._calls.put(None))
            await ended
            self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            function, done = call
            result, error = None, None
            try:
                result = function()
            except BaseException as caught:
                error = caught
            with suppress(RuntimeError):  # the loop was closed before the store
                self._loop.call_soon_threadsafe(done, result, error)


def resolve(waiter: asyncio.Future[T], result: T, error: BaseException | None) -> None:
    """End the wait, unless it was cancelled."""
    if waiter.done():
        return
    if error is None:
        waiter.set_result(result)
    else:
        waiter.set_exception(error)


class Readers:
    """A small pool, so that one long query does not hold up all short ones. For one event loop."""

    def __init__(self, file: SqliteFile, *, count: int) -> None:
        """Start the threads; their connections are opened when they are first needed."""
        self._readers = [_Reader(file, f"jobstatus-reader-{number}") for number in range(1, count + 1)]
        self._idle = list(reversed(self._readers))
        self._calls: deque[tuple[Callable[[sqlite3.Connection], Any], Callable[[Any, BaseException | None], None]]]
        self._calls = deque()

    async def call(
        self, query: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return what `query(connection, …)` returns. Cancelling the wait does not stop it.

        Raises:
            sqlite3.Error: what the query raised.
        """
        waiter: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.submit(lambda connection: query(connection, *args, **kwargs), partial(resolve, waiter))
        return await waiter

    def submit(self, query: Callable[[sqlite3.Connection], T], done: Callable[[T, BaseException | None], None]) -> None:
        """Have the first reader that is free run `query`, then call `done(result, error)` on the event loop."""
        self._calls.append((query, done))
        self._begin()

    async def close(self) -> None:
        """Finish what was called, close the connections and end the threads."""
        last = asyncio.get_running_loop().create_future()
        self.submit(lambda _: None, lambda *_: last.set_result(None))
        await last  # all before it have begun
        for reader in self._readers:
            await reader.worker.call(reader.close)
            await reader.worker.stop()

    def _begin(self) -> None:
        while self._idle and self._calls:
            query, done = self._calls.popleft()
            reader = self._idle.pop()
            reader.worker.submit(partial(reader.run, query), partial(self._end, reader, done))

    def _end(
        self, reader: _Reader, done: Callable[[T, BaseException | None], None], result: T, error: BaseException | None
    ) -> None:
        self._idle.append(reader)
        self._begin()
        done(result, error)


class _Reader:
    def __init__(self, file: SqliteFile, name: str) -> None:
        self.worker = Worker(name)
        self._file = file
        self._connection: sqlite3.Connection | None = None

    def run(self, query: Callable[[sqlite3.Connection], T]) -> T:
        if self._connection is None:
            self._connection = self._file.connect_reader()
        return query(self._connection)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
