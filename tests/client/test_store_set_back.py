"""Clients that stay while their server's store is set back to a backup: what they knew counts no longer."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from jobstatus_grpc import JobChangeType, JobState, JobStatusClient
from jobstatus_grpc.stores import back_up_store, restore_store
from tests.support.servers import ServerProcess

MANY = 20


class Store:
    """A SQLite store on a server, with a job `a` of which there is a backup."""

    def __init__(self, server: ServerProcess, url: str, backup: str) -> None:
        self.server = server
        self._url, self._backup = url, backup

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[JobStatusClient]:
        """Change the store while the clients of its server cannot reach it."""
        with ServerProcess(store=self._url) as other, JobStatusClient(other.address) as client:
            yield client

    def back_up(self) -> None:
        back_up_store(self._url, self._backup)

    def set_back(self) -> None:
        self.server.kill()
        restore_store(self._url, self._backup)


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    url = f"sqlite:///{tmp_path}/jobs.db"
    with ServerProcess(store=url) as server:
        yield Store(server, url, str(tmp_path / "backup.db"))


def test_a_watch_yields_the_end_at_a_revision_that_it_has_seen_before(connect, store):
    client = connect(store.server.address)
    client.create(id="a", state=JobState.IN_PROGRESS)
    store.back_up()
    client.update("a", reason="lost")
    watch = client.watch("a")
    assert next(watch).revision == 2
    store.set_back()
    with store.elsewhere() as other:
        other.update("a", state=JobState.SUCCEEDED)
    store.server.start()
    assert [(job.revision, job.state) for job in watch] == [(2, JobState.SUCCEEDED)]


def test_a_watch_of_many_jobs_begins_anew_with_lower_revisions(connect, store):
    client = connect(store.server.address)
    client.create(id="a")
    store.back_up()
    watch = client.watch_jobs(min_update_interval_seconds=0)
    for _ in range(MANY):
        client.update("a", reason=client.get("a").reason + "x")
    while next(watch).revision <= MANY:
        pass
    store.set_back()
    store.server.start()
    assert [next(watch).type for _ in range(3)] == [JobChangeType.RESET, JobChangeType.SNAPSHOT, JobChangeType.SYNCED]
    client.update("a", state=JobState.IN_PROGRESS)
    assert next(watch).revision == 2


def test_a_tracked_job_sees_a_cancel_at_a_lower_revision(connect, store):
    client = connect(store.server.address)
    with client.track("n", heartbeat_timeout_seconds=3600) as tracked:
        store.back_up()
        for number in range(MANY):
            client.update(tracked.id, reason=str(number))
        tracked.progress(1)
        assert result_of(client, tracked.wait_cancelled(0.5)) is False
        assert tracked.job.revision > MANY
        store.set_back()
        store.server.start()
        client.cancel(tracked.id)
        assert result_of(client, tracked.wait_cancelled(20)) is True
        assert (tracked.cancelled, tracked.job.revision) == (True, 2)


def result_of(client: Any, wait: Any) -> Any:
    """Return what a wait of either client returns."""
    return client.run(wait) if inspect.isawaitable(wait) else wait
