"""One watcher of all jobs that match a filter: what it may send, and when it is woken to do so."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from jobstatus_grpc.errors import JobStatusError, StoreChangedError, StreamAgeError
from jobstatus_grpc.filter_backlog import Backlog, News
from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.stores.interface import Position
from jobstatus_grpc.timed_watcher import CLOCK_RESOLUTION_SECONDS, TimedWatcher
from jobstatus_grpc.wake_queue import LOOK, WAKE
from jobstatus_grpc.watcher import EventType

if TYPE_CHECKING:
    from jobstatus_grpc.filter_hub import FilterHub


class FilterWatcher(TimedWatcher):
    """Hands out, message by message, what its backlog holds. For one task at a time."""

    __slots__ = ("_error", "_gathered", "_hub", "_is_turn_wanted", "_waiter", "backlog")

    def __init__(
        self,
        hub: FilterHub,
        tenant: str,
        job_filter: JobFilter,
        *,
        heartbeat_seconds: float,
        min_update_seconds: float,
        max_age_seconds: float | None,
    ) -> None:
        super().__init__(hub.wakes, heartbeat_seconds=heartbeat_seconds, max_age_seconds=max_age_seconds)
        self.backlog = Backlog(self, tenant, job_filter, hub.held, min_update_seconds=min_update_seconds)
        self._hub = hub
        self._error: type[JobStatusError] | None = None
        self._gathered: dict[str, News] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_turn_wanted = False

    def offer(self, news: News) -> None:
        """Take what the hub has for it: at once, or while it gathers, when that is over."""
        if self._gathered is None:
            due_at = self.backlog.offer(news, self._loop.time())
            if due_at is not None:
                self._look_at(due_at)
        elif self.backlog.may_concern(news.change):
            self._gathered.pop(news.change.id, None)
            self._gathered[news.change.id] = news

    def gather(self) -> None:
        """Put by, from now on, what the hub has."""
        self._gathered = {}

    def forget_gathered(self) -> None:
        """Put nothing by any more, and forget what was."""
        self._gathered = None

    def accept_gathered(self) -> None:
        """Take what was put by."""
        gathered, self._gathered = self._gathered or {}, None
        for news in gathered.values():
            self.offer(news)

    async def next(self) -> tuple[list[bytes], Position]:
        """Wait for what is due and return its events, or a HEARTBEAT, and up to where everything has been told then.

        Raises:
            DrainingError, StreamAgeError: the watch ends here; the caller resumes elsewhere.
            StoreChangedError: what the reader holds is void.
        """
        while True:
            due_at = self.backlog.next_due_at
            if due_at is not None:
                self._look_at(due_at)
            await self._woken()
            now = self._loop.time()
            events = self.backlog.take(now, self._hub.render)
            if not events and self._is_heartbeat_due(now):
                events = [self._hub.render(EventType.HEARTBEAT, None)]
            if events:
                self.note_sent()
                return events, self.backlog.before or self._hub.position

    async def turn(self) -> None:
        """Wait for a turn of the event loop that no other watcher has. Raises as `next`."""
        self._is_turn_wanted = True
        try:
            await self._woken()
        finally:
            self._is_turn_wanted = False

    async def beside(self, task: asyncio.Future[Any]) -> bool:
        """Wait for `task`, at most until the next heartbeat; tell whether one is due. Raises as `next`."""
        self._waiter = self._loop.create_future()
        seconds = max(self._heartbeat_due_at() - self._loop.time(), 0)
        try:
            await asyncio.wait((task, self._waiter), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiter = None
        self.check()
        return self._is_heartbeat_due(self._loop.time())

    def check(self) -> None:
        """Raise what ends the watch, if anything does."""
        if self._error is not None:
            raise self._error()
        if self._is_too_old(self._loop.time()):
            raise StreamAgeError

    def end(self, error: type[JobStatusError]) -> None:
        """End the watch with `error`."""
        if self._error is None or error is not StoreChangedError:  # who is to go does not begin again
            self._error = error
        self.wake_soon()

    def restart(self) -> None:
        """Forget what the reader holds and what waits, to begin again."""
        if self._error is StoreChangedError:
            self._error = None
        self._gathered = None
        self.backlog.clear()

    def close(self) -> None:
        """Stop the timers, and forget."""
        super().close()
        self.backlog.clear()

    def wake_soon(self) -> None:
        """Look, in its turn, whether there is something to do; not while nobody waits."""
        if self._waiter is not None:
            super().wake_soon()

    def step(self) -> int:
        """Look, in its turn; see WakeQueue."""
        self._is_queued = False
        if self._waiter is None or self._waiter.done() or not self._has_work():
            return LOOK
        self._waiter.set_result(None)
        return WAKE

    async def _woken(self) -> None:
        self._waiter = self._loop.create_future()
        if self._has_work():
            self.wake_soon()
        try:
            await self._waiter
        finally:
            self._waiter = None
        self.check()

    def _has_work(self) -> bool:
        if self._is_turn_wanted or self._error is not None or self.backlog.ready:
            return True
        now = self._loop.time()
        due_at = self.backlog.next_due_at
        return self._is_heartbeat_due(now) or (due_at is not None and due_at <= now + CLOCK_RESOLUTION_SECONDS)

    def _look_at(self, due_at: float) -> None:
        """Wake the watcher then, or now where that is past."""
        if due_at <= self._loop.time() + CLOCK_RESOLUTION_SECONDS:
            self.wake_soon()
        else:
            self._wake_at(due_at)
