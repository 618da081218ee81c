"""The change feed and the stall clocks of stores that only this process writes. Both live in memory."""

from __future__ import annotations

import asyncio
import heapq
import secrets
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import NamedTuple

from jobstatus_grpc.errors import StoreChangedError, StoreUnavailableError
from jobstatus_grpc.job import Command, Create, Job, JobState, Outcome, Update, is_large, with_heartbeat
from jobstatus_grpc.stores.interface import MAX_BATCH_CHANGES, Change, ChangeBatch, Key, Page, Position, Silence

MAX_LARGE_CHANGES = 100
"""The number of changes of jobs with a large result that a feed with `max_jobs` keeps: up to 64 KiB each."""

TOO_OLD = "the position is older than the store's history"


class Epoch(NamedTuple):
    """A run of changes that one process has made. Its name is random: no other history has an epoch of this name."""

    first_sequence: int
    """The number of its first change. It ends where the next epoch begins."""
    name: str


def new_epoch(first_sequence: int) -> Epoch:
    """Return an epoch of a process whose first change will have this number."""
    return Epoch(first_sequence, secrets.token_hex(8))


class Feed:
    """Numbers the changes of a store, and keeps the newest of each job: a slow reader skips the others.

    A position is the number of a change and the epoch that made it. If the store goes back to an earlier state, later
    changes get the same numbers in another epoch, so that the positions from before are not taken for theirs.

    For one event loop.
    """

    def __init__(self, epochs: Sequence[Epoch], *, sequence: int = 0, max_jobs: int | None = None) -> None:
        """Create a feed.

        Args:
            epochs: the known epochs in order. The last one is this process's.
            sequence: the number of the last change before this process's first.
            max_jobs: the number of changes to keep; None: all.
        """
        self.sequence = sequence
        """The number of the newest change."""
        self.forgotten_sequence = 0
        """The number of the newest removal that was dropped, or whose id names a new job since: a reader at an earlier
        position would miss it."""
        self._epochs = epochs
        self._first_sequences = [epoch.first_sequence for epoch in epochs]
        self._max_jobs = max_jobs
        self._complete_after = sequence
        self._newest: OrderedDict[Key, tuple[int, Change]] = OrderedDict()
        self._large: set[Key] = set()
        self._changed = asyncio.Event()
        self._is_ended = False

    def publish(self, changes: Mapping[Key, Change]) -> None:
        """Append `changes` in their order, and wake the readers."""
        newest = self._newest
        for number, (key, change) in enumerate(changes.items(), start=self.sequence + 1):
            self.forget(key)
            newest[key] = (number, change)
            newest.move_to_end(key)
            self._note_size(key, change)
        self.sequence += len(changes)
        while self._max_jobs is not None and (len(newest) > self._max_jobs or len(self._large) > MAX_LARGE_CHANGES):
            key, (self._complete_after, _) = newest.popitem(last=False)
            self._large.discard(key)
        self._wake_readers()

    def _note_size(self, key: Key, change: Change) -> None:
        job = change.known_job
        if self._max_jobs is not None and job is not None and is_large(job):
            self._large.add(key)
        else:
            self._large.discard(key)

    def end(self) -> None:
        """Close the feed: all readers get StoreUnavailableError, now and later."""
        self._is_ended = True
        self._wake_readers()

    def position(self, sequence: int | None = None) -> Position:
        """Return the position after the change number `sequence` (None: the newest)."""
        if sequence is None:
            sequence = self.sequence
        return f"{self._epoch_of(sequence)}-{sequence}"

    def sequence_of(self, position: Position) -> int:
        """Return the number of the last change before `position`.

        Raises:
            StoreChangedError: the position is not of this feed, or a removal after it was dropped.
        """
        epoch, _, digits = position.rpartition("-")
        is_number = digits.isascii() and digits.isdigit() and len(digits) < 20
        if not is_number or int(digits) > self.sequence or epoch != self._epoch_of(int(digits)):
            raise StoreChangedError
        if int(digits) < self.forgotten_sequence:
            raise StoreChangedError(TOO_OLD)
        return int(digits)

    def _epoch_of(self, sequence: int) -> str:
        """Return the name of the epoch that made the change number `sequence`; empty if it is not known any more."""
        index = bisect_right(self._first_sequences, sequence)
        return self._epochs[index - 1].name if index else ""

    async def wait_beyond(self, sequence: int) -> None:
        """Wait until there is a change after the number `sequence`.

        Raises:
            StoreUnavailableError: the feed has ended.
        """
        while self.sequence <= sequence and not self._is_ended:
            await self._changed.wait()
        if self._is_ended:
            raise StoreUnavailableError("the store is closed")

    def since(self, sequence: int, up_to: int | None = None) -> ChangeBatch | None:
        """Return the first changes after the number `sequence`; None if some of them are not kept.

        Args:
            sequence: the number of the last change before the batch.
            up_to: the number of the last change to return; None: the newest.
        """
        if sequence < self._complete_after:
            return None
        end = self.sequence if up_to is None else max(up_to, sequence)
        newer: list[tuple[int, Change]] = []
        beyond: list[Key] = []
        for key, entry in reversed(self._newest.items()):
            if entry[0] <= sequence:
                break
            if entry[0] <= end:
                newer.append(entry)
            else:
                beyond.append(key)
        newer.reverse()
        last = end if len(newer) <= MAX_BATCH_CHANGES else newer[MAX_BATCH_CHANGES - 1][0]
        return ChangeBatch(self.position(last), [change for _, change in newer[:MAX_BATCH_CHANGES]], beyond)

    def forget(self, key: Key) -> None:
        """Drop the job's newest change if it is its removal: readers at earlier positions get StoreChangedError."""
        entry = self._newest.get(key)
        if entry is not None and entry[1].job is None:
            self.forgotten_sequence = max(self.forgotten_sequence, entry[0])
            del self._newest[key]

    def _wake_readers(self) -> None:
        self._changed.set()
        self._changed.clear()


