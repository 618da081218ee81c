"""The SQLite store's file: its lock, its errors at opening, its mode, its migrations."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Create, JobFilter, JobState, Update
from jobstatus_grpc.stores.sql.migrations import migrations
from jobstatus_grpc.stores.sqlite.database import SqliteFile, path_of
from jobstatus_grpc.stores.sqlite.store import SqliteStore, open_store
from tests.support.sqlite import on_file, open_at, raw, raw_script
from tests.support.stores import done, ids_of

STEPS = migrations("jobstatus_grpc.stores.sqlite")

# One process


def test_a_second_process_is_refused_in_one_line(tmp_path):
    path = tmp_path / "jobs.db"

    async def use(store):
        program = "import asyncio, sys; from jobstatus_grpc.stores.sqlite import open_store as o; "
        program += f"asyncio.run(o({f'sqlite:///{path}'!r}))"
        return await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True)

    (result,) = on_file(path, use)
    expected = f"CannotStartError: cannot open the store {path}: process {os.getpid()} has it open"
    assert result.stderr.splitlines()[-1].endswith(expected)


def test_a_link_to_the_file_has_the_same_lock(tmp_path):
    (tmp_path / "link.db").symlink_to(tmp_path / "jobs.db")

    async def use(store):
        with pytest.raises(errors.CannotStartError, match="has it open"):
            await open_store(f"sqlite:///{tmp_path}/link.db")

    on_file(tmp_path / "jobs.db", use)


def test_a_refused_opening_leaves_the_file_free(tmp_path):
    path = tmp_path / "jobs.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(errors.CannotStartError, match=f"{path}: file is not a database"):
        asyncio.run(open_at(path))
    path.unlink()
    on_file(path, SqliteStore.position)


# What cannot be opened


def make_directory(path: Path) -> None:
    path.mkdir()


def make_parent_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.touch()


def make_foreign(path: Path) -> None:
    raw(path, "CREATE TABLE theirs (a)")


def make_newer(path: Path) -> None:
    on_file(path, SqliteStore.position)
    raw(path, f"PRAGMA user_version = {len(STEPS) + 1}")


def make_unwritable(path: Path) -> None:
    path.touch()
    path.chmod(0o400)
    if os.access(path, os.W_OK):
        pytest.skip("this user may write everything")


def make_lock_a_link(path: Path) -> None:
    (path.parent / "mine").write_text("text")
    Path(f"{path}.lock").symlink_to("mine")


UNUSABLE = {
    make_directory: "Is a directory",
    make_parent_a_file: "Not a directory",
    make_foreign: "it is a database of something else",
    make_newer: f"newer than the {len(STEPS)} known here",
    make_unwritable: "Permission denied",
    make_lock_a_link: os.strerror(errno.ELOOP),
}


@pytest.mark.parametrize("make", UNUSABLE)
def test_a_file_that_cannot_be_used_is_named_in_one_line(tmp_path, make):
    path = tmp_path / "in" / "jobs.db"
    path.parent.mkdir()
    make(path)
    with pytest.raises(errors.CannotStartError) as refusal:
        asyncio.run(open_at(path))
    message = str(refusal.value)
    assert message.startswith(f"cannot open the store {path}: ")
    assert UNUSABLE[make] in message
    assert "\n" not in message


@pytest.mark.parametrize("url", ["sqlite:", "sqlite://", "sqlite:///", "sqlite://host/a.db", "sqlite:///:memory:"])
def test_a_url_without_a_path_is_refused(url):
    with pytest.raises(errors.CannotStartError, match="sqlite:///relative/path"):
        asyncio.run(open_store(url))


def test_three_slashes_are_relative_and_four_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert path_of("sqlite:///a/b.db") == str(tmp_path / "a" / "b.db")
    assert path_of(f"sqlite:///{tmp_path}/ü%20?.db") == str(tmp_path / "ü%20?.db")


def test_a_path_may_hold_what_a_uri_may_not(tmp_path):
    path = tmp_path / "ü %20?#&.db"
    on_file(path, lambda store: done(store, Create(id="a")))
    assert path.exists()


def test_a_missing_directory_is_an_error_that_names_the_path_and_the_four_slashes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.CannotStartError) as refusal:
        asyncio.run(open_store("sqlite:///var/lib/x.db"))
    message = str(refusal.value)
    assert f"cannot open the store {tmp_path}/var/lib/x.db: the directory {tmp_path}/var/lib does not exist" in message
    assert "sqlite:////absolute/path.db" in message
    assert os.listdir(tmp_path) == []


# The file


def test_what_is_created_is_for_its_owner_only(tmp_path):
    path = tmp_path / "jobs.db"

    async def use(store):
        await done(store, Create(id="a"))
        return {name: stat.S_IMODE(os.stat(path.parent / name).st_mode) for name in os.listdir(path.parent)}

    (modes,) = on_file(path, use)
    assert modes == dict.fromkeys(["jobs.db", "jobs.db-wal", "jobs.db-shm", "jobs.db.lock"], 0o600)


def test_the_writing_connection_is_durable_and_readers_cannot_write(tmp_path):
    file = SqliteFile(str(tmp_path / "jobs.db"))
    with closing(file.connect_writer()) as writer, closing(file.connect_reader()) as reader:
        settings = [writer.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
        assert settings == ["wal", 2]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.execute("DELETE FROM jobs")
    file.unlock()


def test_a_clean_end_leaves_one_file_and_its_lock(tmp_path):
    on_file(tmp_path / "jobs.db", lambda store: done(store, Create(id="a")))
    assert sorted(os.listdir(tmp_path)) == ["jobs.db", "jobs.db.lock"]


def test_no_index_holds_what_every_update_changes(tmp_path):
    on_file(tmp_path / "jobs.db", SqliteStore.position)
    indexes = raw(tmp_path / "jobs.db", "SELECT name FROM pragma_index_list('jobs')")
    columns = {row[0] for (name,) in indexes for row in raw(tmp_path / "jobs.db", f"PRAGMA index_info({name})")}
    assert columns.isdisjoint({"revision", "updated_at", "progress", "reason"})


# Migrations

VERSION_1 = Path(__file__).with_name("version_1.sql").read_text(encoding="utf-8")


def test_a_file_of_version_1_is_listed_and_counted_as_if_it_had_always_been(tmp_path):
    raw_script(tmp_path / "jobs.db", VERSION_1)

    async def use(store):
        assert (await store.get("default", "render")).labels == {"team": 'me"dia', "zone": "eu"}
        assert await ids_of(store) == ["failed", "plain", "backup", "render"]
        assert await ids_of(store, JobFilter(labels={"team": 'me"dia'})) == ["backup", "render"]
        assert await ids_of(store, JobFilter(labels={'wei"rd\\ ☃': ""})) == ["plain"]
        assert await ids_of(store, JobFilter(labels={"zone": "eu"}), tenant="other") == ["render"]
        assert await ids_of(store, JobFilter(names={"render ☃"}, done=True)) == ["failed"]
        assert await ids_of(store, JobFilter(parent_id="parent")) == ["render"]
        await done(store, Update(id="render", changes={"labels": {}}))
        assert await ids_of(store, JobFilter(labels={"zone": "eu"})) == []
        return [store.jobs_by_state()[state] for state in JobState]

    assert on_file(tmp_path / "jobs.db", use) == [[2, 1, 0, 1, 0, 1, 0]]


def test_a_file_of_version_1_becomes_what_a_new_one_is(tmp_path):
    raw_script(tmp_path / "old.db", VERSION_1)
    for name in ("old.db", "new.db"):
        on_file(tmp_path / name, SqliteStore.position)
    schemas = [set(raw(tmp_path / name, "SELECT type, name, sql FROM sqlite_master")) for name in ("old.db", "new.db")]
    assert schemas[0] == schemas[1]


def test_a_job_of_before_a_column_was_added_has_the_same_checksum(tmp_path):
    path = tmp_path / "jobs.db"
    on_file(path, lambda store: store.commit([Create(id="a", name="n")]))
    raw(path, "ALTER TABLE jobs DROP COLUMN trace_parent")
    raw(path, "PRAGMA user_version = 10")
    (job,) = on_file(path, lambda store: store.get("default", "a"))
    assert (job.name, job.trace_parent) == ("n", "")


def test_a_file_is_migrated_a_version_at_a_time(tmp_path):
    file = SqliteFile(str(tmp_path / "jobs.db"))
    file.connect_writer().close()
    steps = [*STEPS, "ALTER TABLE jobs ADD COLUMN extra TEXT;", "CREATE INDEX by_extra ON jobs (extra);"]
    with closing(file.connect_writer(steps)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(steps),)
        assert connection.execute("SELECT count(extra) FROM jobs").fetchone() == (0,)
    file.unlock()


def test_a_migration_that_fails_leaves_the_version_before(tmp_path):
    file = SqliteFile(str(tmp_path / "jobs.db"))
    steps = [*STEPS, "CREATE TABLE fine (a);", "CREATE TABLE half (a); CREATE TABLE jobs (a);"]
    with pytest.raises(errors.CannotStartError, match="table jobs already exists"):
        file.connect_writer(steps)
    file.unlock()
    assert raw(tmp_path / "jobs.db", "PRAGMA user_version") == [(len(steps) - 1,)]
    assert raw(tmp_path / "jobs.db", "SELECT count(*) FROM sqlite_master WHERE name IN ('fine', 'half')") == [(1,)]
