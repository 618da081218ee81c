"""The contract between the service and the stores. `tests/stores/contract/` states it as tests.

A store makes no decision about a job: it loads what is stored under the ids of some commands, calls `batch.apply_all`,
and writes the result. Every key and every query includes the tenant.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import NamedTuple, Protocol, TypeAlias

from jobstatus_grpc.errors import DataLossError
from jobstatus_grpc.job import Children, Command, Job, JobFilter, JobState, Outcome, Transition
from jobstatus_grpc.job.limits import MAX_REQUEST_AGE


def utc_now() -> datetime:
    """Return this machine's time."""
    return datetime.now(timezone.utc)


Key: TypeAlias = tuple[str, str]
"""A job's tenant and id."""

RequestKey: TypeAlias = tuple[str, str, str]
"""A request: the tenant and id of its job, and its request_id."""

Position: TypeAlias = str
"""A place in a store's change feed, with the name of the history that it is in. Opaque to all but that store.

A store that was set back to an earlier state continues in another history: later positions are refused.
"""

MAX_POSITION_CHARACTERS = 320
"""The length of a position: with a page's cursor it fits in a token, see server/tokens.py."""

MAX_BATCH_CHANGES = 1000
"""The number of changes in a ChangeBatch. Of many times as many, only the newest of each job may be left."""

Clock: TypeAlias = Callable[[], datetime]
"""Returns the time as an aware UTC datetime. All instants in a job come from its store's clock."""

DEFAULT_RETENTION = timedelta(days=7)
"""How long a job is kept after its end."""

TOMBSTONE_RETENTION = timedelta(hours=24)
"""How long the tombstone of a removed job is found: its id cannot be used, and calls for it get JobExpiredError."""

FEED_RETENTION = timedelta(hours=24)
"""The age from which a change may be dropped from the feed, unless it is the newest of a job that exists."""

REQUEST_RETENTION = MAX_REQUEST_AGE + timedelta(hours=1)
"""How long a job remembers a request, at least. An hour longer than a request_id may be old: that hour is for clients
whose clocks are ahead."""


def is_remembered(removed_at: datetime, now: datetime) -> bool:
    """Whether the tombstone of a job that was removed at `removed_at` is found at `now`."""
    return now - removed_at < TOMBSTONE_RETENTION


@dataclass(frozen=True, slots=True)
class CommitResult:
    """What became of the commands of one `JobStore.commit`."""

    outcomes: Sequence[Outcome]
    """One per command, in order. In the place of a deferred command: StoreUnavailableError, which means "not known"."""
    deferred: Mapping[int, asyncio.Future[Outcome]] = field(default_factory=dict)
    """The outcomes that follow later, by the index of the command: another process has locked the job."""


class Silence(NamedTuple):
    """How long the worker of a job has been silent."""

    duration: timedelta
    """When `overdue` returned the job's Stall; 0 if an update has come or the stall clocks were restarted since."""
    heard_at: datetime | None
    """When its last heartbeat arrived that changed nothing; None: that is not known."""


class Change(NamedTuple):
    """One job's newest state within a batch of changes."""

    tenant: str
    id: str
    revision: int
    """Of a removed job: its last revision plus one."""
    job: Job | None
    """None: the job was deleted or has expired."""
    final: Job | None = None
    """Of a removed job: the job as it ended. The change to that state may be left out, as this one is newer."""

    @property
    def known_job(self) -> Job | None:
        """The job, or if it was removed, the job as it ended; None if that is not known."""
        return self.job if self.job is not None else self.final


STALLED = 0
"""Counted beside the states, which begin at 1: jobs that are stalled."""


@dataclass(frozen=True, slots=True)
class ChangeBatch:
    """The changes up to a position, at most one for each job, with its newest state."""

    position: Position
    changes: Sequence[Change]
    superseded: Collection[Key] = ()
    """The jobs that changed before `position`, or may have, and again after it: in a later batch."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the jobs that match a filter."""

    jobs: Sequence[Job]
    """The newest created first. There may be fewer than the limit, or none, even if more pages follow."""
    cursors: Sequence[str]
    """One per job: where the list continues after it. Opaque to all but the store."""
    next_cursor: str
    """Where the list continues after this page; empty at the end of the list."""
    damaged: Sequence[DataLossError] = ()
    """One for each job that is left out because what is stored of it is damaged. `id` in the metadata, if known."""


