"""The query plans of the PostgreSQL store's lists, with or without statistics, and what a progress report writes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from jobstatus_grpc.job import JobFilter, JobState, Update
from jobstatus_grpc.stores.postgres import pages
from jobstatus_grpc.stores.postgres.store import PostgresStore
from tests.stores.contract.lists import START
from tests.support.postgres_jobs import fill
from tests.support.stores import done

S = JobState
JOBS = 20_000
LIMIT = 50
MOST_ARMS = 8
"""Most index ranges that a query may merge: one for each state, two for IN_PROGRESS; at most a page of each."""

# Each in a database of JOBS jobs, of which every label, name and parent has one in 400.
FILTERS = {
    "nothing": (JobFilter(), "jobs_by_state"),
    "a state": (JobFilter(states={S.PENDING}), "jobs_by_state"),
    "a rare state": (JobFilter(states={S.SUCCEEDED}), "jobs_by_state"),
    "states": (JobFilter(states={S.PENDING, S.FAILED, S.SUCCEEDED}), "jobs_by_state"),
    "done": (JobFilter(done=True), "jobs_by_state"),
    "not done": (JobFilter(done=False), "jobs_by_state"),
    "stalled": (JobFilter(stalled=True), "jobs_by_state"),
    "a name": (JobFilter(names={"8"}), "jobs_by_name"),
    "names": (JobFilter(names={"8", "12", "16"}), "jobs_by_name"),
    "a label": (JobFilter(labels={"team": "5"}), "labels_pkey"),
    "a parent": (JobFilter(parent_id="6"), "jobs_by_parent"),
    "created earlier": (JobFilter(created_before=START), "jobs_by_state"),
    "created later": (JobFilter(created_after=START), "jobs_by_state"),
}


async def filled(url: str) -> PostgresStore:
    store = await PostgresStore.open(url)
    async with store._database.connection(seconds=60) as connection:
        await fill(connection, JOBS)
    return store


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for child in plan.get("Plans", ()) for node in nodes(child))]


async def explained(connection: Any, job_filter: JobFilter) -> AsyncIterator[list[dict[str, Any]]]:
    """The plan steps of each query of the first page."""
    queries: list[tuple[str, tuple[Any, ...]]] = []
    fetch = connection.fetch

    class Listening:
        transaction = connection.transaction

        async def fetch(self, query: str, *values: Any) -> Any:
            queries.append((query, values))
            return await fetch(query, *values)

    await pages.read_page(Listening(), "default", job_filter, limit=LIMIT, cursor="")
    for query, values in queries:
        (row,) = await fetch(f"EXPLAIN (ANALYZE, FORMAT JSON) {query}", *values)
        yield nodes(json.loads(row[0])[0]["Plan"])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("knows", ["statistics", "nothing"])
def test_a_filter_on_one_field_reads_a_page_from_its_index(postgres_url, knows):
    async def main() -> None:
        store = await filled(postgres_url)
        async with store._database.connection(seconds=60) as connection:
            if knows == "statistics":
                await connection.execute("ANALYZE")
            for name, (job_filter, index) in FILTERS.items():
                read = [steps async for steps in explained(connection, job_filter)]
                used = {step["Index Name"] for steps in read for step in steps if "Index Name" in step}
                assert index in used, name
                assert not [step for steps in read for step in steps if step["Node Type"] == "Seq Scan"], name
                most = max(step["Actual Rows"] * step["Actual Loops"] for steps in read for step in steps)
                assert most <= MOST_ARMS * (LIMIT + 1), name
        await store.close()

    asyncio.run(main())


def test_a_report_of_progress_touches_no_index(postgres, postgres_url):
    async def main() -> None:
        store = await filled(postgres_url)
        for turn in range(1, 6):
            ids = [f"{number}" for number in range(3, JOBS, 100)]
            await done(store, *(Update(id=job_id, changes={"progress": float(turn)}) for job_id in ids))
        await store.close()

    asyncio.run(main())
    counted = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'jobs'"
    ((updated, hot),) = postgres.execute(counted, postgres_url.rpartition("/")[2])
    assert (int(updated), int(hot)) == (1000, 1000)
