"""WatchJobs: the hub that finds the watchers of a changed job, the watcher of one stream, and what the stream sends.

A stream first reads the store: a snapshot, or what has changed since the client's resume token. It subscribes to the
hub only then, at the position that it has reached. So a slow client costs no memory for what changes in the meantime:
that is in the store's feed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, NoReturn, TypeAlias, TypeVar

from jobstatus_grpc.errors import JobStatusError, StoreChangedError, StreamAgeError
from jobstatus_grpc.job import Job, JobFilter, JobState
from jobstatus_grpc.job.limits import MAX_RESPONSE_BYTES
from jobstatus_grpc.stores.interface import MAX_BATCH_CHANGES, Change, ChangeBatch, JobStore, Key, Page, Position
from jobstatus_grpc.watch.backlog import MAX_EVENTS, UNKNOWN_REVISION, Backlog, HeldJobs, News
from jobstatus_grpc.watch.numbers import read_numbers
from jobstatus_grpc.watch.watcher import (
    CLOCK_RESOLUTION_SECONDS,
    LOOK,
    NOWHERE,
    WAKE,
    EventType,
    Hold,
    OnDelivery,
    RenderJobsEvent,
    Send,
    Stamp,
    TimedWatcher,
    WakeQueue,
)

T = TypeVar("T")

OFFERS_PER_TURN = 64
"""Watchers that get a change in one iteration of the event loop, at most; each costs a few microseconds."""

LOOKED_AT_PER_TURN = 64
"""Jobs that one stream examines or renders in one iteration of the event loop, at most."""

LISTED_JOBS = 1000
"""Jobs in one page when a resumed stream lists what its client has. They are not rendered, so it is a large page."""

RETRY_SECONDS = 0.2
"""The pause before a stream begins again, where it has to twice in a row: the hub does not know the new store yet."""

MAX_GUESSES = MAX_EVENTS
"""Jobs that a resume removes though they may never have matched: at most these, and as many as match.

With more, RESET and snapshots cost the client less.
"""

MAX_BATCHES = 8
"""Batches of changes that a resume reads: at most these, and as many as the matching jobs fill.

