"""One change feed → many watchers. The store is the log; the hub is only a bell.

Level-triggered: a change marks its job's topic, and the topic's watchers are woken one per turn of the event loop, so
that an update's latency does not depend on how many watch. Whoever is woken sends the newest state there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

from jobstatus_grpc.errors import JobStatusError, StoreChangedError
from jobstatus_grpc.filter_hub import FilterHub
from jobstatus_grpc.outage_log import OutageLog
from jobstatus_grpc.record import Job
from jobstatus_grpc.stores.interface import Change, ChangeBatch, JobStore, Position
from jobstatus_grpc.watcher import EventType, Render, Topic, TrySend, Watcher

log = logging.getLogger("jobstatus_grpc.watch_hub")

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
