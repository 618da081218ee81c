"""One watcher of one job: what it has sent, what it may send, and when."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from jobstatus_grpc.errors import JobExpiredError, JobStatusError, StreamAgeError
from jobstatus_grpc.record import Job, is_urgent
from jobstatus_grpc.timed_watcher import CLOCK_RESOLUTION_SECONDS, TimedWatcher
from jobstatus_grpc.wake_queue import WakeQueue

if TYPE_CHECKING:
    from jobstatus_grpc.watch_hub import WatchHub


class EventType(enum.IntEnum):
    """What an event of a watch says; REMOVED, SYNCED and RESET in watches of many only."""

    SNAPSHOT = 1
    UPDATED = 2
    REMOVED = 3
    SYNCED = 4
    HEARTBEAT = 5
    RESET = 6


Render: TypeAlias = Callable[[EventType, Job], bytes]


class Topic:
    """A job that is watched: its newest state, and that state rendered once for all its watchers."""

    __slots__ = (
        "_again", "_is_queued", "_rendered", "_round", "_wakes", "newest", "removed", "urgent_revision", "watchers",
    )  # fmt: skip

    def __init__(self, wakes: WakeQueue) -> None:
        self.newest: Job | None = None
        self.urgent_revision = 0
        """The newest revision that min_update_interval must not hold back."""
        self.removed = False
        self.watchers: dict[Watcher, None] = {}
        self._wakes = wakes
        self._round: list[Watcher] = []
        self._again = False
        self._is_queued = False
        self._rendered: dict[EventType, tuple[Job, bytes]] = {}

    def offer(self, job: Job) -> bool:
        """Take `job` as the newest state, unless a newer one is known; tell whether it was taken."""
        before = self.newest
        if before is not None and job.revision <= before.revision:
            return False
        if before is None or is_urgent(before, job):
            self.urgent_revision = job.revision
        self.newest = job
        return True

    def begin_round(self) -> None:
        """Let each watcher look whether it has something to send: in this round, or in one that follows it."""
        if self._is_queued:
            self._again = True
            return
        self._round = list(self.watchers)
        self._is_queued = True
        self._wakes.enqueue(self)

    def step(self) -> bool:
        """Look at the round's next watcher, and stand in the queue again, behind other jobs, if there are more."""
        woken = self._round.pop().poke() if self._round else False
        if not self._round and self._again:
            self._again = False
            self._round = list(self.watchers)
        self._is_queued = bool(self._round)
        if self._is_queued:
            self._wakes.enqueue(self)
        return woken

    def render(self, event_type: EventType, job: Job, render: Render) -> bytes:
        """Return the event's bytes, rendered anew only where the job is another."""
        known = self._rendered.get(event_type)
        if known is None or known[0] is not job:
            known = self._rendered[event_type] = (job, render(event_type, job))
        return known[1]


class Watcher(TimedWatcher):
    """Yields the events of one job to one stream. For one task at a time.

    It holds no queue: one pending wake-up, and through its topic the newest job.
    """

    __slots__ = ("_hub", "_min_update_seconds", "_sent", "_updated_at", "_waiting", "error", "topic")

    def __init__(
        self,
        hub: WatchHub,
        topic: Topic,
        *,
        heartbeat_seconds: float,
        min_update_seconds: float,
        max_age_seconds: float | None,
    ) -> None:
        super().__init__(hub.wakes, heartbeat_seconds=heartbeat_seconds, max_age_seconds=max_age_seconds)
        self.topic = topic
        self.error: type[JobStatusError] | None = None
        """Set by the hub to end the watch with it."""
        self._hub = hub
        self._min_update_seconds = min_update_seconds
        self._sent: Job | None = None
        self._updated_at = float("-inf")
        self._waiting: asyncio.Future[None] | None = None

    async def next(self) -> bytes | None:
        """Wait for the next event and return its message; None once a done state has been returned.

        The first is the SNAPSHOT of the topic's newest job, which must be known by then.

        Raises:
            DrainingError, StoreChangedError, StreamAgeError: the watch ends here; the caller resumes elsewhere.
            JobExpiredError: the job is gone, and its end was not seen.
        """
        sent, newest = self._sent, self.topic.newest
        assert newest is not None
        if sent is None:
            return self._send(EventType.SNAPSHOT, newest)
        if sent.done:
            return None
        if newest.revision > sent.revision or self.error or self.topic.removed:
            self.wake_soon()
        while True:
            self._waiting = self._loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
            message = self._take()
            if message is not None:
                return message

    def poke(self) -> bool:
        """Wake the waiting task if there is something for it to do now; tell whether it was woken."""
        waiting = self._waiting
        if waiting is None or waiting.done():
            return False
        now = self._loop.time()
        if self.error is not None or self.topic.removed or self._is_heartbeat_due(now):
            waiting.set_result(None)
            return True
        due_at = self._news_due_at()
        if due_at is None:
            return False
        if due_at <= now + CLOCK_RESOLUTION_SECONDS:
            waiting.set_result(None)
            return True
        self._wake_at(due_at)
        return False

    def step(self) -> bool:
        """Look, in its turn; see WakeQueue."""
        self._is_queued = False
        return self.poke()

    def _take(self) -> bytes | None:
        """Return what is due now, if anything is."""
        now = self._loop.time()
        newest = self.topic.newest
        assert newest is not None
        due_at = self._news_due_at()
        if due_at is None or not newest.done:  # an end that is known is told first
            if self.error is not None:
                raise self.error()
            if self.topic.removed:
                raise JobExpiredError(f"job {newest.id!r} was deleted or has expired", id=newest.id)
            if self._is_too_old(now):
                raise StreamAgeError
        if due_at is not None and (due_at <= now + CLOCK_RESOLUTION_SECONDS or newest.done):
            self._updated_at = now
            return self._send(EventType.UPDATED, newest)
        if self._is_heartbeat_due(now):
            assert self._sent is not None
            return self._send(EventType.HEARTBEAT, self._sent)
        return None

    def _send(self, event_type: EventType, job: Job) -> bytes:
        self._sent = job
        self.note_sent()
        return self._hub.message(self.topic, event_type, job)

    def _news_due_at(self) -> float | None:
        """Return the loop's time at which the newest job may be sent; None where it has been."""
        topic, sent = self.topic, self._sent
        assert topic.newest is not None
        assert sent is not None
        if topic.newest.revision <= sent.revision:
            return None
        if topic.urgent_revision > sent.revision:
            return 0.0
        return self._updated_at + self._min_update_seconds
