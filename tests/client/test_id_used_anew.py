"""An id that names a new job, a day after the old one was deleted: no client takes the new job for the old one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from jobstatus_grpc import JobChangeType, JobState, JobStatusClient
from tests.support.servers import ServerProcess
from tests.support.sqlite import raw

A_DAY_EARLIER = "UPDATE {}tombstones SET removed_at = removed_at - 86400000000"


class Store:
    """A server on a store with a job `a`, and how to let a day pass for the tombstones in the store."""

    def __init__(self, server: ServerProcess, url: str, pass_a_day: Callable[[], object]) -> None:
        self.server = server
        self._url, self._pass_a_day = url, pass_a_day

    def use_anew(self) -> None:
        """Delete the job, and create another under its id a day later, while the clients of the server are cut off."""
        self.server.terminate()
        with ServerProcess(store=self._url) as other, JobStatusClient(other.address) as client:
            client.update("a", state=JobState.SUCCEEDED)
            client.delete("a")
        self._pass_a_day()
        with ServerProcess(store=self._url) as other, JobStatusClient(other.address) as client:
            client.create(id="a", name="new")
        self.server.start()


class IdUsedAnewContract:
    """The facts for a store; the fixture `store` makes one."""

    @pytest.fixture
    def client(self, connect, store):
        client = connect(store.server.address)
        for reason in "1234":
            client.update("a", allow_missing=True, reason=reason, state=JobState.IN_PROGRESS)
        return client

    def test_a_watch_of_many_jobs_that_was_cut_begins_anew(self, client, store):
        watch = client.watch_jobs()
        assert [next(watch).type for _ in range(2)] == [JobChangeType.SNAPSHOT, JobChangeType.SYNCED]
        store.use_anew()
        changes = [next(watch) for _ in range(3)]
        assert [change.type for change in changes] == [
            JobChangeType.RESET,
            JobChangeType.SNAPSHOT,
            JobChangeType.SYNCED,
        ]
        assert (changes[1].job.name, changes[1].revision) == ("new", 1)

    def test_a_watch_of_the_job_yields_the_new_one(self, client, store):
        watch = client.watch("a")
        assert next(watch).revision == 4
        store.use_anew()
        job = next(watch)
        assert (job.name, job.revision) == ("new", 1)


class TestSqliteStore(IdUsedAnewContract):
    @pytest.fixture
    def store(self, tmp_path) -> Iterator[Store]:
        url = f"sqlite:///{tmp_path}/jobs.db"
        with ServerProcess(store=url) as server:
            yield Store(server, url, lambda: raw(tmp_path / "jobs.db", A_DAY_EARLIER.format("")))


class TestPostgresStore(IdUsedAnewContract):
    @pytest.fixture
    def store(self, postgres, postgres_url) -> Iterator[Store]:
        database = postgres_url.rpartition("/")[2]
        with ServerProcess(store=postgres_url) as server:
            yield Store(server, postgres_url, lambda: postgres.execute(A_DAY_EARLIER.format("jobstatus."), database))
