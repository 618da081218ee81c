"""The number of jobs that a tenant may have, by an injected clock."""

from __future__ import annotations

import asyncio

import pytest

from jobstatus_grpc.errors import StoreUnavailableError, TooManyJobsError
from jobstatus_grpc.job import Create, Delete
from jobstatus_grpc.job_quota import COUNT_AGAIN_SECONDS, COUNT_FULL_AGAIN_SECONDS, JobQuota
from jobstatus_grpc.stores.memory import MemoryStore
from tests.support.loop import on_a_loop
from tests.support.stores import done, end


class CountedStore(MemoryStore):
    """Counts how often jobs are counted, and may be away."""

    counts = 0
    is_away = False

    async def count(self, tenant, *, at_most):
        self.counts += 1
        if self.is_away:
            raise StoreUnavailableError
        return await super().count(tenant, at_most=at_most)


class Tenant:
    """Creates and deletes jobs within a limit."""

    def __init__(self, limit):
        self.store, self.now = CountedStore(), 1000.0
        self.refused: list[tuple[str, int]] = []
        self.limit = limit
        self._quota = JobQuota(
            self.store,
            lambda tenant: self.limit,
            on_refusal=lambda *refusal: self.refused.append(refusal),
            clock=lambda: self.now,
        )

    async def create(self, *ids):
        for id in ids:
            await self._quota.require_room("default", id)
            await self.store.commit([Create(id=id)])

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
    await tenant._quota.require_room("default", "a")
    tenant.limit = 2
    await tenant.create("b")


@on_a_loop
async def test_while_the_store_is_away_the_old_count_is_used():
    tenant = Tenant(2)
    await tenant.create("a")
    tenant.store.is_away = True
    tenant.now += COUNT_AGAIN_SECONDS
    await tenant.create("b")
    await tenant.settle()
