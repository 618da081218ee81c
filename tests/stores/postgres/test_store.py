"""PostgresStore passes the contract."""

from __future__ import annotations

import pytest

from jobstatus_grpc.stores.postgres.store import PostgresStore
from tests.stores.contract import StoreContract
from tests.support.stores import RETENTION


class TestPostgresStore(StoreContract):
    @pytest.fixture(autouse=True)
    def _on(self, postgres):
        self._postgres = postgres
        self._databases: dict[object, str] = {}
        yield
        for database in self._databases.values():
            postgres.drop_database(database)

    async def open(self, directory, clock):
        if directory not in self._databases:
            self._databases[directory] = self._postgres.create_database()
        url = self._postgres.url(self._databases[directory])
        return await PostgresStore.open(url, clock=clock, retention=RETENTION, seconds=clock.seconds)
