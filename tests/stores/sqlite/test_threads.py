"""The reader threads of the SQLite store share their work."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest

from jobstatus_grpc.job import Create, JobFilter, Update
from jobstatus_grpc.stores.sqlite.database import SqliteFile
from jobstatus_grpc.stores.sqlite.readers import ReaderPool
from tests.support.sqlite import on_file
from tests.support.stores import done


def answer(connection) -> int:
    (row,) = connection.execute("SELECT 42")
    return row[0]


class LongQuery:
    """Runs until it is released."""

    def __init__(self, readers):
        self._go_on = threading.Event()
        self.call = asyncio.create_task(readers.call(lambda _: self._go_on.wait(30)))

    def let_go(self):
        self._go_on.set()


@asynccontextmanager
async def opened(tmp_path):
    file = SqliteFile(str(tmp_path / "jobs.db"))
    file.connect_writer().close()
    readers = ReaderPool([file.connect_reader(), file.connect_reader()])
    try:
        yield readers
    finally:
        await readers.close()
        file.unlock()


async def all_busy(readers):
    """Return queries that occupy both readers, and calls that are queued behind them."""
    queries = [LongQuery(readers), LongQuery(readers)]
    calls = [asyncio.create_task(readers.call(answer)) for _ in range(3)]
    await asyncio.sleep(0)
    return queries, calls


def test_a_call_is_run_by_the_first_reader_that_is_free(tmp_path):
    async def main():
        async with opened(tmp_path) as readers:
            queries, calls = await all_busy(readers)
            queries[1].let_go()
            assert await asyncio.gather(*calls) == [42, 42, 42]
            assert not queries[0].call.done()
            queries[0].let_go()

    asyncio.run(main())


def test_closing_finishes_what_was_called(tmp_path):
    async def main():
        async with opened(tmp_path) as readers:
            queries, calls = await all_busy(readers)
            for query in queries:
                asyncio.get_running_loop().call_soon(query.let_go)
        assert await asyncio.gather(*calls) == [42, 42, 42]

    asyncio.run(main())


@pytest.mark.parametrize("caller_goes", [False, True])
def test_a_long_list_does_not_hold_up_reads_of_single_jobs(tmp_path, monkeypatch, caller_goes):
    path = tmp_path / "jobs.db"
    go_on = threading.Event()
    was_let_go = []
    monkeypatch.setattr(
        "jobstatus_grpc.stores.sqlite.store.read_page", lambda *_, **__: was_let_go.append(go_on.wait(30))
    )

    (created,) = on_file(path, lambda store: done(store, Create(id="a")))

    async def use(store):
        listing = asyncio.create_task(store.page("default", None, limit=1))
        await asyncio.sleep(0)
        if caller_goes:
            listing.cancel()
            await asyncio.sleep(0)
        assert await store.get("default", "a") == created[0]
        go_on.set()
        await asyncio.gather(listing, return_exceptions=True)

    on_file(path, use)
    assert was_let_go == [True]


READS = {
    "a list": lambda store: store.page("default", JobFilter(), limit=1),
    "the history": lambda store: store.transitions("default", "a"),
    "the number of jobs": lambda store: store.count("default", at_most=10),
    "the position": lambda store: store.position(),
}


@pytest.mark.parametrize("read", READS)
def test_a_read_of_the_file_waits_until_what_it_has_seen_is_published(tmp_path, read):
    """Else the cache answers with an older job than a list before, or a position is before what a list has shown."""

    async def use(store):
        (before,) = await done(store, Create(id="a"))
        is_written, go_on = threading.Event(), threading.Event()
        write, position = store._writer.write, await store.position()

        def write_and_wait(*args, **settings):
            written = write(*args, **settings)
            is_written.set()
            go_on.wait(30)
            return written

        store._writer.write = write_and_wait
        committing = asyncio.create_task(done(store, Update(id="a", changes={"reason": "x"})))
        await asyncio.to_thread(is_written.wait, 30)
        reading = asyncio.create_task(READS[read](store))
        await asyncio.wait([reading], timeout=0.2)
        assert not reading.done()
        assert await store.get("default", "a") == before
        go_on.set()
        await reading
        (after,) = await committing
        assert await store.get("default", "a") == after
        assert [change.job for change in (await store.changes(position)).changes] == [after]

    on_file(tmp_path / "jobs.db", use)
