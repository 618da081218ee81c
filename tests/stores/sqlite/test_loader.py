"""Jobs that are not in the SQLite store's cache are read in groups, and never older than the latest commit."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import deque
from contextlib import contextmanager

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Create, Delete, JobFilter, Update
from jobstatus_grpc.stores.sqlite.queries import read_found
from tests.support.sqlite import on_file, raw
from tests.support.stores import done, end

LARGE = {"text": "r" * 5000}
"""A job with this result is too large for the cache."""


class HeldReads:
    """Holds each group after its read, until it is released: the oldest first."""

    def __init__(self):
        self.ids: list[list[str]] = []
        self._loop = asyncio.get_running_loop()
        self._begun = asyncio.Semaphore(0)
        self._held: deque[threading.Event] = deque()
        self._releases = 0

    def __call__(self, connection, keys, now):
        found = read_found(connection, keys, now)
        self.ids.append([job_id for _, job_id in keys])
        released = threading.Event()
        self._loop.call_soon_threadsafe(self._hold, released)
        assert released.wait(timeout=30)
        return found

    async def begun(self):
        """Wait until one more group has read the file."""
        await self._begun.acquire()

    def let_go(self, groups=1000):
        """Release the oldest groups, those still to come included."""
        self._releases += groups
        self._release()

    def _hold(self, released):
        self._held.append(released)
        self._release()
        self._begun.release()

    def _release(self):
        while self._held and self._releases:
            self._held.popleft().set()
            self._releases -= 1


@pytest.fixture
def held(monkeypatch):
    """Hold the groups' reads during a block; its end releases them."""

    @contextmanager
    def hold():
        reads = HeldReads()
        with monkeypatch.context() as patch:
            patch.setattr("jobstatus_grpc.stores.sqlite.readers.read_found", reads)
            try:
                yield reads
            finally:
                reads.let_go()

    return hold


@pytest.fixture
def path(tmp_path):
    """A file with jobs a to f, none of them cached, and the deleted job g."""
    path = tmp_path / "jobs.db"
    creations = [Create(id=job_id) for job_id in "abcdefg"]
    on_file(path, lambda store: done(store, *creations, end("g"), Delete(id="g")))
    return path


