"""What every store must remember of requests: each has one effect, however often it is sent."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Cancel, Command, Create, Delete, Job, JobState, RequestId, Update
from jobstatus_grpc.job.ids import new_uuid7
from jobstatus_grpc.job.limits import MAX_REQUEST_AGE
from jobstatus_grpc.stores.interface import REQUEST_RETENTION, JobStore
from tests.support.stores import NO_LIMIT, TIMEOUT, StandingClock, claim, done, end, on_store, settled, start, trim

S = JobState


def report(number: int, *, payload: str = "h", made_at: datetime | None = None, **more: Any) -> Update:
    """A report of its own number, under a request_id of that; with `made_at`, under a UUIDv7."""
    value = f"r{number}" if made_at is None else new_uuid7(made_at)
    return Update(id="a", changes={"reason": f"{number}"}, request=RequestId(value, payload), **more)


async def refusal_of(store: JobStore, command: Command) -> type[object]:
    (outcome,) = await settled(store.commit([command]))
    assert not isinstance(outcome, Job)
    return type(outcome)


class RequestsContract:
    """Requests that are sent again."""

    async def open(self, directory: Path, clock: StandingClock) -> JobStore:
        """Return a new store, or the one in `directory` again, with RETENTION and the clock's seconds."""
        raise NotImplementedError

    @pytest.mark.parametrize("in_one_batch", [True, False])
    @on_store
    async def test_a_request_has_one_effect_though_500_others_came_after_it(self, store, in_one_batch):
        reports = [report(number) for number in range(500)]
        *_, newest = await done(store, Create(id="a"), *reports)
        repeats = [reports[:3]] if in_one_batch else [[repeat] for repeat in reports[:3]]
        for batch in repeats:
            assert await done(store, *batch) == [newest] * len(batch)
        assert await store.get("default", "a") == newest

    @on_store
    async def test_repeats_and_new_requests_in_one_batch_are_told_apart(self, store):
        await done(store, Create(id="a"), *map(report, range(30)))
        jobs = await done(store, report(30), report(3), report(31), report(30), report(29))
        assert [(job.revision, job.reason) for job in jobs] == [
            (32, "30"), (32, "30"), (33, "31"), (33, "31"), (33, "31"),
        ]  # fmt: skip

    @on_store
    async def test_a_request_that_changed_nothing_changes_nothing_later(self, store):
        (job,) = await done(store, Create(id="a", reason="1"))
        position = await store.position()
        assert await done(store, report(1)) == [job]
        assert await store.position() == position
        newest = (await done(store, report(2)))[-1]
        assert await done(store, report(1)) == [newest]

    @on_store
    async def test_a_forced_cancel_that_changed_nothing_ends_no_job_that_stalls_later(self, store, clock):
        forced = Cancel(id="a", force=True, request=RequestId("c", "h"))
        await start(store, "a")
        await done(store, Cancel(id="a"), forced)
        clock.advance(seconds=TIMEOUT.total_seconds())
        (stalled,) = await done(store, *await store.overdue(limit=NO_LIMIT))
        assert stalled.stalled
        assert await done(store, forced) == [stalled]

    @on_store
    async def test_a_heartbeat_is_not_remembered(self, store, clock):
        heartbeat = Update(id="a", request=RequestId("b", "h"))
        await start(store, "a")
        await done(store, heartbeat)
        clock.advance(seconds=TIMEOUT.total_seconds())
        stall = await store.overdue(limit=NO_LIMIT)
        assert [job.stalled for job in await done(store, *stall, heartbeat)] == [True, False]

    @on_store
    async def test_a_retried_claim_is_known_after_others(self, store):
        won = claim("a", request=RequestId("me", "h"))
        *_, newest = await done(store, Create(id="a"), won, *map(report, range(20)))
        assert await done(store, won) == [newest]
        assert await refusal_of(store, claim("a", request=RequestId("you", "h"))) is errors.StaleAttemptError

    @on_store
    async def test_an_old_request_id_with_another_payload_is_refused(self, store):
        await done(store, Create(id="a"), *map(report, range(20)))
        assert await refusal_of(store, report(1, payload="other")) is errors.RequestIdReusedError
        assert await refusal_of(store, Cancel(id="a", request=RequestId("r1", "c"))) is errors.RequestIdReusedError

    @on_store
    async def test_a_refused_request_is_not_remembered(self, store):
        await done(store, Create(id="a"))
        assert await refusal_of(store, report(1, expected_revision=7)) is errors.RevisionMismatchError
        assert [job.reason for job in await done(store, report(1))] == ["1"]

    @on_store
    async def test_a_done_job_knows_its_requests(self, store):
        *_, ended, _ = await done(
            store, Create(id="a"), report(1), end("a"), Update(id="a", changes={"state": S.SUCCEEDED})
        )
        assert await done(store, report(1)) == [ended]
        assert await refusal_of(store, report(2)) is errors.IllegalTransitionError

    @on_store
    async def test_requests_of_two_jobs_have_nothing_to_do_with_each_other(self, store):
        await done(store, *(Create(id=job_id, tenant=tenant) for tenant in ("default", "other") for job_id in "ab"))
        other = [report(1)._replace(id=job_id, tenant=tenant) for tenant in ("default", "other") for job_id in "ab"]
        assert [job.revision for job in await done(store, *other)] == [2] * 4

    @on_store
    async def test_a_request_is_remembered_for_its_time_and_forgotten_after_it(self, store, clock):
        *_, newest = await done(store, Create(id="a"), report(1), report(2))
        for age in (timedelta(minutes=2), REQUEST_RETENTION - timedelta(minutes=3)):
            clock.advance(seconds=age.total_seconds())
            await trim(store)
            assert await done(store, report(1)) == [newest]
        clock.advance(minutes=5)
        await trim(store)
        assert [job.revision for job in await done(store, report(1))] == [newest.revision + 1]

    @on_store
    async def test_forgetting_takes_as_many_steps_as_there_are_requests(self, store, clock):
        await done(store, Create(id="a"), *map(report, range(25)))
        clock.advance(minutes=2)
        await done(store, report(25))
        await trim(store)
        clock.advance(seconds=REQUEST_RETENTION.total_seconds())
        assert [await store.trim(limit=10) for _ in range(3)][:2] == [True, True]
        *_, newest = await done(store, *map(report, range(26)))
        assert newest.reason == "25"

    @on_store
    async def test_a_uuid_that_is_older_than_the_memory_is_refused_unless_it_is_known(self, store, clock):
        known, unknown = (report(number, made_at=clock.now) for number in range(2))
        *_, job = await done(store, Create(id="a"), known)
        clock.advance(seconds=MAX_REQUEST_AGE.total_seconds() + 1)
        assert await done(store, known) == [job]
        assert await refusal_of(store, unknown) is errors.RequestIdTooOldError
        assert await store.get("default", "a") == job

    @on_store
    async def test_an_old_uuid_creates_no_job(self, store, clock):
        request = RequestId(new_uuid7(clock.now - timedelta(hours=25)), "h")
        created: list[Command] = [Create(id="a", request=request), Update(id="b", allow_missing=True, request=request)]
        assert [await refusal_of(store, command) for command in created] == [errors.RequestIdTooOldError] * 2
        assert await refusal_of(store, Update(id="c", request=request)) is errors.JobNotFoundError

    @on_store
    async def test_a_creation_is_known_as_long_as_its_job(self, store, clock):
        create = Create(id="a", request=RequestId(new_uuid7(clock.now), "h"))
        (job,) = await done(store, create)
        clock.advance(days=30)
        await trim(store)
        assert await done(store, create) == [job]

    @on_store
    async def test_a_new_job_under_a_used_id_knows_no_request_of_the_old_one(self, store, clock):
        await done(store, Create(id="a"), report(1), end("a"), Delete(id="a"))
        clock.advance(hours=24)
        jobs = await done(store, Create(id="a"), report(1), report(1))
        assert [job.revision for job in jobs] == [1, 2, 2]
