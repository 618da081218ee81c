"""One watcher of all jobs that match a filter: what it may send, and when it is woken to do so."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

from jobstatus_grpc.errors import JobStatusError, StoreChangedError, StreamAgeError
from jobstatus_grpc.filter_backlog import Backlog, News
from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.stores.interface import Position
from jobstatus_grpc.watcher import CLOCK_RESOLUTION_SECONDS, EventType

if TYPE_CHECKING:
    from jobstatus_grpc.filter_hub import FilterHub


class FilterWatcher:
    """Hands out, message by message, what its backlog holds. For one task at a time."""

    __slots__ = (
        "_beat_timer", "_ends_at", "_error", "_gathered", "_heartbeat_seconds", "_hub", "_is_queued",
        "_is_turn_wanted", "_loop", "_sent_at", "_throttle_timer", "_waiter", "backlog",
    )  # fmt: skip

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
        self.backlog = Backlog(self, tenant, job_filter, hub.held, min_update_seconds=min_update_seconds)
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._heartbeat_seconds = heartbeat_seconds
        now = self._loop.time()
        self._ends_at = now + max_age_seconds * random.uniform(0.9, 1.1) if max_age_seconds else float("inf")
        self._sent_at = now
        self._error: type[JobStatusError] | None = None
        self._gathered: dict[str, News] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_turn_wanted = False
        self._is_queued = False
        self._throttle_timer: asyncio.TimerHandle | None = None
        self._beat_timer: asyncio.TimerHandle | None = None
        self._arm_beat()

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
            if not events and self._is_beat_due(now):
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
        seconds = max(min(self._sent_at + self._heartbeat_seconds, self._ends_at) - self._loop.time(), 0)
        try:
            await asyncio.wait((task, self._waiter), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiter = None
        self.check()
        return self._is_beat_due(self._loop.time())

    def note_sent(self) -> None:
        """Count the silence from now on."""
        self._sent_at = self._loop.time()

    def check(self) -> None:
        """Raise what ends the watch, if anything does."""
        if self._error is not None:
            raise self._error()
        if self._loop.time() + CLOCK_RESOLUTION_SECONDS >= self._ends_at:
            raise StreamAgeError

    def end(self, error: type[JobStatusError]) -> None:
        """End the watch with `error`."""
        if self._error is None or error is not StoreChangedError:  # who is to go does not begin again
            self._error = error
        self._wake_soon()

    def restart(self) -> None:
        """Forget what the reader holds and what waits, to begin again."""
        if self._error is StoreChangedError:
            self._error = None
        self._gathered = None
        self.backlog.clear()

    def close(self) -> None:
        """Stop the timers, and forget."""
        for timer in (self._beat_timer, self._throttle_timer):
            if timer is not None:
                timer.cancel()
        self.backlog.clear()

    def step(self) -> bool:
        """Look, in its turn; see WakeQueue."""
        self._is_queued = False
        if self._waiter is None or self._waiter.done() or not self._has_work():
            return False
        self._waiter.set_result(None)
        return True

    async def _woken(self) -> None:
        self._waiter = self._loop.create_future()
        if self._has_work():
            self._wake_soon()
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
        return self._is_beat_due(now) or (due_at is not None and due_at <= now + CLOCK_RESOLUTION_SECONDS)

    def _is_beat_due(self, now: float) -> bool:
        return now + CLOCK_RESOLUTION_SECONDS >= min(self._sent_at + self._heartbeat_seconds, self._ends_at)

    def _look_at(self, due_at: float) -> None:
        """Wake the watcher then, or now where that is past."""
        if due_at <= self._loop.time() + CLOCK_RESOLUTION_SECONDS:
            self._wake_soon()
        elif self._throttle_timer is None:
            self._throttle_timer = self._loop.call_at(due_at, self._on_throttle_end)
        elif due_at < self._throttle_timer.when():
            self._throttle_timer.cancel()
            self._throttle_timer = self._loop.call_at(due_at, self._on_throttle_end)

    def _on_throttle_end(self) -> None:
        self._throttle_timer = None
        self._wake_soon()

    def _on_beat(self) -> None:
        """Wake the watcher if it has been silent; messages do not move the timer, it looks when it fires."""
        if self._is_beat_due(self._loop.time()):
            self._wake_soon()
            self._arm_beat(self._loop.time() + self._heartbeat_seconds)
        else:
            self._arm_beat(self._sent_at + self._heartbeat_seconds)

    def _arm_beat(self, next_at: float | None = None) -> None:
        next_at = self._sent_at + self._heartbeat_seconds if next_at is None else next_at
        if self._loop.time() < self._ends_at < next_at:
            next_at = self._ends_at
        self._beat_timer = self._loop.call_at(next_at, self._on_beat)

    def _wake_soon(self) -> None:
        if self._waiter is not None and not self._is_queued:
            self._is_queued = True
            self._hub.wakes.enqueue(self)
