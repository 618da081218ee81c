"""A package with a store that claims to be shared, so that workers can be tested without a database.

Each process has jobs of its own. A file in the package's folder makes the next openings fail: `crash`, or `refuse`.
"""

from __future__ import annotations

from pathlib import Path

MODULE = """
import os, pathlib
from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.stores import memory
from jobstatus_grpc.stores.interface import StoreType

HERE = pathlib.Path(__file__).parent

async def open_store(url, **settings):
    if (HERE / "crash").exists():
        os._exit(3)
    if (HERE / "refuse").exists():
        raise CannotStartError("the store is away; bring it back")
    return await memory.open_store("memory:", **settings)

STORE_TYPE = StoreType(open=open_store, is_shared=True)
"""


def install(folder: Path) -> None:
    """Install the package into a folder for PYTHONPATH; `shared:` is its scheme."""
    (folder / "shared_store_of_tests.py").write_text(MODULE)
    distribution = folder / "shared_store_of_tests-1.0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Name: shared-store-of-tests\nVersion: 1.0\n")
    entry_point = "[jobstatus_grpc.stores]\nshared = shared_store_of_tests:STORE_TYPE\n"
    (distribution / "entry_points.txt").write_text(entry_point)
