"""How long the workers of the jobs IN_PROGRESS have been silent, for stores that see every update in this process."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

from jobstatus_grpc.commands import Command, Create, Update
from jobstatus_grpc.job import JobState, Outcome
from jobstatus_grpc.record import Job
from jobstatus_grpc.stores.found import Key

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
