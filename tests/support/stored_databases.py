"""Stores the newest schemas as files that later versions must read: `make stored-databases`.

tests/stores/sqlite and tests/stores/postgres have a dump of each schema version that was released, `version_N.sql`, and
the jobs in it as the API sends them, `version_N.json`. A file that exists is never written again.

They are dumps in SQL, as a file of SQLite contains the version of the library that wrote it.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.json_format import MessageToDict
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.job import Command, Create, Delete, JobState, RequestId, Update
from jobstatus_grpc.stores.interface import JobStore
from jobstatus_grpc.stores.postgres.store import PostgresStore
from jobstatus_grpc.stores.sql.migrations import migrations
from jobstatus_grpc.stores.sqlite.database import APPLICATION_ID
from jobstatus_grpc.wire.convert import job_to_wire, transition_to_wire
from tests.stores.contract.stored_jobs import STORED
from tests.support.postgres import PostgresCluster, PostgresHome
from tests.support.sqlite import open_at
from tests.support.stores import RETENTION, StandingClock, claim, done, jobs_of

STORES = Path(__file__).parents[1] / "stores"
NEWEST = {name: len(migrations(f"jobstatus_grpc.stores.{name}")) for name in ("sqlite", "postgres")}
"""The version of each schema."""

TENANTS = ("default", "other")
OPEN_JOB = "job-1"
REMOVED_JOB = "removed"
REQUEST = Update(id=OPEN_JOB, changes={"reason": "page 1"}, request=RequestId("request", "hash"))
"""A request that the stores remember; its job has changed since then."""

# In place of the random names in a file.
_FIXED = """
UPDATE store SET incarnation = '0123456789abcdef', log = '0123456789abcdef', previous_log = NULL;
UPDATE epochs SET name = printf('%016x', first_sequence);
"""


class StoredDatabase(NamedTuple):
    """A dump, and what a store reads from it."""

    sql: str
    contents: Mapping[str, Any]
    """The jobs and their history by tenant and id, and in SQLite the position at the end of the feed."""


def commands() -> list[Sequence[Command]]:
    """Return the commits that fill a store: jobs with every field and state, a family, and a job that was deleted."""
    commits: list[Sequence[Command]] = [
        [_with_id(command, f"job-{number}") for command in stored] for number, stored in enumerate(STORED.values(), 1)
    ]
    for state in JobState:
        changes = [] if state is JobState.PENDING else [Update(id=f"in-{state.word}", changes={"state": state})]
        commits.append([Create(id=f"in-{state.word}", parent_id=OPEN_JOB, labels={"kind": "child"}), *changes])
    commits.append([REQUEST, claim(OPEN_JOB), Update(id=OPEN_JOB, changes={"progress": 40.0, "reason": "page 2"})])
    commits.append([Create(id=REMOVED_JOB), Update(id=REMOVED_JOB, changes={"state": JobState.SUCCEEDED})])
    commits.append([Delete(id=REMOVED_JOB)])
    return commits


def _with_id(command: Command, job_id: str) -> Command:
    if isinstance(command, Update):
        return command._replace(id=job_id)
    return replace(command, id=job_id)


async def _fill(store: JobStore, clock: StandingClock) -> None:
    for commit in commands():
        clock.advance(seconds=1)
        await done(store, *commit)


async def contents_of(store: JobStore) -> dict[str, Any]:
    """Return the jobs in a store and their history, as the API sends them, by tenant and id."""
    found: dict[str, Any] = {}
    for tenant in TENANTS:
        found[tenant] = {}
        for job in sorted(await jobs_of(store, tenant=tenant), key=lambda job: job.id):
            message = pb.JobStatus()
            job_to_wire(job, message)
            history = [MessageToDict(transition_to_wire(each)) for each in await store.transitions(tenant, job.id)]
            found[tenant][job.id] = {"job": MessageToDict(message), "history": history}
    return found


def sqlite_database(folder: Path) -> StoredDatabase:
    """Make a file with the newest schema in `folder`, and return its dump."""
    path, copy = folder / "jobs.db", folder / "copy.db"

    async def fill() -> None:
        clock = StandingClock()
        store = await open_at(path, clock)
        await _fill(store, clock)
        await store.close()

    async def read() -> dict[str, Any]:
        store = await open_at(copy)
        contents = {"jobs": await contents_of(store), "position": await store.position()}
        await store.close()
        return contents

    asyncio.run(fill())
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(_FIXED)
        lines = [f"PRAGMA application_id = {APPLICATION_ID};", f"PRAGMA user_version = {NEWEST['sqlite']};"]
        sql = "\n".join([*lines, *connection.iterdump(), ""])
    shutil.copy(path, copy)
    return StoredDatabase(sql, asyncio.run(read()))


# Makes the rows those of a store that is at rest, in the order of their keys, without the numbers of its cluster.
_AT_REST = """
UPDATE jobstatus.changes SET xid = ranks.rank::text::xid8
    FROM (SELECT xid, number, dense_rank() OVER (ORDER BY xid) AS rank FROM jobstatus.changes) AS ranks
    WHERE changes.xid = ranks.xid AND changes.number = ranks.number;
