"""Flipped bytes in the SQLite database and its log: a wrong row is never served, a lost write never passed over."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Create, Job, Update
from tests.support.sqlite import on_file
from tests.support.stores import claim, done, pages_of

FLIPS, FLIPS_IN_FULL = 20, 400
JOBS = 300

FILL = """
import asyncio, os, random, signal, sys
from jobstatus_grpc.job import Create, JobState, Update
from jobstatus_grpc.stores.sqlite import open_store

async def main():
    chance = random.Random(int(sys.argv[2]))
    store = await open_store(f"sqlite:///{sys.argv[1]}")
    ids = [f"{n}" for n in range(60)]
    await store.commit([Create(id=job_id, state=JobState.IN_PROGRESS) for job_id in ids])
    for number in range(60):
        chosen = chance.sample(ids, chance.randint(1, 20))
        await store.commit([Update(id=job_id, changes={"reason": f"{number}"}) for job_id in chosen])
    for job_id in ids:
        print(job_id, (await store.get("default", job_id)).reason)
    await store.commit([Create(id="last")])
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def flip(path: Path, chance: random.Random) -> None:
    """Change a bit, or a few bytes, anywhere in the file."""
    with path.open("r+b") as file:
        file.seek(chance.randrange(path.stat().st_size))
        size = chance.choice((1, 1, 1, 4, 64))
        data = bytearray(file.read(size))
        for index in range(len(data)):
            data[index] ^= 1 << chance.randrange(8)
        file.seek(-len(data), 1)
        file.write(data)


async def outcome_of(reading):
    return (await asyncio.gather(reading, return_exceptions=True))[0]


def copy_of(directory: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(directory, target)
    return target / "jobs.db"


def fill_and_kill(path: Path, seed: int) -> dict[str, str]:
    """Write to the store in a process that is killed; return what was acknowledged: the reason of each job."""
    path.parent.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", FILL, str(path), f"{seed}"], stdout=subprocess.PIPE, text=True, check=False
    )
    return {"last": ""} | dict(line.partition(" ")[::2] for line in result.stdout.splitlines())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1])
def test_a_flip_in_the_log_loses_no_acknowledged_write_unnoticed(tmp_path, is_full, record_fault, seed):
    chance = random.Random(seed)
    acknowledged = fill_and_kill(tmp_path / "killed" / "jobs.db", seed)
    assert len(acknowledged) == 61
    found: Counter[str] = Counter()

    async def read(store):
        outcomes = {job_id: await outcome_of(store.get("default", job_id)) for job_id in acknowledged}
        return {job_id: job.reason for job_id, job in outcomes.items() if isinstance(job, Job)}

    for _ in range(FLIPS_IN_FULL if is_full else FLIPS):
        path = copy_of(tmp_path / "killed", tmp_path / "flipped")
        flip(path.with_name("jobs.db-wal"), chance)
        try:
            (jobs,) = on_file(path, read)
        except errors.CannotStartError:
            found["refused"] += 1
            continue
        # The last transaction, cut off, is what a loss of power leaves of one that was not acknowledged.
        lacks_last = jobs == {job_id: reason for job_id, reason in acknowledged.items() if job_id != "last"}
        assert jobs == acknowledged or lacks_last
        found["without the last transaction" if lacks_last else "no effect"] += 1
    assert found["refused"] > found.total() / 2
    record_fault(
        "a flipped bit, or up to 64 bytes, in the log of a killed SQLite server",
        count=found.total(),
        checked="every acknowledged write",
        result=", ".join(f"{number} {name}" for name, number in sorted(found.items())),
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1])
def test_a_flip_in_the_database_never_makes_a_wrong_job(tmp_path, is_full, record_fault, seed):
    chance = random.Random(seed)
    (tmp_path / "sound").mkdir()

    async def fill(store):
        await done(store, *(Create(id=f"{n}", name=f"job {n % 7}", labels={"n": f"{n}"}) for n in range(JOBS)))
        await done(store, *(claim(f"{n}") for n in range(0, JOBS, 2)))
        await done(store, *(Update(id=f"{n}", changes={"progress": n / 3}) for n in range(0, JOBS, 3)))

    async def read_all(store):
        return {f"{n}": await outcome_of(store.get("default", f"{n}")) for n in range(JOBS)}

    async def list_all(store):
        pages = await pages_of(store, limit=100)
        return [job for page in pages for job in page.jobs]

    on_file(tmp_path / "sound" / "jobs.db", fill)
    expected, _ = on_file(tmp_path / "sound" / "jobs.db", read_all, list_all)
    found: Counter[str] = Counter()

    async def check(store):
        end = asyncio.create_task(store.closed())
        jobs = await read_all(store)
        listed = await outcome_of(list_all(store))
        wrong = {job_id for job_id, job in jobs.items() if isinstance(job, Job) and job != expected[job_id]}
        if isinstance(listed, list):
            wrong |= {job.id for job in listed if job != expected.get(job.id)}
        assert not wrong
        assert not end.done()
        end.cancel()
        kinds = {type(outcome) for outcome in jobs.values()} | ({type(listed)} - {list})
        # Unavailable: the damage is in the schema.
        assert kinds <= {Job, errors.DataLossError, errors.JobNotFoundError, errors.StoreUnavailableError}
        return kinds

    for _ in range(FLIPS_IN_FULL if is_full else FLIPS):
        path = copy_of(tmp_path / "sound", tmp_path / "flipped")
        flip(path, chance)
        try:
            (kinds,) = on_file(path, check)
        except errors.CannotStartError:
            found["not opened"] += 1
            continue
        if errors.DataLossError in kinds:
            found["DATA_LOSS for the damaged jobs"] += 1
        found["a job hidden by a damaged index"] += errors.JobNotFoundError in kinds
        found["UNAVAILABLE"] += errors.StoreUnavailableError in kinds
        found["no effect on reads"] += kinds == {Job}
    record_fault(
        "a flipped bit, or up to 64 bytes, in the SQLite database",
        count=FLIPS_IN_FULL if is_full else FLIPS,
        checked="every job, by GetJob and in the list",
        result="no wrong job: " + ", ".join(f"{number} {name}" for name, number in sorted(found.items())),
    )
