"""A store is found by the scheme of its URL."""

from __future__ import annotations

import asyncio

import pytest

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.stores import open_store
from jobstatus_grpc.stores.memory import MemoryStore
from jobstatus_grpc.stores.sqlite import SqliteStore


def opened(url: str) -> object:
    async def main() -> object:
        store = await open_store(url)
        await store.close()
        return store

    return asyncio.run(main())


def test_each_scheme_has_its_store(tmp_path):
    assert isinstance(opened("memory:"), MemoryStore)
    assert isinstance(opened(f"sqlite:///{tmp_path}/jobs.db"), SqliteStore)


@pytest.mark.parametrize("url", ["oracle://me:secret@host/jobs", "jobs.db", "", ":"])
def test_an_unknown_scheme_is_told_the_known_ones_and_no_password(url):
    with pytest.raises(CannotStartError, match=r"known are memory:, .*sqlite:") as refusal:
        opened(url)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("scheme", "advice"),
    [("theirs", "needs a_driver_of_theirs; install it"), ("postgresql", r"pip install 'jobstatus-grpc\[postgres\]'")],
)
def test_a_missing_driver_says_what_to_install(tmp_path, monkeypatch, scheme, advice):
    (tmp_path / "their_store.py").write_text("import a_driver_of_theirs")
    (tmp_path / "theirs-1.0.dist-info").mkdir()
    (tmp_path / "theirs-1.0.dist-info" / "METADATA").write_text("Name: theirs\nVersion: 1.0\n")
    entry_point = f"[jobstatus_grpc.stores]\n{scheme} = their_store:open_store\n"
    (tmp_path / "theirs-1.0.dist-info" / "entry_points.txt").write_text(entry_point)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CannotStartError, match=advice):
        opened(f"{scheme}://host/jobs")
