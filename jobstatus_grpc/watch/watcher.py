"""What every watcher does by the clock: it says something now and then, holds back what is minor, and grows old."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias

from jobstatus_grpc.job import Job

if TYPE_CHECKING:
    pass


# What a step costs, in microseconds or so.
LOOK, SEND, WAKE = 1, 8, 64

TURN = 64

YIELD_SECONDS = 0.05
"""So long after a commit met watchers in the queue, threads that carry requests and replies come first on the core."""

LONGEST_SHARE_SECONDS = 0.02
"""A commit that waits for watchers waits no longer."""


class Wakeable(Protocol):
    """What can stand in the queue."""

    def step(self) -> int:
        """Look at one watcher, send something or wake it; tell which. Whoever has more to do enqueues itself again."""
        ...


class WakeQueue:
    """Steps through what stands in it, first come first served. Lives on one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[Wakeable] = deque()
        self._is_turning = False
        self._is_paused = False
        self._may_pause_at = 0.0
        self._is_empty = asyncio.Event()
        self._yields_until = 0.0

    def enqueue(self, item: Wakeable) -> None:
        """Let `item` step in its turn. It may stand in the queue more than once; better it does not."""
        self._items.append(item)
        self._turn_soon()

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Wake nobody while the block runs: a thread that commits gets the interpreter only when this one rests.

        The block begins when those in the queue have had as long as the last one took, 20 ms at most, or there are
        none: so a stream of commits cannot starve watchers, nor they it. For one task at a time.
        """
        if self._items:
            await self._let_them_have_their_share()
        began_at = self._loop.time()
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            now = self._loop.time()
            self._may_pause_at = now + min(now - began_at, LONGEST_SHARE_SECONDS)
            self._turn_soon()

    async def _let_them_have_their_share(self) -> None:
        now = self._loop.time()
        self._yields_until = now + YIELD_SECONDS
        if now < self._may_pause_at:
            self._is_empty.clear()
            end = self._loop.call_at(self._may_pause_at, self._is_empty.set)
            try:
                await self._is_empty.wait()
            finally:
                end.cancel()

    def _turn_soon(self) -> None:
        if self._items and not self._is_turning and not self._is_paused:
            self._is_turning = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        if not self._is_paused:
            left = TURN
            for _ in range(min(TURN, len(self._items))):
                left -= self._items.popleft().step()
                if left <= 0:
                    break
        self._is_turning = False
        if not self._items:
            self._is_empty.set()
        elif self._loop.time() < self._yields_until:
            _yield_core()
        self._turn_soon()


def _yield_core() -> None:
    if hasattr(os, "sched_yield"):  # Windows has none
        os.sched_yield()


# A timer may fire a little before its time.
CLOCK_RESOLUTION_SECONDS = 0.002


class TimedWatcher:
    """Stands in the queue of those to be woken when it has been silent for too long, is too old, or told itself to."""

    __slots__ = (
        "_ends_at", "_heartbeat_seconds", "_heartbeat_timer", "_is_queued", "_loop", "_sent_at", "_throttle_timer",
        "_wakes",
    )  # fmt: skip

    def __init__(self, wakes: WakeQueue, *, heartbeat_seconds: float, max_age_seconds: float | None) -> None:
        self._wakes = wakes
        self._is_queued = False
        self._loop = asyncio.get_running_loop()
        self._heartbeat_seconds = heartbeat_seconds
        self._sent_at = now = self._loop.time()
        self._ends_at = now + max_age_seconds * random.uniform(0.9, 1.1) if max_age_seconds else float("inf")
        self._throttle_timer: asyncio.TimerHandle | None = None
        self._arm_heartbeat(now + heartbeat_seconds)

    def step(self) -> int:
        """Look, in its turn; see WakeQueue."""
        raise NotImplementedError

    def wake_soon(self) -> None:
        """Look, in its turn, whether there is something to do."""
        if not self._is_queued:
            self._is_queued = True
            self._wakes.enqueue(self)

    def note_sent(self) -> None:
        """Count the silence from now on. That does not move the timer: it looks when it fires."""
        self._sent_at = self._loop.time()

    def close(self) -> None:
        """Stop the timers."""
        self._heartbeat_timer.cancel()
        if self._throttle_timer is not None:
            self._throttle_timer.cancel()

    def _heartbeat_due_at(self) -> float:
        """Return the loop's time at which it is time for a HEARTBEAT, or for the end."""
        return min(self._sent_at + self._heartbeat_seconds, self._ends_at)

    def _is_heartbeat_due(self, now: float) -> bool:
        return now + CLOCK_RESOLUTION_SECONDS >= self._heartbeat_due_at()

    def _is_too_old(self, now: float) -> bool:
        return now + CLOCK_RESOLUTION_SECONDS >= self._ends_at

    def _wake_at(self, due_at: float) -> None:
        """Wake up then, unless that happens earlier anyway."""
        if self._throttle_timer is not None:
            if self._throttle_timer.when() <= due_at:
                return
            self._throttle_timer.cancel()
        self._throttle_timer = self._loop.call_at(due_at, self._on_throttle_end)

    def _on_throttle_end(self) -> None:
        self._throttle_timer = None
        self.wake_soon()

    def _on_heartbeat_timer(self) -> None:
        now = self._loop.time()
        next_at = self._sent_at + self._heartbeat_seconds
        if self._is_heartbeat_due(now):
            self.wake_soon()
            next_at = now + self._heartbeat_seconds
        self._arm_heartbeat(next_at)

    def _arm_heartbeat(self, next_at: float) -> None:
        if self._loop.time() < self._ends_at < next_at:
            next_at = self._ends_at
        self._heartbeat_timer = self._loop.call_at(next_at, self._on_heartbeat_timer)


class EventType(enum.IntEnum):
    """What an event of a watch says; REMOVED, SYNCED and RESET in watches of many only."""

    SNAPSHOT = 1
    UPDATED = 2
    REMOVED = 3
    SYNCED = 4
    HEARTBEAT = 5
    RESET = 6


Render: TypeAlias = Callable[[EventType, Job], bytes]

TrySend: TypeAlias = Callable[[bytes], bool]
"""Sends a message without a wait, or tells that it cannot."""
