"""A clock, an event loop for each test, and short forms of store calls, for tests of stores."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from jobstatus_grpc.job import Command, Create, Job, JobFilter, JobState, Outcome, Update
from jobstatus_grpc.stores.interface import Change, CommitResult, JobStore, Page

RETENTION = timedelta(days=7)
ALL = JobFilter()
TIMEOUT = timedelta(seconds=30)
NO_LIMIT = 1000


class StandingClock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, 12, 0, 0, 250, tzinfo=timezone.utc)
        """A test that sets it leaves `seconds` as it is."""
        self._seconds = self.now.timestamp()

    def __call__(self) -> datetime:
        return self.now

    def seconds(self) -> float:
        return self._seconds

    def advance(self, **duration: float) -> datetime:
        self.now += timedelta(**duration)
        self._seconds += timedelta(**duration).total_seconds()
        return self.now


def on_store(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run `test(self, store, …)` on a new store and loop; it may also ask for `clock`, and for fixtures."""

    def run(self: Any, tmp_path: Path, **arguments: Any) -> None:
        async def main() -> None:
            clock = StandingClock()
            store = await self.open(tmp_path, clock)
            try:
                await test(self, store, **arguments, **({"clock": clock} if "clock" in wanted else {}))
            finally:
                await store.close()

        asyncio.run(main())

    wanted = inspect.signature(test).parameters
    fixtures = [parameter for name, parameter in wanted.items() if name not in ("store", "clock")]
    tmp_path = inspect.Parameter("tmp_path", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    setattr(run, "__signature__", inspect.Signature([*fixtures, tmp_path]))  # noqa: B010
    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def done(store: JobStore, *commands: Command) -> list[Job]:
    """Commit `commands` and return the jobs; none may be refused."""
    outcomes = await settled(store.commit(commands))
    refusals = [outcome for outcome in outcomes if not isinstance(outcome, Job)]
    assert not refusals, refusals
    return [outcome for outcome in outcomes if isinstance(outcome, Job)]


async def until_writable(store: JobStore) -> None:
    while not store.writable:  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.01)


async def settled(commit: Awaitable[CommitResult]) -> list[Outcome]:
    """Return the outcomes of a commit, with those that were deferred because another process held the job."""
    result = await commit
    outcomes = list(result.outcomes)
    for index, outcome in result.deferred.items():
        outcomes[index] = await outcome
    return outcomes


async def last_heartbeats(store: JobStore) -> set[datetime | None]:
    """Return the last_heartbeat_at of all jobs, listed and read one by one."""
    listed = (await store.page("default", JobFilter(), limit=100)).jobs
    return {job.last_heartbeat_at for job in [*listed, *[await store.get("default", job.id) for job in listed]]}


async def following(store: JobStore, after: str) -> list[Change]:
    """Return all changes after a position, oldest batch first."""
    changes: list[Change] = []
    while after != await store.position():
        batch = await store.changes(after)
        changes += batch.changes
        after = batch.position
    return changes


def claim(job_id: str, attempt: int = 1, **more: Any) -> Update:
    return Update(id=job_id, changes={"state": JobState.IN_PROGRESS}, attempt=attempt, **more)


def report(job_id: str, progress: float) -> Update:
    return Update(id=job_id, changes={"progress": progress}, allow_missing=True)


def end(job_id: str, state: JobState = JobState.SUCCEEDED, **changes: Any) -> Update:
    return Update(id=job_id, changes={"state": state, **changes})


async def pages_of(store: JobStore, job_filter: JobFilter = ALL, *, limit: int = 3, tenant="default") -> list[Page]:
    """All pages of a list."""
    pages = [await store.page(tenant, job_filter, limit=limit)]
    while pages[-1].next_cursor:
        pages.append(await store.page(tenant, job_filter, limit=limit, cursor=pages[-1].next_cursor))
    return pages


async def jobs_of(store: JobStore, job_filter: JobFilter = ALL, **more) -> list[Job]:
    """The jobs of all pages of a list."""
    return [job for page in await pages_of(store, job_filter, **more) for job in page.jobs]


async def ids_of(store: JobStore, job_filter: JobFilter = ALL, **more) -> list[str]:
    """The ids of all pages of a list."""
    return [job.id for job in await jobs_of(store, job_filter, **more)]


async def due(store: JobStore, fail_after: timedelta | None = None) -> list[tuple[str, str]]:
    """The overdue commands, by kind and id."""
    commands = await store.overdue(limit=NO_LIMIT, fail_stalled_after=fail_after)
    return [(type(command).__name__, command.id) for command in commands]


async def sweep(store: JobStore, fail_after: timedelta | None = None) -> list[Job]:
    """Commit the overdue commands."""
    return await done(store, *await store.overdue(limit=NO_LIMIT, fail_stalled_after=fail_after))


async def start(store: JobStore, *ids: str) -> None:
    """Bring jobs IN_PROGRESS, with TIMEOUT."""
    await done(store, *(Create(id=job_id, heartbeat_timeout=TIMEOUT, state=JobState.IN_PROGRESS) for job_id in ids))


async def trim(store: JobStore, limit: int = NO_LIMIT) -> None:
    """Trim until nothing is left to trim."""
    while await store.trim(limit=limit):
        pass
