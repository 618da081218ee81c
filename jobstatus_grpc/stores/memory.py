"""Keeps jobs in this process's memory: what every other store must be equal to, and a store for tests."""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict, deque
from collections.abc import Sequence
from datetime import datetime, timedelta

from jobstatus_grpc.errors import CannotStartError, StoreUnavailableError
from jobstatus_grpc.job import Command, Found, Job, Outcome, Tombstone, Transition, require_job
from jobstatus_grpc.limits import TRANSITIONS_KEPT
from jobstatus_grpc.stores.batch import apply_all
from jobstatus_grpc.stores.clock import utc_now
from jobstatus_grpc.stores.feed import Feed
from jobstatus_grpc.stores.found import TOMBSTONE_RETENTION, Key
from jobstatus_grpc.stores.interface import DEFAULT_RETENTION, ChangeBatch, Clock, Position


async def open_store(url: str, *, clock: Clock = utc_now, retention: timedelta = DEFAULT_RETENTION) -> MemoryStore:
    """Return a new, empty store for `memory:`."""
    if url != "memory:":
        raise CannotStartError("a store in memory has nothing to configure: its URL is memory:")
    return MemoryStore(clock=clock, retention=retention)


def _new_history() -> deque[Transition]:
    return deque(maxlen=TRANSITIONS_KEPT)


class MemoryStore:
    """A JobStore that forgets everything when its process ends."""

    def __init__(self, *, clock: Clock = utc_now, retention: timedelta = DEFAULT_RETENTION) -> None:
        """Begin empty. `retention` is how long a job is kept once it is done."""
        self._clock = clock
        self._retention = retention
        self._jobs: dict[Key, Job] = {}
        self._tombstones: dict[Key, tuple[Tombstone, datetime]] = {}
        self._transitions: dict[Key, deque[Transition]] = defaultdict(_new_history)
        self._feed = Feed(secrets.token_hex(8))
        self._closed = asyncio.Event()

    async def commit(self, commands: Sequence[Command]) -> list[Outcome]:
        """See JobStore. Nothing is durable here."""
        self._check_open()
        now = self._clock()
        found = {key: self._find(key, now) for key in {(command.tenant, command.id) for command in commands}}
        batch = apply_all(commands, found, now=now, retention=self._retention)
        self._jobs.update(batch.jobs)
        for key, transition in batch.transitions:
            self._transitions[key].append(transition)
        for key, tombstone in batch.removed.items():
            self._jobs.pop(key, None)
            self._transitions.pop(key, None)
            self._tombstones[key] = (tombstone, now)
        if batch.changes:
            self._feed.publish(batch.changes)
        return batch.outcomes

    async def get(self, tenant: str, job_id: str) -> Job:
        """See JobStore."""
        self._check_open()
        return require_job(self._find((tenant, job_id), self._clock()), job_id)

    async def transitions(
        self, tenant: str, job_id: str, *, after_revision: int = 0, limit: int = 1000
    ) -> list[Transition]:
        """See JobStore."""
        await self.get(tenant, job_id)
        history = self._transitions[tenant, job_id]
        return [entry for entry in history if entry.revision > after_revision][:limit]

    async def position(self) -> Position:
        """See JobStore."""
        self._check_open()
        return self._feed.position()

    async def changes(self, after: Position) -> ChangeBatch:
        """See JobStore. Every job's newest change is kept, so that no position is too old."""
        self._check_open()
        sequence = self._feed.sequence_of(after)
        await self._feed.wait_beyond(sequence)
        batch = self._feed.since(sequence)
        assert batch is not None
        return batch

    @property
    def writable(self) -> bool:
        """See JobStore."""
        return not self._closed.is_set()

    async def closed(self) -> BaseException | None:
        """See JobStore. Nothing breaks this store."""
        await self._closed.wait()
        return None

    async def close(self) -> None:
        """See JobStore."""
        self._closed.set()
        self._feed.end()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise StoreUnavailableError("the store is closed")

    def _find(self, key: Key, now: datetime) -> Found:
        if key in self._jobs:
            return self._jobs[key]
        if key in self._tombstones:
            tombstone, removed_at = self._tombstones[key]
            if now - removed_at < TOMBSTONE_RETENTION:
                return tombstone
        return None
