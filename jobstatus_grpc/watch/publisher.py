"""From the store's change feed to the watchers: one task reads the feed and publishes each batch to both hubs.

The feed is the only source of changes for watchers, also of those that this process commits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NoReturn

from jobstatus_grpc.errors import RetryableError, StoreChangedError
from jobstatus_grpc.stores.interface import ChangeBatch, JobStore, Position
from jobstatus_grpc.stores.outage_log import OutageLog
from jobstatus_grpc.watch.filter_watch import FilterHub
from jobstatus_grpc.watch.job_watch import JobHub
from jobstatus_grpc.watch.numbers import read_numbers

log = logging.getLogger("jobstatus_grpc.watch.publisher")

RETRY_SECONDS = 0.2
"""The pause before the feed is read again after it failed."""


class Publisher:
    """Follows a store's feed for a hub of watchers of one job each and a hub of watchers of many."""

    def __init__(
        self,
        store: JobStore,
        job_hub: JobHub,
        filter_hub: FilterHub,
        *,
        observe_batch: Callable[[ChangeBatch], None] | None = None,
    ) -> None:
        """`observe_batch` is called with each batch once it is published: for metrics."""
        self._store = store
        self._job_hub = job_hub
        self._filter_hub = filter_hub
        self._observe_batch = observe_batch

    async def follow(self, position: Position) -> NoReturn:
        """Publish every change after `position`, until cancelled.

        Read the position before the first watcher registers: a change between that reading and the start of this is
        then published too. Where the store was replaced, every watch of one job ends with StoreChangedError, for the
        client to resume it, and every WatchJobs stream begins again.
        """
        self._filter_hub.begin(position)
        outage = OutageLog(log, "the change feed")
        current: Position | None = position
        while True:
            try:
                if current is None:
                    current = await self._restart()
                if outage.lasts:
                    await self._store.position()  # `changes` would not return before something changes
                    outage.recovered()
                batch = await self._store.changes(current)
                await self._publish(batch, after=current)
            except StoreChangedError:
                log.warning("the store was replaced, or its history trimmed beyond the last batch: watches start over")
                current = None
            except Exception as error:
                outage.failed(error)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                current = batch.position

    async def _restart(self) -> Position:
        """Return the position of the store that is there now, and make every watch start over from it."""
        position = await self._store.position()
        self._filter_hub.begin(position)
        self._job_hub.end_all(StoreChangedError)
        self._filter_hub.end_all(StoreChangedError)
        return position

    async def _publish(self, batch: ChangeBatch, *, after: Position) -> None:
        """Publish a batch with the numbers of children, which are read before.

        If that fails now but may succeed later, nothing is published.
        """
        job_hub, filter_hub = self._job_hub, self._filter_hub
        # A watch that begins during the read gets the batch from the store: here its jobs have no numbers.
        filter_hub.reached = batch.position
        watched = {key for change in batch.changes if job_hub.has_watchers(key := (change.tenant, change.id))}
        try:
            changes, parents = await read_numbers(
                self._store,
                batch.changes,
                is_watched=lambda key: filter_hub.is_followed or key in watched,
                is_parent_watched=lambda key: key in filter_hub.held or job_hub.has_watchers(key),
            )
        except RetryableError:
            raise
        except Exception:
            log.exception("the numbers of children cannot be read; the changes are published without them")
            changes, parents = batch.changes, ()
        for change in changes:
            if (change.tenant, change.id) in watched:
                job_hub.publish(change)
        for change in parents:
            job_hub.publish(change)
        await filter_hub.publish(changes, before=after, after=batch.position, parents=parents)
        if self._observe_batch is not None:
            try:
                self._observe_batch(batch)
            except Exception:
                log.exception("a batch of changes cannot be counted; its publication is not affected")
