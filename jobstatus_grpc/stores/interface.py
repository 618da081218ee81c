"""The contract between the service and whatever keeps its jobs. `tests/stores/contract/` says it again, as tests.

A store never decides: it loads what is under an id, calls `job.apply`, and writes what comes back. Every key and every
query holds the tenant.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import NamedTuple, Protocol, TypeAlias

from jobstatus_grpc.job import Command, Job, JobFilter, JobState, Outcome, Transition


def utc_now() -> datetime:
    """Return this machine's time."""
    return datetime.now(timezone.utc)


Position: TypeAlias = str
"""A place in a store's change feed. Opaque to everybody but its store; holds the store's incarnation."""

Clock: TypeAlias = Callable[[], datetime]
"""Tells the time as an aware UTC datetime. The store's clock is the only one that a job's instants come from."""

DEFAULT_RETENTION = timedelta(days=7)


class Change(NamedTuple):
    """One job's newest state within a batch of changes."""

    tenant: str
    id: str
    revision: int
    """For a removed job: its last revision plus one."""
    job: Job | None
    """None: the job was deleted or has expired."""


@dataclass(frozen=True, slots=True)
class ChangeBatch:
    """What changed from one position to another, each job at most once, with its newest state."""

    position: Position
    changes: Sequence[Change]


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the jobs that match a filter."""

    jobs: Sequence[Job]
    """The newest created first. May be fewer than were asked for, or none, also where others follow."""
    cursors: Sequence[str]
    """One per job: what follows it. Opaque to everybody but the store."""
    next_cursor: str
    """What follows this page; empty where nothing does."""


class JobStore(Protocol):
    """Keeps jobs, their history and the feed of their changes. All methods are for one event loop."""

    @property
    def commits_at_once(self) -> int:
        """How many commits may run side by side."""
        ...

    async def commit(self, commands: Sequence[Command]) -> Sequence[Outcome | asyncio.Future[Outcome]]:
        """Apply `commands` in order, in one durable transaction.

        Each succeeds or fails by itself: a refused command leaves no trace and does not stop the next. Commands on
        one job take effect in their order, and each sees the ones before it. When this returns, `get` and `changes`
        show what was written.

        Returns:
            One outcome per command, in order: the job as stored, or the error that refused it. Of a deleted job: as
            it last was. In place of an outcome there may be a future of it, where another process holds the job: the
            others need not wait for that.

        Raises:
            StoreFullError: nothing was written, and nothing will be until there is room.
            StoreUnavailableError: nothing is known to be written; a request_id tells on retry.
        """
        ...

    async def get(self, tenant: str, job_id: str) -> Job:
        """Return the job as of the latest committed write.

        Raises:
            JobNotFoundError: the id was never used, or its tombstone is gone.
            JobExpiredError: the job was deleted or has expired within 24 hours.
            StoreUnavailableError: try again later.
        """
        ...

    async def transitions(
        self, tenant: str, job_id: str, *, after_revision: int = 0, limit: int = 1000
    ) -> list[Transition]:
        """Return the job's history, oldest first, from the first entry above `after_revision`, at most `limit`.

        Raises:
            JobNotFoundError, JobExpiredError, StoreUnavailableError: as `get`.
        """
        ...

    async def page(self, tenant: str, job_filter: JobFilter, *, limit: int, cursor: str = "") -> Page:
        """Return at most `limit` jobs that match, the newest created first, of those that follow `cursor`.

        Pages are stable: no job comes twice or is left out because others were created meanwhile. A page that would
        take too long is cut short.

        Raises:
            InvalidTokenError: `cursor` is not one of this kind of store.
            StoreUnavailableError: try again later.
        """
        ...

    def jobs_by_state(self) -> Mapping[JobState, int]:
        """Return how many jobs there are in each state, of all tenants, as of a moment ago; cheap at any size."""
        ...

    async def position(self) -> Position:
        """Return where the feed stands now: `changes` from here misses nothing that is committed later.

        While nothing changes it stays the same, and `changes` leads to exactly this.
        """
        ...

    async def changes(self, after: Position, *, up_to: Position | None = None) -> ChangeBatch:
        """Wait until something changed after `after`, and return all of it, or as much as fits a batch.

        Every job's newest change is in exactly one place of the feed; older ones may be left out. Cancelling the wait
        loses nothing.

        Args:
            up_to: a position of now or earlier: return what lies before it, without waiting. The batch that reaches it
                has it as its own position.

        Raises:
            StoreChangedError: a position is of another incarnation of the store, or older than its history.
            StoreUnavailableError: try again later.
        """
        ...

    async def overdue(self, *, limit: int, fail_stalled_after: timedelta | None = None) -> Sequence[Command]:
        """Return what time asks for, at most `limit` commands: Stall and Expire. They are judged once committed.

        In one process of all that share a store; the others get nothing. The clocks of silence start when a store is
        opened, and when it can be written again.

        Raises:
            StoreUnavailableError: try again later.
        """
        ...

    def restart_stall_clocks(self) -> None:
        """Count every worker's silence from now on: this process was absent, and nobody could report to it."""
        ...

    async def trim(self, *, limit: int) -> bool:
        """Look at up to `limit` rows of history, and drop those that nobody needs: changes and tombstones of 24 hours.

        The newest change of a job that exists is never dropped.

        Returns:
            Whether there is more to look at now.

        Raises:
            StoreFullError, StoreUnavailableError: as `commit`.
        """
        ...

    @property
    def writable(self) -> bool:
        """Whether the last write went through, or the store has since found that writes do again."""
        ...

    async def closed(self) -> BaseException | None:
        """Wait for the store's end: None after `close`, else what broke it, beyond repair; the process should end."""
        ...

    async def close(self) -> None:
        """Finish the running commit, refuse later ones, and release everything. Calling it again does nothing."""
        ...


Key: TypeAlias = tuple[str, str]
"""A job's tenant and id."""

TOMBSTONE_RETENTION = timedelta(hours=24)
"""A tombstone of this age is not found any more."""

FEED_RETENTION = timedelta(hours=24)
"""A change of this age may be dropped, unless it is the newest of a job that exists."""
