"""SqliteStore and MemoryStore give the same results for random calls."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import settings

from jobstatus_grpc.stores.interface import JobStore
from jobstatus_grpc.stores.sqlite.store import SqliteStore
from tests.stores.contract.machine import StorePair
from tests.support.stores import RETENTION


class SqliteAndMemory(StorePair):
    keeps_heartbeats = False

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        super().__init__()

    async def open(self) -> JobStore:
        path, seconds = Path(self.directory.name, "jobs.db"), self.clock.seconds
        return await SqliteStore.open(str(path), clock=self.clock, retention=RETENTION, seconds=seconds)

    def teardown(self) -> None:
        super().teardown()
        self.directory.cleanup()


TestStores = SqliteAndMemory.TestCase
TestStores.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)
