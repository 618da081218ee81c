"""What watches of one job and of many share: event types, the queue in which watchers run, and their timers.

A change puts the watchers that it concerns into the WakeQueue of the event loop, which runs a few of them in each
iteration of the loop. A watcher's timers put it into the same queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, TypeAlias

from jobstatus_grpc.job import Job
from jobstatus_grpc.stores.interface import Change, Position


class EventType(enum.IntEnum):
    """The type of a watch's event, with the numbers of the API; REMOVED, SYNCED and RESET in WatchJobs only."""

    SNAPSHOT = 1
    UPDATED = 2
    REMOVED = 3
    SYNCED = 4
    HEARTBEAT = 5
    RESET = 6


RenderJobEvent: TypeAlias = Callable[[EventType, Job], bytes]
"""Returns a WatchJobResponse without its server_time. server/responses.py has it: watch/ imports no protobuf."""

RenderJobsEvent: TypeAlias = Callable[[EventType, Change | None], bytes]
"""Returns a WatchJobsResponse with one event and no server_time; the change is None for an event without a job.

Renderings put one behind the other are one response with all their events.
"""

Stamp: TypeAlias = Callable[[], bytes]
"""Returns the bytes to append to a rendering when it is sent: the response's server_time."""

TrySend: TypeAlias = Callable[[bytes], int]
"""Sends a message without waiting and returns the cost, as of Wakeable; returns 0 where that is impossible now."""

Send: TypeAlias = Callable[[bytes, Position | None], Awaitable[None]]
"""Sends a message, with the feed's position up to which the client then has everything; None: the position before."""

Hold: TypeAlias = Callable[[int], None]
"""Counts the bytes of memory that a watch holds now, and raises the error that ends it if they are too many."""

NOWHERE: Position = ""
"""The position of a client that has discarded its jobs, and lacks some that match: no store knows it, so that a stream
which begins there begins with RESET."""


LOOK, WAKE = 1, 64
"""The cost of one run of a queued item, in about microseconds: nothing to do, a task woken. A transport says what a
message costs."""

TURN = 64
"""The cost after which the queue leaves the rest to the event loop's next iteration: one task woken, or 8 messages over
the native transport.

Row `fanout`: with one item per iteration, whatever it costs, the burst takes 200 times as long to reach all watchers.
"""

YIELD_SECONDS = 0.05
"""After a commit met queued watchers, the core is yielded for this long to threads that carry requests and replies.

Row `change`, native: without it, a change takes a fifth longer to reach the last of 1,000 watchers.
"""

LONGEST_PAUSE_SECONDS = 0.02
"""How long a commit keeps watchers waiting, at most: a disk may need seconds, and heartbeats must go on."""

LONGEST_SHARE_SECONDS = 0.02
"""How long a commit waits for queued watchers, at most. Row `fanout`: without it, an update's p50 is a tenth longer."""

CLOCK_RESOLUTION_SECONDS = 0.002
"""By how much a timer may fire too early: uvloop counts whole milliseconds. Events are sent early by as much."""


class Wakeable(Protocol):
    """An item of the WakeQueue."""

    def run(self) -> int:
        """Do one piece of work and return its cost, such as LOOK. An item with more to do enqueues itself again."""
        ...


