"""The reading half of the SQLite store: a pool of connections, and the loader that reads single jobs in groups."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Concatenate, ParamSpec, TypeVar

from jobstatus_grpc.errors import DataLossError, StoreUnavailableError
from jobstatus_grpc.job import Found, Tombstone
from jobstatus_grpc.stores.interface import Clock, Key
from jobstatus_grpc.stores.sql.rows import JobCache, StoredJob
from jobstatus_grpc.stores.sqlite.database import is_malformed
from jobstatus_grpc.stores.sqlite.queries import read_found
from jobstatus_grpc.stores.sqlite.writer import Health, WorkerThread, resolve

P = ParamSpec("P")

T = TypeVar("T")

MAX_GROUP_KEYS = 500
"""The number of jobs in a group. It bounds how long one read takes."""

GATHER_TURNS = 32
"""The number of event loop turns to wait for more keys before a group is read; a request takes several turns."""

MAX_WAIT_SECONDS = 0.02
"""If a read takes longer (slow disk, or behind a long query), the next group is read in parallel."""


class JobLoader:
    """Reads jobs in groups: keys that are requested while a read runs are read together in the next one.

    Passing a single job between threads costs more than reading it. For one event loop.
    """

    def __init__(self, readers: ReaderPool, cache: JobCache, health: Health, clock: Clock) -> None:
        self._readers = readers
        self._cache = cache
        self._health = health
        self._clock = clock
        self._pending: dict[Key, list[asyncio.Future[Found]]] = {}
        self._ticket: object | None = None
        """The cache's ticket of the read whose end starts the next one; None if no read runs."""
        self._timer: asyncio.TimerHandle | None = None
        """Starts the next read if that one takes too long."""

    def load(self, key: Key) -> asyncio.Future[Found]:
        """Read the job under `key`, as of now or later. Cancelling the future does not affect other calls.

        Returns:
            A future of the job, its tombstone or None. It raises DataLossError or StoreUnavailableError.
        """
        future: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        # A running read of the same key is not joined: it may have started before the latest commit.
        self._pending.setdefault(key, []).append(future)
        if self._ticket is None:
            self._start_read()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(MAX_WAIT_SECONDS, self._start_read)
        return future

    def _start_read(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._pending:
            self._ticket = None
            return
        group = {key: self._pending.pop(key) for key in list(islice(self._pending, MAX_GROUP_KEYS))}
        if self._pending:
            self._timer = asyncio.get_running_loop().call_later(MAX_WAIT_SECONDS, self._start_read)
        self._ticket = ticket = self._cache.expect(group)
        finish = partial(self._finish, group, ticket)
        try:
            self._health.check()
        except StoreUnavailableError as error:
            finish(None, error)
        else:
            self._readers.submit(partial(read_found, keys=list(group), now=self._clock()), finish)

    def _finish(
        self,
        group: Mapping[Key, Sequence[asyncio.Future[Found]]],
        ticket: object,
        found: tuple[Mapping[Key, StoredJob | DataLossError], Mapping[Key, Tombstone]] | None,
        error: BaseException | None,
    ) -> None:
        jobs, tombstones = found or ({}, {})
        if error is not None:
            error = self._health.failed(error, is_write=False)
        sound = {key: stored for key, stored in jobs.items() if isinstance(stored, StoredJob)}
        self._cache.fill(ticket, group, sound)
        for key, futures in group.items():
            failure = error
            if key not in sound and isinstance(damage := jobs.get(key), DataLossError):
                self._health.note_damage(damage)
                failure = damage
            for future in futures:
                resolve(future, sound[key].shown if key in sound else tombstones.get(key), failure)
        self._gather(ticket, GATHER_TURNS)

    def _gather(self, ticket: object, turns: int) -> None:
        """Start the next read; if keys are pending, after `turns` more loop turns: small groups cost most per key."""
        if self._ticket is not ticket:
            return  # the timer has started another read
        if turns and self._pending:
            asyncio.get_running_loop().call_soon(self._gather, ticket, turns - 1)
        else:
            self._start_read()


class ReaderPool:
    """A small pool of reading connections, so that a long query does not block all short ones. For one event loop."""

    def __init__(self, connections: Sequence[sqlite3.Connection]) -> None:
        """Start a thread for each of the connections, which it closes in the end."""
        self._readers = [
            _Reader(connection, f"jobstatus-reader-{number}") for number, connection in enumerate(connections, start=1)
        ]
        self._idle = list(reversed(self._readers))
        self._calls: deque[tuple[Callable[[sqlite3.Connection], Any], Callable[[Any, BaseException | None], None]]]
        self._calls = deque()

    async def call(
        self, query: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return the result of `query(connection, …)`. Cancelling the call does not stop the query.

        Raises:
            sqlite3.Error: the query failed.
        """
        waiter: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.submit(lambda connection: query(connection, *args, **kwargs), partial(resolve, waiter))
        return await waiter

    def submit(self, query: Callable[[sqlite3.Connection], T], done: Callable[[T, BaseException | None], None]) -> None:
        """Run `query` in the first idle thread, then call `done(result, error)` on the event loop."""
        self._calls.append((query, done))
        self._start_queries()

    async def close(self) -> None:
        """Finish all queries, close the connections and end the threads."""
        last = asyncio.get_running_loop().create_future()
        self.submit(lambda _: None, lambda *_: last.set_result(None))
        await last  # all earlier queries have started
        for reader in self._readers:
            await reader.thread.call(reader.close)
            await reader.thread.stop()

    def _start_queries(self) -> None:
        while self._idle and self._calls:
            query, done = self._calls.popleft()
            reader = self._idle.pop()
            reader.thread.submit(partial(reader.run, query), partial(self._finish, reader, done))

    def _finish(
        self, reader: _Reader, done: Callable[[T, BaseException | None], None], result: T, error: BaseException | None
    ) -> None:
        self._idle.append(reader)
        self._start_queries()
        done(result, error)


class _Reader:
    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self.thread = WorkerThread(name)
        self._connection = connection

    def run(self, query: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return query(self._connection)
        except sqlite3.DatabaseError as error:
            if not is_malformed(error):
                raise
            return query(self._connection)  # an error of the disk, which SQLite reports as the same, may have passed

    def close(self) -> None:
        self._connection.close()
