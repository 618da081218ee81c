"""What clients do when the server limits their rate: they wait as long as it asks, and lose nothing."""

from __future__ import annotations

import time

import pytest

from jobstatus_grpc import JobState
from jobstatus_grpc.auth import Role
from tests.support.auth import AuthText
from tests.support.servers import ServerProcess


@pytest.fixture
def limited(connect, tmp_path):
    """Connect to a server with these limits."""
    servers = []

    def limited(limits):
        auth = AuthText(tmp_path / "auth.toml")
        token = auth.admit("ci", Role.OPERATOR)
        auth.add("limits", limits)
        servers.append(ServerProcess("--auth", str(auth.path)))
        servers[0].start()
        return connect(servers[0].address, token=token)

    yield limited
    for server in servers:
        server.kill()


def test_calls_wait_for_their_turn(limited):
    client = limited("[limits]\ncalls_per_second = 10\ncalls_burst = 2")
    began_at = time.monotonic()
    jobs = [client.create() for _ in range(8)]
    assert len({job.id for job in jobs}) == 8
    assert time.monotonic() - began_at > 0.5


def test_a_watch_waits_for_its_turn(limited):
    client = limited("[limits]\ncalls_per_second = 5\ncalls_burst = 2")
    job = client.create()
    client.update(job.id, state=JobState.SUCCEEDED)
    assert [seen.state for seen in client.watch(job.id)] == [JobState.SUCCEEDED]


def test_a_tracked_job_is_reported_more_slowly(limited, caplog):
    client = limited("[limits]\ncalls_per_second = 4\ncalls_burst = 1")
    with client.track("work") as job:
        for percent in range(100):
            job.progress(percent)
            time.sleep(0.01)
    assert client.get(job.id).state is JobState.SUCCEEDED
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) <= 1


def test_a_reporter_slows_down_and_the_newest_of_each_job_arrives(limited, caplog):
    client = limited("[limits]\nupdates_per_second = 100\ncalls_per_second = 50")
    jobs = [client.create().id for _ in range(20)]
    refused = []
    with client.reporter(on_error=lambda update, error: refused.append(error), max_pending=50) as reporter:
        for percent in range(100):
            for job_id in jobs:
                reporter.update(job_id, progress=percent)
            time.sleep(0.02)
    assert refused == []
    assert {client.get(job_id).progress for job_id in jobs} == {99}
    assert [record.getMessage()[:30] for record in caplog.records] == ["updates are sent more slowly: "]
