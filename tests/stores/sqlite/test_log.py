"""The write-ahead log that a killed process leaves: replayed on its own file, refused on any other."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Create
from jobstatus_grpc.stores.sqlite import database
from tests.support.sqlite import on_file, open_at, raw_script
from tests.support.stores import done, ids_of

PROGRAM = """
import asyncio, os, signal, sqlite3, sys
from contextlib import closing
from jobstatus_grpc.job import Create
from jobstatus_grpc.stores.sqlite import open_store, writer

async def main():
    path, checkpoint_bytes, steps = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    writer.CHECKPOINT_BYTES = checkpoint_bytes
    store = await open_store(f"sqlite:///{path}")
    for step in steps:
        kind, _, name = step.partition("=")
        if kind == "backup":
            with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(name)) as target:
                source.backup(target)
        elif kind == "index":
            with closing(sqlite3.connect(path)) as other:
                other.execute(f"CREATE INDEX {name} ON jobs (reason)")
        else:
            await store.commit([Create(id=f"{name}-{n}", reason="r" * 500) for n in range(100)])
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""

NEVER = 10**9


def kill_after(path: Path, *steps: str, checkpoint_bytes: int = NEVER) -> None:
    """Take steps in a process with the store, `jobs=NAME`, `backup=FILE` or `index=NAME`, and kill it."""
    subprocess.run([sys.executable, "-c", PROGRAM, str(path), str(checkpoint_bytes), *steps], check=False)
    assert path.with_name(f"{path.name}-wal").stat().st_size > 0


def refusal_of(path: Path) -> str:
    with pytest.raises(errors.CannotStartError) as refused:
        asyncio.run(open_at(path))
    assert "\n" not in str(refused.value)
    return str(refused.value)


async def count(store) -> int:
    return len(await ids_of(store, limit=1000))


@pytest.mark.parametrize("checkpoint_bytes", [NEVER, 50_000, 200_000])
@pytest.mark.parametrize("runs", [1, 3])
def test_a_log_of_the_file_is_replayed_however_often_its_process_was_killed(tmp_path, checkpoint_bytes, runs):
    path = tmp_path / "jobs.db"
    for run in range(runs):
        kill_after(path, *(f"jobs={run}-{n}" for n in range(3)), checkpoint_bytes=checkpoint_bytes)
    assert on_file(path, count) == [300 * runs]


def test_a_log_is_replayed_after_a_clean_end_and_a_migration(tmp_path):
    path = tmp_path / "jobs.db"
    raw_script(path, Path(__file__).with_name("version_1.sql").read_text(encoding="utf-8"))
    kill_after(path, "jobs=a")
    assert on_file(path, count) == [104]
    kill_after(path, "jobs=b")
    assert on_file(path, count) == [204]


@pytest.mark.parametrize("checkpoint_bytes", [NEVER, 50_000, 200_000])
def test_a_log_is_replayed_where_an_administrator_changed_the_schema(tmp_path, checkpoint_bytes):
    path = tmp_path / "jobs.db"
    kill_after(path, "jobs=a", "index=one", "jobs=b", "index=two", checkpoint_bytes=checkpoint_bytes)
    assert on_file(path, count) == [200]


BACKUPS = {
    "of an earlier process": (["jobs=a"], ["backup={}", "jobs=b"]),
    "of the same process and log": ([], ["jobs=a", "backup={}", "jobs=b"]),
    "of the same process before it wrote": (["jobs=a"], ["backup={}", "jobs=b"]),
}


@pytest.mark.parametrize("when", BACKUPS)
@pytest.mark.parametrize("checkpoint_bytes", [NEVER, 200_000])
def test_the_log_of_a_killed_process_is_not_replayed_over_a_backup(tmp_path, when, checkpoint_bytes):
    path, backup = tmp_path / "jobs.db", tmp_path / "backup.db"
    before, last = BACKUPS[when]
    if before:
        kill_after(path, *before)
        on_file(path, count)
    kill_after(path, *(step.format(backup) for step in last), checkpoint_bytes=checkpoint_bytes)
    shutil.copy(backup, path)
    content = path.read_bytes()
    message = refusal_of(path)
    assert message.startswith(f"cannot open the store {path}: {path}-wal is the log of another file")
    assert "jobstatus restore" in message
    assert path.read_bytes() == content
    path.with_name("jobs.db-wal").unlink()
    path.with_name("jobs.db-shm").unlink()
    assert on_file(path, count) == [0 if when.endswith("wrote") and not before else 100]


def test_the_log_of_a_killed_process_is_not_replayed_over_an_older_copy_of_the_stopped_file(tmp_path):
    path, copy = tmp_path / "jobs.db", tmp_path / "copy.db"
    on_file(path, lambda store: done(store, Create(id="a")))
    shutil.copy(path, copy)
    on_file(path, lambda store: done(store, Create(id="b")))
    kill_after(path, "jobs=c")
    shutil.copy(copy, path)
    assert "is the log of another file" in refusal_of(path)


def test_the_log_of_one_store_is_not_replayed_over_another(tmp_path):
    path, other = tmp_path / "jobs.db", tmp_path / "other.db"
    kill_after(path, "jobs=a")
    on_file(other, lambda store: done(store, Create(id="b")))
    shutil.copy(other, path)
    assert "is the log of another file" in refusal_of(path)


def test_a_log_without_its_file_is_not_dropped(tmp_path):
    path = tmp_path / "jobs.db"
    kill_after(path, "jobs=a")
    content = path.read_bytes()
    path.unlink()
    assert "it is gone, but its log" in refusal_of(path)
    path.write_bytes(content)
    assert on_file(path, count) == [100]


# Damage


def damage(path: Path) -> None:
    """Overwrite pages behind the first ones of the tables, which hold the marks of the log."""
    with path.open("r+b") as file:
        file.seek(60 * database.PAGE_BYTES)
        file.write(b"\xff" * 20 * database.PAGE_BYTES)


def test_a_damaged_file_is_refused_after_an_unclean_end(tmp_path):
    path = tmp_path / "jobs.db"
    on_file(path, lambda store: done(store, *(Create(id=f"{n}", reason="r" * 900) for n in range(400))))
    kill_after(path, "jobs=a")
    damage(path)
    message = refusal_of(path)
    assert message.startswith(f"cannot open the store {path}: it is damaged (")
    assert "jobstatus restore" in message


def test_a_large_file_is_not_checked_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "QUICK_CHECK_BYTES", 100_000)
    path = tmp_path / "jobs.db"
    on_file(path, lambda store: done(store, *(Create(id=f"{n}", reason="r" * 900) for n in range(400))))
    kill_after(path, "jobs=a")
    damage(path)
    on_file(path, lambda store: asyncio.sleep(0))
