"""What every store must do: `jobstatus_grpc/stores/interface.py` as tests.

A store's tests subclass StoreContract, and run `machine.StorePair` to compare the store with MemoryStore.
"""

from __future__ import annotations

from tests.stores.contract.children import ChildrenContract
from tests.stores.contract.core import CoreContract
from tests.stores.contract.lists import ListsContract
from tests.stores.contract.requests import RequestsContract
from tests.stores.contract.time import TimeContract


class StoreContract(CoreContract, RequestsContract, TimeContract, ListsContract, ChildrenContract):
    """The whole contract. Names of tests are facts; `open` says which store they are about."""