class WakeQueue:
    """Runs its items in order, a few in each iteration of its event loop, and none while a commit runs."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[Wakeable] = deque()
        self._is_scheduled = False
        self._is_paused = False
        self._may_pause_at = 0.0
        self._is_empty = asyncio.Event()
        self._yields_until = 0.0

    def enqueue(self, item: Wakeable) -> None:
        """Append `item`. The queue does not look for duplicates; its users do."""
        self._items.append(item)
        self._schedule()

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Run nothing during the block: a thread that commits gets the interpreter only when this thread is idle.

        After LONGEST_PAUSE_SECONDS the queue runs again, whether the block has ended or not.

        The block begins when the queue is empty, or has run for as long as the last block took, at most 20 ms. So a
        stream of commits cannot starve watchers, nor watchers commits. For one task at a time.
        """
        if self._items:
            await self._let_items_run()
        began_at = self._loop.time()
        self._is_paused = True
        resumption = self._loop.call_later(LONGEST_PAUSE_SECONDS, self._resume)
        try:
            yield
        finally:
            resumption.cancel()
            now = self._loop.time()
            self._may_pause_at = now + min(now - began_at, LONGEST_SHARE_SECONDS)
            self._resume()

    def _resume(self) -> None:
        self._is_paused = False
        self._schedule()

    async def _let_items_run(self) -> None:
        now = self._loop.time()
        self._yields_until = now + YIELD_SECONDS
        if now < self._may_pause_at:
            self._is_empty.clear()
            end = self._loop.call_at(self._may_pause_at, self._is_empty.set)
            try:
                await self._is_empty.wait()
            finally:
                end.cancel()

    def _schedule(self) -> None:
        if self._items and not self._is_scheduled and not self._is_paused:
            self._is_scheduled = True
            self._loop.call_soon(self._run_some)

    def _run_some(self) -> None:
        if not self._is_paused:
            left = TURN
            for _ in range(min(TURN, len(self._items))):
                left -= self._items.popleft().run()
                if left <= 0:
                    break
        self._is_scheduled = False
        if not self._items:
            self._is_empty.set()
        elif self._loop.time() < self._yields_until:
            _yield_core()
        self._schedule()


def _yield_core() -> None:
    if hasattr(os, "sched_yield"):  # Windows has none
        os.sched_yield()


class TimedWatcher:
    """A WakeQueue item with timers: for heartbeats, for the end of its stream's age, for changes that are held back."""

    __slots__ = (
        "_ends_at", "_heartbeat_seconds", "_heartbeat_timer", "_is_queued", "_loop", "_sent_at", "_throttle_timer",
        "_wake_queue",
    )  # fmt: skip

    def __init__(self, wake_queue: WakeQueue, *, heartbeat_seconds: float, max_age_seconds: float | None) -> None:
        self._wake_queue = wake_queue
        self._is_queued = False
        self._loop = asyncio.get_running_loop()
        self._heartbeat_seconds = heartbeat_seconds
        self._sent_at = now = self._loop.time()
        self._ends_at = now + max_age_seconds * random.uniform(0.9, 1.1) if max_age_seconds else float("inf")
        self._throttle_timer: asyncio.TimerHandle | None = None
        self._start_heartbeat_timer(now + heartbeat_seconds)

    def run(self) -> int:
        """Do what is due; see Wakeable."""
        raise NotImplementedError

    def wake_soon(self) -> None:
        """Enqueue the watcher, unless it is in the queue."""
        if not self._is_queued:
            self._is_queued = True
            self._wake_queue.enqueue(self)

    def close(self) -> None:
        """Stop the timers."""
        self._heartbeat_timer.cancel()
        if self._throttle_timer is not None:
            self._throttle_timer.cancel()

    def _heartbeat_due_at(self) -> float:
        """Return the loop's time at which a HEARTBEAT is due, or the end of the stream."""
        return min(self._sent_at + self._heartbeat_seconds, self._ends_at)

    def _is_heartbeat_due(self, now: float) -> bool:
        return now + CLOCK_RESOLUTION_SECONDS >= self._heartbeat_due_at()

    def _is_too_old(self, now: float) -> bool:
        return now + CLOCK_RESOLUTION_SECONDS >= self._ends_at

    def _wake_at(self, due_at: float) -> None:
        """Enqueue the watcher at `due_at`, or earlier where a timer is set for that."""
        if self._throttle_timer is not None:
            if self._throttle_timer.when() <= due_at:
                return
            self._throttle_timer.cancel()
        self._throttle_timer = self._loop.call_at(due_at, self._on_throttle_timer)

    def _on_throttle_timer(self) -> None:
        self._throttle_timer = None
        self.wake_soon()

    def _on_heartbeat_timer(self) -> None:
        # Sending does not move the timer, which costs more than to compare the times when it fires.
        now = self._loop.time()
        next_at = self._sent_at + self._heartbeat_seconds
        if self._is_heartbeat_due(now):
            self.wake_soon()
            next_at = now + self._heartbeat_seconds
        self._start_heartbeat_timer(next_at)

    def _start_heartbeat_timer(self, next_at: float) -> None:
        if self._loop.time() < self._ends_at < next_at:
            next_at = self._ends_at
        self._heartbeat_timer = self._loop.call_at(next_at, self._on_heartbeat_timer)
