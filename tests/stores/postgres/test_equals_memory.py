"""PostgresStore and MemoryStore give the same results for random calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from jobstatus_grpc.stores.interface import JobStore
from jobstatus_grpc.stores.postgres.store import PostgresStore
from tests.stores.contract.machine import StorePair
from tests.support.stores import RETENTION

TABLES = ("jobs", "labels", "changes", "transitions", "tombstones", "heard", "counts", "children", "requests")


class PostgresAndMemory(StorePair):
    keeps_heartbeats = True
    url: str

    async def open(self) -> JobStore:
        return await PostgresStore.open(self.url, clock=self.clock, retention=RETENTION, seconds=self.clock.seconds)

    def teardown(self) -> None:
        self.await_(self.empty())
        super().teardown()

    async def empty(self) -> None:
        """Empty the database for the next example. To drop the schema would take longer than the example."""
        assert isinstance(self.other, PostgresStore)
        async with self.other._database.connection() as connection:
            await connection.execute("; ".join(f"DELETE FROM jobstatus.{table}" for table in TABLES))
            await connection.execute("UPDATE jobstatus.store SET forgotten_xid = '0'")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("examples", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_they_answer_the_same(postgres_url, examples):
    # Durability is not tested here.
    url = f"{postgres_url}?synchronous_commit=off"
    examples_of = settings(max_examples=examples, stateful_step_count=15, deadline=None)
    machine = type("OnThisDatabase", (PostgresAndMemory,), {"url": url})
    run_state_machine_as_test(machine, settings=examples_of)
