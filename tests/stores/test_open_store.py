"""The scheme of a URL selects the store."""

from __future__ import annotations

import asyncio
import sys

import pytest

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.stores import open_store, store_name
from jobstatus_grpc.stores.memory import MemoryStore
from jobstatus_grpc.stores.sqlite.store import SqliteStore


def opened(url: str) -> object:
    async def main() -> object:
        store = await open_store(url)
        await store.close()
        return store

    return asyncio.run(main())


def test_each_scheme_has_its_store(tmp_path):
    assert isinstance(opened("memory:"), MemoryStore)
    assert isinstance(opened(f"sqlite:///{tmp_path}/jobs.db"), SqliteStore)


def test_a_store_has_a_name_for_the_log_with_an_absolute_path_and_without_a_password(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert store_name("memory:") == "memory:"
    assert store_name("sqlite:///jobs.db") == f"sqlite:///{tmp_path}/jobs.db"
    assert store_name("postgresql://me:secret@one,two:5433/jobs") == "postgresql on one:5432, two:5433"


@pytest.mark.parametrize(
    "url", ["oracle://me:secret@host/jobs", "jobs.db", "", ":", "host=db password=secret", "password=secret:x"]
)
def test_an_unknown_scheme_is_refused_with_the_known_ones_and_no_password(url):
    with pytest.raises(CannotStartError, match=r"known are memory:, .*sqlite:") as refusal:
        opened(url)
    assert "secret" not in str(refusal.value)


def test_a_missing_driver_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("jobstatus_grpc.stores.postgres")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(CannotStartError, match=r"needs asyncpg; pip install 'jobstatus-grpc\[postgres\]'"):
        opened("postgresql://host/jobs")


def test_a_missing_driver_of_a_store_that_is_not_ours_is_named(tmp_path, monkeypatch):
    (tmp_path / "their_store.py").write_text("import a_driver_of_theirs")
    (tmp_path / "theirs-1.0.dist-info").mkdir()
    (tmp_path / "theirs-1.0.dist-info" / "METADATA").write_text("Name: theirs\nVersion: 1.0\n")
    entry_point = "[jobstatus_grpc.stores]\ntheirs = their_store:open_store\n"
    (tmp_path / "theirs-1.0.dist-info" / "entry_points.txt").write_text(entry_point)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CannotStartError, match="needs a_driver_of_theirs; install it"):
        opened("theirs://host/jobs")
