"""WatchJobs with random filters and delays, and changes at random moments: readers end up with what is listed."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest
from google.protobuf import duration_pb2, timestamp_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.errors import JobNotFoundError
from jobstatus_grpc.job import Create, Delete, JobState, Update
from jobstatus_grpc.stores.memory import MemoryStore
from jobstatus_grpc.stores.postgres.store import PostgresStore
from jobstatus_grpc.stores.sqlite.store import SqliteStore
from jobstatus_grpc.watch import filter_watch
from tests.support.servers import serving
from tests.support.watch_jobs import Reader, Writer, listed

READERS, CUTS, WRITERS = 12, 12, 3
HOT_JOBS, RESUMES = 5, 60


class LeisurelyStore(MemoryStore):
    """Waits at random before and after each read, and has small pages."""

    def __init__(self, chance):
        super().__init__()
        self._chance = chance

    async def _dawdle(self):
        for _ in range(self._chance.choice([0, 0, 1, 5, 40])):
            await asyncio.sleep(0)

    async def page(self, tenant, job_filter, *, limit, cursor=""):
        await self._dawdle()
        page = await super().page(tenant, job_filter, limit=min(limit, 3), cursor=cursor)
        await self._dawdle()
        return page

    async def changes(self, after, *, up_to=None):
        await self._dawdle()
        batch = await super().changes(after, up_to=up_to)
        await self._dawdle()
        return batch


def random_filter(chance):
    """A filter on one or two fields, or none."""
    choices = {
        "ids": [f"job-{chance.randrange(WRITERS)}-{number}" for number in range(1, 60, 2)],
        "states": chance.sample([1, 2, 4], chance.randrange(1, 3)),
        "names": ["odd"],
        "name_prefix": "e",
        "labels": {"color": chance.choice(["red", "green"])},
        "created_after": timestamp_pb2.Timestamp(seconds=1),
        "done": chance.random() < 0.5,
        "stalled": False,
    }
    return pb.JobFilter(**{name: choices[name] for name in chance.sample(list(choices), chance.randrange(3))})


async def read(stub, job_filter, chance, is_over):
    """Read and reconnect at random; after the writer's end, read until the reader's jobs equal the listed ones."""
    reader = Reader()
    cuts = 0
    while not is_over.is_set() or cuts < CUTS:
        interval = duration_pb2.Duration(nanos=chance.choice([0, 20_000_000]))
        stream = stub.WatchJobs(reader.begin(filter=job_filter, min_update_interval=interval))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read_on(stream, reader), chance.uniform(0, 0.1))
        stream.cancel()
        cuts += 1
    expected = await listed(stub, job_filter)
    stream = stub.WatchJobs(reader.begin(filter=job_filter), timeout=10)
    while not reader.is_synced or reader.revisions != expected:
        reader.take(await stream.read())
    assert reader.resets == 0


async def read_on(stream, reader):
    while True:
        reader.take(await stream.read())


@pytest.mark.parametrize("seed", [1, 2])
def test_readers_end_up_with_what_is_listed(seed):
    async def scenario():
        chance = random.Random(seed)
        is_over = asyncio.Event()
        async with serving(LeisurelyStore(chance)) as stub:
            writing = [asyncio.ensure_future(Writer(stub, number, seed=seed).run()) for number in range(WRITERS)]
            filters = [random_filter(chance) for _ in range(READERS)]
            reading = [asyncio.ensure_future(read(stub, one, chance, is_over)) for one in filters]
            await asyncio.sleep(1.5)
            for writer in writing:
                writer.cancel()
            await asyncio.gather(*writing, return_exceptions=True)
            is_over.set()
            await asyncio.gather(*reading)

    asyncio.run(asyncio.wait_for(scenario(), 40))


class RestlessStore:
    """Changes a few jobs of a store before and after each read of a stream, as long as it `is_restless`."""

    def __init__(self, store, chance):
        self.is_restless = False
        self._turn = asyncio.Lock()
        self._store = store
        self._chance = chance
        self._ids = [f"hot-{number}" for number in range(HOT_JOBS)]
        self._created = 0

    def __getattr__(self, name):
        return getattr(self._store, name)

    async def rest(self):
        async with self._turn:
            self.is_restless = False

    async def _change_some(self):
        async with self._turn:
            if self.is_restless:
                await self._store.commit([await self._change() for _ in range(self._chance.randrange(4))])
        for _ in range(self._chance.choice([0, 1, 5])):
            await asyncio.sleep(0)

    async def _change(self):
        job_id = self._chance.choice(self._ids)
        try:
            job = await self._store.get("default", job_id)
        except JobNotFoundError:
            return Create(id=job_id, state=JobState.IN_PROGRESS, name=self._chance.choice(["odd", "even"]))
        if job.done:
            self._created += 1
            self._ids[self._ids.index(job_id)] = f"new-{self._created}"
            return Delete(id=job_id)
        values = {"labels": {"color": self._chance.choice(["red", "green"])}, "reason": str(self._chance.random())}
        name = self._chance.choice(list(values))
        is_end = self._chance.random() < 0.1
        return Update(id=job_id, changes={"state": JobState.SUCCEEDED} if is_end else {name: values[name]})

    async def position(self):
        position = await self._store.position()
        await self._change_some()
        return position

    async def page(self, tenant, job_filter, *, limit, cursor=""):
        await self._change_some()
        page = await self._store.page(tenant, job_filter, limit=min(limit, 2), cursor=cursor)
        await self._change_some()
        return page

    async def changes(self, after, *, up_to=None):
        if up_to is not None:
            await self._change_some()
        batch = await self._store.changes(after, up_to=up_to)
        await self._change_some()
        return batch


async def resume_often(store, chance, job_filter, resumes):
    """Resume while jobs change, and require each time that the reader ends up with the jobs that are listed."""
    restless, reader = RestlessStore(store, chance), Reader()
    async with serving(restless) as stub:
        for _ in range(resumes):
            restless.is_restless = True
            stream = stub.WatchJobs(reader.begin(filter=job_filter, min_update_interval={}), timeout=10)
            while not reader.is_synced:
                reader.take(await stream.read())
            await restless.rest()
            expected = await listed(stub, job_filter)
            while reader.revisions != expected:
                reader.take(await stream.read())
            stream.cancel()
    await store.close()


FILTERS = [{"labels": {"color": "red"}}, {"done": False}, {"states": [2], "names": ["odd"]}]


@pytest.mark.parametrize("max_guesses", [0, 256])
@pytest.mark.parametrize("values", FILTERS)
@pytest.mark.parametrize("seed", [1, 2])
def test_jobs_that_change_at_each_read_of_a_resume_end_up_as_listed(seed, values, max_guesses, monkeypatch):
    monkeypatch.setattr(filter_watch, "MAX_GUESSES", max_guesses)

    async def scenario():
        await resume_often(MemoryStore(), random.Random(seed), pb.JobFilter(**values), RESUMES)

    asyncio.run(asyncio.wait_for(scenario(), 40))


@pytest.mark.parametrize("values", FILTERS)
@pytest.mark.parametrize("cached_changes", [2, 20_000])
def test_so_do_those_of_a_file(values, cached_changes, tmp_path, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.stores.sqlite.store.CACHED_CHANGES", cached_changes)

    async def scenario():
        store = await SqliteStore.open(str(tmp_path / "jobs.db"))
        await resume_often(store, random.Random(3), pb.JobFilter(**values), RESUMES)

    asyncio.run(asyncio.wait_for(scenario(), 40))


@pytest.mark.parametrize("values", FILTERS)
def test_so_do_those_of_postgresql(values, postgres_url):
    async def scenario():
        store = await PostgresStore.open(postgres_url)
        await resume_often(store, random.Random(4), pb.JobFilter(**values), RESUMES // 3)

    asyncio.run(asyncio.wait_for(scenario(), 40))
