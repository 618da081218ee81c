"""WatchJobs with random filters, on a store with random delays: the reader ends with the jobs that are listed."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest
from google.protobuf import duration_pb2, timestamp_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.stores.memory import MemoryStore
from jobstatus_grpc.watch import filter_watch
from tests.support.servers import serving
from tests.support.watch_jobs import Reader, Writer, listed

READERS, CUTS, WRITERS = 12, 12, 3


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


@pytest.mark.parametrize("unsure_seconds", [0, 1])
@pytest.mark.parametrize("seed", [1, 2])
def test_readers_end_up_with_what_is_listed(seed, unsure_seconds, monkeypatch):
    monkeypatch.setattr(filter_watch, "UNSURE_SECONDS", unsure_seconds)

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
