"""Keeps jobs in this process's memory: the reference for the other stores, and a store for tests."""

from __future__ import annotations

import asyncio
import itertools
import time
from bisect import bisect_left, insort
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone

from jobstatus_grpc.errors import CannotStartError, StoreUnavailableError
from jobstatus_grpc.job import (
    NO_CHILDREN,
    Children,
    Command,
    Expire,
    Found,
    Job,
    JobFilter,
    JobState,
    Stall,
    Tombstone,
    Transition,
    add_children,
    require_job,
    visible,
    with_children,
)
from jobstatus_grpc.job.limits import CLOCK_TOLERANCE, TRANSITIONS_KEPT
from jobstatus_grpc.stores.batch import Batch, apply_all
from jobstatus_grpc.stores.embedded import Feed, StallClocks, new_epoch
from jobstatus_grpc.stores.interface import (
    DEFAULT_RETENTION,
    REQUEST_RETENTION,
    STALLED,
    ChangeBatch,
    Clock,
    CommitResult,
    Key,
    Page,
    Position,
    RequestKey,
    StoreType,
    is_remembered,
    utc_now,
)
from jobstatus_grpc.stores.paging import MAX_EXAMINED_ROWS, Cursor, read_cursor, write_cursor
from jobstatus_grpc.stores.retention_clock import RetentionClock

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

_MICROSECOND = timedelta(microseconds=1)


