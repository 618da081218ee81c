"""How long the workers of the jobs IN_PROGRESS have been silent, for stores that see every update in this process."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta

from jobstatus_grpc.errors import StoreChangedError, StoreUnavailableError
from jobstatus_grpc.job import Command, Create, Job, JobState, Outcome, Update, is_large
from jobstatus_grpc.stores.interface import Change, ChangeBatch, Key, Position

MAX_BATCH_CHANGES = 1000

MAX_LARGE_CHANGES = 100

TOO_OLD = "the position is older than the store's history"


class Feed:
    """Numbers the changes of one incarnation, and keeps each job's newest: a reader that is behind skips the others.

    For one event loop.
    """

    def __init__(self, incarnation: str, *, sequence: int = 0, max_jobs: int | None = None) -> None:
        """Begin after the change number `sequence`, to keep at most `max_jobs` changes (None: all of them)."""
        self.sequence = sequence
        """The number of the newest change."""
        self.forgotten_sequence = 0
        """The number of the newest removal that was dropped: who stands before it would miss that."""
        self._incarnation = incarnation
        self._max_jobs = max_jobs
        self._complete_after = sequence
        self._newest: OrderedDict[Key, tuple[int, Change]] = OrderedDict()
        self._large: set[Key] = set()
        self._bell = asyncio.Event()
        self._is_ended = False

    def publish(self, changes: Mapping[Key, Change]) -> None:
        """Append `changes`, in their order, and wake whoever waits."""
        newest = self._newest
        for number, (key, change) in enumerate(changes.items(), start=self.sequence + 1):
            newest[key] = (number, change)
            newest.move_to_end(key)
            self._note_size(key, change)
        self.sequence += len(changes)
        while self._max_jobs is not None and (len(newest) > self._max_jobs or len(self._large) > MAX_LARGE_CHANGES):
            key, (self._complete_after, _) = newest.popitem(last=False)
            self._large.discard(key)
        self._ring()

    def _note_size(self, key: Key, change: Change) -> None:
        if self._max_jobs is not None and change.job is not None and is_large(change.job):
            self._large.add(key)
        else:
            self._large.discard(key)

    def end(self) -> None:
        """Refuse to go on: whoever waits, now or later, gets StoreUnavailableError."""
        self._is_ended = True
        self._ring()

    def position(self, sequence: int | None = None) -> Position:
        """Return the position after the change number `sequence` (None: the newest)."""
        return f"{self._incarnation}-{self.sequence if sequence is None else sequence}"

    def sequence_of(self, position: Position) -> int:
        """Return the number of the change that `position` stands after.

        Raises:
            StoreChangedError: this feed has never been there, or has forgotten what follows.
        """
        incarnation, _, digits = position.rpartition("-")
        is_number = digits.isascii() and digits.isdigit() and len(digits) < 20
        if incarnation != self._incarnation or not is_number or int(digits) > self.sequence:
            raise StoreChangedError
        if int(digits) < self.forgotten_sequence:
            raise StoreChangedError(TOO_OLD)
        return int(digits)

    async def wait_beyond(self, sequence: int) -> None:
        """Wait until there is a change after the number `sequence`.

        Raises:
            StoreUnavailableError: the feed has ended.
        """
        while self.sequence <= sequence and not self._is_ended:
            await self._bell.wait()
        if self._is_ended:
            raise StoreUnavailableError("the store is closed")

    def since(self, sequence: int, up_to: int | None = None) -> ChangeBatch | None:
        """Return the first changes after the number `sequence`; None where older ones are wanted than are kept.

        Args:
            up_to: the number of the last change that is wanted; None: the newest.
        """
        if sequence < self._complete_after:
            return None
        end = self.sequence if up_to is None else max(up_to, sequence)
        newer: list[tuple[int, Change]] = []
        for entry in reversed(self._newest.values()):
            if entry[0] <= sequence:
                break
            if entry[0] <= end:
                newer.append(entry)
        newer.reverse()
        last = end if len(newer) <= MAX_BATCH_CHANGES else newer[MAX_BATCH_CHANGES - 1][0]
        return ChangeBatch(self.position(last), [change for _, change in newer[:MAX_BATCH_CHANGES]])

    def forget(self, key: Key) -> None:
        """Drop the newest change of a job that is gone: who stands before it is told to begin again."""
        entry = self._newest.get(key)
        if entry is not None and entry[1].job is None:
            self.forgotten_sequence = max(self.forgotten_sequence, entry[0])
            del self._newest[key]

    def _ring(self) -> None:
        self._bell.set()
        self._bell.clear()


AGAIN_SECONDS = 5.0
"""A job that was handed out as due is due again after this, in case that its Stall could not be committed."""


class _Clock:
    __slots__ = ("heard_at", "queued_at", "stalled", "timeout_seconds")

    def __init__(self, heard_at: float) -> None:
        self.heard_at = heard_at
        self.timeout_seconds = 0.0
        self.stalled = False
        self.queued_at: float | None = None
        """Where it stands in the queue; older entries of it there do not count."""


class StallClocks:
    """One clock for each job IN_PROGRESS that has a heartbeat_timeout. For one event loop.

    The clocks do not follow the wall's: setting that forward must not stall every job there is.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """Take a clock that never goes back, in seconds."""
        self._now = now
        self._started_at = now()
        self._clocks: dict[Key, _Clock] = {}
        self._queue: list[tuple[float, Key]] = []

    def restart(self) -> None:
        """Let all clocks start anew: while nobody could report, silence means nothing."""
        self._started_at = self._now()

    def begin(self, jobs: Iterable[tuple[Key, timedelta, bool]]) -> None:
        """Start clocks for jobs that were found IN_PROGRESS: key, timeout and whether it is stalled."""
        for key, timeout, stalled in jobs:
            if key not in self._clocks:
                self._start(key, self._started_at, timeout, stalled)

    def note(self, commands: Sequence[Command], outcomes: Sequence[Outcome]) -> None:
        """Take what was committed: a worker's update, also one that changed nothing, starts its job's clock anew."""
        now = self._now()
        for command, job in zip(commands, outcomes, strict=True):
            if not isinstance(job, Job):
                continue
            key = (command.tenant, command.id)
            if job.heartbeat_timeout is None or job.state is not JobState.IN_PROGRESS:
                if self._clocks:
                    self._clocks.pop(key, None)
            elif isinstance(command, (Update, Create)):
                self._start(key, now, job.heartbeat_timeout, job.stalled)
            elif (clock := self._clocks.get(key)) is not None:
                clock.stalled = job.stalled
                self._enqueue(key, clock, now)  # to be looked at anew: what follows a stall has a time of its own

    def silent_for(self, key: Key) -> timedelta:
        """Return how long a job's worker has been silent, as far as is known."""
        clock = self._clocks.get(key)
        heard_at = self._now() if clock is None else max(clock.heard_at, self._started_at)
        return timedelta(seconds=self._now() - heard_at)

    def due(self, *, limit: int, fail_after: timedelta | None) -> list[Key]:
        """Return at most `limit` jobs that have been silent for too long, those that were due first before others."""
        now = self._now()
        due: list[Key] = []
        while self._queue and self._queue[0][0] <= now and len(due) < limit:
            queued_at, key = heapq.heappop(self._queue)
            clock = self._clocks.get(key)
            if clock is None or clock.queued_at != queued_at:
                continue
            clock.queued_at = None
            due_at = self._due_at(clock, fail_after)
            if due_at is None:
                continue
            if due_at <= now:
                due.append(key)
                due_at = now + AGAIN_SECONDS
            self._enqueue(key, clock, due_at)
        return due

    def _due_at(self, clock: _Clock, fail_after: timedelta | None) -> float | None:
        due_at = max(clock.heard_at, self._started_at) + clock.timeout_seconds
        if not clock.stalled:
            return due_at
        return None if fail_after is None else due_at + fail_after.total_seconds()

    def _start(self, key: Key, heard_at: float, timeout: timedelta, stalled: bool) -> None:
        clock = self._clocks.get(key)
        if clock is None:
            clock = self._clocks[key] = _Clock(heard_at)
        timeout_seconds = timeout.total_seconds()
        is_shorter = timeout_seconds < clock.timeout_seconds
        clock.heard_at, clock.timeout_seconds, clock.stalled = heard_at, timeout_seconds, stalled
        # What stands in the queue is looked at when its time comes: most updates need not touch it.
        if clock.queued_at is None or is_shorter:
            self._enqueue(key, clock, heard_at + timeout_seconds)

    def _enqueue(self, key: Key, clock: _Clock, due_at: float) -> None:
        clock.queued_at = due_at
        heapq.heappush(self._queue, (due_at, key))
