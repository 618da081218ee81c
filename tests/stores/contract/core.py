"""What every store must do with commits, reads, history, the feed and its end."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Command, Create, Delete, Expire, Job, JobFilter, JobState, RequestId, Transition, Update
from jobstatus_grpc.job.limits import TRANSITIONS_KEPT
from jobstatus_grpc.stores.interface import Change, CommitResult, JobStore
from tests.stores.contract.stored_jobs import REQUESTS, STORED
from tests.support.stores import RETENTION, StandingClock, claim, done, end, following, on_store

S = JobState


class CoreContract:
    """Commits, reads, history, feed, end."""

    async def open(self, directory: Path, clock: StandingClock) -> JobStore:
        """Return a new store, or the one in `directory` again, with RETENTION."""
        raise NotImplementedError

    # commit

    @pytest.mark.parametrize("name", STORED)
    @pytest.mark.parametrize("in_one_batch", [True, False])
    @on_store
    async def test_a_job_reads_back_as_it_was_answered(self, store, clock, name, in_one_batch):
        commands = STORED[name]
        batches = [commands] if in_one_batch else [[command] for command in commands]
        for batch in batches:
            answered = (await done(store, *batch))[-1]
            clock.advance(seconds=1.000001)
        assert await store.get("default", "a") == answered

    @on_store
    async def test_a_refused_command_leaves_no_trace_and_stops_no_other(self, store):
        before = await store.position()
        commands = [Create(id="a"), Create(id="a"), claim("b"), Update(id="a", attempt=5), claim("a")]
        outcomes = (await store.commit(commands)).outcomes
        kinds = [type(outcome) for outcome in outcomes]
        assert kinds == [Job, errors.JobAlreadyExistsError, errors.JobNotFoundError, errors.StaleAttemptError, Job]
        assert [change.id for change in await following(store, before)] == ["a"]
        assert await store.get("default", "a") == outcomes[-1]

    @on_store
    async def test_commands_on_one_job_see_the_ones_before(self, store):
        jobs = await done(store, Create(id="a"), claim("a"), Update(id="a", changes={"progress": 5.0}), end("a"))
        assert [job.revision for job in jobs] == [1, 2, 3, 4]
        assert [job.state for job in jobs] == [S.PENDING, S.IN_PROGRESS, S.IN_PROGRESS, S.SUCCEEDED]

    @on_store
    async def test_a_batch_of_nothing_is_answered_with_nothing(self, store):
        assert [*(await store.commit([])).outcomes] == []

    @on_store
    async def test_a_large_batch_is_written_whole(self, store):
        await done(store, *(Create(id=f"{n}") for n in range(1234)))
        jobs = await done(store, *(claim(f"{n}") for n in range(1234)))
        assert [await store.get("default", job.id) for job in jobs] == jobs

    @on_store
    async def test_a_command_that_changes_nothing_leaves_the_position(self, store):
        (job,) = await done(store, Create(id="a", request=REQUESTS[0]))
        position = await store.position()
        same = await done(store, Create(id="a", request=REQUESTS[0]), Update(id="a"))
        assert same == [job, job]
        assert await store.position() == position

    @on_store
    async def test_instants_come_from_the_store_s_clock_and_never_go_back(self, store, clock):
        (created,) = await done(store, Create(id="a"))
        clock.advance(hours=-1)
        (ended,) = await done(store, end("a"))
        assert created.created_at == clock.now + timedelta(hours=1)
        assert ended.updated_at == created.updated_at
        assert ended.expires_at == created.created_at + RETENTION

    @on_store
    async def test_a_request_that_was_reused_is_known_in_a_later_batch(self, store):
        await done(store, Create(id="a"), claim("a", request=REQUESTS[1]))
        assert (await done(store, claim("a", request=REQUESTS[1])))[0].attempt == 1
        (refusal,) = (await store.commit([claim("a", request=RequestId(REQUESTS[1].value, "another"))])).outcomes
        assert isinstance(refusal, errors.RequestIdReusedError)

    @on_store
    async def test_a_tenant_sees_its_own_jobs_only(self, store):
        await done(store, Create(id="a", tenant="one"), Create(id="b", tenant="two"))
        for call in (store.get("two", "a"), store.transitions("one", "b")):
            with pytest.raises(errors.JobNotFoundError):
                await call
        (refusal,) = (await store.commit([Update(id="b", tenant="one")])).outcomes
        assert isinstance(refusal, errors.JobNotFoundError)

    @on_store
    async def test_commits_at_the_same_time_take_turns(self, store):
        await done(store, Create(id="a"))
        updates = [done(store, Update(id="a", changes={"reason": f"{n}"})) for n in range(20)]
        outcomes = await asyncio.gather(*updates, done(store, Create(id="b")))
        assert sorted(job.revision for (job,) in outcomes[:-1]) == list(range(2, 22))

    @on_store
    async def test_a_cancelled_commit_takes_effect_whole_or_not_at_all(self, store):
        await done(store, Create(id="a"))
        task = asyncio.create_task(store.commit([claim("a"), Create(id="b")]))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        commands = [Update(id="b"), Update(id="a", changes={"reason": "after"})]
        probe, job = (await store.commit(commands)).outcomes
        assert (job.attempt == 1) is isinstance(probe, Job)
        assert await store.get("default", "a") == job

    @on_store
    async def test_a_job_that_the_caller_does_not_see_is_not_found_and_neither_is_a_removed_one(self, store):
        core = JobFilter(labels={"team": "core"})
        ours, *_ = await done(store, Create(id="a", labels={"team": "core"}), Create(id="b"))
        await done(store, Create(id="c", labels={"team": "core"}), end("c"), Delete(id="c"))
        assert await store.get("default", "a", only=core) == ours
        for job_id in ("b", "c", "d"):
            with pytest.raises(errors.JobNotFoundError, match=f"no job has the id '{job_id}'") as refusal:
                await store.get("default", job_id, only=core)
            assert type(refusal.value) is errors.JobNotFoundError

    @on_store
    async def test_a_command_sees_the_limits_of_its_caller_in_the_same_transaction(self, store):
        core = JobFilter(labels={"team": "core"})
        await done(store, Create(id="a", labels={"team": "core"}))
        late, away = Update(id="a", only=core), Update(id="a", changes={"labels": {}})
        before, moved, after, created = (await store.commit([late, away, late, Create(id="b", only=core)])).outcomes
        assert (before.revision, moved.revision) == (1, 2)
        assert (type(after), after.message) == (errors.JobNotFoundError, "no job has the id 'a'")
        assert isinstance(created, errors.PermissionDeniedError)
        with pytest.raises(errors.JobNotFoundError):
            await store.get("default", "b")

    # get

    @on_store
    async def test_an_unknown_job_is_not_found(self, store):
        with pytest.raises(errors.JobNotFoundError):
            await store.get("default", "a")
        with pytest.raises(errors.JobNotFoundError):
            await store.transitions("default", "a")

    @on_store
    async def test_a_deleted_job_has_expired_and_its_id_is_not_free(self, store):
        ended, answer = (await done(store, Create(id="a"), end("a"), Delete(id="a")))[1:]
        assert answer == ended
        for call in (store.get("default", "a"), store.transitions("default", "a")):
            with pytest.raises(errors.JobExpiredError):
                await call
        create, update = (await store.commit([Create(id="a"), Update(id="a", allow_missing=True)])).outcomes
        assert isinstance(create, errors.JobAlreadyExistsError)
        assert isinstance(update, errors.JobExpiredError)

    @pytest.mark.parametrize(("age", "error"), [(23.9, errors.JobExpiredError), (24, errors.JobNotFoundError)])
    @on_store
    async def test_a_tombstone_counts_for_24_hours(self, store, clock, age, error):
        await done(store, Create(id="a"), end("a"))
        await done(store, Delete(id="a"))
        clock.advance(hours=age)
        with pytest.raises(error):
            await store.get("default", "a")

    @on_store
    async def test_an_id_that_is_free_again_names_a_new_job(self, store, clock):
        await done(store, Create(id="a"), claim("a"), end("a"), Delete(id="a"))
        clock.advance(hours=24)
        (job,) = await done(store, Create(id="a", name="new"))
        assert await store.get("default", "a") == job
        assert [entry.revision for entry in await store.transitions("default", "a")] == [1]
        await done(store, end("a"), Delete(id="a"))
        clock.advance(hours=23)
        with pytest.raises(errors.JobExpiredError):
            await store.get("default", "a")

    @on_store
    async def test_a_job_made_and_deleted_in_one_batch_leaves_a_tombstone(self, store):
        before = await store.position()
        _, ended, _ = await done(store, Create(id="a"), end("a"), Delete(id="a"))
        assert await following(store, before) == [Change("default", "a", 3, None, ended)]
        with pytest.raises(errors.JobExpiredError):
            await store.get("default", "a")

    # transitions

    @on_store
    async def test_the_history_has_each_transition_oldest_first(self, store, clock):
        create = Create(id="a", reason="asked", actor="x")
        await done(store, create, Create(id="b"), claim("a", actor="w"), Update(id="a", changes={"progress": 1.0}))
        at = clock.now
        clock.advance(seconds=1)
        await done(store, end("a", S.FAILED, reason="broke"))
        rows = [
            (None, S.PENDING, "asked", at, 0, "x", 1),
            (S.PENDING, S.IN_PROGRESS, "", at, 1, "w", 2),
            (S.IN_PROGRESS, S.FAILED, "broke", clock.now, 1, "", 4),
        ]
        names = ("from_state", "to_state", "reason", "transitioned_at", "attempt", "actor", "revision")
        history = [Transition(**dict[str, Any](zip(names, row, strict=True))) for row in rows]
        assert await store.transitions("default", "a") == history
        assert await store.transitions("default", "a", after_revision=1, limit=1) == history[1:2]
        assert await store.transitions("default", "a", after_revision=4) == []

    @pytest.mark.parametrize("in_one_batch", [True, False])
    @on_store
    async def test_the_newest_1000_transitions_are_kept(self, store, in_one_batch):
        commands: list[Command] = [Create(id="b"), Create(id="a"), *(claim("a", attempt) for attempt in range(1, 1100))]
        for batch in [commands] if in_one_batch else [commands[:600], commands[600:1098], commands[1098:]]:
            await done(store, *batch)
        history = await store.transitions("default", "a", limit=2000)
        assert [entry.revision for entry in history] == list(range(1101 - TRANSITIONS_KEPT, 1101))
        assert len(await store.transitions("default", "b")) == 1

    # The feed

    @on_store
    async def test_the_feed_begins_at_its_position(self, store):
        await done(store, Create(id="a"))
        position = await store.position()
        (job,) = await done(store, Create(id="b"))
        assert await following(store, position) == [Change("default", "b", 1, job)]

    @on_store
    async def test_changes_waits_for_the_next_commit(self, store):
        position = await store.position()
        waits = [asyncio.create_task(store.changes(position)) for _ in range(2)]
        await asyncio.sleep(0)
        (job,) = await done(store, Create(id="a"))
        for batch in await asyncio.gather(*waits):
            assert list(batch.changes) == [Change("default", "a", 1, job)]
            assert batch.position == await store.position()

    @on_store
    async def test_a_cancelled_wait_loses_nothing(self, store):
        position = await store.position()
        task = asyncio.create_task(store.changes(position))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await done(store, Create(id="a"))
        assert [change.id for change in (await store.changes(position)).changes] == ["a"]

    @on_store
    async def test_a_job_is_in_a_batch_once_with_its_newest_state(self, store):
        position = await store.position()
        await done(store, Create(id="a"), Create(id="b"))
        newest = (await done(store, claim("a"), end("a")))[-1]
        changes = (await store.changes(position)).changes
        assert [(change.id, change.revision) for change in changes] == [("b", 1), ("a", 3)]
        assert changes[1].job == newest

    @on_store
    async def test_a_deleted_job_is_in_the_feed_with_its_last_revision_plus_one(self, store):
        _, ended = await done(store, Create(id="a"), end("a"))
        position = await store.position()
        await done(store, Delete(id="a"))
        assert await following(store, position) == [Change("default", "a", 3, None, ended)]

    @pytest.mark.parametrize("is_expired", [False, True])
    @pytest.mark.parametrize("name", ["a failure", "a success", "a cancelled job"])
    @on_store
    async def test_a_removal_has_the_job_as_it_ended(self, store, clock, name, is_expired):
        position = await store.position()
        ended = (await done(store, *STORED[name]))[-1]
        clock.advance(days=8)
        await done(store, Expire(id="a") if is_expired else Delete(id="a"))
        (change,) = await following(store, position)
        assert change == Change("default", "a", ended.revision + 1, None, ended)

    @on_store
    async def test_every_change_is_in_one_batch_however_many_there_are(self, store):
        position = await store.position()
        await done(store, *(Create(id=f"{n}") for n in range(2500)))
        changes = await following(store, position)
        assert [change.id for change in changes] == [f"{n}" for n in range(2500)]

    @pytest.mark.parametrize("forge", ["{}9", "9{}", "", "-", "x-1", "{}-1", "{}²"])
    @on_store
    async def test_a_position_of_elsewhere_is_refused(self, store, forge):
        await done(store, Create(id="a"))
        with pytest.raises(errors.StoreChangedError):
            await store.changes(forge.format(await store.position()))

    @on_store
    async def test_every_store_has_an_incarnation_of_its_own(self, store, tmp_path_factory):
        other = await self.open(tmp_path_factory.mktemp("other"), StandingClock())
        position = await other.position()
        await other.close()
        with pytest.raises(errors.StoreChangedError):
            await store.changes(position)

    # Closing

    @on_store
    async def test_a_store_is_writable(self, store):
        assert store.writable

    @on_store
    async def test_a_closed_store_refuses_everything(self, store):
        position = await store.position()
        wait = asyncio.create_task(store.changes(position))
        await asyncio.sleep(0)
        await store.close()
        calls = [wait, store.commit([Create(id="a")]), store.commit([]), store.get("default", "a"), store.position()]
        calls += [store.transitions("default", "a"), store.changes(position)]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, errors.StoreUnavailableError)
        assert not store.writable

    @on_store
    async def test_closing_finishes_the_running_commit(self, store):
        commits = [asyncio.create_task(store.commit([Create(id=f"{n}")])) for n in range(3)]
        await asyncio.sleep(0)
        await asyncio.gather(store.close(), store.close())
        first, *others = await asyncio.gather(*commits, return_exceptions=True)
        assert isinstance(first, CommitResult)
        assert all(isinstance(other, (CommitResult, errors.StoreUnavailableError)) for other in others)

    @on_store
    async def test_closed_returns_none_if_nothing_broke(self, store):
        wait = asyncio.create_task(store.closed())
        await asyncio.sleep(0)
        assert not wait.done()
        await store.close()
        assert await wait is None
        assert await store.closed() is None