@pytest.fixture
def no_read_is_slow(monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.stores.sqlite.readers.MAX_WAIT_SECONDS", 60)


def asked(store, *ids):
    """Request jobs, each in a task of its own."""
    return [asyncio.create_task(store.get("default", job_id)) for job_id in ids]


async def ids_of(tasks):
    return [job.id for job in await asyncio.gather(*tasks)]


@pytest.mark.usefixtures("no_read_is_slow")
def test_jobs_asked_for_while_a_read_runs_are_read_together(path, held):
    async def use(store):
        with held() as reads:
            tasks = asked(store, "a")
            await reads.begun()
            tasks += asked(store, "b", "c", "b", "d")
            await asyncio.sleep(0)
            reads.let_go()
            assert await ids_of(tasks) == ["a", "b", "c", "b", "d"]
        assert reads.ids == [["a"], ["b", "c", "d"]]

    on_file(path, use)


def test_a_cached_job_that_the_caller_does_not_see_takes_the_same_read_as_an_unknown_one(path, monkeypatch):
    reads, only = [], JobFilter(labels={"team": "core"})

    def spy(connection, keys, now):
        reads.append(keys)
        return read_found(connection, keys, now)

    async def use(store):
        await done(store, Create(id="cached"))
        for module in ("readers", "store"):
            monkeypatch.setattr(f"jobstatus_grpc.stores.sqlite.{module}.read_found", spy)
        for job_id in ("cached", "unknown"):
            with pytest.raises(errors.JobNotFoundError):
                await store.get("default", job_id, only=only)
            (refusal,) = (await store.commit([Update(id=job_id, only=only)])).outcomes
            assert isinstance(refusal, errors.JobNotFoundError)
        assert [len(keys) for keys in reads] == [1, 1, 1, 1]

    on_file(path, use)


@pytest.mark.usefixtures("no_read_is_slow")
def test_jobs_asked_for_a_few_turns_after_a_read_join_those_that_wait(path, held):
    async def use(store):
        with held() as reads:
            tasks = asked(store, "a")
            await reads.begun()
            tasks += asked(store, "b")
            await asyncio.sleep(0)
            reads.let_go()
            await tasks[0]
            tasks += asked(store, "c")
            assert await ids_of(tasks) == ["a", "b", "c"]
        assert reads.ids == [["a"], ["b", "c"]]

    on_file(path, use)


@pytest.mark.usefixtures("no_read_is_slow")
def test_a_group_is_limited(path, held, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.stores.sqlite.readers.MAX_GROUP_KEYS", 2)

    async def use(store):
        with held() as reads:
            tasks = asked(store, *"abcdef")
            await asyncio.sleep(0)
            reads.let_go()
            assert await ids_of(tasks) == [*"abcdef"]
        assert reads.ids == [["a"], ["b", "c"], ["d", "e"], ["f"]]

    on_file(path, use)


def test_a_job_that_was_read_is_not_read_again(path, held):
    async def use(store):
        await store.get("default", "a")
        with held() as reads:
            reads.let_go()
            assert await ids_of(asked(store, "a")) == ["a"]
        assert reads.ids == []

    on_file(path, use)


def test_hundreds_of_jobs_are_found_at_once(tmp_path):
    ids = [f"{n}" for n in range(1200)]
    path = tmp_path / "jobs.db"
    on_file(path, lambda store: done(store, *(Create(id=job_id) for job_id in ids)))

    async def use(store):
        assert await ids_of(asked(store, *ids)) == ids

    on_file(path, use)


@pytest.mark.usefixtures("no_read_is_slow")
def test_a_job_asked_for_after_a_commit_is_never_as_it_was_before(path, held):
    async def use(store):
        await done(store, Update(id="a", changes={"result": LARGE}))
        with held() as reads:
            before = asked(store, "a")
            await reads.begun()
            await done(store, Update(id="a", changes={"reason": "later"}))
            after = asked(store, "a", "a")
            await asyncio.sleep(0)
            reads.let_go()
            assert [job.revision for job in await asyncio.gather(*before, *after)] == [2, 3, 3]

    on_file(path, use)


def test_a_slow_read_lets_the_next_begin_and_leaves_in_memory_what_is_newer(path, held, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.stores.sqlite.store.CACHED_JOBS", 1)

    async def use(store):
        await ids_of(asked(store, "c", "d"))  # a wait that ended in time
        with held() as reads:
            slow = asked(store, "a")
            await reads.begun()
            await done(store, Update(id="a", changes={"reason": "later"}))
            await done(store, Update(id="b", changes={"reason": "takes the place of a"}))
            after = asked(store, "a")
            await reads.begun()
            reads.let_go(1)
            assert [job.revision for job in await asyncio.gather(*slow)] == [1]
            after += asked(store, "a")
            await asyncio.sleep(0)
        assert [job.revision for job in await asyncio.gather(*after)] == [2, 2]

    on_file(path, use)


def test_while_reads_are_slow_what_did_not_fit_a_group_does_not_wait_for_its_end(path, held, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.stores.sqlite.readers.MAX_GROUP_KEYS", 1)

    async def use(store):
        with held() as reads:
            tasks = asked(store, *"abc")
            for _ in range(2):
                await reads.begun()
            reads.let_go(1)
            await reads.begun()
            assert reads.ids == [["a"], ["b"], ["c"]]
        assert await ids_of(tasks) == [*"abc"]

    on_file(path, use)


def test_what_was_acknowledged_is_read_however_reads_and_commits_meet(path, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.stores.sqlite.store.CACHED_JOBS", 2)
    monkeypatch.setattr("jobstatus_grpc.stores.sqlite.readers.MAX_WAIT_SECONDS", 0.0005)
    acknowledged = dict.fromkeys("abcdef", 1)

    async def write(store):
        for n in range(200):
            result = LARGE if n % 5 == 0 else None
            changed = random.Random(n).sample("abcdef", 2)
            commands = [Update(id=job_id, changes={"reason": f"{n}", "result": result}) for job_id in changed]
            for job in await done(store, *commands):
                acknowledged[job.id] = job.revision

    async def read(store, number, writing):
        choose = random.Random(number)
        while not writing.done():
            job_id = choose.choice("abcdef")
            at_least = acknowledged[job_id]
            assert (await store.get("default", job_id)).revision >= at_least

    async def use(store):
        writing = asyncio.create_task(write(store))
        await asyncio.gather(writing, *(read(store, number, writing) for number in range(20)))

    on_file(path, use)


def test_a_job_that_is_not_there_fails_only_its_own_callers(path, held):
    async def use(store):
        with held():
            tasks = asked(store, *"abxgxc")
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [answer if isinstance(answer, type) else getattr(answer, "id", type(answer)) for answer in answers] == [
            "a", "b", errors.JobNotFoundError, errors.JobExpiredError, errors.JobNotFoundError, "c",
        ]  # fmt: skip

    on_file(path, use)


@pytest.mark.usefixtures("no_read_is_slow")
def test_a_caller_that_goes_neither_stops_nor_delays_the_others(path, held):
    async def use(store):
        with held() as reads:
            first = asked(store, "a")
            await reads.begun()
            gone, *others = asked(store, "b", "b", "c")
            await asyncio.sleep(0)
            for task in (*first, gone):
                task.cancel()
            reads.let_go()
            assert await ids_of(others) == ["b", "c"]
        assert all(task.cancelled() for task in (*first, gone))

    on_file(path, use)


@pytest.mark.usefixtures("no_read_is_slow")
def test_a_read_that_fails_fails_all_of_its_group_and_the_next_succeeds(path, held):
    async def use(store):
        with held() as reads:
            tasks = asked(store, "a")
            await reads.begun()
            tasks += asked(store, "b", "c")
            raw(path, "ALTER TABLE jobs RENAME TO hidden")
        assert await ids_of(tasks[:1]) == ["a"]
        for task in tasks[1:]:
            with pytest.raises(errors.StoreUnavailableError, match="no such table: jobs"):
                await task
        raw(path, "ALTER TABLE hidden RENAME TO jobs")
        assert await ids_of(asked(store, "b")) == ["b"]

    on_file(path, use)


@pytest.mark.usefixtures("no_read_is_slow")
def test_a_store_that_closes_finishes_the_running_read_and_refuses_what_waits(path, held):
    async def use(store):
        with held() as reads:
            running = asked(store, "a")
            await reads.begun()
            waiting = asked(store, "b", "c")
            closing = asyncio.create_task(store.close())
            await asyncio.sleep(0)
        await closing
        assert await ids_of(running) == ["a"]
        for task in waiting:
            with pytest.raises(errors.StoreUnavailableError, match="the store is closed"):
                await task

    on_file(path, use)
