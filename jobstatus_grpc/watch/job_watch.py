"""One change feed → many watchers. The store is the log; the hub is only a bell.

Level-triggered: a change marks its job's topic, and the topic's watchers are woken one per turn of the event loop, so
that an update's latency does not depend on how many watch. Whoever is woken sends the newest state there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

from jobstatus_grpc.errors import JobExpiredError, JobStatusError, StoreChangedError, StreamAgeError
from jobstatus_grpc.job import Job, is_urgent
from jobstatus_grpc.stores.interface import Change, ChangeBatch, JobStore, Position
from jobstatus_grpc.watch.filter_watch import FilterHub
from jobstatus_grpc.watch.publisher import OutageLog
from jobstatus_grpc.watch.watcher import (
    CLOCK_RESOLUTION_SECONDS,
    LOOK,
    SEND,
    TURN,
    WAKE,
    EventType,
    Render,
    TimedWatcher,
    TrySend,
    WakeQueue,
)


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


log = logging.getLogger("jobstatus_grpc.watch.job_watch")

RETRY_SECONDS = 0.2


class WatchHub:
    """Registers watchers and wakes them. Lives on one event loop."""

    def __init__(
        self,
        *,
        render: Render,
        stamp: Callable[[], bytes],
        filters: FilterHub,
        max_age_seconds: float | None = None,
    ) -> None:
        """Take how to render events.

        Args:
            render: returns an event's bytes; called once for all watchers of a job.
            stamp: returns the bytes to append to each message as it is sent: the server's time.
            filters: the watchers of many jobs, who are told of the same changes and stand in the same queue.
            max_age_seconds: how long a watch may last, ± 10 %; None: for ever.
        """
        self._filters = filters
        self._render = render
        self._stamp = stamp
        self._max_age_seconds = max_age_seconds
        self._topics: dict[tuple[str, str], Topic] = {}
        self.wakes = filters.wakes
        self._ending: type[JobStatusError] | None = None

    @contextlib.contextmanager
    def watcher(
        self,
        tenant: str,
        job_id: str,
        *,
        heartbeat_seconds: float,
        min_update_seconds: float,
        try_send: TrySend | None = None,
    ) -> Iterator[Watcher]:
        """Register a watcher for the length of a block. Read the job after that, and `offer` it.

        Args:
            try_send: sends to its reader, while the watcher's `next` waits.

        Raises:
            DrainingError: the hub has ended.
        """
        if self._ending is not None:
            raise self._ending()
        key = (tenant, job_id)
        topic = self._topics.get(key)
        if topic is None:
            topic = self._topics[key] = Topic(self.wakes)
        watcher = Watcher(
            self,
            topic,
            heartbeat_seconds=heartbeat_seconds,
            min_update_seconds=min_update_seconds,
            max_age_seconds=self._max_age_seconds,
            try_send=try_send,
        )
        topic.watchers[watcher] = None
        try:
            yield watcher
        finally:
            watcher.close()
            del topic.watchers[watcher]
            if not topic.watchers and self._topics.get(key) is topic:
                del self._topics[key]

    @property
    def watchers(self) -> int:
        """How many are registered."""
        return sum(len(topic.watchers) for topic in self._topics.values())

    async def follow(
        self, store: JobStore, position: Position, *, observe_batch: Callable[[ChangeBatch], None] | None = None
    ) -> None:
        """Publish what changes in `store` after `position`, until cancelled; tell `observe_batch` of each batch.

        Get the position before the first watcher registers: then nothing falls between its reading and its following.
        """
        self._filters.begin(position)
        is_lost = False
        outage = OutageLog(log, "the change feed")
        while True:
            try:
                if is_lost:
                    position = await store.position()
                    self._filters.begin(position)
                    self.end_all(StoreChangedError)
                    is_lost = False
                if outage.lasts:
                    await store.position()  # `changes` says nothing until something changes
                    outage.end()
                batch = await store.changes(position)
            except StoreChangedError:
                log.warning("the store was replaced by another incarnation; watches end and resume")
                is_lost = True
            except Exception as error:
                outage.note(error)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                for change in batch.changes:
                    self.publish(change)
                await self._filters.publish(batch.changes, before=position, after=batch.position)
                position = batch.position
                if observe_batch is not None:
                    observe_batch(batch)

    def publish(self, change: Change) -> None:
        """Tell the watchers of a job, if it has any."""
        topic = self._topics.get((change.tenant, change.id))
        if topic is not None:
            self._offer(topic, change.job)

    def offer(self, watcher: Watcher, job: Job) -> None:
        """Tell a new watcher, and those beside it, of the job as it was read."""
        self._offer(watcher.topic, job)

    def _offer(self, topic: Topic, job: Job | None) -> None:
        if job is None:
            topic.removed = True
        elif not topic.offer(job):
            return
        topic.begin_round()

    def end_all(self, error: type[JobStatusError]) -> None:
        """End every open watch with `error`, one whose job is done after sending that; forget what jobs were like."""
        topics, self._topics = self._topics, {}
        for topic in topics.values():
            for watcher in topic.watchers:
                watcher.error = error
                watcher.wake_soon()
        self._filters.end_all(error)

    def close(self, error: type[JobStatusError]) -> None:
        """End every open watch with `error`, and refuse new ones with it."""
        self._ending = error
        self._filters.close(error)
        self.end_all(error)

    def message(self, topic: Topic, event_type: EventType, job: Job) -> bytes:
        """Return a whole message: the event, rendered once, and the time of sending."""
        return topic.render(event_type, job, self._render) + self._stamp()
