"""Databases of earlier schema versions, stored as dumps, are read as they were written; see docs/release.md."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jobstatus_grpc.errors import JobExpiredError
from jobstatus_grpc.job import Update
from jobstatus_grpc.stores.interface import JobStore
from jobstatus_grpc.stores.postgres.store import PostgresStore
from tests.support.sqlite import on_file, raw_script
from tests.support.stored_databases import (
    OPEN_JOB,
    REMOVED_JOB,
    REQUEST,
    STORES,
    StoredDatabase,
    contents_of,
    postgres_database,
    sqlite_database,
)
from tests.support.stores import RETENTION, StandingClock, done

SQLITE, POSTGRES = (
    [pytest.param(path, id=path.stem) for path in sorted((STORES / name).glob("version_*.json"))]
    for name in ("sqlite", "postgres")
)


def contents(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def is_kept(stored: Any, now: Any) -> bool:
    """Whether all that was stored is there; a later version may have more fields."""
    if isinstance(stored, dict) and isinstance(now, dict):
        return all(name in now and is_kept(value, now[name]) for name, value in stored.items())
    if isinstance(stored, list) and isinstance(now, list):
        return len(stored) == len(now) and all(map(is_kept, stored, now))
    return bool(stored == now)


async def check(store: JobStore, stored: Mapping[str, Any]) -> None:
    """Fail unless the store has what was stored, and goes on from there."""
    now = await contents_of(store)
    assert {tenant: set(jobs) for tenant, jobs in now.items()} == {t: set(jobs) for t, jobs in stored["jobs"].items()}
    changed = [
        key for tenant, jobs in now.items() for key in jobs if not is_kept(stored["jobs"][tenant][key], jobs[key])
    ]
    assert not changed
    with pytest.raises(JobExpiredError):
        await store.get("default", REMOVED_JOB)
    before = stored.get("position") or await store.position()
    (again,) = await done(store, REQUEST)
    assert again.revision == (await store.get("default", OPEN_JOB)).revision
    (updated,) = await done(store, Update(id=OPEN_JOB, changes={"progress": 50.0}, attempt=1))
    assert updated.revision == again.revision + 1
    assert [change.id for change in (await store.changes(before)).changes] == [OPEN_JOB]


@pytest.mark.parametrize("path", SQLITE)
def test_a_stored_sqlite_file_is_read_and_its_watches_resume(path, tmp_path):
    raw_script(tmp_path / "jobs.db", path.with_suffix(".sql").read_text(encoding="utf-8"))
    on_file(tmp_path / "jobs.db", lambda store: check(store, contents(path)))


@pytest.mark.parametrize("path", POSTGRES)
def test_a_stored_postgresql_dump_is_read(path, postgres, postgres_url):
    postgres.load(postgres_url.rpartition("/")[2], path.with_suffix(".sql"))

    async def main() -> None:
        clock = StandingClock()
        store = await PostgresStore.open(postgres_url, clock=clock, retention=RETENTION, seconds=clock.seconds)
        await check(store, contents(path))
        await store.close()

    asyncio.run(main())


def assert_stable(made: list[StoredDatabase]) -> None:
    assert made[0] == made[1]
    assert len(made[0].sql.encode()) < 100_000


def test_a_sqlite_file_is_stored_in_the_same_bytes_each_time(tmp_path):
    (tmp_path / "again").mkdir()
    assert_stable([sqlite_database(folder) for folder in (tmp_path, tmp_path / "again")])


def test_a_postgresql_database_is_stored_in_the_same_bytes_each_time(postgres):
    assert_stable([postgres_database(postgres) for _ in range(2)])
