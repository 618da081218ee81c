"""Tells the processes that share a database that something changed: a NOTIFY without content, outside of all writes.

NOTIFY takes a lock that all databases of a server share, until its transaction ends: within a write it would make all
writers queue. It is a hint only; who misses one looks a little later anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import asyncpg

from jobstatus_grpc.errors import RetryableError
from jobstatus_grpc.stores.postgres.connect import AWAY, CONNECT_SECONDS
from jobstatus_grpc.stores.postgres.database import Database

CHANNEL = "jobstatus_changes"

QUIET_SECONDS = 0.01
"""It rings at most once in this time."""

RETRY_SECONDS = 0.5

CHECK_SECONDS = 5.0
"""A server that went away without a word is noticed in about this time."""


class Doorbell:
    """Rings for others, and hears them ring, on a connection each. For one event loop."""

    def __init__(self, database: Database) -> None:
        """Take where to listen, and what to ring through; `start` begins."""
        self._database = database
        self._tasks: list[asyncio.Task[None]] = []
        self._wanted = asyncio.Event()
        self.heard = asyncio.Event()
        """Set when somebody rang, here or elsewhere; whoever waits for that clears it."""

    def start(self) -> None:
        """Begin to listen."""
        self._tasks = [asyncio.create_task(self._ring_often()), asyncio.create_task(self._listen())]

    def ring(self) -> None:
        """Let everybody know, soon."""
        self.heard.set()
        self._wanted.set()

    async def close(self) -> None:
        """Stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ring_often(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            with contextlib.suppress(RetryableError):
                async with self._database.connection() as connection:
                    await connection.execute(f"NOTIFY {CHANNEL}")
            await asyncio.sleep(QUIET_SECONDS)

    async def _listen(self) -> None:
        while True:
            with contextlib.suppress(asyncpg.PostgresError, *AWAY):
                connection = await self._database.connect(command_timeout=CONNECT_SECONDS)
                ended = asyncio.Event()
                connection.add_termination_listener(lambda _, ended=ended: ended.set())
                try:
                    await connection.add_listener(CHANNEL, self._on_ring)
                    self.heard.set()
                    while not ended.is_set():
                        with contextlib.suppress(asyncio.TimeoutError):
                            await asyncio.wait_for(ended.wait(), CHECK_SECONDS)
                        await connection.execute("SELECT 1")
                finally:
                    connection.terminate()
            await asyncio.sleep(RETRY_SECONDS)

    def _on_ring(self, *_: Any) -> None:
        self.heard.set()
