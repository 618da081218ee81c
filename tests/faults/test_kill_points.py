"""`kill -9` where it hurts most: around a commit, and in a checkpoint, a trim, a migration, a backup."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from jobstatus_grpc import JobFilter, JobStatusClient
from tests.faults.killed_process import POINTS
from tests.support.judged import judged_under_faults
from tests.support.servers import NotStartedError, ServerProcess
from tests.support.sqlite import raw_script

pytestmark = pytest.mark.slow

KILLS, KILLS_IN_FULL = 1, 30
STATEMENTS = 3
VERSION_1 = (Path(__file__).parents[1] / "stores" / "sqlite" / "version_1.sql").read_text("utf-8")


def killed_at(point):
    return ("-m", "tests.faults.killed_process", point)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("point", sorted(set(POINTS) - {"in a migration", "in a backup"}))
def test_no_acknowledged_write_is_lost_by_a_kill(point, tmp_path, is_full, patience_seconds, monkeypatch, record_fault):
    kills = KILLS_IN_FULL if is_full else KILLS
    ended = itertools.count(1)
    with ServerProcess(program=killed_at(point), store=f"sqlite:///{tmp_path}/jobs.db") as server:

        def start_again():
            try:
                server.start()
            except NotStartedError as error:  # a start commits, checkpoints and trims too
                if error.args[1] != -signal.SIGKILL:
                    raise
                start_again()

        async def die():
            assert await asyncio.to_thread(server.wait) == -signal.SIGKILL
            if next(ended) == kills:
                monkeypatch.delenv("KILL")
            await asyncio.to_thread(start_again)

        server.kill()  # its first start, which chooses the port, had to succeed
        monkeypatch.setenv("KILL", "")
        start_again()
        judging = judged_under_faults(
            [server.address], die, times=kills, pause=lambda: 0.5, seed=1, patience_seconds=patience_seconds
        )
        judged = asyncio.run(judging)
    record_fault(f"`kill -9` of the server {point}, on SQLite", count=kills, checked=judged.what, result="no violation")


@pytest.mark.timeout(600)
def test_a_migration_that_was_killed_is_finished_by_the_next_start(tmp_path, is_full, monkeypatch, record_fault):
    old = tmp_path / "old.db"
    raw_script(old, VERSION_1)
    migrated = jobs_of(shutil.copy(old, tmp_path / "migrated.db"))
    path = tmp_path / "jobs.db"
    kills = 0
    while kills < STATEMENTS or is_full:
        for file in tmp_path.glob("jobs.db*"):
            file.unlink()
        shutil.copy(old, path)
        # In short at statements that are far from each other, in full at each until all of the migration is before it.
        monkeypatch.setenv("KILL", str(kills + 1 if is_full else 8 * kills + 8))
        server = ServerProcess(program=killed_at("in a migration"), store=f"sqlite:///{path}")
        try:
            server.start()
        except AssertionError:
            kills += 1
        else:
            server.kill()
            break
        monkeypatch.delenv("KILL")
        assert jobs_of(path) == migrated
    assert kills >= STATEMENTS
    record_fault(
        "`kill -9` of the server in a migration, at each statement, on SQLite",
        count=kills,
        checked=f"the next start has the {len(migrated)} jobs of the old file",
        result="none lost",
    )


def jobs_of(path):
    """Serve the file, and return its open jobs: the others have expired."""
    with ServerProcess(store=f"sqlite:///{path}") as server, JobStatusClient(server.address) as client:
        return client.list(JobFilter(done=False)).jobs


@pytest.mark.timeout(300)
def test_a_backup_that_was_killed_leaves_the_server_and_the_earlier_backup_as_they_are(
    tmp_path, is_full, patience_seconds, monkeypatch, record_fault
):
    kills = KILLS_IN_FULL if is_full else KILLS
    target, store = tmp_path / "backup.db", f"sqlite:///{tmp_path}/jobs.db"
    command = [sys.executable, *killed_at("in a backup"), "backup", str(target), "--store", store]
    with ServerProcess(store=store) as server:
        subprocess.run(command, check=True, timeout=60)
        monkeypatch.setenv("KILL", "")

        async def back_up():
            ended = await asyncio.to_thread(subprocess.run, command, check=False, timeout=60)
            assert ended.returncode == -signal.SIGKILL
            with closing(sqlite3.connect(target)) as copy:
                assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]

        judging = judged_under_faults(
            [server.address], back_up, times=kills, pause=lambda: 0.2, seed=2, patience_seconds=patience_seconds
        )
        judged = asyncio.run(judging)
    record_fault(
        "`kill -9` of `jobstatus backup`",
        count=kills,
        checked=f"{judged.what}; the backup from before",
        result="no violation, always a whole backup",
    )
