"""The query plans of the SQLite store's lists, and what writes do to the indexes."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from contextlib import closing
from typing import Any

import pytest

from jobstatus_grpc.job import Create, Delete, JobFilter, JobState, Update
from jobstatus_grpc.job.limits import MAX_RESPONSE_BYTES
from jobstatus_grpc.stores.sql.criteria import MAX_COUNTED_ROWS
from jobstatus_grpc.stores.sql.rows import JOB_COLUMNS, REPORT_COLUMNS
from jobstatus_grpc.stores.sqlite.queries import read_page
from jobstatus_grpc.stores.sqlite.store import SqliteStore
from jobstatus_grpc.stores.sqlite.writer import _write_jobs, _write_reports
from tests.stores.contract.lists import FILTERS, farm
from tests.support.sqlite import on_file, raw
from tests.support.stores import ALL, StandingClock, done, end, ids_of, pages_of

S = JobState


def queries(path, job_filter: JobFilter) -> list[str]:
    """The queries that read the first page, with their values."""
    statements: list[str] = []
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.set_trace_callback(statements.append)
        read_page(connection, "default", job_filter, limit=50, cursor="")
    return [statement for statement in statements if statement.startswith("SELECT")]


def plan(path, query: str) -> str:
    """SQLite's plan of a query, a line for each step."""
    return "\n".join(row[3] for row in raw(path, f"EXPLAIN QUERY PLAN {query}"))


@pytest.fixture(scope="module")
def farm_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("farm") / "jobs.db"
    clock = StandingClock()
    on_file(path, lambda store: farm(store, clock), clock=clock)
    return path


# Indexes