CREATE TEMPORARY TABLE sums AS SELECT state, sum(jobs) AS jobs FROM jobstatus.counts GROUP BY state;
TRUNCATE jobstatus.counts;
INSERT INTO jobstatus.counts (state, jobs) SELECT state, jobs FROM sums WHERE jobs <> 0 ORDER BY state;
CREATE TEMPORARY TABLE numbers AS
    SELECT tenant, parent_id, state, sum(total) AS total FROM jobstatus.children GROUP BY tenant, parent_id, state;
TRUNCATE jobstatus.children;
INSERT INTO jobstatus.children (tenant, parent_id, state, total, is_new)
    SELECT tenant, parent_id, state, total, false FROM numbers WHERE total <> 0 ORDER BY tenant, parent_id, state;
DO $$ DECLARE key record; BEGIN
    FOR key IN SELECT conrelid::regclass AS clustered, conname FROM pg_constraint
        WHERE contype = 'p' AND connamespace = 'jobstatus'::regnamespace
    LOOP EXECUTE format('CLUSTER %s USING %I', key.clustered, key.conname); END LOOP;
END $$;
"""


def postgres_database(cluster: PostgresCluster) -> StoredDatabase:
    """Make a database with the newest schema in `cluster`, and return its dump."""
    name = cluster.create_database()

    async def fill() -> dict[str, Any]:
        clock = StandingClock()
        store = await PostgresStore.open(cluster.url(name), clock=clock, retention=RETENTION, seconds=clock.seconds)
        await _fill(store, clock)
        contents = {"jobs": await contents_of(store)}
        await store.close()
        return contents

    contents = asyncio.run(fill())
    cluster.execute(_AT_REST, name)
    dump = cluster.dump(name)
    cluster.drop_database(name)
    # The versions of server and pg_dump, and a random word that newer ones of pg_dump write.
    sql = re.sub(r"^(--.*|\\(un)?restrict .*)?\n", "", dump, flags=re.MULTILINE)
    return StoredDatabase(sql, contents)


def main() -> None:
    """Write the files of the newest versions, unless they exist."""
    with tempfile.TemporaryDirectory() as folder, closing(PostgresHome()) as home, PostgresCluster(16, home) as cluster:
        for name, database in (("sqlite", sqlite_database(Path(folder))), ("postgres", postgres_database(cluster))):
            path = STORES / name / f"version_{NEWEST[name]}.sql"
            if path.exists():
                print(f"{path} exists, and is not changed", file=sys.stderr)
                continue
            path.write_text(database.sql, encoding="utf-8")
            text = json.dumps(database.contents, indent=1, sort_keys=True, ensure_ascii=False)
            path.with_suffix(".json").write_text(f"{text}\n", encoding="utf-8")
            print(f"{path}: {len(database.sql)} characters", file=sys.stderr)


if __name__ == "__main__":
    main()
