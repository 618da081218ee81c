"""One stream of a watch of many: what is there, then what changes. The store is the log, read until the hub takes over.

Without a token: SNAPSHOTs, SYNCED, what has changed meanwhile, and then what the hub tells. With one: what has changed
since, SYNCED, and then what the hub tells. Nothing is kept of what changes while the reader takes its time over the
first part: it is in the store's feed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NoReturn, TypeAlias, TypeVar

from jobstatus_grpc.errors import StoreChangedError, UnavailableError
from jobstatus_grpc.job import Job
from jobstatus_grpc.job.limits import MAX_RESPONSE_BYTES
from jobstatus_grpc.stores.interface import Change, ChangeBatch, JobStore, Page, Position
from jobstatus_grpc.watch.backlog import MAX_EVENTS, UNKNOWN_REVISION, News
from jobstatus_grpc.watch.filter_watch import FilterHub, FilterWatcher
from jobstatus_grpc.watch.watcher import EventType

Send: TypeAlias = Callable[[bytes, Position | None], Awaitable[None]]
"""Takes a message and up to where everything has been told then; None: as before."""

T = TypeVar("T")

LISTED_JOBS = 1000

LOOKED_AT_PER_TURN = 64
"""So many jobs are looked at or rendered in one turn of the event loop, which no other watcher has."""

RETRY_SECONDS = 0.2

# How long a commit may take from the store's file to the hub, and far longer.
UNSURE_SECONDS = 1.0


class FilterStream:
    """Tells one reader, through `send`, of the jobs that match. For one task."""

    def __init__(self, store: JobStore, hub: FilterHub, watcher: FilterWatcher, send: Send) -> None:
        self._store = store
        self._hub = hub
        self._watcher = watcher
        self._send_message = send
        self._backlog = watcher.backlog
        self._is_synced = False
        self._settling: asyncio.Task[None] | None = None

    async def run(self, after: Position | None) -> NoReturn:
        """Tell of all that changes after a position, or after all that is there; None: what is there comes first.

        Raises:
            DrainingError, StreamAgeError, StoreUnavailableError: the watch ends here; the caller resumes elsewhere.
        """
        began_again = False
        try:
            while True:
                try:
                    await (self._snapshot() if after is None else self._resume(after))
                    began_again = False
                    while True:
                        await self._send(*await self._watcher.next())
                except StoreChangedError:
                    if began_again:  # by a store whose change the hub has not noticed yet
                        await asyncio.sleep(RETRY_SECONDS)
                    began_again, after = True, None
                    await self._reset()
        finally:
            self._stop_settling()

    async def _reset(self) -> None:
        self._stop_settling()
        self._hub.withdraw(self._watcher)
        self._watcher.restart()
        self._is_synced = False
        await self._send([self._hub.render(EventType.RESET, None)], None)

    async def _snapshot(self) -> None:
        position = self._hub.reached
        cursor: str | None = ""
        while cursor is not None:
            page = await self._page(MAX_EVENTS, cursor)
            for job in page.jobs:
                self._backlog.hold(job)
            await self._send_snapshots(page.jobs)
            cursor = page.next_cursor or None
        await self._send_synced(position)
        await self._replay(position, is_last=True)

    async def _resume(self, after: Position) -> None:
        self._backlog.is_unsure = True
        position = await self._replay(after, is_last=False)
        cursor: str | None = ""
        while cursor is not None:  # what the reader holds, if it has not changed since
            page = await self._page(LISTED_JOBS, cursor)
            for job in page.jobs:
                if not self._backlog.holds(job.id):
                    self._backlog.hold(job, revision=UNKNOWN_REVISION)
            cursor = page.next_cursor or None
        position = await self._replay(position, is_last=True)
        await self._send_synced(self._backlog.before or position)
        self._settling = asyncio.ensure_future(self._become_sure())

    async def _replay(self, position: Position, *, is_last: bool) -> Position:
        """Tell what has changed up to where the hub is, and return that; the last time, let the hub take over there."""
        is_there = False
        while not is_there:
            await self._watcher.turn()
            up_to = self._hub.gather(self._watcher) if is_last else self._hub.reached
            batch = await self._changes(position, up_to)
            await self._offer(batch.changes, position)
            is_there = batch.position in (position, up_to)  # a token from elsewhere may be ahead of this hub
            position = batch.position
            if not is_there:
                self._hub.withdraw(self._watcher)
            elif is_last:
                self._hub.settle(self._watcher)
            await self._send_ready(position)
        return position

    async def _offer(self, changes: Sequence[Change], before: Position) -> None:
        now = asyncio.get_running_loop().time()
        for number, change in enumerate(changes, start=1):
            if change.tenant == self._backlog.tenant:
                self._backlog.offer(News(change, before), now)
            if number % LOOKED_AT_PER_TURN == 0:
                await self._watcher.turn()

    async def _become_sure(self) -> None:
        """Find out when the hub has told all that was committed when the feed was last read.

        A job that had left the filter by then and changed once more was left out there, and may be in its reader's
        hands; until now every such change was told.
        """
        while self._backlog.is_unsure:
            await asyncio.sleep(UNSURE_SECONDS)
            with contextlib.suppress(UnavailableError):
                self._backlog.is_unsure = await self._store.position() != self._hub.position
        self._hub.settle(self._watcher)

    def _stop_settling(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None

    async def _page(self, limit: int, cursor: str) -> Page:
        await self._watcher.turn()
        return await self._read(
            self._store.page(self._backlog.tenant, self._backlog.filter, limit=limit, cursor=cursor)
        )

    async def _changes(self, after: Position, up_to: Position) -> ChangeBatch:
        if after == up_to:
            return ChangeBatch(after, ())
        return await self._read(self._store.changes(after, up_to=up_to))

    async def _read(self, reading: Coroutine[Any, Any, T]) -> T:
        """Wait for the store, and let the reader hear from us meanwhile."""
        task = asyncio.ensure_future(reading)
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            while True:
                if await self._watcher.beside(task):
                    await self._send([self._hub.render(EventType.HEARTBEAT, None)], None)
                if task.done():
                    return task.result()
        finally:
            task.cancel()

    async def _send_snapshots(self, jobs: Sequence[Job]) -> None:
        events: list[bytes] = []
        size = 0
        for number, job in enumerate(jobs, start=1):
            change = Change(job.tenant, job.id, job.revision, job)
            event = self._hub.render(EventType.SNAPSHOT, change)
            if events and size + len(event) > MAX_RESPONSE_BYTES:
                await self._send(events, None)
                events, size = [], 0
            events.append(event)
            size += len(event)
            if number % LOOKED_AT_PER_TURN == 0:
                await self._watcher.turn()
        if events:
            await self._send(events, None)

    async def _send_synced(self, position: Position) -> None:
        self._is_synced = True
        await self._send([self._hub.render(EventType.SYNCED, None)], position)

    async def _send_ready(self, position: Position) -> None:
        """Tell what may be told now; what becomes ready meanwhile comes later."""
        left = self._backlog.ready
        while left > 0:
            await self._watcher.turn()
            events = self._backlog.take(asyncio.get_running_loop().time(), self._hub.render)
            left -= len(events)
            await self._send(events, (self._backlog.before or position) if self._is_synced else None)

    async def _send(self, events: Sequence[bytes], position: Position | None) -> None:
        self._watcher.note_sent()
        await self._send_message(b"".join((*events, self._hub.stamp())), position)
