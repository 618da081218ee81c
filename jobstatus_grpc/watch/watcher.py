"""What watches of one job and of many share: event types, the queue in which watchers run, and their timers.

A change puts the watchers that it concerns into the WakeQueue of the event loop, which runs a few of them in each
iteration of the loop. A watcher's timers put it into the same queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import math
import os
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
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

OnDelivery: TypeAlias = Callable[[Job], None]
"""Is called with a job when a watch sends it after a change: for tracing."""

Hold: TypeAlias = Callable[[int], None]
"""Counts the bytes of memory that a watch holds now, and raises the error that ends it if they are too many."""

NOWHERE: Position = ""
"""The position of a client that has discarded its jobs, and lacks some that match: no store knows it, so that a stream
which begins there begins with RESET."""


LOOK, WAKE = 1, 64
"""The cost of one run of a queued item, in about microseconds: nothing to do, a task woken. A transport says what a
message costs."""

TURN = 64
"""The cost after which the queue leaves the rest to the event loop's next iteration: one task woken, or several
messages of a transport.

Row `fanout`: with one item per iteration, whatever it costs, the burst takes 200 times as long to reach all watchers.
"""

YIELD_SECONDS = 0.05
"""After a commit met queued watchers, the core is yielded in each iteration of the loop for this long: to threads that
carry requests and replies.

Row `change`, native: without it, a change takes a fifth longer to reach the last of 1,000 watchers.
"""

YIELD_INTERVAL_SECONDS = 0.001
"""Otherwise the core is yielded at this interval while watchers are queued.

Row `fanout`, native: without it, an update's p99 during the burst is four times as long.
"""

LONGEST_PAUSE_SECONDS = 0.02
"""How long a commit keeps watchers waiting, at most: a disk may need seconds, and heartbeats must go on."""

LONGEST_SHARE_SECONDS = 0.02
"""How long a commit waits for queued watchers, at most. Row `fanout`: without it, an update's p50 is a tenth longer."""

CLOCK_RESOLUTION_SECONDS = 0.002
"""By how much a timer may fire too early: uvloop counts whole milliseconds. Events are sent early by as much."""


ROUND_SECONDS = 0.1
"""Heartbeats that are due within this time are sent together, by as much late. Of shorter heartbeat intervals than 2 s,
it is a twentieth.

Row `watchers`, CPU while idle: a heartbeat that is sent alone wakes the event loop and the transport's thread.
"""


class Wakeable(Protocol):
    """An item of the WakeQueue."""

    def run(self) -> int:
        """Do one piece of work and return its cost, such as LOOK. An item with more to do enqueues itself again."""
        ...


@dataclass(slots=True)
class _Round:
    """Watchers that are called at the same time."""

    timer: asyncio.TimerHandle
    members: dict[TimedWatcher, None] = field(default_factory=dict)


class WakeQueue:
    """Runs its items in order, a few in each iteration of its event loop, and none while a commit runs."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[Wakeable] = deque()
        self._is_scheduled = False
        self._is_paused = False
        self._may_pause_at = 0.0
        self._is_empty = asyncio.Event()
        self._yields_until = self._yields_next_at = 0.0
        self._rounds: dict[float, _Round] = {}
        """By the time at which they are called."""

    def enqueue(self, item: Wakeable) -> None:
        """Append `item`. The queue does not look for duplicates; its users do."""
        self._items.append(item)
        self._schedule()

    def join_round(self, watcher: TimedWatcher, due_at: float, *, interval_seconds: float) -> float:
        """Call the watcher's `on_round` at `due_at` or soon after, with those of others; return that time."""
        seconds = min(ROUND_SECONDS, interval_seconds / 20)
        at = math.ceil(due_at / seconds) * seconds
        this = self._rounds.get(at)
        if this is None:
            this = self._rounds[at] = _Round(self._loop.call_at(at, self._run_round, at))
        this.members[watcher] = None
        return at

    def leave_round(self, watcher: TimedWatcher, at: float) -> None:
        """Take back `join_round`, which returned `at`; without effect after the round."""
        this = self._rounds.get(at)
        if this is not None:
            this.members.pop(watcher, None)
            if not this.members:
                this.timer.cancel()
                del self._rounds[at]

    def _run_round(self, at: float) -> None:
        for watcher in self._rounds.pop(at).members:
            watcher.on_round()

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
        else:
            self._yield_if_due()
        self._schedule()

    def _yield_if_due(self) -> None:
        now = self._loop.time()
        if _sched_yield is not None and (now < self._yields_until or now >= self._yields_next_at):
            _sched_yield()
            self._yields_next_at = self._loop.time() + YIELD_INTERVAL_SECONDS


_sched_yield: Callable[[], None] | None = getattr(os, "sched_yield", None)  # Windows has none


class TimedWatcher:
    """A WakeQueue item with timers: for heartbeats, for the end of its stream's age, for changes that are held back."""

    __slots__ = (
        "_ends_at", "_heartbeat_seconds", "_is_queued", "_loop", "_round_at", "_sent_at", "_throttle_timer",
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
        self._join_round(now + heartbeat_seconds)

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
        self._wake_queue.leave_round(self, self._round_at)
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

    def on_round(self) -> None:
        """Enqueue the watcher if its heartbeat or its end is due, and join the next round."""
        # Sending does not change the round, which costs more than to compare the times in it.
        now = self._loop.time()
        next_at = self._sent_at + self._heartbeat_seconds
        if self._is_heartbeat_due(now):
            self.wake_soon()
            next_at = now + self._heartbeat_seconds
        self._join_round(next_at)

    def _join_round(self, next_at: float) -> None:
        if self._loop.time() < self._ends_at < next_at:
            next_at = self._ends_at
        self._round_at = self._wake_queue.join_round(self, next_at, interval_seconds=self._heartbeat_seconds)