class JobStore(Protocol):
    """Keeps jobs, their history and the feed of their changes. All methods are for one event loop."""

    @property
    def commits_at_once(self) -> int:
        """The number of commits that may run concurrently."""
        ...

    async def commit(self, commands: Sequence[Command]) -> CommitResult:
        """Apply `commands` in order, in one durable transaction.

        Each succeeds or fails by itself: a refused command leaves no trace and does not stop the next. Commands on
        one job take effect in their order, and each sees the effect of the ones before it. When this returns, `get`
        and `changes` show what was written.

        Returns:
            One outcome per command, in order: the job as stored, or the error that refused it. For a deleted job: the
            job as it was before. The outcomes of commands on jobs that another process has locked are deferred.

        Raises:
            StoreFullError: nothing was written; commits fail until there is space.
            StoreUnavailableError: nothing is known to be written; retry with the same request_id.
        """
        ...

    async def get(self, tenant: str, job_id: str, *, only: JobFilter | None = None) -> Job:
        """Return the job as of the latest commit, with the numbers of its children.

        The jobs of `page` and `jobs` have these numbers too; those in outcomes and changes have not.

        Args:
            tenant: the job's tenant.
            job_id: its id.
            only: the jobs that the caller may see; None: all. Any other job, and each removed one, is JobNotFoundError,
                by the same steps as an id that was never used, so that the time does not tell them apart.

        Raises:
            JobNotFoundError: the id was never used, or the job was removed more than 24 hours ago.
            JobExpiredError: the job was deleted or has expired within the last 24 hours.
            DataLossError: what is stored of the job is damaged; that of other jobs may not be.
            StoreUnavailableError: retry later.
        """
        ...

    async def jobs(self, keys: Collection[Key]) -> Mapping[Key, Job]:
        """Return those of these jobs that exist, as `get` does; a damaged one is left out.

        Raises:
            StoreUnavailableError: retry later.
        """
        ...

    async def children(self, keys: Collection[Key]) -> Mapping[Key, Children]:
        """Return the numbers of the children of these jobs, as of the latest commit; nothing of a job without any.

        The job itself need not exist. What a commit changes in these numbers, it changes in one transaction with the
        child, and so that commits on the children of one job do not wait for each other.

        Raises:
            StoreUnavailableError: retry later.
        """
        ...

    async def transitions(
        self, tenant: str, job_id: str, *, after_revision: int = 0, limit: int = 1000
    ) -> list[Transition]:
        """Return the job's history, oldest first: at most `limit` entries with a revision above `after_revision`.

        Raises:
            JobNotFoundError, JobExpiredError, DataLossError, StoreUnavailableError: as `get`.
        """
        ...

    async def page(self, tenant: str, job_filter: JobFilter, *, limit: int, cursor: str = "") -> Page:
        """Return at most `limit` jobs that match, the newest created first, starting after `cursor`.

        Pages are stable: a job is neither repeated nor skipped because other jobs are created between two pages. A
        page that would take too long to read is cut short.

        Raises:
            InvalidTokenError: `cursor` is not a cursor of this kind of store.
            StoreUnavailableError: retry later.
        """
        ...

    async def count(self, tenant: str, *, at_most: int) -> int:
        """Return the number of the tenant's jobs, as of a moment ago; counting ends at `at_most`.

        Raises:
            StoreUnavailableError: retry later.
        """
        ...

    def stalled_jobs(self) -> int:
        """Return the number of stalled jobs, as `jobs_by_state`."""
        ...

    def damaged_rows(self) -> int:
        """Return the number of rows that were found damaged since the store was opened."""
        ...

    def jobs_by_state(self) -> Mapping[JobState, int]:
        """Return the number of jobs in each state, over all tenants, as of a few seconds ago. Cheap at any size."""
        ...

    async def position(self) -> Position:
        """Return the feed's position now: `changes` from here misses no later commit.

        It is after each commit that a read before this call has seen. It stays the same until something changes, and
        `changes` leads to exactly this position.
        """
        ...

    async def changes(self, after: Position, *, up_to: Position | None = None) -> ChangeBatch:
        """Wait until something has changed since `after`, and return all changes, or as many as fit in a batch.

        The newest change of each job is in exactly one place of the feed; older ones may be left out. With `up_to`, the
        batches that lead there name each job whose change is left out because a newer one follows beyond. Cancelling
        the call loses nothing.

        Args:
            up_to: an earlier or the current position: return the changes before it, without waiting. The batch that
                reaches it has it as its own position.

        Raises:
            StoreChangedError: a position is from another history of the store, or older than what it has kept.
            StoreUnavailableError: retry later.
        """
        ...

    async def overdue(self, *, limit: int, fail_stalled_after: timedelta | None = None) -> Sequence[Command]:
        """Return at most `limit` commands for jobs that are due: Stall and Expire. The commit decides whether they are.

        Expire is due as well for jobs that ended while the clock was wrong, if their end is in the future now: the
        commit takes it back.

        Of the processes that share a store only one gets commands. The stall clocks start when a store is opened, and
        again when writes succeed after a failure. Silence is measured by a monotonic clock, up to this call: neither a
        time of day that is set nor a commit that is late makes it longer.

        Args:
            limit: the maximum number of commands.
            fail_stalled_after: how long a job may be stalled before it fails; None: it never fails.

        Raises:
            StoreUnavailableError: retry later.
        """
        ...

    def restart_stall_clocks(self) -> None:
        """Measure the silence of all workers from now on: this process was suspended, and could not receive reports."""
        ...

    async def trim(self, *, limit: int) -> bool:
        """Examine up to `limit` rows of history, and drop what is old.

        That is changes and tombstones of more than 24 hours ago, but never the newest change of a job that exists, and
        requests of more than REQUEST_RETENTION ago.
        What was recorded for a time that is in the future, while the clock was wrong, counts as recorded now.

        Returns:
            Whether there are more rows to examine now.

        Raises:
            StoreFullError, StoreUnavailableError: as `commit`.
        """
        ...

    @property
    def writable(self) -> bool:
        """Whether the last write succeeded, or a later probe did."""
        ...

    async def closed(self) -> BaseException | None:
        """Wait for the store's end. Return None after `close`, or the error that broke it: the process should end."""
        ...

    async def close(self) -> None:
        """Finish the running commit, refuse later ones, and release all resources. Further calls do nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreType:
    """A kind of store, as an entry point of the group `jobstatus_grpc.stores` names it under its URL scheme."""

    open: Callable[..., Awaitable[JobStore]]
    """`open(url, *, clock, retention)` returns the open store. Raises CannotStartError, or StoreUnreachableError if it
    may open later; the message never holds the URL, which may hold a password."""
    name: Callable[[str], str] | None = None
    """`name(url)` returns what log lines call the store: with an absolute path or its hosts, without user and password.
    None: the URL's scheme."""
    migrate: Callable[[str], Awaitable[int]] | None = None
    """`migrate(url)` creates the store's schema or brings it up to date, and returns its version. None: `open` does,
    and the schema has no version."""
    back_up: Callable[[str, str], int] | None = None
    """`back_up(url, file)` writes a verified copy of the store to a file, also while it is in use, and returns the
    number of jobs in it. None: the store has no backups of its own. Raises CannotStartError."""
    restore: Callable[[str, str], int] | None = None
    """`restore(url, file)` replaces the store, which must not be in use, with such a copy. Else as `back_up`."""
    is_shared: bool = False
    """Whether several processes may have the same store open at once."""

    async def prepare(self, url: str) -> int:
        """Create or migrate the store at `url`, and return the version of its schema; 0 if it has none."""
        if self.migrate is not None:
            return await self.migrate(url)
        store = await self.open(url)
        await store.close()
        return 0
