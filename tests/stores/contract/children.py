"""What every store must do with the numbers of children that it shows with a parent."""

from __future__ import annotations

from pathlib import Path

from jobstatus_grpc.job import PROGRESS, Cancel, Command, Create, Delete, Expire, Job, JobState, Update
from jobstatus_grpc.stores.interface import JobStore
from tests.support.stores import RETENTION, StandingClock, claim, done, end, following, jobs_of, on_store

S = JobState


def children_of(job: Job) -> tuple[dict[str, int], float | None]:
    return dict(job.children), job.children_progress


async def numbers(store: JobStore, job_id: str = "p", tenant: str = "default") -> tuple[dict[str, int], float | None]:
    """Return the numbers that each way of reading a job gives."""
    read = children_of(await store.get(tenant, job_id))
    listed = [job for job in await jobs_of(store, tenant=tenant) if job.id == job_id]
    many = await store.jobs([(tenant, job_id), (tenant, "nobody")])
    assert [children_of(job) for job in [*listed, *many.values()]] == [read, read]
    return read


class ChildrenContract:
    """The numbers of children."""

    async def open(self, directory: Path, clock: StandingClock) -> JobStore:
        """Return a new store, or the one in `directory` again, with RETENTION."""
        raise NotImplementedError

    @on_store
    async def test_a_job_without_children_has_no_numbers(self, store):
        await done(store, Create(id="p"), Create(id="other", parent_id="q"))
        assert await numbers(store) == ({}, None)
        assert await store.children([("default", "p"), ("default", "nobody")]) == {}

    @on_store
    async def test_a_parent_has_the_number_of_its_children_by_state_and_their_mean_progress(self, store):
        await done(store, Create(id="p"), *(Create(id=f"{n}", parent_id="p") for n in range(4)))
        assert await numbers(store) == ({"pending": 4}, 0.0)
        await done(store, claim("0"), Update(id="0", changes={"progress": 50.0}), claim("1"), end("1", S.FAILED))
        assert await numbers(store) == ({"pending": 2, "in_progress": 1, "failed": 1}, 37.5)
        await done(store, Update(id="0", changes={"progress": 70.0}), Cancel(id="2"), Cancel(id="0"))
        assert await numbers(store) == ({"pending": 1, "in_progress": 1, "failed": 1, "cancelled": 1}, 67.5)
        assert await store.children([("default", "p")]) == {
            ("default", "p"): {S.PENDING: 1, S.IN_PROGRESS: 1, S.FAILED: 1, S.CANCELLED: 1, PROGRESS: 270_000_000}
        }

    @on_store
    async def test_a_new_attempt_takes_its_progress_back(self, store):
        await done(store, Create(id="p"), Create(id="c", parent_id="p", state=S.IN_PROGRESS, progress=80.0))
        assert await numbers(store) == ({"in_progress": 1}, 80.0)
        await done(store, claim("c", 2))
        assert await numbers(store) == ({"in_progress": 1}, 0.0)

    @on_store
    async def test_children_that_are_deleted_or_expire_are_counted_no_more(self, store, clock):
        await done(store, Create(id="p"), *(Create(id=f"{n}", parent_id="p") for n in range(3)), end("0"), end("1"))
        await done(store, Delete(id="0"))
        assert await numbers(store) == ({"pending": 1, "succeeded": 1}, 50.0)
        clock.advance(seconds=RETENTION.total_seconds())
        await done(store, Expire(id="1"))
        assert await numbers(store) == ({"pending": 1}, 0.0)
        await done(store, end("2"), Delete(id="2"))
        assert await numbers(store) == ({}, None)

    @on_store
    async def test_a_parent_may_be_created_after_its_children_and_again(self, store, clock):
        await done(store, Create(id="c", parent_id="p"), Update(id="d", allow_missing=True, parent_id="p"))
        await done(store, Create(id="p"))
        assert await numbers(store) == ({"pending": 2}, 0.0)
        await done(store, end("p"), Delete(id="p"), end("c"))
        clock.advance(days=2)
        await done(store, Create(id="p"))
        assert await numbers(store) == ({"pending": 1, "succeeded": 1}, 50.0)

    @on_store
    async def test_a_parent_and_its_children_may_change_in_one_commit(self, store):
        commands: list[Command] = [
            Create(id="p"),
            Create(id="c", parent_id="p"),
            claim("p"),
            claim("c"),
            end("c"),
            Delete(id="c"),
        ]
        await done(store, *commands, Create(id="d", parent_id="p"))
        assert await numbers(store) == ({"pending": 1}, 0.0)

    @on_store
    async def test_a_change_of_a_child_is_no_change_of_its_parent(self, store, clock):
        (parent,) = await done(store, Create(id="p"))
        position = await store.position()
        clock.advance(seconds=1)
        await done(store, Create(id="c", parent_id="p"))
        shown = await store.get("default", "p")
        assert (shown.revision, shown.updated_at) == (parent.revision, parent.updated_at)
        assert [change.id for change in await following(store, position)] == ["c"]

    @on_store
    async def test_a_refused_command_changes_no_numbers(self, store):
        await done(store, Create(id="p"), Create(id="c", parent_id="p"))
        await store.commit([Create(id="c", parent_id="p"), Delete(id="c"), Update(id="c", attempt=4)])
        assert await numbers(store) == ({"pending": 1}, 0.0)

    @on_store
    async def test_the_numbers_of_a_tenant_are_its_own(self, store):
        await done(store, Create(id="p"), Create(id="p", tenant="other"), Create(id="c", parent_id="p", tenant="other"))
        assert await numbers(store) == ({}, None)
        assert await numbers(store, tenant="other") == ({"pending": 1}, 0.0)

    @on_store
    async def test_a_job_may_be_its_own_parent(self, store):
        await done(store, Create(id="p", parent_id="p"), claim("p"))
        assert await numbers(store) == ({"in_progress": 1}, 0.0)

    @on_store
    async def test_the_mean_stays_exact_over_many_reports(self, store):
        await done(store, Create(id="p"), *(Create(id=f"{n}", parent_id="p") for n in range(3)))
        await done(store, *(claim(f"{n}") for n in range(3)))
        for step in range(1, 100):
            await done(store, *(Update(id=f"{n}", changes={"progress": step / 3}) for n in range(3)))
        assert (await store.get("default", "p")).children_progress == 33.0
        await done(store, *(end(f"{n}") for n in range(3)), *(Delete(id=f"{n}") for n in range(3)))
        assert await store.children([("default", "p")]) == {}
