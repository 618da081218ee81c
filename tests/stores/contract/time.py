"""What every store must do as time passes: silence, retention, the end of history."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Cancel, Create, Delete, Expire, JobState, Stall, Update, evolve
from jobstatus_grpc.stores.interface import Change, JobStore
from tests.support.stores import (
    NO_LIMIT,
    RETENTION,
    TIMEOUT,
    StandingClock,
    claim,
    done,
    due,
    end,
    following,
    last_heartbeats,
    on_store,
    report,
    start,
    sweep,
    trim,
)

S = JobState


class TimeContract:
    """Silence, retention, the end of history."""

    async def open(self, directory: Path, clock: StandingClock) -> JobStore:
        """Return a new store, or the one in `directory` again, with RETENTION and the clock's seconds."""
        raise NotImplementedError

    # Silence

    @on_store
    async def test_a_worker_that_is_silent_for_its_timeout_is_due_and_its_job_stalls(self, store, clock):
        await start(store, "a")
        clock.advance(seconds=29.9)
        assert await due(store) == []
        clock.advance(seconds=0.1)
        (job,) = await sweep(store)
        assert (job.stalled, job.state, job.revision) == (True, S.IN_PROGRESS, 2)

    @on_store
    async def test_stalls_are_in_the_history_and_stalled_jobs_are_counted(self, store, clock):
        for name in "abc":
            await start(store, name)
        clock.advance(seconds=30)
        await sweep(store)
        assert store.stalled_jobs() == 3
        entries = await store.transitions("default", "a")
        assert [(entry.from_state, entry.to_state, entry.reason) for entry in entries[-1:]] == [
            (S.IN_PROGRESS, S.IN_PROGRESS, "stalled: no update came for 30 s")
        ]
        await done(store, Update(id="a"))
        await done(store, Cancel(id="b", force=True))
        assert store.stalled_jobs() == 1
        await done(store, Update(id="c", changes={"state": S.SUCCEEDED}))
        assert store.stalled_jobs() == 0

    @on_store
    async def test_the_end_of_a_stall_is_in_the_history(self, store, clock):
        await start(store, "a", "b", "c")
        clock.advance(seconds=30)
        await sweep(store)
        await done(store, Update(id="a"), Update(id="b", changes={"reason": "back"}), end("c"))
        last = [(await store.transitions("default", name))[-1] for name in "abc"]
        assert [(entry.to_state, entry.reason) for entry in last] == [
            (S.IN_PROGRESS, "an update came: no longer stalled"), (S.IN_PROGRESS, "back"), (S.SUCCEEDED, "")
        ]  # fmt: skip

    @on_store
    async def test_a_job_says_when_its_worker_was_last_heard(self, store, clock):
        (job,) = await done(store, Create(id="a", state=S.IN_PROGRESS, heartbeat_timeout=TIMEOUT))
        assert job.last_heartbeat_at == job.created_at
        heard_at = clock.advance(seconds=20)
        await done(store, Update(id="a"))
        clock.advance(seconds=5)
        await done(store, Cancel(id="a"))
        assert await last_heartbeats(store) == {heard_at}
        assert await due(store) == []
        assert await last_heartbeats(store) == {heard_at}
        changed_at = clock.advance(seconds=1)
        await done(store, Update(id="a", changes={"progress": 1.0}))
        assert await last_heartbeats(store) == {changed_at}

    @on_store
    async def test_heartbeats_change_nothing_else(self, store, clock):
        (job,) = await done(store, Create(id="a", state=S.IN_PROGRESS, heartbeat_timeout=TIMEOUT))
        position = await store.position()
        heard_at = clock.advance(seconds=20)
        await done(store, Update(id="a"))
        assert await store.position() == position
        assert await store.get("default", "a") == evolve(job, {"last_heartbeat_at": heard_at})

    @on_store
    async def test_a_stall_keeps_the_last_heartbeat_also_at_its_end(self, store, clock):
        await start(store, "a")
        heard_at = clock.advance(seconds=20)
        await done(store, Update(id="a"))
        clock.advance(seconds=30)
        (stalled,) = await sweep(store)
        (ended,) = await done(store, Cancel(id="a", force=True))
        assert (stalled.last_heartbeat_at, ended.last_heartbeat_at) == (heard_at, heard_at)
        assert await last_heartbeats(store) == {heard_at}

    @pytest.mark.parametrize(
        "command", [Create(id="b", heartbeat_timeout=TIMEOUT), Create(id="b", state=S.IN_PROGRESS)]
    )
    @on_store
    async def test_a_job_without_a_start_or_a_timeout_has_no_last_heartbeat(self, store, clock, command):
        await done(store, command, Update(id="b", changes={"reason": "r"}), Update(id="b"))
        assert await last_heartbeats(store) == {None}

    @on_store
    async def test_without_its_timeout_a_job_has_no_last_heartbeat_any_more(self, store, clock):
        await start(store, "a")
        await done(store, Update(id="a"), Update(id="a", changes={"heartbeat_timeout": None}), Update(id="a"))
        assert await last_heartbeats(store) == {None}

    @on_store
    async def test_a_stalled_job_is_due_no_more(self, store, clock):
        await start(store, "a")
        clock.advance(seconds=30)
        await sweep(store)
        clock.advance(hours=1)
        assert await due(store) == []

    @pytest.mark.parametrize("changes", [{}, {"progress": 1.0}], ids=["a heartbeat", "a change"])
    @on_store
    async def test_an_update_starts_the_clock_anew(self, store, clock, changes):
        await start(store, "a")
        clock.advance(seconds=20)
        await done(store, Update(id="a", changes=changes))
        clock.advance(seconds=29.9)
        assert await due(store) == []
        clock.advance(seconds=0.1)
        assert await due(store) == [("Stall", "a")]

    @on_store
    async def test_an_update_of_a_stalled_job_clears_the_mark_and_it_may_stall_again(self, store, clock):
        await start(store, "a")
        clock.advance(seconds=30)
        await sweep(store)
        (cleared,) = await done(store, Update(id="a"))
        clock.advance(seconds=30)
        (again,) = await sweep(store)
        assert (cleared.stalled, cleared.revision, again.stalled, again.revision) == (False, 3, True, 4)

    @on_store
    async def test_neither_a_refused_update_nor_a_cancel_is_a_sign_of_life(self, store, clock):
        await start(store, "a")
        clock.advance(seconds=20)
        await store.commit([Update(id="a", attempt=7), Cancel(id="a")])
        clock.advance(seconds=10)
        assert await due(store) == [("Stall", "a")]

    @on_store
    async def test_silence_is_judged_again_inside_the_transaction(self, store, clock):
        await start(store, "a", "b")
        clock.advance(seconds=30)
        commands = await store.overdue(limit=NO_LIMIT)
        await done(store, Update(id="a"))
        jobs = await done(store, *commands, Update(id="b"), Stall(id="b"))
        assert [(job.id, job.stalled) for job in jobs] == [("a", False), ("b", True), ("b", False), ("b", False)]

    @on_store
    async def test_what_passes_before_the_commit_is_not_held_against_a_worker(self, store, clock):
        await start(store, "a")
        clock.advance(seconds=30)
        commands = await store.overdue(limit=NO_LIMIT, fail_stalled_after=TIMEOUT)
        clock.advance(hours=1)
        (job,) = await done(store, *commands)
        assert (job.state, job.stalled) == (S.IN_PROGRESS, True)

    @on_store
    async def test_clocks_that_are_restarted_take_back_what_was_due(self, store, clock):
        await start(store, "a")
        clock.advance(seconds=30)
        commands = await store.overdue(limit=NO_LIMIT)
        store.restart_stall_clocks()
        assert [job.stalled for job in await done(store, *commands)] == [False]

    @pytest.mark.parametrize("command", [end("a"), Update(id="a", changes={"heartbeat_timeout": None})])
    @on_store
    async def test_only_a_job_in_progress_with_a_timeout_is_due(self, store, clock, command):
        await start(store, "a")
        await done(store, command, Create(id="b", heartbeat_timeout=TIMEOUT), Create(id="c"), claim("c"))
        clock.advance(hours=1)
        assert await due(store) == []

    @on_store
    async def test_a_shorter_timeout_counts_at_once(self, store, clock):
        await start(store, "a")
        await done(store, Update(id="a", changes={"heartbeat_timeout": timedelta(seconds=2)}))
        clock.advance(seconds=2)
        assert await due(store) == [("Stall", "a")]

    @on_store
    async def test_what_was_due_and_could_not_be_committed_is_due_again(self, store, clock):
        await start(store, "a")
        clock.advance(seconds=30)
        assert await due(store) == [("Stall", "a")]
        clock.advance(seconds=10)
        assert await due(store) == [("Stall", "a")]

    @on_store
    async def test_as_many_are_due_at_once_as_are_asked_for_the_longest_silent_first(self, store, clock):
        await start(store, "a")
        clock.advance(seconds=1)
        await start(store, "b", "c")
        clock.advance(seconds=40)
        first = await store.overdue(limit=2)
        assert [command.id for command in first] == ["a", "b"]
        assert await due(store) == [("Stall", "c")]

    @on_store
    async def test_clocks_that_are_restarted_count_from_now(self, store, clock):
        await start(store, "a")
        clock.advance(seconds=29)
        store.restart_stall_clocks()
        clock.advance(seconds=29)
        assert await due(store) == []
        clock.advance(seconds=1)
        assert await due(store) == [("Stall", "a")]

    @on_store
    async def test_silence_before_clocks_were_restarted_fails_no_job(self, store, clock):
        await start(store, "a")
        clock.advance(hours=1)
        store.restart_stall_clocks()
        clock.advance(seconds=30)
        assert [job.state for job in await sweep(store, TIMEOUT)] == [S.IN_PROGRESS]

    @on_store
    async def test_a_job_that_stays_stalled_fails_if_the_server_is_configured_so(self, store, clock):
        await start(store, "a")
        clock.advance(seconds=30)
        await sweep(store, TIMEOUT)
        clock.advance(seconds=29)
        assert await due(store, TIMEOUT) == []
        clock.advance(seconds=1)
        (job,) = await sweep(store, TIMEOUT)
        assert (job.state, job.error and job.error.code, job.stalled) == (S.FAILED, 4, False)
        assert await due(store, TIMEOUT) == []

    @on_store
    async def test_a_job_fails_in_time_also_where_it_was_marked_late(self, store, clock):
        await start(store, "a")
        clock.advance(seconds=31)
        await sweep(store, timedelta(seconds=3))
        clock.advance(seconds=2)
        assert [job.state for job in await sweep(store, timedelta(seconds=3))] == [S.FAILED]

    @pytest.mark.parametrize("again", [[], [end("a"), Delete(id="a")]])
    @on_store
    async def test_a_position_before_the_removal_of_a_job_whose_id_was_used_anew_is_too_old(self, store, clock, again):
        await done(store, Create(id="a"), end("a"), Create(id="b"))
        before = await store.position()
        await done(store, Delete(id="a"))
        after = await store.position()
        clock.advance(hours=24)
        await done(store, Create(id="a"), *again)
        await done(store, end("b"))
        with pytest.raises(errors.StoreChangedError):
            await following(store, before)
        assert {change.id for change in await following(store, after)} == {"a", "b"}

    # Retention

    @on_store
    async def test_a_done_job_expires_after_its_retention(self, store, clock):
        _, ended, _ = await done(store, Create(id="a"), end("a"), Create(id="open"))
        clock.advance(days=RETENTION.days, seconds=-1)
        assert await due(store) == []
        clock.advance(seconds=1)
        position = await store.position()
        await sweep(store)
        assert await following(store, position) == [Change("default", "a", 3, None, ended)]
        with pytest.raises(errors.JobExpiredError):
            await store.get("default", "a")
        assert await due(store) == []

    @on_store
    async def test_few_jobs_expire_at_once_the_earliest_done_first(self, store, clock):
        for name in "cab":
            await done(store, Create(id=name), end(name))
            clock.advance(seconds=1)
        clock.advance(days=RETENTION.days)
        assert await store.overdue(limit=2) == [Expire(id="c"), Expire(id="a")]

    @on_store
    async def test_a_job_that_was_deleted_is_not_due(self, store, clock):
        await done(store, Create(id="a"), end("a"), Delete(id="a"))
        clock.advance(days=RETENTION.days)
        assert await due(store) == []

    # The end of history

    @on_store
    async def test_the_newest_change_of_a_job_that_exists_is_never_dropped(self, store, clock):
        position = await store.position()
        await done(store, Create(id="a"), Create(id="b"))
        jobs = await done(store, claim("a"), end("b"))
        await trim(store)
        clock.advance(days=30)
        await trim(store)
        assert [change.job for change in await following(store, position)] == jobs

    @on_store
    async def test_a_removal_is_known_for_24_hours(self, store, clock):
        await done(store, Create(id="a"), end("a"))
        position = await store.position()
        await done(store, Delete(id="a"))
        await trim(store)
        clock.advance(hours=23.9)
        await trim(store)
        assert [change.id for change in await following(store, position)] == ["a"]

    @on_store
    async def test_a_position_before_a_removal_that_was_dropped_is_too_old(self, store, clock):
        await done(store, Create(id="a"), end("a"), Create(id="b"))
        before = await store.position()
        await done(store, Delete(id="a"))
        after = await store.position()
        await done(store, claim("b"))
        await trim(store)
        clock.advance(hours=25)
        await trim(store)
        with pytest.raises(errors.StoreChangedError):
            await store.changes(before)
        assert [change.id for change in await following(store, after)] == ["b"]

    @on_store
    async def test_trimming_takes_small_steps_to_the_same_end(self, store, clock):
        ids = [f"{n}" for n in range(25)]
        await done(store, *(Create(id=job_id) for job_id in ids), *(end(job_id) for job_id in ids))
        before = await store.position()
        await done(store, *(Delete(id=job_id) for job_id in ids[::2]))
        await trim(store)
        clock.advance(hours=25)
        await trim(store, limit=3)
        await done(store, *(Create(id=job_id) for job_id in ids[::2]))
        with pytest.raises(errors.StoreChangedError):
            await store.changes(before)

    # Between two positions

    @on_store
    async def test_changes_up_to_a_position_are_returned_without_waiting(self, store):
        start_position = await store.position()
        await done(store, Create(id="a"), Create(id="b"))
        middle = await store.position()
        await done(store, claim("a"), Create(id="c"))
        batch = await store.changes(start_position, up_to=middle)
        assert ([change.id for change in batch.changes], batch.position) == (["b"], middle)
        assert ("default", "a") in batch.superseded, "its newest change follows"
        batch = await store.changes(middle, up_to=middle)
        assert (list(batch.changes), batch.position) == ([], middle)

    @on_store
    async def test_many_changes_of_few_jobs_come_in_few_batches(self, store):
        after = await store.position()
        for progress in range(1, 8):
            await done(store, *(report(f"{n}", progress) for n in range(300)))
        end_position = await store.position()
        await done(store, *(report(f"{n}", 50) for n in range(100)))
        batch = await store.changes(after, up_to=end_position)
        assert ([change.id for change in batch.changes], batch.position) == (
            [f"{n}" for n in range(100, 300)],
            end_position,
        )
        assert set(batch.superseded) == {("default", f"{n}") for n in range(100)}

    @on_store
    async def test_a_batch_of_changes_that_were_mostly_replaced_is_no_larger_than_others(self, store):
        after = await store.position()
        for progress in (1, 2):
            await done(store, *(report(f"{n}", progress) for n in range(1200)))
        batch = await store.changes(after)
        assert [change.id for change in batch.changes] == [f"{n}" for n in range(1000)]
        assert [change.id for change in await following(store, batch.position)] == [f"{n}" for n in range(1000, 1200)]

    @on_store
    async def test_many_changes_up_to_a_position_come_in_batches(self, store):
        after = await store.position()
        await done(store, *(Create(id=f"{n}") for n in range(2500)))
        end_position = await store.position()
        ids: list[str] = []
        while after != end_position:
            batch = await store.changes(after, up_to=end_position)
            ids += [change.id for change in batch.changes]
            after = batch.position
        assert ids == [f"{n}" for n in range(2500)]
