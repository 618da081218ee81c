"""Wakes the change feed of every process on one database after a commit: LISTEN, and NOTIFY without a payload.

NOTIFY takes a lock that all databases of a server share, and holds it until its transaction ends: inside the writing
transactions it would serialize them. So it runs in one of its own, after the commit. A notification that is lost only
delays a feed until its next poll.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from jobstatus_grpc.stores.postgres.connect import CONNECT_SECONDS
from jobstatus_grpc.stores.postgres.database import Database, describe

logger = logging.getLogger(__name__)

CHANNEL = "jobstatus_changes"

QUIET_SECONDS = 0.01
"""Shortest time between two NOTIFYs of this process, in seconds: commits in between share one."""

RETRY_SECONDS = 0.5
"""Pause before a lost listening session is opened again, in seconds; the feed polls in that time."""

CHECK_SECONDS = 5.0
"""How often the listening session is checked, in seconds: only so is a server noticed that vanished without a FIN."""


class Notifier:
    """Sends notifications through the pool, and receives them in a session of its own. For one event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._tasks: list[asyncio.Task[None]] = []
        self._unsent = asyncio.Event()
        self.notified = asyncio.Event()
        """Set after a commit, of this process or another; the one reader, the feed, clears it."""

    def start(self) -> None:
        """Start to send and to listen."""
        self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._listen())]

    def notify(self) -> None:
        """Wake the feed of this process now, and those of all others within about QUIET_SECONDS."""
        self.notified.set()
        self._unsent.set()

    async def close(self) -> None:
        """Stop both; a notification that is not sent yet is lost."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send(self) -> None:
        while True:
            await self._unsent.wait()
            self._unsent.clear()
            try:
                async with self._database.connection() as connection:
                    await connection.execute(f"NOTIFY {CHANNEL}")
            except Exception as error:  # the next commit sends another
                logger.debug("no notification was sent: %s", describe(error))
            await asyncio.sleep(QUIET_SECONDS)

    async def _listen(self) -> None:
        while True:
            try:
                connection = await self._database.connect(command_timeout=CONNECT_SECONDS)
                ended = asyncio.Event()
                connection.add_termination_listener(lambda _, ended=ended: ended.set())
                try:
                    await connection.add_listener(CHANNEL, self._on_notification)
                    self.notified.set()  # for what was committed while nothing listened
                    while not ended.is_set():
                        with contextlib.suppress(asyncio.TimeoutError):
                            await asyncio.wait_for(ended.wait(), CHECK_SECONDS)
                        await connection.execute("SELECT 1")
                finally:
                    connection.terminate()
            except Exception as error:  # the driver makes any error of a session that is lost
                logger.debug("the listening session was lost: %s", describe(error))
            await asyncio.sleep(RETRY_SECONDS)

    def _on_notification(self, *_: Any) -> None:
        self.notified.set()