class MemoryStore:
    """A JobStore whose jobs are lost when the process ends."""

    commits_at_once = 1

    def __init__(
        self,
        *,
        clock: Clock = utc_now,
        retention: timedelta = DEFAULT_RETENTION,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create an empty store.

        Args:
            clock: returns the time.
            retention: how long a job is kept after its end.
            seconds: the monotonic clock that measures silence.
        """
        self._clock = clock
        self._retention = retention
        self._jobs: dict[Key, Job] = {}
        self._order = CreationOrder()
        self._counts: Counter[int] = Counter()
        self._jobs_of: Counter[str] = Counter()
        self._children: dict[Key, Children] = {}
        self._expiring: OrderedDict[Key, None] = OrderedDict()
        self._tombstones: OrderedDict[Key, tuple[Tombstone, datetime]] = OrderedDict()
        self._transitions: dict[Key, deque[Transition]] = defaultdict(_new_history)
        self._seconds = seconds
        self._requests: dict[Key, dict[str, tuple[str, float]]] = defaultdict(dict)
        """By job and request_id: the hash of the payload, and when the request was committed."""
        self._requests_by_age: deque[tuple[float, RequestKey]] = deque()
        self._feed = Feed([new_epoch(0)])
        self._stall_clocks = StallClocks(seconds)
        self._retention_clock = RetentionClock(seconds)
        self._latest_end_at = self._latest_removal_at = clock()
        """If they are in the future, the clock was wrong then."""
        self._closed = asyncio.Event()

    async def commit(self, commands: Sequence[Command]) -> CommitResult:
        """See JobStore. Nothing is durable here."""
        self._check_open()
        now = self._clock()
        found = {key: self._find(key, now) for key in set(map(_key, commands))}
        batch = apply_all(
            commands,
            found,
            now=now,
            retention=self._retention,
            silence_of=self._stall_clocks.silence_of,
            known=self._known(commands),
        )
        self._write(batch, now)
        self._stall_clocks.note(commands, batch.outcomes, now)
        if batch.changes:
            self._feed.publish(batch.changes)
        batch.log()
        return CommitResult(batch.outcomes)

    def _write(self, batch: Batch, now: datetime) -> None:
        for key, job in batch.jobs.items():
            if key not in self._jobs:
                self._order.add(key, job)
                self._jobs_of[key[0]] += 1
            if job.finished_at is not None:
                self._expiring[key] = None
                self._expiring.move_to_end(key)
                self._latest_end_at = max(self._latest_end_at, job.finished_at)
            self._jobs[key] = job
        for key, transition in batch.transitions:
            self._transitions[key].append(transition)
        for key, tombstone in batch.removed.items():
            if self._jobs.pop(key, None) is not None:
                self._order.remove(key)
                self._jobs_of[key[0]] -= 1
            self._expiring.pop(key, None)
            self._transitions.pop(key, None)
            self._requests.pop(key, None)
            self._tombstones.pop(key, None)
            self._tombstones[key] = (tombstone, now)
            self._latest_removal_at = max(self._latest_removal_at, now)
        self._counts.update(batch.counts)
        for key, change in batch.child_changes().items():
            children = add_children(self._children.pop(key, NO_CHILDREN), change)
            if children:
                self._children[key] = children
        at = self._seconds()
        for (tenant, job_id, request_id), payload in batch.requests.items():
            self._requests[tenant, job_id][request_id] = (payload, at)
            self._requests_by_age.append((at, (tenant, job_id, request_id)))

    def _known(self, commands: Sequence[Command]) -> dict[RequestKey, str]:
        """Return those of the commands' requests that are remembered, with the hashes of their payloads."""
        known: dict[RequestKey, str] = {}
        for command in commands:
            request, key = command.request, _key(command)
            found = None if request is None else self._requests.get(key, {}).get(request.value)
            if request is not None and found is not None:
                known[key[0], key[1], request.value] = found[0]
        return known

    async def get(self, tenant: str, job_id: str, *, only: JobFilter | None = None) -> Job:
        """See JobStore."""
        self._check_open()
        found = visible(self._find((tenant, job_id), self._clock()), only)
        return self._shown(require_job(found, job_id))

    async def jobs(self, keys: Collection[Key]) -> Mapping[Key, Job]:
        """See JobStore."""
        self._check_open()
        return {key: self._shown(self._jobs[key]) for key in keys if key in self._jobs}

    async def children(self, keys: Collection[Key]) -> Mapping[Key, Children]:
        """See JobStore."""
        self._check_open()
        return {key: self._children[key] for key in keys if key in self._children}

    def _shown(self, job: Job) -> Job:
        """Return a job as stored with its last heartbeat and the numbers of its children."""
        return with_children(self._stall_clocks.shown(job), self._children.get((job.tenant, job.id), NO_CHILDREN))

    async def transitions(
        self, tenant: str, job_id: str, *, after_revision: int = 0, limit: int = 1000
    ) -> list[Transition]:
        """See JobStore."""
        await self.get(tenant, job_id)
        history = self._transitions[tenant, job_id]
        return [entry for entry in history if entry.revision > after_revision][:limit]

    async def page(self, tenant: str, job_filter: JobFilter, *, limit: int, cursor: str = "") -> Page:
        """See JobStore. It examines the jobs one by one, whatever the filter."""
        self._check_open()
        page = self._order.page(self._jobs, tenant, job_filter, limit=limit, cursor=cursor)
        return replace(page, jobs=[self._shown(job) for job in page.jobs])

    async def count(self, tenant: str, *, at_most: int) -> int:
        """See JobStore."""
        self._check_open()
        return min(self._jobs_of[tenant], at_most)

    def stalled_jobs(self) -> int:
        """See JobStore."""
        return self._counts[STALLED]

    def damaged_rows(self) -> int:
        """See JobStore."""
        return 0

    def jobs_by_state(self) -> Mapping[JobState, int]:
        """See JobStore."""
        return {state: self._counts[state] for state in JobState}

    async def position(self) -> Position:
        """See JobStore."""
        self._check_open()
        return self._feed.position()

    async def changes(self, after: Position, *, up_to: Position | None = None) -> ChangeBatch:
        """See JobStore. Every job's newest change is kept."""
        self._check_open()
        sequence = self._feed.sequence_of(after)
        if up_to is None:
            await self._feed.wait_beyond(sequence)
        batch = self._feed.since(sequence, None if up_to is None else self._feed.sequence_of(up_to))
        assert batch is not None
        return batch

    async def overdue(self, *, limit: int, fail_stalled_after: timedelta | None = None) -> Sequence[Command]:
        """See JobStore."""
        self._check_open()
        silent = self._stall_clocks.due(limit=limit, fail_after=fail_stalled_after)
        commands: list[Command] = [
            Stall(id=job_id, tenant=tenant, fail_after=fail_stalled_after) for tenant, job_id in silent
        ]
        expired = self._expired(self._clock(), limit - len(commands))
        commands.extend(Expire(id=job_id, tenant=tenant) for tenant, job_id in expired)
        return commands

    def _expired(self, now: datetime, limit: int) -> list[Key]:
        """Return at most `limit` jobs that have expired, or whose end is in the future."""
        due_at, future = self._retention_clock.at(now), now + CLOCK_TOLERANCE
        expired: list[Key] = []
        for key in self._expiring:  # in the order of the jobs' ends, unless the clock was wrong
            job = self._jobs[key]
            assert job.expires_at is not None
            assert job.finished_at is not None
            is_due = job.expires_at <= due_at or job.finished_at > future
            if len(expired) >= limit or not (is_due or self._latest_end_at > future):
                return expired
            if is_due:
                expired.append(key)
        if not expired:
            self._latest_end_at = now
        return expired

    def restart_stall_clocks(self) -> None:
        """See JobStore."""
        self._stall_clocks.restart()

    async def trim(self, *, limit: int) -> bool:
        """See JobStore."""
        self._check_open()
        now = self._clock()
        if self._latest_removal_at > now:
            for removed, (tombstone, removed_at) in self._tombstones.items():
                self._tombstones[removed] = (tombstone, min(removed_at, now))
            self._latest_removal_at = now
        old_at = self._retention_clock.at(now)
        requests = self._forget_requests(limit)
        for _ in range(limit):
            key = next(iter(self._tombstones), None)
            if key is None or is_remembered(self._tombstones[key][1], old_at):
                return requests == limit
            del self._tombstones[key]
            self._feed.forget(key)
        return True

    def _forget_requests(self, limit: int) -> int:
        """Forget at most `limit` old requests, and return their number."""
        old_at = self._seconds() - REQUEST_RETENTION.total_seconds()
        count = 0
        while count < limit and self._requests_by_age and self._requests_by_age[0][0] <= old_at:
            at, (tenant, job_id, request_id) = self._requests_by_age.popleft()
            requests = self._requests.get((tenant, job_id), {})
            # The job may be another one since, under the same id.
            if request_id in requests and requests[request_id][1] == at:
                del requests[request_id]
            count += 1
        return count

    @property
    def writable(self) -> bool:
        """See JobStore."""
        return not self._closed.is_set()

    async def closed(self) -> BaseException | None:
        """See JobStore. No error breaks this store."""
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
            if is_remembered(removed_at, now):
                return tombstone
        return None


def _key(command: Command) -> Key:
    return (command.tenant, command.id)


def _new_history() -> deque[Transition]:
    return deque(maxlen=TRANSITIONS_KEPT)


class CreationOrder:
    """The keys of all jobs in the order of creation."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._places: dict[Key, Cursor] = {}
        self._entries: list[tuple[Cursor, Key]] = []

    def add(self, key: Key, job: Job) -> None:
        """Add a new job."""
        place = ((job.created_at - _EPOCH) // _MICROSECOND, next(self._numbers))
        self._places[key] = place
        insort(self._entries, (place, key))

    def remove(self, key: Key) -> None:
        """Remove a job."""
        del self._entries[bisect_left(self._entries, (self._places.pop(key), key))]

    def page(self, jobs: Mapping[Key, Job], tenant: str, job_filter: JobFilter, *, limit: int, cursor: str) -> Page:
        """Return a page; see JobStore."""
        start = bisect_left(self._entries, (read_cursor(cursor), ("", ""))) if cursor else len(self._entries)
        stop = max(start - MAX_EXAMINED_ROWS, 0)
        found: list[Job] = []
        cursors: list[str] = []
        for place, key in reversed(self._entries[stop:start]):
            if key[0] == tenant and job_filter.matches(jobs[key]):
                found.append(jobs[key])
                cursors.append(write_cursor(place))
                if len(found) == limit:
                    stop = bisect_left(self._entries, (place, ("", "")))
                    break
        return Page(found, cursors, write_cursor(self._entries[stop][0]) if stop else "")


async def open_store(url: str, *, clock: Clock = utc_now, retention: timedelta = DEFAULT_RETENTION) -> MemoryStore:
    """Return a new, empty store for `memory:`."""
    if url != "memory:":
        raise CannotStartError("a store in memory has nothing to configure: its URL is memory:")
    return MemoryStore(clock=clock, retention=retention)


STORE_TYPE = StoreType(open=open_store)
