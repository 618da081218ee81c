"""`jobstatus backup` and `jobstatus restore`."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import threading
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.servers import ServerProcess
from tests.support.service import Service
from tests.support.sqlite import raw


@pytest.fixture
def store(tmp_path) -> Path:
    """The path of a store that a server was killed on, so that its log is there, with the jobs a and b."""
    return make_store(tmp_path / "jobs.db", "a", "b")


def make_store(path: Path, *ids: str) -> Path:
    with ServerProcess(store=f"sqlite:///{path}") as server:
        create(server, *ids)
    return path


def create(server: ServerProcess, *ids: str) -> None:
    service = Service(server.address)
    for job_id in ids:
        service.create(id=job_id)
    service.close()


def ids_in(path: Path) -> set[str]:
    return {job_id for (job_id,) in raw(path, "SELECT id FROM jobs")}


def files_in(directory: Path) -> set[str]:
    return set(os.listdir(directory))


def test_a_backup_is_made_beside_a_server_that_writes_and_is_whole(offline_cli, tmp_path):
    path, backup = tmp_path / "jobs.db", tmp_path / "copies" / "backup.db"
    backup.parent.mkdir()
    with ServerProcess(store=f"sqlite:///{path}") as server:
        create(server, "a", "b")
        is_over = threading.Event()

        def write() -> None:
            number = 0
            while not is_over.is_set():
                number += 1
                create(server, f"more-{number}")

        writer = threading.Thread(target=write)
        writer.start()
        done = offline_cli("backup", str(backup), "--store", f"sqlite:///{path}")
        is_over.set()
        writer.join()
        assert (done.returncode, done.stderr) == (0, "")
        assert {"a", "b"} <= ids_in(backup)
        assert done.stdout == f"wrote a backup to {backup}; jobs: {len(ids_in(backup))}\n"
        create(server, "after")
        assert server.terminate() == 0
    assert raw(backup, "PRAGMA integrity_check") == [("ok",)]
    assert files_in(backup.parent) == {"backup.db"}
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600


def test_a_backup_of_a_killed_servers_store_has_what_is_in_its_log(offline, store, tmp_path):
    done = offline("backup", str(tmp_path / "backup.db"), "--store", f"sqlite:///{store}")
    assert done.returncode == 0
    assert ids_in(tmp_path / "backup.db") == {"a", "b"}


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal", ".lock"])
def test_a_backup_replaces_no_file_that_belongs_to_a_store(offline, store, tmp_path, suffix):
    (tmp_path / "link").symlink_to(f"{store}{suffix}")
    before, log = files_in(tmp_path), store.with_name("jobs.db-wal").read_bytes()
    done = offline("backup", str(tmp_path / "link"), "--store", f"sqlite:///{store}")
    says = f"error: {store}{suffix} is a file of the store {store}; name another file\n"
    assert (done.stdout, done.stderr, done.returncode) == ("", says, 2)
    assert (files_in(tmp_path), store.with_name("jobs.db-wal").read_bytes()) == (before, log)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_backup_replaces_no_store_that_is_served(offline, store, tmp_path, link):
    other, alias = tmp_path / "other.db", tmp_path / "alias.db"
    with ServerProcess(store=f"sqlite:///{other}") as server:
        link(other, alias)
        for target in (other, alias):
            done = offline("backup", str(target), "--store", f"sqlite:///{store}")
            assert (done.stdout, done.returncode, done.stderr.count("\n")) == ("", 2, 1)
            assert done.stderr.endswith(" has it open; name another file for the backup\n")
        create(server, "c")
        assert server.terminate() == 0
    assert ids_in(other) == {"c"}


def test_a_backup_replaces_no_store_with_writes_that_are_in_its_log_alone(offline, store, tmp_path):
    other = make_store(tmp_path / "other.db", "c")
    done = offline("backup", str(other), "--store", f"sqlite:///{store}")
    assert (done.stdout, done.returncode, done.stderr.count("\n")) == ("", 2, 1)
    assert "other.db-wal is the log of a store" in done.stderr
    assert ids_in(other) == {"c"}


def test_a_backup_replaces_an_older_one_that_was_served_since(offline, store, tmp_path):
    backup = tmp_path / "backup.db"
    offline("backup", str(backup), "--store", f"sqlite:///{store}")
    with ServerProcess(store=f"sqlite:///{backup}") as server:
        create(server, "c")
        assert server.terminate() == 0
    assert offline("backup", str(backup), "--store", f"sqlite:///{store}").returncode == 0
    assert ids_in(backup) == {"a", "b"}


def test_the_store_is_that_of_serve_unless_it_is_named(offline, store, tmp_path, monkeypatch):
    os.rename(store, tmp_path / "jobstatus.db")
    os.rename(f"{store}-wal", tmp_path / "jobstatus.db-wal")
    monkeypatch.chdir(tmp_path)
    assert offline("backup", "backup.db").returncode == 0
    assert ids_in(tmp_path / "backup.db") == {"a", "b"}


def test_a_restored_store_has_the_backups_jobs_and_no_log_of_before(offline, store, tmp_path):
    backup = tmp_path / "backup.db"
    offline("backup", str(backup), "--store", f"sqlite:///{store}")
    make_store(store, "c", "d")
    assert store.with_name("jobs.db-wal").stat().st_size > 0
    before = files_in(tmp_path)
    done = offline("restore", str(backup), "--store", f"sqlite:///{store}")
    assert (done.stdout, done.stderr, done.returncode) == (f"restored the store from {backup}; jobs: 2\n", "", 0)
    assert files_in(tmp_path) == before - {"jobs.db-wal", "jobs.db-shm"}
    make_store(store, "e")
    assert ids_in(store) == {"a", "b", "e"}


def test_a_store_that_is_gone_is_restored(offline, store, tmp_path):
    backup = tmp_path / "backup.db"
    offline("backup", str(backup), "--store", f"sqlite:///{store}")
    new = tmp_path / "new" / "jobs.db"
    new.parent.mkdir()
    assert offline("restore", str(backup), "--store", f"sqlite:///{new}").returncode == 0
    assert ids_in(new) == {"a", "b"}


def test_a_restore_beside_a_server_is_refused_and_changes_nothing(offline, store, tmp_path):
    backup = tmp_path / "backup.db"
    offline("backup", str(backup), "--store", f"sqlite:///{store}")
    with ServerProcess(store=f"sqlite:///{store}") as server:
        create(server, "c")
        done = offline("restore", str(backup), "--store", f"sqlite:///{store}")
        assert (done.stdout, done.returncode) == ("", 2)
        assert done.stderr == f"error: cannot open the store {store}: process {server.pid} has it open\n"
        create(server, "d")
        assert server.terminate() == 0
    assert ids_in(store) == set("abcd")


def make_damaged(path: Path, store: Path) -> None:
    shutil.copy(store, path)
    with path.open("r+b") as file:
        file.seek(3 * 2048)
        file.write(b"\xff" * 9 * 2048)


def make_foreign(path: Path, store: Path) -> None:
    raw(path, "CREATE TABLE theirs (a)")


def make_newer(path: Path, store: Path) -> None:
    shutil.copy(store, path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def make_text(path: Path, store: Path) -> None:
    path.write_text("not a database " * 1000)


def make_nothing(path: Path, store: Path) -> None: ...


def make_the_store(path: Path, store: Path) -> None:
    path.symlink_to(store)


UNUSABLE = {
    make_damaged: "is damaged",
    make_foreign: "is not a store of jobstatus",
    make_newer: "newer than",
    make_text: "file is not a database",
    make_nothing: "there is no file",
    make_the_store: "is the store itself",
}


@pytest.mark.parametrize("make", UNUSABLE)
def test_what_is_no_backup_is_refused_in_one_line_and_changes_nothing(offline, tmp_path, make):
    store, file = tmp_path / "jobs.db", tmp_path / "file.db"
    with ServerProcess(store=f"sqlite:///{store}") as server:
        create(server, "a")
        assert server.terminate() == 0
    make(file, store)
    before, content = files_in(tmp_path), store.read_bytes()
    done = offline("restore", str(file), "--store", f"sqlite:///{store}")
    assert (done.stdout, done.returncode, done.stderr.count("\n")) == ("", 2, 1)
    assert UNUSABLE[make] in done.stderr
    assert (files_in(tmp_path), store.read_bytes()) == (before, content)


def test_a_damaged_store_leaves_the_last_backup_as_it_was(offline, tmp_path):
    store, backup = tmp_path / "jobs.db", tmp_path / "backup.db"
    with ServerProcess(store=f"sqlite:///{store}") as server:
        create(server, "a")
        assert server.terminate() == 0
    backup.write_text("the last one")
    make_damaged(store, store.rename(tmp_path / "whole.db"))
    done = offline("backup", str(backup), "--store", f"sqlite:///{store}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "damaged" in done.stderr
    assert backup.read_text() == "the last one"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["backup", "b.db"], "jobstatus.db; name the one to copy: --store sqlite:///PATH"),
        (["restore", "b.db", "--store", "sqlite:///b.db"], "there is no file"),
        (["backup", "b.db", "--store", "memory:"], "has no backups of its own"),
        (["restore", "b.db", "--store", "postgresql://me:secret@host/db"], "use pg_dump and pg_restore"),
        (["restore", "b.db"], "--store"),
        (["backup"], "FILE"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_2(offline, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    done = offline(*arguments)
    assert (done.stdout, done.returncode, done.stderr.count("\n")) == ("", 2, 1)
    assert says in done.stderr
    assert "secret" not in done.stderr
    assert files_in(tmp_path) == set()


def test_a_store_is_not_restored_into_a_directory_that_is_missing(offline, store, tmp_path):
    backup = tmp_path / "backup.db"
    offline("backup", str(backup), "--store", f"sqlite:///{store}")
    done = offline("restore", str(backup), "--store", f"sqlite:///{tmp_path}/missing/jobs.db")
    assert (done.stdout, done.returncode, done.stderr.count("\n")) == ("", 2, 1)
    assert f"the directory {tmp_path}/missing does not exist" in done.stderr
