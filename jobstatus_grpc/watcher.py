"""One watcher of one job: what it has sent, what it may send, and when."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from jobstatus_grpc.errors import JobExpiredError, JobStatusError, StreamAgeError
from jobstatus_grpc.record import Job, is_urgent
from jobstatus_grpc.timed_watcher import CLOCK_RESOLUTION_SECONDS, TimedWatcher
from jobstatus_grpc.wake_queue import LOOK, SEND, TURN, WAKE, WakeQueue

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
TrySend: TypeAlias = Callable[[bytes], bool]
"""Sends a message without a wait, or tells that it cannot."""


class Topic:
    """A job that is watched: its newest state, and that state rendered once for all its watchers."""

    __slots__ = (
        "_again", "_is_queued", "_rendered", "_round", "_told", "_wakes", "is_done", "newest", "removed",
        "urgent_revision", "watchers",
    )  # fmt: skip

    def __init__(self, wakes: WakeQueue) -> None:
        self.newest: Job | None = None
        self.urgent_revision = 0
        """The newest revision that min_update_interval must not hold back."""
        self.is_done = False
        """Whether that is done."""
        self.removed = False
        self.watchers: dict[Watcher, None] = {}
        self._wakes = wakes
        self._round: list[Watcher] = []
        self._told: list[asyncio.Future[bytes | None]] = []
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
        self.is_done = job.done
        return True

    def begin_round(self) -> None:
        """Let each watcher look whether it has something to send: in this round, or in one that follows it."""
        if self._is_queued:
            self._again = True
            return
        self._round = list(self.watchers)
        self._enqueue()

    def step(self) -> int:
        """Look at watchers of the round for a turn, then stand in the queue again, behind other jobs, for the rest."""
        cost = LOOK
        while self._round and cost < TURN:
            cost += self._round.pop().poke()
        if not self._round and self._again:
            self._again = False
            self._round = list(self.watchers)
        if not self._round and self._told and cost < TURN:
            cost += self._end_one()
        self._is_queued = False
        if self._round or self._told:
            self._enqueue()
        return cost

    def end_later(self, waiting: asyncio.Future[bytes | None]) -> None:
        """Let the task of a watcher end, whose reader has been told the end; first all others are."""
        self._told.append(waiting)
        if not self._is_queued:
            self._enqueue()

    def _enqueue(self) -> None:
        self._is_queued = True
        self._wakes.enqueue(self)

    def _end_one(self) -> int:
        waiting = self._told.pop()
        if waiting.done():  # its reader has left
            return LOOK
        waiting.set_result(None)
        return WAKE

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

    __slots__ = ("_hub", "_min_update_seconds", "_sent", "_try_send", "_updated_at", "_waiting", "error", "topic")

    def __init__(
        self,
        hub: WatchHub,
        topic: Topic,
        *,
        heartbeat_seconds: float,
        min_update_seconds: float,
        max_age_seconds: float | None,
        try_send: TrySend | None,
    ) -> None:
        super().__init__(hub.wakes, heartbeat_seconds=heartbeat_seconds, max_age_seconds=max_age_seconds)
        self.topic = topic
        self.error: type[JobStatusError] | None = None
        """Set by the hub to end the watch with it."""
        self._hub = hub
        self._min_update_seconds = min_update_seconds
        self._sent: Job | None = None
        self._updated_at = float("-inf")
        self._try_send = try_send
        self._waiting: asyncio.Future[bytes | None] | None = None

    async def next(self) -> bytes | None:
        """Wait for the next event and return its message; None once a done state has been told.

        The first is the SNAPSHOT of the topic's newest job, which must be known by then. What `try_send` takes while
        this waits is not returned: to wake a task costs more than to send.

        Raises:
            DrainingError, StoreChangedError, StreamAgeError: the watch ends here; the caller resumes elsewhere.
            JobExpiredError: the job is gone, and its end was not seen.
        """
        sent, newest = self._sent, self.topic.newest
        assert newest is not None
        if sent is None:
            return self._send(EventType.SNAPSHOT, newest, self._loop.time())
        if sent.done:
            return None
        if newest.revision > sent.revision or self.error or self.topic.removed:
            self.wake_soon()
        self._waiting = self._loop.create_future()
        try:
            return await self._waiting
        finally:
            self._waiting = None

    def poke(self) -> int:
        """Send what is due now, if anything is, or hand it to the waiting task; tell which, as WakeQueue wants it."""
        waiting = self._waiting
        if waiting is None or waiting.done():
            return LOOK
        try:
            message = self._take(self._loop.time())
        except JobStatusError as error:
            waiting.set_exception(error)
            return WAKE
        if message is None:
            return LOOK
        if self._try_send is None or not self._try_send(message):
            waiting.set_result(message)
            return WAKE
        if self.topic.is_done and self._sent is self.topic.newest:
            self._waiting = None
            self.topic.end_later(waiting)
        return SEND

    def step(self) -> int:
        """Look, in its turn; see WakeQueue."""
        self._is_queued = False
        return self.poke()

    def _take(self, now: float) -> bytes | None:
        """Return what is due now, if anything is; where news must wait, wake up then."""
        topic, sent = self.topic, self._sent
        newest = topic.newest
        assert newest is not None
        assert sent is not None
        is_news = newest.revision > sent.revision
        is_end = is_news and topic.is_done
        if not is_end:  # which is told first, where it is known
            self._check(now)
        is_urgent = is_end or topic.urgent_revision > sent.revision
        due_at = 0.0 if is_urgent else self._updated_at + self._min_update_seconds
        if is_news and due_at <= now + CLOCK_RESOLUTION_SECONDS:
            self._updated_at = now
            return self._send(EventType.UPDATED, newest, now)
        if self._is_heartbeat_due(now):
            return self._send(EventType.HEARTBEAT, sent, now)
        if is_news:
            self._wake_at(due_at)
        return None

    def _check(self, now: float) -> None:
        """Raise what ends the watch, if anything does."""
        if self.error is not None:
            raise self.error()
        if self.topic.removed and self._sent is not None:
            job_id = self._sent.id
            raise JobExpiredError(f"job {job_id!r} was deleted or has expired", id=job_id)
        if self._is_too_old(now):
            raise StreamAgeError

    def _send(self, event_type: EventType, job: Job, now: float) -> bytes:
        self._sent = job
        self._sent_at = now
        return self._hub.message(self.topic, event_type, job)
