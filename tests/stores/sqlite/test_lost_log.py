"""A write-ahead log that lost acknowledged transactions is refused; what a kill or a loss of power leaves is not."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Create
from jobstatus_grpc.stores.sqlite.backup import back_up, restore
from jobstatus_grpc.stores.sqlite.database import PAGE_BYTES
from tests.support.sqlite import on_file, open_at
from tests.support.stores import done, ids_of

FRAME_BYTES = 24 + PAGE_BYTES

PROGRAM = """
import asyncio, os, signal, sys
from jobstatus_grpc.job import Create
from jobstatus_grpc.stores.sqlite import open_store

async def main():
    store = await open_store(f"sqlite:///{sys.argv[1]}")
    for number in range(10):
        await store.commit([Create(id=f"{number}")])
        print(await store.position(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""

ALL = [f"{number}" for number in reversed(range(10))]


@pytest.fixture
def path(tmp_path):
    """A store with ten jobs, each of its own transaction, all of them in the log of a killed process."""
    path = tmp_path / "jobs.db"
    with path.with_name("positions").open("w") as positions:
        subprocess.run([sys.executable, "-c", PROGRAM, path], stdout=positions, check=False)
    return path


def log_of(path: Path) -> Path:
    return path.with_name("jobs.db-wal")


def commits_of(path: Path) -> list[int]:
    """Return the number of pages in the log up to each commit."""
    log = log_of(path).read_bytes()
    frames = (len(log) - 32) // FRAME_BYTES
    marks = [log[32 + number * FRAME_BYTES + 4 :][:4] for number in range(frames)]
    return [number + 1 for number, mark in enumerate(marks) if mark != bytes(4)]


def flip(path: Path, offset: int) -> None:
    with log_of(path).open("r+b") as log:
        log.seek(offset)
        (byte,) = log.read(1)
        log.seek(offset)
        log.write(bytes([byte ^ 1]))


def start_of(commits: list[int], number: int) -> int:
    """Return the offset of the first page of a transaction."""
    return 32 + (commits[number - 1] if number else 0) * FRAME_BYTES


def refusal_of(path: Path) -> str:
    with pytest.raises(errors.CannotStartError) as refused:
        asyncio.run(open_at(path))
    return str(refused.value)


@pytest.mark.parametrize("within", [100, 8, 16])
def test_a_flip_that_cuts_transactions_off_is_refused_with_their_number(path, within):
    """In a page, in its salt, and in its checksum."""
    commits = commits_of(path)
    flip(path, start_of(commits, 5) + within)
    assert f"{10 - 5 - 1} or more transactions, which were acknowledged, cannot be read" in refusal_of(path)
    assert "jobstatus restore" in refusal_of(path)


@pytest.mark.parametrize("offset", [0, 8, 17, 30])
def test_a_flip_in_the_header_of_the_log_is_refused(path, offset):
    flip(path, offset)
    assert "9 or more transactions" in refusal_of(path)


def test_what_a_loss_of_power_leaves_of_the_last_transaction_is_dropped(path):
    commits = commits_of(path)
    flip(path, start_of(commits, 9) + 100)
    assert on_file(path, ids_of) == [ALL[1:]]


def test_a_log_that_ends_anywhere_in_its_last_transaction_is_replayed(path):
    commits = commits_of(path)
    for size in range(start_of(commits, 9), log_of(path).stat().st_size - 1, FRAME_BYTES // 3):
        os.truncate(log_of(path), size)
    assert on_file(path, ids_of) == [ALL[1:]]


def test_pages_of_an_earlier_log_are_no_lost_transactions(path):
    """After a checkpoint the log begins anew over its old pages."""
    pages = log_of(path).read_bytes()[32:]
    on_file(path, ids_of)
    subprocess.run([sys.executable, "-c", PROGRAM.replace('f"{number}"', 'f"n{number}"'), path], check=False)
    with log_of(path).open("ab") as log:
        log.write(pages)
    assert len(on_file(path, ids_of)[0]) == 20


def test_the_operator_goes_on_without_them_by_backup_and_restore(path, tmp_path, caplog):
    url, copy = f"sqlite:///{path}", tmp_path / "copy.db"
    flip(path, start_of(commits_of(path), 5) + 100)
    damaged = log_of(path).read_bytes()
    assert back_up(url, str(copy)) == 5
    assert "the log of the store" in caplog.text
    assert restore(url, str(copy)) == 5
    assert path.with_name("jobs.db-wal.damaged").read_bytes() == damaged
    assert on_file(path, ids_of) == [ALL[5:]]


def test_positions_of_lost_transactions_are_refused_when_later_ones_have_their_numbers(path, tmp_path):
    url, copy = f"sqlite:///{path}", tmp_path / "copy.db"
    flip(path, start_of(commits_of(path), 5) + 100)
    back_up(url, str(copy))
    restore(url, str(copy))
    positions = path.with_name("positions").read_text().split()

    async def use(store):
        for number in range(10):
            await done(store, Create(id=f"new-{number}"))
        here = await store.position()
        reads = [store.changes(position, up_to=here) for position in positions]
        outcomes = await asyncio.gather(*reads, return_exceptions=True)
        return [isinstance(outcome, errors.StoreChangedError) for outcome in outcomes]

    assert on_file(path, use) == [[False] * 5 + [True] * 5]


def test_ten_killed_lives_leave_a_small_log(path):
    for _ in range(9):
        program = PROGRAM.replace("id=f", "id=os.urandom(8).hex() + f")
        subprocess.run([sys.executable, "-c", program, path], check=False)
    commits = commits_of(path)
    assert len(commits) == 10
    assert len(on_file(path, ids_of)[0]) == 100


def test_a_clean_start_leaves_an_empty_log(path):
    async def use(store):
        return log_of(path).stat().st_size

    assert on_file(path, use) == [0]
