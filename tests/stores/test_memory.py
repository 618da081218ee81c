from __future__ import annotations

import asyncio

import pytest

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.stores.memory import MemoryStore, open_store
from tests.stores.contract import StoreContract
from tests.support.stores import RETENTION


class TestMemoryStore(StoreContract):
    async def open(self, directory, clock):
        return MemoryStore(clock=clock, retention=RETENTION, seconds=clock.seconds)


@pytest.mark.parametrize("url", ["memory:jobs", "memory://", "memory:///jobs.db"])
def test_a_url_of_memory_names_nothing_else(url):
    with pytest.raises(CannotStartError, match="its URL is memory:"):
        asyncio.run(open_store(url))
