"""The watchers of many jobs: finds those that a change concerns, and lets them have it.

A watcher is found through one value of its filter (an id, the parent, a name, a label, a state), or because its reader
holds the job; only one that filters by nothing of that kind looks at every change of its tenant.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeAlias

from jobstatus_grpc.errors import JobStatusError, StoreChangedError, StreamAgeError
from jobstatus_grpc.job import JobFilter, JobState
from jobstatus_grpc.stores.interface import Change, Position
from jobstatus_grpc.watch.backlog import Backlog, HeldJobs, News, RenderEvent
from jobstatus_grpc.watch.watcher import CLOCK_RESOLUTION_SECONDS, LOOK, WAKE, EventType, TimedWatcher, WakeQueue


class FilterWatcher(TimedWatcher):
    """Hands out, message by message, what its backlog holds. For one task at a time."""

    __slots__ = ("_error", "_gathered", "_hub", "_is_turn_wanted", "_waiter", "backlog")

    def __init__(
        self,
        hub: FilterHub,
        tenant: str,
        job_filter: JobFilter,
        *,
        heartbeat_seconds: float,
        min_update_seconds: float,
        max_age_seconds: float | None,
    ) -> None:
        super().__init__(hub.wakes, heartbeat_seconds=heartbeat_seconds, max_age_seconds=max_age_seconds)
        self.backlog = Backlog(self, tenant, job_filter, hub.held, min_update_seconds=min_update_seconds)
        self._hub = hub
        self._error: type[JobStatusError] | None = None
        self._gathered: dict[str, News] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_turn_wanted = False

    def offer(self, news: News) -> None:
        """Take what the hub has for it: at once, or while it gathers, when that is over."""
        if self._gathered is None:
            due_at = self.backlog.offer(news, self._loop.time())
            if due_at is not None:
                self._look_at(due_at)
        elif self.backlog.may_concern(news.change):
            self._gathered.pop(news.change.id, None)
            self._gathered[news.change.id] = news

    def gather(self) -> None:
        """Put by, from now on, what the hub has."""
        self._gathered = {}

    def forget_gathered(self) -> None:
        """Put nothing by any more, and forget what was."""
        self._gathered = None

    def accept_gathered(self) -> None:
        """Take what was put by."""
        gathered, self._gathered = self._gathered or {}, None
        for news in gathered.values():
            self.offer(news)

    async def next(self) -> tuple[list[bytes], Position]:
        """Wait for what is due and return its events, or a HEARTBEAT, and up to where everything has been told then.

        Raises:
            DrainingError, StreamAgeError: the watch ends here; the caller resumes elsewhere.
            StoreChangedError: what the reader holds is void.
        """
        while True:
            due_at = self.backlog.next_due_at
            if due_at is not None:
                self._look_at(due_at)
            await self._woken()
            now = self._loop.time()
            events = self.backlog.take(now, self._hub.render)
            if not events and self._is_heartbeat_due(now):
                events = [self._hub.render(EventType.HEARTBEAT, None)]
            if events:
                self.note_sent()
                return events, self.backlog.before or self._hub.position

    async def turn(self) -> None:
        """Wait for a turn of the event loop that no other watcher has. Raises as `next`."""
        self._is_turn_wanted = True
        try:
            await self._woken()
        finally:
            self._is_turn_wanted = False

    async def beside(self, task: asyncio.Future[Any]) -> bool:
        """Wait for `task`, at most until the next heartbeat; tell whether one is due. Raises as `next`."""
        self._waiter = self._loop.create_future()
        seconds = max(self._heartbeat_due_at() - self._loop.time(), 0)
        try:
            await asyncio.wait((task, self._waiter), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiter = None
        self.check()
        return self._is_heartbeat_due(self._loop.time())

    def check(self) -> None:
        """Raise what ends the watch, if anything does."""
        if self._error is not None:
            raise self._error()
        if self._is_too_old(self._loop.time()):
            raise StreamAgeError

    def end(self, error: type[JobStatusError]) -> None:
        """End the watch with `error`."""
        if self._error is None or error is not StoreChangedError:  # who is to go does not begin again
            self._error = error
        self.wake_soon()

    def restart(self) -> None:
        """Forget what the reader holds and what waits, to begin again."""
        if self._error is StoreChangedError:
            self._error = None
        self._gathered = None
        self.backlog.clear()

    def close(self) -> None:
        """Stop the timers, and forget."""
        super().close()
        self.backlog.clear()

    def wake_soon(self) -> None:
        """Look, in its turn, whether there is something to do; not while nobody waits."""
        if self._waiter is not None:
            super().wake_soon()

    def step(self) -> int:
        """Look, in its turn; see WakeQueue."""
        self._is_queued = False
        if self._waiter is None or self._waiter.done() or not self._has_work():
            return LOOK
        self._waiter.set_result(None)
        return WAKE

    async def _woken(self) -> None:
        self._waiter = self._loop.create_future()
        if self._has_work():
            self.wake_soon()
        try:
            await self._waiter
        finally:
            self._waiter = None
        self.check()

    def _has_work(self) -> bool:
        if self._is_turn_wanted or self._error is not None or self.backlog.ready:
            return True
        now = self._loop.time()
        due_at = self.backlog.next_due_at
        return self._is_heartbeat_due(now) or (due_at is not None and due_at <= now + CLOCK_RESOLUTION_SECONDS)

    def _look_at(self, due_at: float) -> None:
        """Wake the watcher then, or now where that is past."""
        if due_at <= self._loop.time() + CLOCK_RESOLUTION_SECONDS:
            self.wake_soon()
        else:
            self._wake_at(due_at)


# Each takes a few microseconds; updates that arrive meanwhile wait for so many.
OFFERS_PER_TURN = 64

_Key: TypeAlias = tuple[object, ...]


class FilterHub:
    """Registers watchers of many jobs. Lives on one event loop."""

    def __init__(
        self,
        *,
        wakes: WakeQueue,
        render: RenderEvent,
        stamp: Callable[[], bytes],
        max_age_seconds: float | None = None,
    ) -> None:
        """Take how to render events.

        Args:
            wakes: where watchers stand that have something to send.
            render: returns the bytes of a message with one event; the change is None for events without a job.
            stamp: returns the bytes to append to each message as it is sent: the server's time.
            max_age_seconds: how long a watch may last, ± 10 %; None: for ever.
        """
        self.wakes = wakes
        self.render = render
        self.stamp = stamp
        self.held: HeldJobs = {}
        self.position: Position = ""
        """Up to where all changes have been published."""
        self.reached: Position = ""
        """Up to where changes have been published, or are being: what is registered now may miss those before it."""
        self._max_age_seconds = max_age_seconds
        self._ending: type[JobStatusError] | None = None
        self._keys: dict[FilterWatcher, Sequence[_Key]] = {}
        self._by_key: dict[_Key, dict[FilterWatcher, None]] = {}

    @property
    def watchers(self) -> int:
        """How many are registered."""
        return len(self._keys)

    @contextlib.contextmanager
    def watcher(
        self, tenant: str, job_filter: JobFilter, *, heartbeat_seconds: float, min_update_seconds: float
    ) -> Iterator[FilterWatcher]:
        """Register a watcher for the length of a block. It is told nothing until it gathers.

        Raises:
            DrainingError: the hub has ended.
        """
        if self._ending is not None:
            raise self._ending()
        watcher = FilterWatcher(
            self,
            tenant,
            job_filter,
            heartbeat_seconds=heartbeat_seconds,
            min_update_seconds=min_update_seconds,
            max_age_seconds=self._max_age_seconds,
        )
        self._keys[watcher] = ()
        try:
            yield watcher
        finally:
            watcher.close()
            self._place(watcher, ())
            del self._keys[watcher]

    def gather(self, watcher: FilterWatcher) -> Position:
        """Let `watcher` put by every change after the position that is returned."""
        self._place(watcher, [_all_of(watcher.backlog.tenant)])
        watcher.gather()
        return self.reached

    def withdraw(self, watcher: FilterWatcher) -> None:
        """Tell `watcher` nothing any more; it forgets what it has put by."""
        self._place(watcher, ())
        watcher.forget_gathered()

    def settle(self, watcher: FilterWatcher) -> None:
        """Let `watcher` have what it has put by, and from now on what concerns it."""
        watcher.accept_gathered()
        backlog = watcher.backlog
        is_picky = not backlog.is_unsure
        self._place(watcher, _keys_of_filter(backlog.tenant, backlog.filter) if is_picky else [_all_of(backlog.tenant)])

    def begin(self, position: Position) -> None:
        """Take it that everything up to `position` has been published."""
        self.position = self.reached = position

    async def publish(self, changes: Iterable[Change], *, before: Position, after: Position) -> None:
        """Tell the watchers whom changes concern, which lead from one position to the other."""
        self.reached = after
        if self._by_key or self.held:
            offers = 0
            for change in changes:
                watchers = self._concerned(change)
                if watchers:
                    news = News(change, before)
                    for watcher in watchers:
                        watcher.offer(news)
                    offers += len(watchers)
                if offers >= OFFERS_PER_TURN:
                    offers = 0
                    await asyncio.sleep(0)
        self.position = after

    def end_all(self, error: type[JobStatusError]) -> None:
        """End every open watch with `error`; StoreChangedError lets it begin again."""
        for watcher in self._keys:
            watcher.end(error)

    def close(self, error: type[JobStatusError]) -> None:
        """End every open watch with `error`, and refuse new ones with it."""
        self._ending = error
        self.end_all(error)

    def _concerned(self, change: Change) -> dict[FilterWatcher, None]:
        found = [watchers for key in _keys_of_change(change) if (watchers := self._by_key.get(key))]
        held = self.held.get((change.tenant, change.id))
        return dict.fromkeys(chain(held.revisions if held else (), *found))

    def _place(self, watcher: FilterWatcher, keys: Sequence[_Key]) -> None:
        """Let `watcher` be found through `keys`, and through no others."""
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
    """Return through what to find a filter's watchers: a job that matches has one of these among its own."""
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
    """Return the keys of the job as it is now; of one that is gone nothing is known, and only its holders care."""
    tenant, job = change.tenant, change.job
    keys = [_all_of(tenant)]
    if job is not None:
        keys += ((tenant, "id", job.id), (tenant, "name", job.name), (tenant, "state", job.state))
        keys += ((tenant, "label", label, value) for label, value in job.labels.items())
        if job.parent_id:
            keys.append((tenant, "parent", job.parent_id))
        if job.stalled:
            keys.append((tenant, "stalled"))
    return keys
