"""The SQLite store when its process, its disk or its file fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Create, Delete, Job
from jobstatus_grpc.stores.sqlite.store import SqliteStore
from tests.support.disk import small_disk
from tests.support.sqlite import on_file, raw
from tests.support.stores import StandingClock, done, due, end, following, start

WRITER = """
import asyncio, sys
from jobstatus_grpc.job import Create, Update
from jobstatus_grpc.stores.sqlite import open_store

async def main():
    store = await open_store(sys.argv[1])
    await store.commit([Create(id=f"{n}") for n in range(5)])
    revision = 1
    while True:
        commands = [Update(id=f"{n}", changes={"reason": f"{revision}"}) for n in range(5)]
        outcomes = (await store.commit(commands)).outcomes
        revision = outcomes[0].revision
        print(revision, flush=True)

asyncio.run(main())
"""


def test_a_killed_process_loses_nothing_that_it_acknowledged(tmp_path):
    path = tmp_path / "jobs.db"
    command = [sys.executable, "-c", WRITER, f"sqlite:///{path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 50:
            pass
        process.kill()
        acknowledged = int((process.stdout.read().splitlines() or ["50"])[-1])

    async def read(store):
        return [await store.get("default", f"{n}") for n in range(5)]

    (jobs,) = on_file(path, read)
    revisions = {job.revision for job in jobs}
    assert len(revisions) == 1, "a batch is written whole"
    assert revisions.pop() >= acknowledged
    assert raw(path, "PRAGMA integrity_check") == [("ok",)]


def test_the_write_ahead_log_is_copied_into_the_file_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.stores.sqlite.writer.CHECKPOINT_BYTES", 200_000)

    async def use(store):
        for n in range(100):
            await done(store, *(Create(id=f"{n}-{m}", reason="r" * 1000) for m in range(10)))
        return (tmp_path / "jobs.db").stat().st_size, (tmp_path / "jobs.db-wal").stat().st_size

    ((file_size, log_size),) = on_file(tmp_path / "jobs.db", use)
    assert file_size > 500_000
    assert log_size < 1_000_000


# A full disk


@contextlib.contextmanager
def file_size_limit(directory: Path) -> Iterator[Callable[[], None]]:
    """Let no file grow beyond 700 kB until the yielded function is called."""
    if not hasattr(sqlite3, "SQLITE_IOERR_WRITE"):
        pytest.skip("this Python reports the limit of a file as a failing disk")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def make_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, before[1]))
    try:
        yield make_room
    finally:
        make_room()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def fill(store: SqliteStore, written: list[str]) -> None:
    while True:
        await done(store, Create(id=f"{len(written)}", reason="r" * 4000))
        written.append(f"{len(written)}")


async def fill_with_done(store: SqliteStore, written: list[str]) -> None:
    while True:
        ids = [f"{len(written)}-{number}" for number in range(20)]
        await done(store, *(Create(id=job_id, reason="r" * 4000) for job_id in ids))
        await done(store, *map(end, ids))
        written += ids


@pytest.mark.parametrize("limit", [file_size_limit, small_disk])
def test_a_full_disk_refuses_writes_reads_on_and_recovers_by_itself(tmp_path, limit):
    path = tmp_path / "disk" / "jobs.db"
    path.parent.mkdir()

    async def use(store, make_room):
        start = await store.position()
        written: list[str] = []
        with pytest.raises(errors.StoreFullError):
            await fill(store, written)
        assert len(written) > 10
        assert not store.writable
        assert [change.id for change in await following(store, start)] == written
        assert [(await store.get("default", job_id)).id for job_id in written] == written
        assert len(await store.transitions("default", "0")) == 1
        with pytest.raises(errors.JobNotFoundError):
            await store.get("default", f"{len(written)}")
        make_room()
        await until(lambda: store.writable)
        assert (await done(store, Create(id="after")))[0] == await store.get("default", "after")
        return [*written, "after"]

    with limit(path.parent) as make_room:
        (written,) = on_file(path, lambda store: use(store, make_room), probe_interval_seconds=0.01)
        assert {job_id for (job_id,) in raw(path, "SELECT id FROM jobs")} == set(written)
        assert raw(path, "PRAGMA integrity_check") == [("ok",)]


def test_time_without_writes_does_not_count_as_silence(tmp_path):
    clock = StandingClock()

    async def use(store, make_room):
        await start(store, "a")
        with pytest.raises(errors.StoreFullError):
            await fill(store, [])
        clock.advance(seconds=40)
        assert await due(store) == []
        make_room()
        await until(lambda: store.writable)
        clock.advance(seconds=29)
        assert await due(store) == []
        clock.advance(seconds=1)
        assert await due(store) == [("Stall", "a")]

    with file_size_limit(tmp_path) as make_room:
        on_file(tmp_path / "jobs.db", lambda store: use(store, make_room), clock=clock, probe_interval_seconds=0.01)


FILL_LOG = """
import asyncio, os, signal, sys
from jobstatus_grpc.job import Create
from jobstatus_grpc.stores.sqlite import open_store, writer