INDEXES = {
    "nothing": "jobs_by_state",
    "ids": "sqlite_autoindex_jobs_1",
    "a state": "jobs_by_state",
    "states": "jobs_by_state",
    "a name": "jobs_by_name",
    "names": "jobs_by_name",
    "a label": "PRIMARY KEY (tenant=? AND name=? AND value=? AND created_at>?",
    "a parent": "jobs_by_parent",
    "done": "jobs_by_state",
    "not done": "jobs_by_state",
    "stalled": "jobs_by_state",
    "not stalled": "jobs_by_state",
    "created then or later": "jobs_by_state",
    "created earlier": "jobs_by_state",
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_filter_on_one_field_reads_two_indexes_and_the_numbers_of_children_and_sorts_nothing(farm_path, name):
    (cursors, rows, numbers) = queries(farm_path, FILTERS[name][0])
    steps = plan(farm_path, cursors)
    assert INDEXES[name] in steps
    assert "SCAN jobs" not in steps
    assert "SCAN labels" not in steps
    assert name == "ids" or "TEMP B-TREE" not in steps
    assert plan(farm_path, rows).startswith("SEARCH jobs USING INTEGER PRIMARY KEY (rowid=?)")
    assert "SEARCH children USING PRIMARY KEY (tenant=? AND parent_id=?)" in plan(farm_path, numbers)


@pytest.mark.parametrize("name", FILTERS)
def test_no_filter_makes_a_query_that_scans_a_table(farm_path, name):
    for query in queries(farm_path, FILTERS[name][0]):
        assert "SCAN jobs" not in plan(farm_path, query)
        assert "SCAN labels" not in plan(farm_path, query)


def test_of_several_conditions_the_one_with_the_fewest_jobs_is_read(tmp_path):
    many = MAX_COUNTED_ROWS + 2
    common: dict[str, Any] = {"parent_id": "p", "labels": {"k": "v"}}
    jobs = [Create(id=f"{n}", name="rare" if n == 0 else f"name {n}", **common) for n in range(many)]
    on_file(tmp_path / "jobs.db", lambda store: done(store, *jobs, end("1")))

    def source(**fields) -> str:
        query = queries(tmp_path / "jobs.db", JobFilter(parent_id="p", labels={"k": "v"}, **fields))[1]
        return next(word for word in ("jobs_by_parent", "jobs_by_name", "jobs_by_state") if word in query)

    assert source(names={"rare"}) == "jobs_by_name"
    assert source(name_prefix="rare") == "jobs_by_name"
    assert source(done=True) == "jobs_by_state"
    assert source(done=False) == "jobs_by_parent"
    assert source(done=False, name_prefix="name") == "jobs_by_name"


@pytest.mark.parametrize("fields", [{"names": {"rare"}}, {"name_prefix": "r"}, {"parent_id": "p"}])
def test_the_index_of_a_name_or_a_parent_shows_which_jobs_are_in_a_state(farm_path, fields):
    steps = plan(farm_path, queries(farm_path, JobFilter(done=False, **fields))[1])
    index = "jobs_by_parent" if "parent_id" in fields else "jobs_by_name"
    assert f"COVERING INDEX {index}" in steps
    assert steps.index("LIST SUBQUERY") < steps.index("INTEGER PRIMARY KEY"), "checked before the job is read"


@pytest.mark.parametrize(("examined", "index"), [(3, "jobs_by_name"), (2, "jobs_by_state")])
def test_names_with_a_prefix_are_sorted_only_if_they_are_few(farm_path, monkeypatch, examined, index):
    monkeypatch.setattr("jobstatus_grpc.stores.sql.criteria.MAX_EXAMINED_ROWS", examined)
    assert index in queries(farm_path, JobFilter(name_prefix="r"))[1]


def test_more_names_than_an_index_is_read_for_are_found_all_the_same(tmp_path):
    async def use(store):
        await done(store, *(Create(id=f"{n}", name=f"name {n}") for n in range(700)))
        assert len(await ids_of(store, JobFilter(names={f"name {n}" for n in range(600)}), limit=50)) == 600

    on_file(tmp_path / "jobs.db", use)


# Rows read


def test_a_page_of_large_jobs_is_cut_short(tmp_path):
    async def use(store):
        await done(store, *(Create(id=f"{n}", result={"text": "x" * 20_000}) for n in range(250)))
        pages = await pages_of(store, limit=1000)
        assert [len(page.jobs) for page in pages] == [100, 100, 50]
        assert MAX_RESPONSE_BYTES < 100 * 20_000
        assert [job.id for page in pages for job in page.jobs] == [f"{n}" for n in range(249, -1, -1)]

    on_file(tmp_path / "jobs.db", use)


def test_a_page_is_read_from_one_moment_of_the_file(tmp_path):
    path = tmp_path / "jobs.db"
    on_file(path, lambda store: done(store, Create(id="a")))

    def interfere(statement: str) -> None:
        if "WHERE key IN" in statement:
            raw(path, "DELETE FROM jobs")

    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.set_trace_callback(interfere)
        page = read_page(connection, "default", ALL, limit=50, cursor="")
    assert [job.id for job in page.jobs] == ["a"]
    assert raw(path, "SELECT * FROM jobs") == []


# Index writes


def index_writes(path, statement: str) -> list[str]:
    """The index operations of a statement, in program order."""
    connection = sqlite3.connect(path)
    with closing(connection):
        program = connection.execute(f"EXPLAIN {statement}", [None] * statement.count("?")).fetchall()
    return [row[1] for row in program if row[1] in ("IdxInsert", "IdxDelete")]


def test_a_report_of_progress_touches_no_index(farm_path):
    """An upsert can always insert; it deletes index entries only if it names one of their columns."""
    indexes = [row[1] for row in raw(farm_path, "PRAGMA index_list(jobs)")]
    assert index_writes(farm_path, _write_reports(1)) == ["IdxInsert"] * len(indexes)
    assert "IdxDelete" in index_writes(farm_path, _write_jobs(1))


def test_what_stands_in_an_index_is_no_part_of_a_report(farm_path):
    indexed = {
        column
        for index in raw(farm_path, "PRAGMA index_list(jobs)")
        for (_, _, column) in raw(farm_path, f"PRAGMA index_info({index[1]})")
    }
    assert {"state", "stalled", "name", "parent_id", "created_at", "expires_at"} <= indexed <= {"key", *JOB_COLUMNS}
    assert indexed & set(REPORT_COLUMNS) == {"tenant", "id"}  # every statement names them, and no update changes them


def test_no_commit_goes_through_a_whole_table(tmp_path):
    path = tmp_path / "jobs.db"
    statements: list[str] = []

    async def use(store):
        store._writer.connection.set_trace_callback(statements.append)
        await done(store, *(Update(id=f"{n}", changes={"labels": {"k": "w"}}) for n in range(3)))
        await done(store, *(end(f"{n}") for n in range(3)))
        await done(store, *(Delete(id=f"{n}") for n in range(3)))
        store._writer.connection.set_trace_callback(None)

    on_file(path, lambda store: done(store, *(Create(id=f"{n}", labels={"k": "v"}) for n in range(3))), use)
    queries = [statement for statement in statements if not statement.startswith(("BEGIN", "COMMIT"))]
    assert any(query.startswith("DELETE FROM labels") for query in queries)
    plans = "\n".join(plan(path, query) for query in queries)
    assert re.findall(r"SCAN (?:jobs|labels|transitions|tombstones|changes)", plans) == []
    assert "SEARCH labels USING PRIMARY KEY (tenant=? AND name=? AND value=? AND created_at=? AND job_key=?)" in plans


def test_counts_outlive_the_process(tmp_path):
    clock = StandingClock()

    async def write(store):
        await farm(store, clock)
        return store.jobs_by_state()

    async def read(store):
        return store.jobs_by_state()

    written, read_back = on_file(tmp_path / "jobs.db", write, read, clock=clock)
    assert sum(written.values()) == 8
    assert read_back == written
    assert dict(raw(tmp_path / "jobs.db", "SELECT state, count(*) FROM jobs GROUP BY state")) == written


def test_what_could_not_be_written_does_not_count(tmp_path):
    path = tmp_path / "jobs.db"
    on_file(path, lambda store: done(store, Create(id="a", labels={"k": "v"})))
    raw(path, "CREATE TRIGGER refuse BEFORE INSERT ON changes BEGIN SELECT RAISE(ABORT, 'refused'); END")

    async def use(store):
        with pytest.raises(sqlite3.IntegrityError, match="refused"):
            await store.commit([Create(id="b"), end("a", labels={})])
        assert await ids_of(store, JobFilter(labels={"k": "v"}, done=False)) == ["a"]
        return store.jobs_by_state()

    counts = on_file(path, use, lambda store: asyncio.sleep(0, store.jobs_by_state()))
    assert counts == [{**dict.fromkeys(S, 0), S.PENDING: 1}] * 2


def test_labels_of_jobs_that_are_gone_are_gone(tmp_path):
    clock = StandingClock()

    async def use(store: SqliteStore) -> None:
        await done(store, Create(id="a", labels={"k": "v"}), end("a"))
        clock.advance(days=8)
        await done(store, *await store.overdue(limit=10))

    on_file(tmp_path / "jobs.db", use, clock=clock)
    assert raw(tmp_path / "jobs.db", "SELECT * FROM labels") == []
