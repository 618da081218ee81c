"""The connections that only read the SQLite store's file, each in a thread of its own."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from jobstatus_grpc.stores.sqlite_file import SqliteFile
from jobstatus_grpc.stores.worker import Worker

P = ParamSpec("P")
T = TypeVar("T")


class Readers:
    """A small pool, so that one long query does not hold up all short ones. For one event loop."""

    def __init__(self, file: SqliteFile, *, count: int) -> None:
        """Start the threads; their connections are opened when they are first needed."""
        self._readers = [_Reader(file, f"jobstatus-reader-{number}") for number in range(1, count + 1)]

    async def call(
        self, query: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return what `query(connection, …)` returns, run by the reader that has the least to do.

        Raises:
            sqlite3.Error: what the query raised.
        """
        reader = min(self._readers, key=lambda reader: reader.pending)
        reader.pending += 1
        try:
            return await reader.worker.call(lambda: query(reader.connection, *args, **kwargs))
        finally:
            reader.pending -= 1

    async def close(self) -> None:
        """Finish what was called, close the connections and end the threads."""
        for reader in self._readers:
            await reader.worker.call(reader.close)
            await reader.worker.stop()


class _Reader:
    def __init__(self, file: SqliteFile, name: str) -> None:
        self.worker = Worker(name)
        self.pending = 0
        self._file = file
        self._connection: sqlite3.Connection | None = None

    @property
    def connection(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._file.connect_reader()
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
