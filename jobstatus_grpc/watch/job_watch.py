"""WatchJob: the hub that finds the watchers of a changed job, the job's topic, and the watcher of one stream.

Level-triggered: a change replaces the topic's newest state and wakes the job's watchers. There is no queue of events; a
watcher that runs sends the newest state, and skips the states in between.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from jobstatus_grpc.errors import JobExpiredError, JobStatusError, StreamAgeError
from jobstatus_grpc.job import Job, JobFilter, evolve, is_urgent, require_job, shown_numbers, visible
from jobstatus_grpc.stores.interface import Change, Key
from jobstatus_grpc.watch.watcher import (
    CLOCK_RESOLUTION_SECONDS,
    LOOK,
    TURN,
    WAKE,
    EventType,
    OnDelivery,
    RenderJobEvent,
    Stamp,
    TimedWatcher,
    TrySend,
    WakeQueue,
)


class JobHub:
    """Registers the watchers of single jobs and passes changes to them. For one event loop."""

    def __init__(
        self,
        wake_queue: WakeQueue,
        *,
        render: RenderJobEvent,
        stamp: Stamp,
        max_age_seconds: float | None = None,
        trace_watch: Callable[[], OnDelivery] | None = None,
    ) -> None:
        """Create a hub without watchers.

        Args:
            wake_queue: the queue in which its watchers run.
            render: called once for all watchers of a job.
            stamp: called for each message.
            max_age_seconds: how long a watch may last, ± 10 %; None: without limit.
            trace_watch: called when a watch begins; None: deliveries are not traced.
        """
        self._trace_watch = trace_watch
        self._wake_queue = wake_queue
        self._render = render
        self._stamp = stamp
        self._max_age_seconds = max_age_seconds
        self._topics: dict[tuple[str, str], Topic] = {}
        self._closed_with: type[JobStatusError] | None = None

    @property
    def watchers(self) -> int:
        """The number of registered watchers."""
        return sum(len(topic.watchers) for topic in self._topics.values())

    @contextlib.contextmanager
    def watcher(
        self,
        tenant: str,
        job_id: str,
        *,
        heartbeat_seconds: float,
        min_update_seconds: float,
        try_send: TrySend | None = None,
        only: JobFilter | None = None,
    ) -> Iterator[JobWatcher]:
        """Register a watcher for the block. Read the job after that, and call the watcher's `start` with it.

        Args:
            try_send: sends to the client while the watcher's `next` waits; None: the transport cannot.
            only: the watch ends with JobNotFoundError when the job does not match.

        Raises:
            DrainingError: the hub is closed.
        """
        if self._closed_with is not None:
            raise self._closed_with()
        key = (tenant, job_id)
        topic = self._topics.get(key)
        if topic is None:
            topic = self._topics[key] = Topic(self._wake_queue, self._render, self._stamp)
        watcher = JobWatcher(
            self._wake_queue,
            topic,
            heartbeat_seconds=heartbeat_seconds,
            min_update_seconds=min_update_seconds,
            max_age_seconds=self._max_age_seconds,
            try_send=try_send,
            only=only,
            on_delivery=None if self._trace_watch is None else self._trace_watch(),
        )
        topic.watchers[watcher] = None
        try:
            yield watcher
        finally:
            watcher.close()
            del topic.watchers[watcher]
            if not topic.watchers and self._topics.get(key) is topic:
                del self._topics[key]

    def has_watchers(self, key: Key) -> bool:
        """Return whether the job has watchers."""
        return key in self._topics

    def publish(self, change: Change) -> None:
        """Pass a change of the job, or of the numbers of its children, to the job's watchers, if it has any."""
        topic = self._topics.get((change.tenant, change.id))
        if topic is not None:
            if (job := change.known_job) is not None:
                topic.publish(job)
            if change.job is None:
                topic.remove()

    def end_all(self, error: type[JobStatusError]) -> None:
        """End every open watch with `error`, after the job's final state where that is known, and forget all states."""
        topics, self._topics = self._topics, {}
        for topic in topics.values():
            for watcher in topic.watchers:
                watcher.end(error)

    def close(self, error: type[JobStatusError]) -> None:
        """End every open watch with `error`, and refuse new ones with it."""
        self._closed_with = error
        self.end_all(error)


