"""Loss of power under SQLite: unsynced writes are dropped and torn, and no acknowledged one is lost."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Create
from tests.support.disk import Disk, recording_environment
from tests.support.sqlite import on_file, raw
from tests.support.stores import done

CUTS, CUTS_IN_FULL = 25, 1500

WORKER = """
import asyncio, json, os, random, signal, sys
from jobstatus_grpc.job import Create, Delete, Job, JobState, Update
from jobstatus_grpc.stores.sqlite import open_store, writer

async def main():
    path, seed, commits = sys.argv[1], sys.argv[2], int(sys.argv[3])
    writer.CHECKPOINT_BYTES = 60_000
    chance = random.Random(seed)
    journal = os.open(f"{path}.db-journal-of-worker", os.O_RDWR | os.O_CREAT)
    length = 0

    def note(entry):
        nonlocal length
        length += os.pwrite(journal, (json.dumps(entry) + "\\n").encode(), length)

    for _ in range(3):
        store = await open_store(f"sqlite:///{path}.db")
        for _ in range(commits // 3):
            ids = [f"{chance.randrange(60)}" for _ in range(chance.choice((1, 2, 5, 40)))]
            commands = [
                Delete(id=job_id)
                if chance.random() < 0.1
                else Update(
                    id=job_id,
                    allow_missing=True,
                    changes={"reason": "r" * chance.choice((1, 10, 3000))}
                    | ({"state": JobState.SUCCEEDED} if chance.random() < 0.1 else {"progress": chance.random()}),
                )
                for job_id in ids
            ]
            note({command.id: None for command in commands if isinstance(command, Delete)})
            outcomes = (await store.commit(commands)).outcomes
            acknowledged = {}
            for command, outcome in zip(commands, outcomes):
                if isinstance(outcome, Job):
                    acknowledged[command.id] = -1 if isinstance(command, Delete) else outcome.revision
            note(acknowledged)
            if chance.random() < 0.05:
                await store.trim(limit=100)
        await store.close()
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def acknowledged_in(journal: bytes) -> tuple[dict[str, int], set[str]]:
    """Return the last acknowledged revision of each job, -1 if it was deleted, and all jobs that may be deleted."""
    revisions: dict[str, int] = {}
    may_be_deleted: set[str] = set()
    for line in journal.decode().splitlines():
        for job_id, revision in json.loads(line).items():
            if revision is None:
                may_be_deleted.add(job_id)
            else:
                revisions[job_id] = revision
    return revisions, may_be_deleted


async def revision_of(store, job_id: str) -> int:
    try:
        return (await store.get("default", job_id)).revision
    except errors.NotFoundError:
        return -1


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1])
def test_a_loss_of_power_loses_no_acknowledged_write(tmp_path, is_full, record_fault, seed):
    chance = random.Random(seed)
    environment, record = recording_environment(tmp_path)
    path = tmp_path / "jobs"
    cuts = CUTS_IN_FULL if is_full else CUTS
    command = [sys.executable, "-c", WORKER, str(path), f"{seed}", "600" if is_full else "150"]
    subprocess.run(command, env=environment, check=False)
    disk, journal = Disk(record), f"{path}.db-journal-of-worker"
    share = cuts / sum(1 for _ in Disk(record).moments())
    checked = lost_power = 0
    for changed in disk.moments():
        if changed == journal or chance.random() > share:
            continue
        revisions, may_be_deleted = acknowledged_in(disk.written_to(journal))
        if not revisions:
            continue
        disk.lose_power(tmp_path / "lost", chance)
        (tmp_path / "lost" / Path(journal).name).unlink()

        async def check(store, revisions=revisions, may_be_deleted=may_be_deleted):
            found = {job_id: await revision_of(store, job_id) for job_id in revisions}
            for job_id, revision in revisions.items():
                is_kept = found[job_id] >= revision or (found[job_id] == -1 and job_id in may_be_deleted)
                assert is_kept, f"{job_id}: revision {revision} was acknowledged, found {found[job_id]}"
            await done(store, Create(id="after"))

        on_file(tmp_path / "lost" / "jobs.db", check)
        assert raw(tmp_path / "lost" / "jobs.db", "PRAGMA integrity_check") == [("ok",)]
        lost_power += 1
        checked += len(revisions)
    assert lost_power > cuts / 3
    record_fault(
        "loss of power under SQLite at any write, unsynced writes dropped and torn at 512 bytes",
        count=lost_power,
        checked=f"{checked:,} acknowledged revisions",
        result="none lost, each start without a question",
    )
