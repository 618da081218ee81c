"""A SQLite store that goes back: what was given out before a backup was copied back must not be taken for newer."""

from __future__ import annotations

import asyncio
import shutil

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import errors
from jobstatus_grpc.job import Create, Update
from jobstatus_grpc.stores.sqlite.store import SqliteStore
from tests.support.servers import serving
from tests.support.sqlite import on_file, open_at, raw
from tests.support.stores import StandingClock, claim, done, following
from tests.support.watch_jobs import RESET, Reader, events_of


async def write(store: SqliteStore, *ids: str) -> list[str]:
    """Create jobs, one commit each, and return the position after each."""
    positions = []
    for job_id in ids:
        await done(store, Create(id=job_id))
        positions.append(await store.position())
    return positions


def is_valid(position: str):
    async def use(store: SqliteStore) -> bool:
        try:
            await store.changes(position, up_to=await store.position())
        except errors.StoreChangedError:
            return False
        return True

    return use


@pytest.fixture
def gone_back(tmp_path):
    """A store's positions after 6 changes; its file is a backup from before the last 3, with 6 others since."""
    path, backup = tmp_path / "jobs.db", tmp_path / "backup.db"
    (first,) = on_file(path, lambda store: write(store, "a", "b", "c"))
    shutil.copy(path, backup)
    (later,) = on_file(path, lambda store: write(store, "d", "e", "f"))
    shutil.copy(backup, path)
    on_file(path, lambda store: write(store, *"uvwxyz"))
    return path, first, later


def test_positions_after_the_backup_are_refused_and_those_before_it_hold(gone_back):
    path, first, later = gone_back
    assert [on_file(path, is_valid(position))[0] for position in [*first, *later]] == [True] * 3 + [False] * 3


def test_a_position_of_before_the_backup_leads_to_what_was_written_since(gone_back):
    path, first, _ = gone_back
    (changes,) = on_file(path, lambda store: following(store, first[-1]))
    assert [change.id for change in changes] == list("uvwxyz")


def test_positions_after_a_backup_of_a_running_store_are_refused(tmp_path):
    path, backup = tmp_path / "jobs.db", tmp_path / "backup.db"

    async def use(store):
        before = await write(store, "a", "b")
        await asyncio.to_thread(raw, path, f"VACUUM INTO '{backup}'")
        return before + await write(store, "c", "d")

    (positions,) = on_file(path, use)
    shutil.copy(backup, path)
    on_file(path, lambda store: write(store, "x", "y", "z"))
    assert [on_file(path, is_valid(position))[0] for position in positions] == [True, True, False, False]


def test_two_copies_that_go_on_do_not_take_each_others_positions(tmp_path):
    on_file(tmp_path / "one.db", lambda store: write(store, "a"))
    shutil.copy(tmp_path / "one.db", tmp_path / "two.db")
    ((position,),) = on_file(tmp_path / "one.db", lambda store: write(store, "b"))
    on_file(tmp_path / "two.db", lambda store: write(store, "b"))
    assert on_file(tmp_path / "two.db", is_valid(position)) == [False]


def test_positions_hold_over_many_restarts_with_and_without_changes(tmp_path):
    path = tmp_path / "jobs.db"
    positions = on_file(
        path,
        SqliteStore.position,
        lambda store: write(store, "a"),
        SqliteStore.position,
        SqliteStore.position,
        lambda store: write(store, "b"),
    )
    assert positions[1] == [positions[2]] == [positions[3]]
    assert all(on_file(path, *map(is_valid, [positions[0], *positions[1], positions[3], *positions[4]])))


def test_a_refused_change_begins_no_epoch(tmp_path):
    path = tmp_path / "jobs.db"

    async def use(store):
        await store.commit([Update(id="unknown", changes={"reason": "r"})])
        await store.trim(limit=10)

    on_file(path, use, use, lambda store: write(store, "a"), use)
    assert len(raw(path, "SELECT * FROM epochs")) == 2


def test_the_oldest_epochs_are_dropped_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.stores.sqlite.writer.MAX_EPOCHS", 3)
    path = tmp_path / "jobs.db"
    positions = [on_file(path, lambda store, name=name: write(store, name))[0][0] for name in "abcd"]
    assert len(raw(path, "SELECT * FROM epochs")) == 3
    assert on_file(path, *map(is_valid, positions)) == [False, True, True, True]


def test_a_token_of_before_leads_to_reset_however_often_it_is_given(tmp_path):
    path, backup = tmp_path / "jobs.db", tmp_path / "backup.db"

    async def watch(store, reader, *, to_the_end):
        async with serving(store) as stub:
            stream = stub.WatchJobs(reader.begin(), timeout=15)
            first = await stream.read()
            reader.take(first)
            while to_the_end and not reader.is_synced:
                reader.take(await stream.read())
            stream.cancel()
            return events_of(first)

    async def scenario():
        reader = Reader()
        store = await open_at(path)
        await write(store, "a")
        await asyncio.to_thread(raw, path, f"VACUUM INTO '{backup}'")
        await write(store, "b", "c")
        await watch(store, reader, to_the_end=True)
        await store.close()
        shutil.copy(backup, path)
        store = await open_at(path)
        try:
            assert await watch(store, reader, to_the_end=False) == [(RESET, "")]
            await write(store, "x", "y", "z")
            assert await watch(store, reader, to_the_end=True) == [(RESET, "")]
            assert set(reader.jobs) == {"a", "x", "y", "z"}
        finally:
            await store.close()

    asyncio.run(scenario())


def test_page_tokens_of_a_history_from_after_the_backup_are_refused_and_others_hold(tmp_path, refusal):
    path, backup, clock = tmp_path / "jobs.db", tmp_path / "backup.db", StandingClock()

    async def pages(store, *tokens):
        async with serving(store) as stub:
            requests = [pb.ListJobTransitionsRequest(id="a", page_size=1, page_token=token) for token in tokens]
            return await asyncio.gather(*map(stub.ListJobTransitions, requests), return_exceptions=True)

    async def scenario():
        store = await open_at(path, clock)
        await done(store, Create(id="a"), claim("a", 1), claim("a", 2))
        await asyncio.to_thread(raw, path, f"VACUUM INTO '{backup}'")
        clock.advance(seconds=1)
        await done(store, claim("a", 3), claim("a", 4), claim("a", 5))
        tokens = [""]
        while len(tokens) < 6:
            tokens += [page.next_page_token for page in await pages(store, tokens[-1])]
        await store.close()
        shutil.copy(backup, path)
        clock.advance(seconds=1)
        store = await open_at(path, clock)
        found = await pages(store, tokens[5])
        await done(store, claim("a", 3), claim("a", 4), claim("a", 5))
        found += await pages(store, *tokens)
        await store.close()
        return found

    beyond_the_end, *shared, fourth, fifth = asyncio.run(scenario())
    assert [page.transitions[0].revision for page in shared] == [1, 2, 3, 4]
    for end in (beyond_the_end, fourth, fifth):
        assert refusal(end).kind == ("INVALID_ARGUMENT", "INVALID_TOKEN")