class Topic:
    """A watched job: its newest state, its watchers, and its events, rendered once for all of them.

    As an item of the WakeQueue it runs its watchers in rounds. A change during a round leads to one more round.
    """

    __slots__ = (
        "_finished", "_is_queued", "_needs_another_round", "_render", "_rendered", "_round", "_stamp", "_wake_queue",
        "is_done", "is_removed", "newest", "urgent_revision", "watchers",
    )  # fmt: skip

    def __init__(self, wake_queue: WakeQueue, render: RenderJobEvent, stamp: Stamp) -> None:
        self.newest: Job | None = None
        self.urgent_revision = 0
        """The newest revision that min_update_interval must not hold back."""
        self.is_done = False
        """Whether the newest state is terminal."""
        self.is_removed = False
        self.watchers: dict[JobWatcher, None] = {}
        self._wake_queue = wake_queue
        self._render = render
        self._stamp = stamp
        self._rendered: dict[EventType, tuple[Job, bytes]] = {}
        self._round: list[JobWatcher] = []
        self._needs_another_round = False
        self._finished: list[asyncio.Future[bytes | None]] = []
        """Of watchers whose client has the final state: the futures that end their tasks."""
        self._is_queued = False

    def publish(self, job: Job) -> None:
        """Make `job` the newest state and run the watchers, unless a newer one is known."""
        before = self.newest
        if before is not None and not _is_after(before, job):
            return
        if before is None or is_urgent(before, job):
            self.urgent_revision = job.revision
        self.newest = job
        self.is_done = job.done
        self._begin_round()

    def remove(self) -> None:
        """End the watchers with JobExpiredError where they have not sent a final state."""
        self.is_removed = True
        self._begin_round()

    def _begin_round(self) -> None:
        if self._is_queued:
            self._needs_another_round = True
        else:
            self._round = list(self.watchers)
            self._enqueue()

    def message(self, event_type: EventType, job: Job) -> bytes:
        """Return the whole message of an event, rendered anew only for another state of the job."""
        known = self._rendered.get(event_type)
        if known is None or known[0] is not job:
            known = self._rendered[event_type] = (job, self._render(event_type, job))
        return known[1] + self._stamp()

    def finish_later(self, waiting: asyncio.Future[bytes | None]) -> None:
        """End a watcher's task once the other watchers have sent the final state: ending a task costs more."""
        self._finished.append(waiting)
        if not self._is_queued:
            self._enqueue()

    def run(self) -> int:
        """Run watchers of the round, up to a cost of TURN, and enqueue the topic again for the rest, behind others."""
        cost = LOOK
        while self._round and cost < TURN:
            cost += self._round.pop().send_due()
        if not self._round and self._needs_another_round:
            self._needs_another_round = False
            self._round = list(self.watchers)
        if not self._round and self._finished and cost < TURN:
            cost += self._finish_one()
        self._is_queued = False
        if self._round or self._finished:
            self._enqueue()
        return cost

    def _enqueue(self) -> None:
        self._is_queued = True
        self._wake_queue.enqueue(self)

    def _finish_one(self) -> int:
        waiting = self._finished.pop()
        if waiting.done():  # the client has gone
            return LOOK
        waiting.set_result(None)
        return WAKE


def _is_after(before: Job, job: Job) -> bool:
    """Return whether a job is of a later revision, or has other numbers of children while it is open."""
    if job.revision != before.revision or job.done:
        return job.revision > before.revision
    return shown_numbers(job) != shown_numbers(before)


