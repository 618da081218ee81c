"""The watchers of many jobs: finds those that a change concerns, and lets them have it.

A watcher is found through one value of its filter (an id, the parent, a name, a label, a state), or because its reader
holds the job; only one that filters by nothing of that kind looks at every change of its tenant.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeAlias

from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.filter_backlog import HeldJobs, News, RenderEvent
from jobstatus_grpc.filter_watcher import FilterWatcher
from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.state import JobState
from jobstatus_grpc.stores.interface import Change, Position
from jobstatus_grpc.wake_queue import WakeQueue

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