With more, RESET and snapshots cost the server less.
"""

_Key: TypeAlias = tuple[object, ...]


class FilterHub:
    """Registers the watchers of many jobs and passes changes to them. For one event loop.

    A change finds a watcher by one value of its filter (an id, the parent, a name, a label, a state), or because the
    client holds the job. Only a watcher whose filter has no such value examines every change of its tenant.
    """

    def __init__(
        self,
        wake_queue: WakeQueue,
        *,
        render: RenderJobsEvent,
        stamp: Stamp,
        max_age_seconds: float | None = None,
        trace_watch: Callable[[], OnDelivery] | None = None,
    ) -> None:
        """Create a hub without watchers.

        Args:
            wake_queue: the queue in which its watchers run.
            render: called once per change and type of event, for all watchers.
            stamp: called for each message.
            max_age_seconds: how long a watch may last, ± 10 %; None: without limit.
            trace_watch: called when a watch begins; None: deliveries are not traced.
        """
        self._trace_watch = trace_watch
        self.wake_queue = wake_queue
        self.render = render
        self.stamp = stamp
        self.held: HeldJobs[FilterWatcher] = {}
        self.position: Position = ""
        """The feed's position up to which every change was published."""
        self.reached: Position = ""
        """The position after the batch that is being published: a watcher that is added now may miss a part of it."""
        self._max_age_seconds = max_age_seconds
        self._closed_with: type[JobStatusError] | None = None
        self._keys: dict[FilterWatcher, Sequence[_Key]] = {}
        self._by_key: dict[_Key, dict[FilterWatcher, None]] = {}

    @property
    def watchers(self) -> int:
        """The number of registered watchers."""
        return len(self._keys)

    @contextlib.contextmanager
    def watcher(
        self,
        tenant: str,
        job_filter: JobFilter,
        *,
        heartbeat_seconds: float,
        min_update_seconds: float,
        only: JobFilter | None = None,
    ) -> Iterator[FilterWatcher]:
        """Register a watcher for the block. It gets no changes before `buffer` or `subscribe`.

        Args:
            only: the jobs that the caller may see; `job_filter` matches no others. None: all.

        Raises:
            DrainingError: the hub is closed.
        """
        if self._closed_with is not None:
            raise self._closed_with()
        watcher = FilterWatcher(
            self,
            tenant,
            job_filter,
            heartbeat_seconds=heartbeat_seconds,
            min_update_seconds=min_update_seconds,
            max_age_seconds=self._max_age_seconds,
            only=only,
            on_delivery=None if self._trace_watch is None else self._trace_watch(),
        )
        self._keys[watcher] = ()
        try:
            yield watcher
        finally:
            watcher.close()
            self._set_keys(watcher, ())
            del self._keys[watcher]

    def buffer(self, watcher: FilterWatcher) -> Position:
        """Make `watcher` keep every change after the position that is returned, to process them when it subscribes."""
        self._set_keys(watcher, [_all_of(watcher.backlog.tenant)])
        watcher.buffered, watcher.is_subscribed = {}, True
        return self.reached

    def subscribe(self, watcher: FilterWatcher) -> None:
        """Make `watcher` process its buffered changes, and from now on those that concern it."""
        buffered, watcher.buffered = watcher.buffered or {}, None
        for news in buffered.values():
            watcher.receive(news)
        self._set_keys(watcher, _keys_of_filter(watcher.backlog.tenant, watcher.backlog.filter))

    def unsubscribe(self, watcher: FilterWatcher) -> None:
        """Pass no more changes to `watcher`, and drop the buffered ones."""
        self._set_keys(watcher, ())
        watcher.buffered, watcher.is_subscribed = None, False

    def begin(self, position: Position) -> None:
        """Count everything up to `position` as published."""
        self.position = self.reached = position

    @property
    def is_followed(self) -> bool:
        """Whether a change may concern a watcher."""
        return bool(self._by_key or self.held)

    async def publish(
        self, changes: Iterable[Change], *, before: Position, after: Position, parents: Iterable[Change] = ()
    ) -> None:
        """Pass the changes between two positions to the watchers that they concern; then jobs with changed children."""
        self.reached = after
        if self.is_followed:
            offers = 0
            for change, is_of_children in chain(zip(changes, repeat(False)), zip(parents, repeat(True))):
                watchers = self._concerned(change)
                if watchers:
                    news = News(change, before, is_of_children=is_of_children)
                    for watcher in watchers:
                        watcher.receive(news)
                    offers += len(watchers)
                if offers >= OFFERS_PER_TURN:
                    offers = 0
                    await asyncio.sleep(0)
        self.position = after

    def end_all(self, error: type[JobStatusError]) -> None:
        """End every open watch with `error`; with StoreChangedError, its stream begins again."""
        for watcher in self._keys:
            watcher.end(error)

    def close(self, error: type[JobStatusError]) -> None:
        """End every open watch with `error`, and refuse new ones with it."""
        self._closed_with = error
        self.end_all(error)

    def _concerned(self, change: Change) -> dict[FilterWatcher, None]:
        found = [watchers for key in _keys_of_change(change) if (watchers := self._by_key.get(key))]
        held = self.held.get((change.tenant, change.id))
        return dict.fromkeys(chain(held.revisions if held else (), *found))

    def _set_keys(self, watcher: FilterWatcher, keys: Sequence[_Key]) -> None:
        """Let a change find `watcher` by `keys`, and by no others."""
        for key in self._keys[watcher]:
            watchers = self._by_key[key]
            del watchers[watcher]
            if not watchers:
                del self._by_key[key]
        self._keys[watcher] = keys
        for key in keys:
            self._by_key.setdefault(key, {})[watcher] = None


def _all_of(tenant: str) -> _Key:
    return (tenant,)


def _keys_of_filter(tenant: str, job_filter: JobFilter) -> list[_Key]:
    """Return keys such that every job that matches has at least one of them among its own."""
    if job_filter.ids:
        return [(tenant, "id", job_id) for job_id in job_filter.ids]
    if job_filter.parent_id:
        return [(tenant, "parent", job_filter.parent_id)]
    if job_filter.names:
        return [(tenant, "name", name) for name in job_filter.names]
    for label, value in job_filter.labels.items():
        return [(tenant, "label", label, value)]
    if job_filter.stalled:
        return [(tenant, "stalled")]
    states = job_filter.possible_states
    return [_all_of(tenant)] if len(states) == len(JobState) else [(tenant, "state", state) for state in states]


def _keys_of_change(change: Change) -> list[_Key]:
    """Return the keys of the job as it is now, or of a removed job, as it ended."""
    tenant, job = change.tenant, change.known_job
    keys = [_all_of(tenant)]
    if job is not None:
        keys += ((tenant, "id", job.id), (tenant, "name", job.name), (tenant, "state", job.state))
        keys += ((tenant, "label", label, value) for label, value in job.labels.items())
        if job.parent_id:
            keys.append((tenant, "parent", job.parent_id))
        if job.stalled:
            keys.append((tenant, "stalled"))
    return keys


