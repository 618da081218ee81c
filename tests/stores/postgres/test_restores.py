"""A database that was set back to an earlier state: no position from after that state is accepted."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import uuid
from functools import partial

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Create, Update
from jobstatus_grpc.stores.interface import MAX_BATCH_CHANGES
from jobstatus_grpc.stores.postgres.store import PostgresStore
from tests.support.postgres import signal_all
from tests.support.stores import claim, done, following

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CHANGES = 7


def on(url, scenario):
    """Run `scenario(store)`, and return its result."""

    async def main():
        store = await PostgresStore.open(url)
        try:
            return await scenario(store)
        finally:
            await store.close()

    return asyncio.run(asyncio.wait_for(main(), 250))


async def write(store):
    """Change a job some times; return the position before and after each."""
    if not await store.count("default", at_most=1):
        await done(store, Create(id="a"))
    positions = [await store.position()]
    for number in range(CHANGES):
        await done(store, Update(id="a", changes={"reason": f"{positions[-1]} {number}"}))
        positions.append(await store.position())
    return positions


async def write_many(store, before):
    """Change more jobs than a batch holds; return the position after the first batch of changes since `before`."""
    await done(store, *(claim(uuid.uuid4().hex, allow_missing=True) for _ in range(MAX_BATCH_CHANGES + 100)))
    return (await store.changes(before)).position


class Histories:
    """Ways back to an earlier state. Each yields nothing, and sets the database back when it is continued."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.current = cluster

    @contextlib.contextmanager
    def cold_copy(self):
        self.cluster.stop()
        copy = self.cluster.copy_files()
        self.cluster.start()
        yield
        self.cluster.stop()
        self.cluster.copy_files_back(copy)
        self.cluster.start()

    @contextlib.contextmanager
    def snapshot_of_the_disk(self):
        pids = self.cluster.pids
        signal_all(pids, signal.SIGSTOP)
        copy = self.cluster.copy_files()
        signal_all(pids, signal.SIGCONT)
        yield
        self.cluster.kill()
        self.cluster.copy_files_back(copy)
        self.cluster.start()

    @contextlib.contextmanager
    def point_in_time(self):
        archive = self.cluster.archive()
        self.cluster.stop()
        copy = self.cluster.copy_files()
        self.cluster.start()
        self.cluster.execute("SELECT pg_create_restore_point('here')")
        yield
        self.cluster.execute("SELECT pg_switch_wal()")
        self.cluster.stop()
        self.cluster.copy_files_back(copy)
        self.cluster.recover(archive, "here")

    @contextlib.contextmanager
    def asynchronous_standby(self):
        standby = self.cluster.standby(is_synchronous=False)
        standby.stop()
        yield
        self.cluster.kill()
        standby.start()
        standby.promote()
        self.current = standby


WAYS = ["cold_copy", "snapshot_of_the_disk", "point_in_time", "asynchronous_standby"]


@pytest.mark.parametrize("way", WAYS)
def test_no_position_is_shared_by_the_history_that_was_lost_and_the_one_that_follows(new_postgres, way, record_fault):
    histories = Histories(new_postgres)
    database = new_postgres.create_database()
    before = on(new_postgres.url(database), write)
    with getattr(histories, way)():
        lost = on(new_postgres.url(database), write)[1:]
        lost.append(on(new_postgres.url(database), partial(write_many, before=before[-1])))

    async def scenario(store):
        for _ in range(2 * CHANGES):
            for position in lost:
                with pytest.raises(errors.StoreChangedError):
                    await store.changes(position, up_to=await store.position())
            await done(store, Update(id="a", changes={"reason": await store.position()}))
        with contextlib.suppress(errors.StoreChangedError):  # a position from before is accepted, or refused
            assert [change.id for change in await following(store, before[-1])] == ["a"]

    on(histories.current.url(database), scenario)
    record_fault(
        f"a database set back to an earlier state: {way.replace('_', ' ')}",
        count=1,
        checked=f"{len(lost)} positions after that state, each {2 * CHANGES} times",
        result="each is refused: the watch begins anew",
    )