async def main():
    writer.CHECKPOINT_BYTES = 10**9
    store = await open_store(sys.argv[1])
    number = 0
    while os.stat(sys.argv[1].removeprefix("sqlite:///") + "-wal").st_size < 14_000_000:
        await store.commit([Create(id=f"{number}", reason="r" * 2000)])
        number += 1
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_on_a_full_disk_jobs_are_deleted_and_others_fit_in_their_place(tmp_path):
    """The files take all of the disk, so that only what is deleted makes room."""
    path = tmp_path / "disk" / "jobs.db"
    path.parent.mkdir()

    async def use(store):
        written: list[str] = []
        with pytest.raises(errors.StoreFullError):
            await fill_with_done(store, written)
        for job_id in written:
            command = [Create(id="refused"), Delete(id=job_id)]
            refused, deleted = (await store.commit(command)).outcomes
            if isinstance(refused, Job):
                break
            assert (type(refused), type(deleted)) == (errors.StoreFullError, Job)
            await store.trim(limit=10)
        await until(lambda: store.writable)
        await done(store, *(Create(id=f"again-{n}", reason="r" * 4000) for n in range(20)))

    with small_disk(path.parent, room=19_000_000):
        on_file(path, use, probe_interval_seconds=0.01)
        assert raw(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_disk_full_of_the_log_of_a_killed_process_is_freed_at_the_start(tmp_path):
    path = tmp_path / "disk" / "jobs.db"
    path.parent.mkdir()
    with small_disk(path.parent, room=19_000_000):
        command = [sys.executable, "-c", FILL_LOG, f"sqlite:///{path}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert path.with_name("jobs.db-wal").stat().st_size > 12_000_000
        on_file(path, lambda store: done(store, Create(id="after"), end("0"), Delete(id="0")))


OUT_OF_DESCRIPTORS = """
import asyncio, resource, sys
from jobstatus_grpc.job import Create, Delete, JobFilter, JobState, Update
from jobstatus_grpc.stores.sqlite import open_store

async def main():
    store = await open_store(sys.argv[1])
    await store.commit([Create(id=f"{n}") for n in range(500)])
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    store._cache._jobs.clear()
    readings = [store.get("default", f"{n}") for n in range(500)]
    readings += [store.transitions("default", "1"), store.page("default", JobFilter(), limit=500)]
    await asyncio.gather(*readings)
    await store.commit([Update(id="1", changes={"state": JobState.SUCCEEDED})])
    await store.commit([Delete(id="1")])
    await store.close()

asyncio.run(main())
"""


def test_a_store_needs_no_more_file_descriptors_once_it_is_open(tmp_path):
    command = [sys.executable, "-c", OUT_OF_DESCRIPTORS, f"sqlite:///{tmp_path}/jobs.db"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


# A broken file


def test_in_a_corrupt_file_what_is_not_damaged_is_read_and_nothing_is_written(tmp_path):
    path = tmp_path / "jobs.db"
    ids = [f"{n}" for n in range(400)]
    on_file(path, lambda store: done(store, *(Create(id=job_id, reason="r" * 900) for job_id in ids)))
    with path.open("r+b") as file:
        file.seek(20 * 4096)
        file.write(b"\xff" * 40 * 4096)

    async def use(store):
        outcomes = [await asyncio.gather(store.get("default", job_id), return_exceptions=True) for job_id in ids]
        kinds = Counter(type(outcome) for (outcome,) in outcomes)
        assert kinds.keys() == {Job, errors.DataLossError}
        assert min(kinds.values()) > 50
        with pytest.raises(errors.StoreUnavailableError, match=r"writes are refused: the file .* is damaged"):
            await store.commit([Create(id="after")])
        assert not store.writable

    on_file(path, use)


SHIM = """
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int fails(int fd) {
    char link[64], path[4096], suffix[64] = "";
    FILE *order = fopen(getenv("FAILING_FSYNC"), "r");
    if (!order) return 0;
    if (!fgets(suffix, sizeof suffix, order)) suffix[0] = 0;
    fclose(order);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path);
    size_t end = strlen(suffix);
    return end && length > (ssize_t) end && !memcmp(path + length - end, suffix, end);
}
int fsync(int fd) { if (fails(fd)) { errno = EIO; return -1; } return syscall(SYS_fsync, fd); }
int fdatasync(int fd) { if (fails(fd)) { errno = EIO; return -1; } return syscall(SYS_fdatasync, fd); }
"""

FAILING = """
import asyncio, os, sys
from pathlib import Path
from jobstatus_grpc.job import Create
from jobstatus_grpc.stores.sqlite import open_store, writer

async def main():
    store = await open_store(sys.argv[1])
    await store.commit([Create(id="before")])
    writer.CHECKPOINT_BYTES = 1
    Path(os.environ["FAILING_FSYNC"]).write_text(sys.argv[2])
    outcome, = await asyncio.gather(store.commit([Create(id="after")]), return_exceptions=True)
    print(type(outcome).__name__)
    print(await store.closed())
    await store.close()

asyncio.run(main())
"""


@pytest.mark.parametrize(("suffix", "outcome"), [("-wal", "StoreUnavailableError"), (".db", "CommitResult")])
def test_a_failed_fsync_ends_the_store(tmp_path, suffix, outcome):
    """A limit on the log makes the write fail; one on the database applies later, and leaves the log intact."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    path, shim = tmp_path / "jobs.db", tmp_path / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, "-x", "c", "-"], input=SHIM.encode(), check=True)
    environment = os.environ | {"LD_PRELOAD": str(shim), "FAILING_FSYNC": str(tmp_path / "order")}
    command = [sys.executable, "-c", FAILING, f"sqlite:///{path}", suffix]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kind, broken = result.stdout.splitlines()
    assert kind == outcome
    assert broken.startswith(f"the store {path} is broken: disk I/O error")
    assert (tmp_path / "jobs.db-wal").stat().st_size > 0
    assert isinstance(on_file(path, lambda store: store.get("default", "before"))[0], Job)
