"""Rows of a SQLite store that are not what was written: they are never served, and affect nothing else."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from datetime import timedelta

import grpc
import pytest
from google.longrunning.operations_pb2 import ListOperationsRequest
from google.longrunning.operations_pb2_grpc import OperationsStub

from jobstatus_grpc import JobStatusClient, errors
from jobstatus_grpc.job import JOB_FIELDS, Create, Job, JobFilter, Update
from jobstatus_grpc.stores.sql.rows import (
    STORED_COLUMNS,
    lasting_checksum,
    with_checksum,
)
from tests.support.servers import ServerProcess
from tests.support.sqlite import on_file, raw
from tests.support.stores import StandingClock, claim, done, end, ids_of
from tests.support.web import Web

VERSION_8 = {
    "key": 5000000000, "tenant": "default", "id": "ü", "name": "render ☃", "state": 2, "attempt": 1, "revision": 5,
    "reports_progress": 1, "progress": 42.5, "cancel_requested": 1, "cancel_reason": "why", "stalled": 1,
    "created_at": 1700000000000001, "updated_at": 1700000000000002, "started_at": 1700000000000003,
    "finished_at": 1700000000000004, "expires_at": 1700000000000005, "estimated_completion": 1700000000000006,
    "heartbeat_timeout": 30000000, "parent_id": "parent", "reason": "reading", "error": "{}", "labels": '{"a":"b"}',
    "creation_request": '{"r":"h"}', "requests": '{"s":"h"}', "result": "{}", "last_heartbeat_at": 1700000000000007,
    "first_progress": 0.1, "first_progress_at": 1700000000000008,
}  # fmt: skip

OTHERS = {"key": "key + 1000", "tenant": "'other'", "labels": "'{}'", "result": "'{}'", "id": "'d'"}


@pytest.fixture
def path(tmp_path):
    """A store with the jobs a, b and c, of which b has reported."""
    path = tmp_path / "jobs.db"

    async def fill(store):
        await done(store, *(Create(id=job_id, heartbeat_timeout=timedelta(seconds=30)) for job_id in "abc"))
        await done(store, claim("b"))
        await done(store, Update(id="b", changes={"progress": 5, "reason": "reading"}))

    on_file(path, fill)
    return path


async def outcome_of(reading):
    return (await asyncio.gather(reading, return_exceptions=True))[0]


@pytest.mark.parametrize("column", [*STORED_COLUMNS, "checksum"])
def test_a_job_with_any_other_value_is_not_served_and_the_other_jobs_are(path, column):
    raw(path, f"UPDATE jobs SET {column} = {OTHERS.get(column, '77')} WHERE id = 'b'")

    async def use(store):
        outcomes = [await outcome_of(store.get("default", job_id)) for job_id in "abc"]
        assert [type(outcome) for outcome in outcomes[::2]] == [Job, Job]
        assert isinstance(outcomes[1], (errors.DataLossError, errors.JobNotFoundError))
        assert {"a", "c"} == {job.id for job in (await store.page("default", JobFilter(), limit=9)).jobs}

    on_file(path, use)


def test_calls_for_a_damaged_job_fail_and_those_in_the_same_commit_do_not(path, caplog):
    raw(path, "UPDATE jobs SET reason = 'writing' WHERE id = 'b'")

    async def use(store):
        outcomes = (await store.commit([Update(id=job_id, changes={"reason": "r"}) for job_id in "abc"])).outcomes
        assert [type(outcome) for outcome in outcomes] == [Job, errors.DataLossError, Job]
        page = await store.page("default", JobFilter(), limit=2)
        assert ([job.id for job in page.jobs], [error.metadata["id"] for error in page.damaged]) == (["c"], ["b"])
        assert [
            job.id for job in (await store.page("default", JobFilter(), limit=2, cursor=page.next_cursor)).jobs
        ] == ["a"]
        assert store.damaged_rows() == 1
        assert store.writable

    on_file(path, use)
    (record,) = caplog.records
    assert "(table jobs, row 2, job b)" in record.getMessage()


def test_a_server_names_the_damaged_job_and_serves_all_others(path):
    raw(path, "UPDATE jobs SET reason = 'writing' WHERE id = 'b'")
    with ServerProcess("--http", "127.0.0.1:0", store=f"sqlite:///{path}", log=path.with_name("log")) as server:
        reply = Web(server.http).request("GET", "/v1/jobs")
        assert ([job["id"] for job in reply.json()], reply.headers["x-jobstatus-unreachable"]) == (["c", "a"], "b")
        with grpc.insecure_channel(server.address) as channel:
            operations = OperationsStub(channel).ListOperations(ListOperationsRequest(), timeout=20)
            assert ([each.name for each in operations.operations], [*operations.unreachable]) == (
                ["jobs/c", "jobs/a"], ["jobs/b"],
            )  # fmt: skip
        with JobStatusClient(server.address) as client:
            with pytest.raises(errors.DataLossError):
                client.get("b")
            page = client.list()
            assert ([job.id for job in page.jobs], page.unreachable) == (["c", "a"], ("b",))
            with pytest.raises(errors.DataLossError, match="1 damaged jobs are left out: b"):
                list(client.list_all())
            first = [next(iter(client.watch(job_id))) for job_id in "ac"]
            assert [job.id for job in first] == ["a", "c"]
        command = [sys.executable, "-m", "jobstatus_grpc", "list", "--address", server.address]
        listed = subprocess.run(command, capture_output=True, text=True, check=True)
        assert [line.partition("\t")[0] for line in listed.stdout.splitlines()] == ["c", "a"]
        assert "left out, because they are damaged: b" in listed.stderr
        assert server.terminate() == 0


def test_a_damaged_entry_fails_the_history_of_its_job_only(path):
    raw(path, "UPDATE transitions SET actor = 'somebody' WHERE id = 'b' AND revision = 2")

    async def use(store):
        with pytest.raises(errors.DataLossError):
            await store.transitions("default", "b")
        assert len(await store.transitions("default", "a")) == 1
        assert (await store.get("default", "b")).progress == 5

    on_file(path, use)


def test_a_damaged_change_resets_the_watches_that_would_need_it(path):
    (position,) = on_file(path, lambda store: store.position())
    start = f"{position.rpartition('-')[0]}-1"
    raw(path, "UPDATE changes SET revision = 7 WHERE sequence = 3")

    async def use(store):
        with pytest.raises(errors.StoreChangedError):
            await store.changes(start)
        assert (await store.changes(position, up_to=position)).changes == []

    on_file(path, use)


def test_a_change_of_a_damaged_job_is_left_out(path):
    raw(path, "UPDATE jobs SET reason = 'writing' WHERE id = 'b'")

    async def use(store):
        position = await store.position()
        batch = await store.changes(f"{position.rpartition('-')[0]}-1", up_to=position)
        assert ({change.id for change in batch.changes}, batch.superseded) == ({"c"}, set())

    on_file(path, use)


def test_a_damaged_job_does_not_keep_others_from_expiring(tmp_path):
    path, clock = tmp_path / "jobs.db", StandingClock()

    async def fill(store):
        await done(store, *(Create(id=job_id) for job_id in "abc"))
        for job_id in "abc":
            clock.advance(seconds=1)
            await done(store, end(job_id))

    async def expire(store):
        clock.advance(hours=24 * 30)
        for _ in range(3):
            await store.commit(await store.overdue(limit=1))
        with pytest.raises(errors.DataLossError):
            await store.get("default", "a")
        assert await ids_of(store) == []

    on_file(path, fill, clock=clock)
    raw(path, "UPDATE jobs SET reason = 'damaged' WHERE id = 'a'")
    on_file(path, expire, clock=clock)


def test_rows_of_an_earlier_version_are_served_and_get_a_checksum_when_they_are_written(path):
    for table in ("jobs", "changes", "transitions"):
        raw(path, f"UPDATE {table} SET checksum = NULL")
    raw(path, "UPDATE store SET unchecked_key = 3, unchecked_sequence = 5")

    async def use(store):
        assert await ids_of(store) == ["c", "b", "a"]
        await done(store, Update(id="b", changes={"progress": 6.0}))

    on_file(path, use)
    assert raw(path, "SELECT id FROM jobs WHERE checksum IS NULL") == [("a",), ("c",)]
    on_file(path, lambda store: store.get("default", "b"))
    raw(path, "UPDATE jobs SET state = 3 WHERE id = 'b'")
    assert isinstance(on_file(path, lambda store: outcome_of(store.get("default", "b")))[0], errors.DataLossError)


def test_a_row_that_has_lost_its_checksum_is_damaged(path):
    (position,) = on_file(path, lambda store: store.position())
    for table in ("jobs", "changes", "transitions"):
        raw(path, f"UPDATE {table} SET checksum = NULL")

    async def use(store):
        changes = store.changes(f"{position.rpartition('-')[0]}-1")
        readings = [store.get("default", "b"), store.transitions("default", "b"), changes]
        outcomes = [type(await outcome_of(reading)) for reading in readings]
        assert outcomes == [errors.DataLossError, errors.DataLossError, errors.StoreChangedError]

    on_file(path, use)


def test_the_checksums_of_stored_rows_stay_valid():
    """Another version of Python, or of Job, must not make all stored jobs damaged."""
    row = tuple(VERSION_8.get(column) for column in STORED_COLUMNS)
    assert sorted(STORED_COLUMNS) == sorted(("key", *JOB_FIELDS))
    assert with_checksum(row, lasting_checksum(row))[-1] == 1799767339
