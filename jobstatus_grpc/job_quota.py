"""The number of jobs that a tenant may have: refuses the creation of more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from jobstatus_grpc.errors import JobExpiredError, JobNotFoundError, TooManyJobsError
from jobstatus_grpc.stores.interface import JobStore

COUNT_AGAIN_SECONDS = 5.0
"""Age from which a tenant's jobs are counted again. In between, creations are added, and removals are not known."""

COUNT_FULL_AGAIN_SECONDS = 1.0
"""The same for a tenant without room, so that a deletion makes room soon."""

MAX_COUNTS = 10_000
"""Tenants whose count is remembered."""


NEVER = float("-inf")


class _Count:
    def __init__(self) -> None:
        self.jobs = 0
        self.created = 0
        self.counted_at = NEVER
        self.counting = asyncio.Lock()


class JobQuota:
    """Refuses new jobs of a tenant that has as many as it may. Belongs to one event loop.

    The count is the store's, up to COUNT_AGAIN_SECONDS old, plus what was created here since. So a tenant may get more
    jobs than its limit by those that are being created while it is counted, and that other processes create until then.
    """

    def __init__(
        self,
        store: JobStore,
        max_jobs: Callable[[str], int | None],
        *,
        on_refusal: Callable[[str, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_jobs` returns a tenant's limit, None: any number. `on_refusal` is called with tenant and limit."""
        self._store = store
        self._max_jobs = max_jobs
        self._on_refusal = on_refusal
        self._now = clock
        self._counts: dict[str, _Count] = {}
        self._countings: set[asyncio.Task[None]] = set()

    async def require_room(self, tenant: str, job_id: str) -> None:
        """Count a job that is to be created.

        Raises:
            TooManyJobsError: the tenant has no room. Not if the job exists: the creation is a repetition, or refused.
            StoreUnavailableError: the jobs cannot be counted.
        """
        limit = self._max_jobs(tenant)
        if limit is None:
            return
        if len(self._counts) > MAX_COUNTS:
            self._counts.clear()
        count = self._counts.setdefault(tenant, _Count())
        if count.jobs >= limit or count.counted_at == NEVER:
            await self._count_if_older(count, tenant, limit, COUNT_FULL_AGAIN_SECONDS)
        elif self._now() - count.counted_at >= COUNT_AGAIN_SECONDS and not count.counting.locked():
            # Nothing waits for it: with a million jobs it takes a fifth of a second.
            counting = asyncio.create_task(self._count_if_older(count, tenant, limit, COUNT_AGAIN_SECONDS))
            self._countings.add(counting)
            counting.add_done_callback(self._counted)
        if count.jobs < limit:
            count.jobs += 1
            count.created += 1
        elif not await self._exists(tenant, job_id):
            self._on_refusal(tenant, limit)
            text = f"the tenant {tenant} has reached its limit of {limit} jobs. Delete some, or wait until some expire"
            raise TooManyJobsError(text, limit="jobs", scope="tenant", value=str(limit))

    async def _count_if_older(self, count: _Count, tenant: str, limit: int, seconds: float) -> None:
        async with count.counting:
            if self._now() - count.counted_at >= seconds:
                created_before = count.created
                count.jobs = await self._store.count(tenant, at_most=limit) + count.created - created_before
                count.counted_at = self._now()

    def _counted(self, counting: asyncio.Task[None]) -> None:
        self._countings.discard(counting)
        if not counting.cancelled():
            counting.exception()  # the old count stays in use, and the next creation starts another

    async def _exists(self, tenant: str, job_id: str) -> bool:
        try:
            await self._store.get(tenant, job_id)
        except JobExpiredError:
            return True  # refused with a better reason
        except JobNotFoundError:
            return False
        return True
