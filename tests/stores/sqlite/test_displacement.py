"""The files of a SQLite store that are deleted or replaced while it is open."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from jobstatus_grpc import errors
from jobstatus_grpc.job import Create
from jobstatus_grpc.server.health import NOT_SERVING, SERVING, WRITE
from jobstatus_grpc.stores.sqlite.store import SqliteStore
from tests.support.servers import ServerProcess
from tests.support.service import Service
from tests.support.sqlite import on_file
from tests.support.stores import StandingClock, done, due, ids_of, start


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def delete(path: Path) -> None:
    path.unlink()


def replace_by_a_copy(path: Path) -> None:
    shutil.copy(path, path.with_name("copy.db"))
    path.with_name("copy.db").rename(path)


def delete_the_log(path: Path) -> None:
    path.with_name("jobs.db-wal").unlink()


def delete_the_index_of_the_log(path: Path) -> None:
    path.with_name("jobs.db-shm").unlink()


def delete_all(path: Path) -> None:
    for file in list(path.parent.iterdir()):
        file.unlink()


def delete_the_directory(path: Path) -> None:
    shutil.rmtree(path.parent)


DISPLACEMENTS = {
    delete: "jobs.db is gone",
    replace_by_a_copy: "jobs.db was replaced by another file",
    delete_the_log: "jobs.db-wal is gone",
    delete_the_index_of_the_log: "jobs.db-shm is gone",
    delete_all: "jobs.db is gone",
    delete_the_directory: "jobs.db is gone",
}


@pytest.mark.parametrize("displace", DISPLACEMENTS)
def test_writes_are_refused_and_reads_go_on_once_a_file_is_not_in_its_place(tmp_path, displace, caplog, record_fault):
    path = tmp_path / "in" / "jobs.db"
    path.parent.mkdir()

    async def use(store: SqliteStore) -> None:
        job = (await done(store, Create(id="a")))[0]
        displace(path)
        await until(lambda: not store.writable)
        with pytest.raises(errors.StoreUnavailableError, match=DISPLACEMENTS[displace]):
            await store.commit([Create(id="b")])
        with pytest.raises(errors.StoreUnavailableError, match=DISPLACEMENTS[displace]):
            await store.trim(limit=1)
        assert await store.get("default", "a") == job

    on_file(path, use)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert DISPLACEMENTS[displace] in record.getMessage()
    assert "jobstatus restore" in record.getMessage()
    record_fault(
        f"files of a SQLite store: {displace.__name__.replace('_', ' ')}",
        count=1,
        checked="writes, reads, the log",
        result="writes are refused, reads go on",
    )


def test_reads_return_what_the_file_held_that_another_has_replaced(tmp_path):
    path, other = tmp_path / "jobs.db", tmp_path / "other.db"
    on_file(other, lambda store: done(store, Create(id="other")))

    async def use(store):
        await done(store, Create(id="a"))
        other.rename(path)
        assert await ids_of(store) == ["a"]

    on_file(path, use)
    with pytest.raises(errors.CannotStartError, match="is the log of another file"):
        on_file(path, lambda store: ids_of(store))


def test_writes_go_on_when_the_file_is_put_back_and_the_time_between_is_no_silence(tmp_path, caplog):
    path, clock = tmp_path / "jobs.db", StandingClock()

    async def use(store):
        await start(store, "a")
        path.rename(tmp_path / "away.db")
        await until(lambda: not store.writable)
        clock.advance(seconds=60)
        assert await due(store) == []
        (tmp_path / "away.db").rename(path)
        await until(lambda: store.writable)
        assert await due(store) == []
        await done(store, Create(id="b"))

    on_file(path, use, clock=clock)
    assert "is writable again" in caplog.records[-1].getMessage()
    assert on_file(path, lambda store: ids_of(store)) == [["b", "a"]]


OPEN = """
import asyncio, sys
from jobstatus_grpc.job import Create
from jobstatus_grpc.stores.sqlite import open_store

async def main():
    store = await open_store(f"sqlite:///{sys.argv[1]}")
    await store.commit([Create(id="second")])
    print("open", flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


def open_second(path: Path) -> str:
    """Open the store in another process; return the error that it ends with, empty if it gets the store."""
    result = subprocess.run(
        [sys.executable, "-c", OPEN, path], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return result.stderr.splitlines()[-1] if result.returncode else ""


def start_second(path: Path) -> subprocess.Popen:
    """Open the store in another process, which keeps it open."""
    second = subprocess.Popen([sys.executable, "-c", OPEN, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert second.stdout is not None
    assert second.stdout.readline() == b"open\n"
    return second


def test_a_second_process_is_refused_at_once_where_the_locks_file_was_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.stores.sqlite.writer.DISPLACEMENT_SECONDS", 100)
    path = tmp_path / "jobs.db"

    async def use(store):
        path.with_name("jobs.db.lock").unlink()
        return await asyncio.to_thread(open_second, path)

    assert on_file(path, use)[0].endswith(f"cannot open the store {path}: another process has it open")


def test_a_second_process_is_refused_where_all_files_were_deleted(tmp_path):
    path = tmp_path / "jobs.db"

    async def use(store):
        delete_all(path)
        await until(lambda: path.with_name("jobs.db.lock").exists())
        return await asyncio.to_thread(open_second, path)

    assert on_file(path, use)[0].endswith(f"process {os.getpid()} has it open")
    assert open_second(path) == ""


def test_the_end_of_a_store_whose_files_were_deleted_leaves_those_of_the_next_one_alone(tmp_path, monkeypatch):
    """The other process opens the path before this one has looked."""
    monkeypatch.setattr("jobstatus_grpc.stores.sqlite.writer.DISPLACEMENT_SECONDS", 100)
    path = tmp_path / "jobs.db"

    async def use(store):
        await done(store, Create(id="first"))
        delete_all(path)
        return await asyncio.to_thread(start_second, path)

    (second,) = on_file(path, use)
    second.kill()
    second.communicate()
    assert on_file(path, lambda store: ids_of(store)) == [["second"]]


def test_a_server_whose_file_was_deleted_refuses_writes_and_says_so(tmp_path):
    path, log = tmp_path / "jobs.db", tmp_path / "log"
    with ServerProcess(store=f"sqlite:///{path}", log=log) as server:
        service = Service(server.address)
        health: Any = HealthStub(service.channel)

        def status() -> int:
            return health.Check(health_pb2.HealthCheckRequest(service=WRITE)).status

        job = service.create(id="a")
        assert status() == SERVING
        path.unlink()
        deadline = time.monotonic() + 10
        while status() != NOT_SERVING:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(grpc.RpcError) as refused:
            service.create(id="b")
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert service.get("a") == job
        service.close()
        assert server.terminate() == 0
    assert log.read_text().count(f"{path} is gone") == 1