AGAIN_SECONDS = 5.0
"""A job that was returned as due is due again after this time, in case its Stall could not be committed."""


MAX_OBSOLETE = 1000
"""Obsolete entries of the queue of stall clocks that are kept beside as many as there are clocks."""


class _Clock:
    __slots__ = ("due_in_queue_at", "found_at", "heard_at", "stalled", "timeout_seconds", "updated_at")

    def __init__(self, updated_at: float) -> None:
        self.updated_at = updated_at
        self.heard_at: datetime | None = None
        """The time of the last update by the store's clock; None: there was none since the process started."""
        self.timeout_seconds = 0.0
        self.stalled = False
        self.due_in_queue_at: float | None = None
        """The time of its valid entry in the queue; its older entries are ignored."""
        self.found_at = float("-inf")
        """When `due` returned it last."""


class StallClocks:
    """One clock for each job IN_PROGRESS that has a heartbeat_timeout. For one event loop.

    The clocks are independent of the wall clock: if that is set forward, no job must stall.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """Measure with `now`, a monotonic clock in seconds."""
        self._now = now
        self._started_at = now()
        self._clocks: dict[Key, _Clock] = {}
        self._queue: list[tuple[float, Key]] = []

    def restart(self) -> None:
        """Start all clocks anew: the workers could not report, so that their silence has no meaning."""
        self._started_at = self._now()

    def begin(self, jobs: Iterable[tuple[Key, timedelta, bool]]) -> None:
        """Start clocks for stored jobs that are IN_PROGRESS: key, timeout and whether the job is stalled."""
        for key, timeout, stalled in jobs:
            if key not in self._clocks:
                self._start(key, self._started_at, None, timeout, stalled)

    def note(self, commands: Sequence[Command], outcomes: Sequence[Outcome], at: datetime) -> None:
        """Record commands that were committed `at` this time by the store's clock.

        A worker's update restarts its job's clock, even if it changed nothing.
        """
        now = self._now()
        for command, job in zip(commands, outcomes, strict=True):
            if not isinstance(job, Job):
                continue
            key = (command.tenant, command.id)
            if job.heartbeat_timeout is None or job.state is not JobState.IN_PROGRESS:
                if self._clocks:
                    self._clocks.pop(key, None)
            elif isinstance(command, (Update, Create)):
                self._start(key, now, at, job.heartbeat_timeout, job.stalled)
            elif (clock := self._clocks.get(key)) is not None:
                clock.stalled = job.stalled
                self._enqueue(key, clock, now)  # `due` computes the next time, which depends on `stalled`

    def silence_of(self, key: Key) -> Silence:
        """Return how long a job's worker had been silent when `due` returned it; 0 if an update has come since.

        The time until the commit does not count: where the process was suspended or its disk blocked, no worker could
        report.
        """
        clock = self._clocks.get(key)
        if clock is None:
            return Silence(timedelta(0), None)
        seconds = clock.found_at - max(clock.updated_at, self._started_at)
        return Silence(timedelta(seconds=max(seconds, 0.0)), clock.heard_at)

    def shown(self, job: Job) -> Job:
        """Return a job as stored with its last heartbeat."""
        clock = self._clocks.get((job.tenant, job.id))
        return job if clock is None else with_heartbeat(job, clock.heard_at)

    def shown_on(self, page: Page) -> Page:
        """Return a page of jobs as stored with their last heartbeats."""
        return replace(page, jobs=[self.shown(job) for job in page.jobs]) if self._clocks else page

    def due(self, *, limit: int, fail_after: timedelta | None) -> list[Key]:
        """Return at most `limit` jobs whose workers have been silent for too long, the longest overdue first."""
        now = self._now()
        due: list[Key] = []
        while self._queue and self._queue[0][0] <= now and len(due) < limit:
            queued_at, key = heapq.heappop(self._queue)
            clock = self._clocks.get(key)
            if clock is None or clock.due_in_queue_at != queued_at:
                continue
            clock.due_in_queue_at = None
            due_at = self._due_at(clock, fail_after)
            if due_at is None:
                continue
            if due_at <= now:
                due.append(key)
                clock.found_at = now
                due_at = now + AGAIN_SECONDS
            self._enqueue(key, clock, due_at)
        return due

    def _due_at(self, clock: _Clock, fail_after: timedelta | None) -> float | None:
        due_at = max(clock.updated_at, self._started_at) + clock.timeout_seconds
        if not clock.stalled:
            return due_at
        return None if fail_after is None else due_at + fail_after.total_seconds()

    def _start(self, key: Key, updated_at: float, heard_at: datetime | None, timeout: timedelta, stalled: bool) -> None:
        clock = self._clocks.get(key)
        if clock is None:
            clock = self._clocks[key] = _Clock(updated_at)
        timeout_seconds = timeout.total_seconds()
        is_shorter = timeout_seconds < clock.timeout_seconds
        clock.updated_at, clock.heard_at = updated_at, heard_at
        clock.timeout_seconds, clock.stalled = timeout_seconds, stalled
        # An entry that is too early is corrected by `due`: most updates need not touch the queue.
        if clock.due_in_queue_at is None or is_shorter:
            self._enqueue(key, clock, updated_at + timeout_seconds)

    def _enqueue(self, key: Key, clock: _Clock, due_at: float) -> None:
        if len(self._queue) > 2 * len(self._clocks) + MAX_OBSOLETE:
            # Most are of jobs that are done: they would be kept until they are due, up to 7 days.
            clocks = self._clocks.items()
            self._queue = sorted((at, key) for key, clock in clocks if (at := clock.due_in_queue_at) is not None)
        clock.due_in_queue_at = due_at
        heapq.heappush(self._queue, (due_at, key))
