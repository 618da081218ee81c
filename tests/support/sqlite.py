"""SQLite stores and files, for the tests of the SQLite store."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

from jobstatus_grpc.stores.sqlite.store import SqliteStore
from tests.support.stores import RETENTION, StandingClock


async def open_at(path: Path, clock=None, **more) -> SqliteStore:
    clock = clock or StandingClock()
    return await SqliteStore.open(str(path), clock=clock, retention=RETENTION, seconds=clock.seconds, **more)


def on_file(path: Path, *uses, **more) -> list:
    """Call each of `uses` with the store in the file, opened anew for each, and return the results."""

    async def main() -> list:
        results = []
        for use in uses:
            store = await open_at(path, **more)
            try:
                results.append(await use(store))
            finally:
                await store.close()
        return results

    return asyncio.run(main())


def raw(path: Path, query: str) -> list:
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(query).fetchall()


def raw_script(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
