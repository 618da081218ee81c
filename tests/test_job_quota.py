"""The number of jobs that a tenant may have, by an injected clock."""

from __future__ import annotations

import asyncio

import pytest

from jobstatus_grpc.errors import (
    JobAlreadyExistsError,
    JobNotFoundError,
    JobStatusError,
    StoreFullError,
    StoreUnavailableError,
    TooManyJobsError,
)
from jobstatus_grpc.job import Create, Delete, RequestId, Update
from jobstatus_grpc.job_quota import COUNT_AGAIN_SECONDS, COUNT_FULL_AGAIN_SECONDS, JobQuota
from jobstatus_grpc.server.limits import CallerLimits, LimitRules
from jobstatus_grpc.stores.memory import MemoryStore
from tests.support.loop import on_a_loop
from tests.support.stores import done, end


class CountedStore(MemoryStore):
    """Counts how often jobs are counted, and may be away, or full. A count goes on once `may_count` is set."""

    counts = 0
    is_away = is_full = False

    def __init__(self):
        super().__init__()
        self.may_count = asyncio.Event()
        self.may_count.set()

    async def count(self, tenant, *, at_most):
        self.counts += 1
        if self.is_away:
            raise StoreUnavailableError
        await self.may_count.wait()
        return await super().count(tenant, at_most=at_most)

    async def commit(self, commands):
        if self.is_full:
            raise StoreFullError
        return await super().commit(commands)


class Tenant:
    """Creates and deletes jobs within a limit."""

    def __init__(self, limit):
        self.store, self.now = CountedStore(), 1000.0
        self.refused: list[tuple[str, int]] = []
        self.limit = limit
        self._quota = JobQuota(
            self.store,
            lambda tenant: self.limit,
            refuse=self._refuse,
            clock=lambda: self.now,
        )

    def _refuse(self, tenant, limit):
        self.refused.append((tenant, limit))
        return CallerLimits(LimitRules()).refuse_job(tenant, limit)

    async def create(self, *ids):
        for id in ids:
            await self.submit(Create(id=id))

    async def update(self, *ids):
        """Update jobs in one batch, and create those that are missing; return the outcomes."""
        return await self._quota.submit([Update(id=id, allow_missing=True) for id in ids], self._commit)

    async def submit(self, command):
        (outcome,) = await self._quota.submit([command], self._commit)
        if isinstance(outcome, JobStatusError):
            raise outcome

    async def _commit(self, commands):
        return list((await self.store.commit(commands)).outcomes)

    async def settle(self):
        await asyncio.wait(self._quota._countings)


@on_a_loop
async def test_a_tenant_gets_as_many_jobs_as_its_limit_and_they_are_counted_once():
    tenant = Tenant(3)
    await tenant.create("a", "b", "c")
    assert tenant.store.counts == 1
    with pytest.raises(TooManyJobsError, match="the tenant default has reached its limit of 3 jobs"):
        await tenant.create("d")
    assert tenant.refused == [("default", 3)]


@on_a_loop
async def test_a_deletion_makes_room_soon():
    tenant = Tenant(1)
    await tenant.create("a")
    await done(tenant.store, end("a"), Delete(id="a"))
    with pytest.raises(TooManyJobsError):
        await tenant.create("b")
    tenant.now += COUNT_FULL_AGAIN_SECONDS
    await tenant.create("b")


@on_a_loop
async def test_a_full_tenant_is_not_counted_for_each_call():
    tenant = Tenant(1)
    await tenant.create("a")
    for _ in range(100):
        with pytest.raises(TooManyJobsError):
            await tenant.create("b")
    assert tenant.store.counts == 1


@on_a_loop
async def test_what_others_create_is_counted_after_a_while_and_creations_do_not_wait_for_it():
    tenant = Tenant(5)
    await tenant.create("a")
    await done(tenant.store, *(Create(id=id) for id in "bcd"))
    tenant.now += COUNT_AGAIN_SECONDS
    await tenant.create("e")
    await tenant.settle()
    with pytest.raises(TooManyJobsError):
        await tenant.create("f")


@on_a_loop
async def test_a_repetition_is_let_through_and_a_limit_that_is_raised_holds_at_once():
    tenant = Tenant(1)
    await tenant.create("a")
    with pytest.raises(JobAlreadyExistsError):
        await tenant.create("a")
    tenant.limit = 2
    await tenant.create("b")


@on_a_loop
async def test_a_creation_that_is_sent_again_takes_one_place():
    tenant = Tenant(2)
    for _ in range(3):
        await tenant.submit(Create(id="a", request=RequestId("r", "hash")))
    await tenant.create("b")
    with pytest.raises(TooManyJobsError):
        await tenant.create("c")


@on_a_loop
async def test_while_the_store_is_away_the_old_count_is_used():
    tenant = Tenant(2)
    await tenant.create("a")
    tenant.store.is_away = True
    tenant.now += COUNT_AGAIN_SECONDS
    await tenant.create("b")
    await tenant.settle()


@on_a_loop
async def test_an_update_that_may_create_its_job_counts_once_it_does():
    tenant = Tenant(2)
    await tenant.create("a")
    await tenant.update("a")
    await tenant.update("b")
    with pytest.raises(TooManyJobsError):
        await tenant.submit(Update(id="c", allow_missing=True))
    assert [outcome.id for outcome in await tenant.update("b")] == ["b"]


@on_a_loop
async def test_of_a_batch_the_items_without_room_are_refused_and_a_job_takes_one_place():
    tenant = Tenant(2)
    await tenant.create("a")
    outcomes = await tenant.update("a", "b", "c", "b", "a")
    assert [getattr(outcome, "id", None) for outcome in outcomes] == ["a", "b", None, "b", "a"]
    assert isinstance(outcomes[2], TooManyJobsError)
    assert tenant.refused == [("default", 2)]


@on_a_loop
async def test_an_update_that_must_find_its_job_is_not_refused_for_the_quota():
    tenant = Tenant(1)
    await tenant.create("a")
    with pytest.raises(JobNotFoundError):
        await tenant.submit(Update(id="b"))


@on_a_loop
async def test_a_creation_that_is_refused_or_fails_gives_its_place_back():
    tenant = Tenant(2)
    await tenant.create("a")
    for _ in range(3):
        with pytest.raises(JobAlreadyExistsError):
            await tenant.create("a")
        tenant.store.is_full = True
        with pytest.raises(StoreFullError):
            await tenant.create("b")
        tenant.store.is_full = False
    await tenant.create("b")
    assert tenant.store.counts == 1


@on_a_loop
async def test_a_creation_that_is_refused_while_jobs_are_counted_leaves_the_count_right():
    tenant = Tenant(3)
    await tenant.create("a")
    tenant.now += COUNT_AGAIN_SECONDS
    tenant.store.may_count.clear()
    for _ in range(3):
        with pytest.raises(JobAlreadyExistsError):
            await tenant.create("a")
    tenant.store.may_count.set()
    await tenant.settle()
    await tenant.create("b", "c")
    with pytest.raises(TooManyJobsError):
        await tenant.create("d")