class FilterWatcher(TimedWatcher):
    """Waits for one stream: for events of its backlog, its heartbeat, its end. For one task at a time."""

    __slots__ = ("_error", "_hub", "_wants_iteration", "_woken", "backlog", "buffered", "is_subscribed")

    def __init__(
        self,
        hub: FilterHub,
        tenant: str,
        job_filter: JobFilter,
        *,
        heartbeat_seconds: float,
        min_update_seconds: float,
        max_age_seconds: float | None,
        only: JobFilter | None,
        on_delivery: OnDelivery | None,
    ) -> None:
        super().__init__(hub.wake_queue, heartbeat_seconds=heartbeat_seconds, max_age_seconds=max_age_seconds)
        self.backlog = Backlog(
            self,
            tenant,
            job_filter,
            hub.held,
            min_update_seconds=min_update_seconds,
            only=only,
            on_delivery=on_delivery,
        )
        self.buffered: dict[tuple[str, bool], News] | None = None
        """The newest change and the newest numbers of children of each job since `FilterHub.buffer`; None: changes go
        to the backlog."""
        self.is_subscribed = False
        """Whether the hub's changes are taken. Before, those of the jobs that are held come from the feed as well."""
        self._hub = hub
        self._error: type[JobStatusError] | None = None
        self._woken: asyncio.Future[None] | None = None
        self._wants_iteration = False

    def receive(self, news: News) -> None:
        """Add a change to the buffer or the backlog, and wake up when it is due."""
        if not self.is_subscribed:
            return
        if self.buffered is None:
            due_at = self.backlog.add(news, self._loop.time())
            if due_at is not None:
                self._wake_when_due(due_at)
        elif self.backlog.may_concern(news.change):
            key = (news.change.id, news.is_of_children)
            self.buffered.pop(key, None)
            self.buffered[key] = news

    async def next(self) -> tuple[list[bytes], Position]:
        """Wait for events that are due, or a HEARTBEAT; return them and the position up to which all was sent then.

        Raises:
            DrainingError, StreamAgeError: the watch ends here; the client resumes elsewhere.
            StoreChangedError: what the client has is void.
        """
        while True:
            due_at = self.backlog.next_due_at
            if due_at is not None:
                self._wake_when_due(due_at)
            await self._wait_for_work()
            now = self._loop.time()
            events = self.backlog.take(now, self._hub.render)
            if not events and self._is_heartbeat_due(now):
                events = [self._hub.render(EventType.HEARTBEAT, None)]
            if events:
                self.mark_sent()
                return events, self.backlog.before or self._hub.position

    async def next_iteration(self) -> None:
        """Wait for an iteration of the event loop in which no other watcher works. Raises as `next`."""
        self._wants_iteration = True
        try:
            await self._wait_for_work()
        finally:
            self._wants_iteration = False

    async def wait_for(self, task: asyncio.Future[Any]) -> bool:
        """Wait for `task`, at most until the next heartbeat; return whether that is due. Raises as `next`."""
        self._woken = self._loop.create_future()
        seconds = max(self._heartbeat_due_at() - self._loop.time(), 0)
        try:
            await asyncio.wait((task, self._woken), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._woken = None
        self._raise_if_ended()
        return self._is_heartbeat_due(self._loop.time())

    def mark_sent(self) -> None:
        """Count the heartbeat interval from now on."""
        self._sent_at = self._loop.time()

    def end(self, error: type[JobStatusError]) -> None:
        """End the watch with `error`. StoreChangedError replaces no other error: a closing watch must not restart."""
        if self._error is None or error is not StoreChangedError:
            self._error = error
        self.wake_soon()

    def reset(self) -> None:
        """Forget what the client has and what is unsent, to begin again with the store that is there now."""
        if self._error is StoreChangedError:
            self._error = None
        self._hub.unsubscribe(self)
        self.backlog.clear()

    def close(self) -> None:
        """Stop the timers and empty the backlog."""
        super().close()
        self.backlog.clear()

    def wake_soon(self) -> None:
        """Enqueue the watcher, if its task waits."""
        if self._woken is not None:
            super().wake_soon()

    def run(self) -> int:
        """Wake the task if there is work for it; see Wakeable."""
        self._is_queued = False
        if self._woken is None or self._woken.done():
            return LOOK
        if not self._has_work():
            due_at = self.backlog.next_due_at
            if due_at is not None:  # the timer was for an earlier change, which has been sent or replaced since
                self._wake_at(due_at)
            return LOOK
        self._woken.set_result(None)
        return WAKE

    async def _wait_for_work(self) -> None:
        self._woken = self._loop.create_future()
        if self._has_work():
            self.wake_soon()
        try:
            await self._woken
        finally:
            self._woken = None
        self._raise_if_ended()

    def _has_work(self) -> bool:
        if self._wants_iteration or self._error is not None:
            return True
        now = self._loop.time()
        return self.backlog.is_due(now) or self._is_heartbeat_due(now)

    def _raise_if_ended(self) -> None:
        if self._error is not None:
            raise self._error()
        if self._is_too_old(self._loop.time()):
            raise StreamAgeError

    def _wake_when_due(self, due_at: float) -> None:
        if due_at <= self._loop.time() + CLOCK_RESOLUTION_SECONDS:
            self.wake_soon()
        else:
            self._wake_at(due_at)


class _ReplayTooLargeError(Exception):
    """Snapshots of the jobs that match cost less than the changes since the client's position."""


class FilterStream:
    """Sends the events of one WatchJobs stream. For one task.

    Without a position to resume from: SNAPSHOTs, SYNCED, changes since the snapshot began. With one: changes since that
    position, SYNCED. Then, in both cases, changes as the hub publishes them.

    The client that resumes has any job that matched at the position or later, as of any of its states since. The server
    does not know which, and the feed has only the newest change of each job. So a job that has changed and does not
    match is sent as REMOVED, if it may have matched: a guess. The jobs that match and have not changed are listed.
    """

    def __init__(self, store: JobStore, hub: FilterHub, watcher: FilterWatcher, send: Send, *, hold: Hold) -> None:
        """`hold` is called with the memory that the stream holds, before it grows by more than a page of jobs."""
        self._store = store
        self._hub = hub
        self._watcher = watcher
        self._send_message = send
        self._hold = hold
        self._backlog = watcher.backlog
        self._is_synced = False
        self._matching: int | None = None
        """The number of matching jobs; None: they are not listed yet."""
        self._superseded: set[Key] = set()
        """Jobs that changed after the position of the resume, by changes that the feed has left out so far."""

    async def run(self, after: Position | None) -> NoReturn:
        """Send events until the watch ends with an error; `after` is the position to resume from, None: a snapshot.

        Raises:
            DrainingError, StreamAgeError, StoreUnavailableError: the watch ends here; the client resumes elsewhere.
        """
        has_just_restarted = False
        if after is not None and self._backlog.only is not None:
            # A resume sends the removal of each changed job that the client may have had, also of those that were
            # never among the jobs that it may see.
            after = None
            await self._reset()
        while True:
            try:
                await (self._snapshot() if after is None else self._resume(after))
                has_just_restarted = False
                while True:
                    await self._send(*await self._watcher.next())
            except (StoreChangedError, _ReplayTooLargeError):
                if has_just_restarted:
                    await asyncio.sleep(RETRY_SECONDS)
                has_just_restarted, after = True, None
                await self._reset()

    async def _reset(self) -> None:
        self._watcher.reset()
        self._superseded.clear()
        self._matching = None
        self._is_synced = False
        await self._send([self._hub.render(EventType.RESET, None)], NOWHERE)

    async def _snapshot(self) -> None:
        position = self._hub.reached
        cursor: str | None = ""
        while cursor is not None:
            page = await self._page(MAX_EVENTS, cursor)
            for job in page.jobs:
                self._backlog.hold(job)
            await self._send_snapshots(page.jobs)
            cursor = page.next_cursor or None
        await self._send_synced(position)
        await self._join(position)

    async def _resume(self, after: Position) -> None:
        backlog = self._backlog
        backlog.is_incomplete = True
        position = await self._replay(after, self._hub_position)
        backlog.forget_removed()
        await self._list()
        # What changed before the list ended is before the store's position; the hub may not have published it yet.
        position = await self._replay(position, self._store.position)
        for tenant, job_id in self._superseded:
            if tenant == backlog.tenant:
                backlog.hold_unless_removed(job_id)
        self._superseded.clear()
        backlog.is_incomplete = False
        position = await self._join(position)
        await self._send_synced(backlog.before or position)

    async def _list(self) -> int:
        """Hold the jobs that match, unless that is done, and return their number.

        The client has those that have not changed since its position.
        """
        if self._matching is None:
            self._matching = 0
            cursor: str | None = ""
            while cursor is not None:
                page = await self._page(LISTED_JOBS, cursor)
                for job in page.jobs:
                    if not self._backlog.holds(job.id):
                        self._backlog.hold(job, revision=UNKNOWN_REVISION)
                self._matching += len(page.jobs)
                cursor = page.next_cursor or None
        return self._matching

    async def _replay(self, position: Position, newest: Callable[[], Coroutine[Any, Any, Position]]) -> Position:
        """Send the feed's changes from `position` up to what `newest` returns, and return that.

        Raises:
            _ReplayTooLargeError: they are too many for the number of matching jobs.
        """
        batches = 0
        is_there = False
        while not is_there:
            await self._watcher.next_iteration()
            up_to = await self._read(newest())
            batch = await self._changes(position, up_to)
            self._superseded.update(batch.superseded)
            self._superseded.difference_update((change.tenant, change.id) for change in batch.changes)
            await self._add_to_backlog(batch.changes, position)
            is_there = batch.position in (position, up_to)  # a token of another server may be ahead of this hub
            position = batch.position
            batches += 1
            guesses = self._backlog.guesses
            if guesses > MAX_GUESSES or batches > MAX_BATCHES:
                matching = await self._list()
                if guesses > MAX_GUESSES + matching or batches > MAX_BATCHES + matching // MAX_BATCH_CHANGES:
                    raise _ReplayTooLargeError
            await self._send_due(position)
        return position

    async def _hub_position(self) -> Position:
        return self._hub.reached

    async def _join(self, position: Position) -> Position:
        """Send the feed's changes from `position` up to the hub's, subscribe there, and return that position."""
        is_there = False
        while not is_there:
            await self._watcher.next_iteration()
            up_to = self._hub.buffer(self._watcher)
            batch = await self._changes(position, up_to)
            await self._add_to_backlog(batch.changes, position)
            is_there = batch.position in (position, up_to)  # the store, or another server, may be ahead of this hub
            position = batch.position
            if is_there:
                self._hub.subscribe(self._watcher)
            else:
                self._hub.unsubscribe(self._watcher)
            await self._send_due(position)
        return position

    async def _add_to_backlog(self, changes: Sequence[Change], before: Position) -> None:
        backlog = self._backlog
        numbered = await self._read(
            read_numbers(
                self._store,
                [change for change in changes if change.tenant == backlog.tenant],
                is_watched=lambda _: True,
                is_parent_watched=lambda key: backlog.is_incomplete or backlog.holds(key[1]),
            )
        )
        now = asyncio.get_running_loop().time()
        news = [News(change, before) for change in numbered.changes]
        news += [News(change, before, is_of_children=True) for change in numbered.parents]
        for number, each in enumerate(news, start=1):
            backlog.add(each, now)
            if number % LOOKED_AT_PER_TURN == 0:
                await self._watcher.next_iteration()

    async def _page(self, limit: int, cursor: str) -> Page:
        await self._watcher.next_iteration()
        self._hold(self._backlog.held_bytes)
        return await self._read(
            self._store.page(self._backlog.tenant, self._backlog.filter, limit=limit, cursor=cursor)
        )

    async def _changes(self, after: Position, up_to: Position) -> ChangeBatch:
        if after == up_to:
            return ChangeBatch(after, ())
        return await self._read(self._store.changes(after, up_to=up_to))

    async def _read(self, reading: Coroutine[Any, Any, T]) -> T:
        """Wait for the store, and send heartbeats in the meantime."""
        task = asyncio.ensure_future(reading)
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            while True:
                if await self._watcher.wait_for(task):
                    await self._send([self._hub.render(EventType.HEARTBEAT, None)], None)
                if task.done():
                    return task.result()
        finally:
            task.cancel()

    async def _send_snapshots(self, jobs: Sequence[Job]) -> None:
        events: list[bytes] = []
        size = 0
        for number, job in enumerate(jobs, start=1):
            change = Change(job.tenant, job.id, job.revision, job)
            event = self._hub.render(EventType.SNAPSHOT, change)
            if events and size + len(event) > MAX_RESPONSE_BYTES:
                await self._send(events, None)
                events, size = [], 0
            events.append(event)
            size += len(event)
            if number % LOOKED_AT_PER_TURN == 0:
                await self._watcher.next_iteration()
        if events:
            await self._send(events, None)

    async def _send_synced(self, position: Position) -> None:
        self._is_synced = True
        await self._send([self._hub.render(EventType.SYNCED, None)], position)

    async def _send_due(self, position: Position) -> None:
        """Send the changes that are due now; those that become due in the meantime are sent later."""
        now = asyncio.get_running_loop().time()
        while self._backlog.is_due(now):
            await self._watcher.next_iteration()
            events = self._backlog.take(asyncio.get_running_loop().time(), self._hub.render)
            if events:
                await self._send(events, (self._backlog.before or position) if self._is_synced else None)

    async def _send(self, events: Sequence[bytes], position: Position | None) -> None:
        self._watcher.mark_sent()
        self._hold(self._backlog.held_bytes)
        await self._send_message(b"".join((*events, self._hub.stamp())), position)