class JobWatcher(TimedWatcher):
    """Yields the events of one job to one stream. For one task at a time."""

    __slots__ = (
        "_error", "_min_update_seconds", "_on_delivery", "_only", "_read", "_sent", "_topic", "_try_send",
        "_updated_at", "_waiting",
    )  # fmt: skip

    def __init__(
        self,
        wake_queue: WakeQueue,
        topic: Topic,
        *,
        heartbeat_seconds: float,
        min_update_seconds: float,
        max_age_seconds: float | None,
        try_send: TrySend | None,
        only: JobFilter | None,
        on_delivery: OnDelivery | None,
    ) -> None:
        super().__init__(wake_queue, heartbeat_seconds=heartbeat_seconds, max_age_seconds=max_age_seconds)
        self._error: type[JobStatusError] | None = None
        self._on_delivery = on_delivery
        self._topic = topic
        self._min_update_seconds = min_update_seconds
        self._only = only
        self._read: Job | None = None
        self._sent: Job | None = None
        self._updated_at = float("-inf")
        self._try_send = try_send
        self._waiting: asyncio.Future[bytes | None] | None = None

    def start(self, job: Job) -> None:
        """Publish the job as it was read after registration; the feed may have brought a newer state.

        Which numbers of children are newer cannot be told: those of the topic are, or its next ones will be.
        """
        newest = self._topic.newest
        if newest is not None:
            numbers = {"children": newest.children, "children_progress": newest.children_progress}
            job = evolve(job, numbers)
        self._read = job
        self._topic.publish(job)

    async def next(self) -> bytes | None:
        """Wait for the next event and return its message; None once a terminal state was sent.

        The first is a SNAPSHOT, without waiting; call `start` before. A message that `try_send` accepts during the
        wait is not returned: waking a task costs more than sending.

        Raises:
            DrainingError, StoreChangedError, StreamAgeError: the watch ends here; the client resumes elsewhere.
            JobExpiredError: the job was removed, and its terminal state was not sent.
            JobNotFoundError: the job is not one of those that the caller may see any more.
        """
        sent, newest = self._sent, self._topic.newest
        assert newest is not None
        if sent is None:
            return self._snapshot(newest)
        if sent.done:
            return None
        if newest is not sent or self._error or self._topic.is_removed:
            self.wake_soon()
        self._waiting = self._loop.create_future()
        try:
            return await self._waiting
        finally:
            self._waiting = None

    def latest(self) -> Job:
        """Return the newest state, whether it was sent or not; raise JobNotFoundError if the caller may not see it."""
        newest = self._topic.newest
        assert newest is not None
        self._require_visible(newest)
        return newest

    def end(self, error: type[JobStatusError]) -> None:
        """End the watch with `error`, unless its terminal state is to be sent."""
        self._error = error
        self.wake_soon()

    def run(self) -> int:
        """Send what is due; see Wakeable."""
        self._is_queued = False
        return self.send_due()

    def send_due(self) -> int:
        """Send the event that is due, if any, or make the waiting `next` return it. Returns the cost: see Wakeable."""
        waiting = self._waiting
        if waiting is None or waiting.done():
            return LOOK
        try:
            message = self._take_due(self._loop.time())
        except Exception as error:
            # Also one that nobody expects: raised here, it would stop the queue, and so all watches of the process.
            waiting.set_exception(error)
            return WAKE
        if message is None:
            return LOOK
        cost = self._try_send(message) if self._try_send is not None else 0
        if not cost:
            waiting.set_result(message)
            return WAKE
        if self._topic.is_done and self._sent is self._topic.newest:
            self._waiting = None
            self._topic.finish_later(waiting)
        return cost

    def _take_due(self, now: float) -> bytes | None:
        """Return the message that is due; None: nothing is. An update that is held back sets the timer."""
        topic, sent = self._topic, self._sent
        newest = topic.newest
        assert newest is not None
        assert sent is not None
        if newest is not sent and not _is_after(sent, newest):
            self._sent = sent = newest  # numbers of children that are again those that were sent
        is_news = newest is not sent
        is_end = is_news and topic.is_done
        if not is_end:  # the terminal state is sent before any error
            self._raise_if_ended(now)
        is_urgent = is_end or topic.urgent_revision > sent.revision
        due_at = 0.0 if is_urgent else self._updated_at + self._min_update_seconds
        if is_news and due_at <= now + CLOCK_RESOLUTION_SECONDS:
            self._updated_at = now
            if self._on_delivery is not None and newest.revision > sent.revision:
                self._on_delivery(newest)
            return self._message(EventType.UPDATED, newest, now)
        if self._is_heartbeat_due(now):
            return self._message(EventType.HEARTBEAT, sent, now)
        if is_news:
            self._wake_at(due_at)
        return None

    def _raise_if_ended(self, now: float) -> None:
        if self._error is not None:
            raise self._error()
        if self._topic.is_removed and self._sent is not None:
            job_id = self._sent.id
            raise JobExpiredError(f"job {job_id!r} was deleted or has expired", id=job_id)
        if self._is_too_old(now):
            raise StreamAgeError

    def _snapshot(self, newest: Job) -> bytes:
        """Return the SNAPSHOT of the newest state, with the heartbeats since that the read job has."""
        self._require_visible(newest)
        read, self._read = self._read, None
        self._sent, self._sent_at = newest, self._loop.time()
        if read is None or read.revision != newest.revision or read.last_heartbeat_at == newest.last_heartbeat_at:
            read = newest
        return self._topic.message(EventType.SNAPSHOT, read)

    def _message(self, event_type: EventType, job: Job, now: float) -> bytes:
        self._require_visible(job)
        self._sent = job
        self._sent_at = now
        return self._topic.message(event_type, job)

    def _require_visible(self, job: Job) -> None:
        if self._only is not None:
            require_job(visible(job, self._only), job.id)
