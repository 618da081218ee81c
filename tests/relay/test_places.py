"""The place of a relay, in a file and in PostgreSQL; the ids of events; the file of dead letters."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import sqlite3
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.job import Job, JobState
from jobstatus_grpc.relay import shared_place
from jobstatus_grpc.relay.event import event_id
from jobstatus_grpc.relay.place import BEGINNING, Delivered, FilePlace, PlaceError, PlaceLostError
from jobstatus_grpc.relay.relay import append_line
from jobstatus_grpc.relay.shared_place import open_shared_place
from tests.support.loop import on_a_loop

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
MINUTE = timedelta(minutes=1)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "relay.state")


@pytest.fixture(params=["file", "postgresql"])
def opened(request, path):
    """Open the place, of each kind, for a block."""
    url = request.getfixturevalue("place_url") if request.param == "postgresql" else ""

    async def open_place(kind):
        return await open_shared_place(url, "a", kind, waiting=lambda: None) if url else FilePlace(path, kind)

    @contextlib.asynccontextmanager
    async def opened(kind="end", *, begins=False):
        place = await open_place(kind)
        try:
            if begins:
                await place.save([Delivered("open", "evt_open", NOW - MINUTE, False)], "t1", NOW)
            yield place
        finally:
            await place.close()

    return opened


async def last_events(place, *ids):
    return [await place.last_event(job_id) for job_id in ids]


@on_a_loop
async def test_a_new_place_is_empty(opened):
    async with opened() as place:
        assert (place.token, place.horizon, await place.last_event("a")) == ("", BEGINNING, None)


@on_a_loop
async def test_what_was_saved_is_there_when_the_place_is_opened_again(opened):
    async with opened(begins=True) as place:
        await place.save([Delivered("a", "evt_0", NOW, False), Delivered("a", "evt_a", NOW, True)], "t2", NOW)
    async with opened() as again:
        assert (again.token, again.horizon, await again.last_event("a")) == ("t2", NOW, "evt_a")


@on_a_loop
async def test_the_end_of_an_old_delivery_is_forgotten_and_an_open_job_is_not(opened):
    async with opened(begins=True) as place:
        ends = [Delivered("old", "evt_1", NOW, True), Delivered("new", "evt_2", NOW + MINUTE, True)]
        await place.save(ends, "t2", NOW)
        await place.save([], "t3", NOW + MINUTE)
        assert await last_events(place, "old", "new", "open") == [None, "evt_2", "evt_open"]


@on_a_loop
async def test_open_jobs_that_are_gone_are_forgotten(opened):
    async with opened(begins=True) as place:
        await place.save([Delivered("other", "evt_1", NOW, False), Delivered("done", "evt_2", NOW, True)], "t2", NOW)
        await place.forget_open_jobs(unless={"other"})
        await place.forget("unknown")
        assert await last_events(place, "open", "other", "done") == [None, "evt_1", "evt_2"]


@on_a_loop
async def test_a_place_is_good_for_one_kind(opened):
    async with opened(begins=True):
        pass
    with pytest.raises(CannotStartError, match="--on end"):
        async with opened("state"):
            pass


@on_a_loop
async def test_of_two_first_starts_of_different_kinds_the_one_that_waited_is_refused(place_url):
    first = await open_shared_place(place_url, "a", "end", waiting=lambda: None)
    row = await first._connection.fetchrow("DELETE FROM jobstatus_relay.places RETURNING *")
    is_waiting = asyncio.Event()
    second = asyncio.create_task(open_shared_place(place_url, "a", "state", waiting=is_waiting.set))
    await is_waiting.wait()
    await first._connection.execute("INSERT INTO jobstatus_relay.places VALUES ($1, $2, $3, $4, $5)", *row)
    await first.close()
    with pytest.raises(CannotStartError, match="--on end"):
        await second


@on_a_loop
async def test_postgresql_ends_no_session_before_its_lease(place_url):
    place = await open_shared_place(place_url, "a", "end", waiting=lambda: None)
    rows = await place._connection.fetch(
        "SELECT name, setting::int / 1000 FROM pg_settings WHERE name IN "
        "('idle_session_timeout', 'idle_in_transaction_session_timeout')"
    )
    assert [seconds > shared_place.LEASE_SECONDS for _, seconds in rows] == [True, True]
    await place.close()


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="no clock that goes on during a suspend")
@on_a_loop
async def test_a_lease_goes_on_while_the_machine_is_suspended(place_url, monkeypatch):
    place = await open_shared_place(place_url, "a", "end", waiting=lambda: None)
    place.check()
    awake_at = time.clock_gettime(time.CLOCK_BOOTTIME) + shared_place.LEASE_SECONDS
    monkeypatch.setattr(time, "clock_gettime", {time.CLOCK_BOOTTIME: awake_at}.__getitem__)
    with pytest.raises(PlaceLostError):
        place.check()
    await place.close()


@on_a_loop
async def test_a_save_that_fails_changes_nothing(path):
    place = FilePlace(path, "end")
    await place.save([], "t1", NOW)
    place._database.execute("PRAGMA max_page_count = 1")
    with pytest.raises(PlaceError, match="full"):
        await place.save([Delivered(f"{number}", "evt_x" * 50, NOW, True) for number in range(1000)], "t2", NOW)
    assert (place.token, await place.last_event("1")) == ("t1", None)
    place._database.execute("PRAGMA max_page_count = 1000")
    await place.save([Delivered("1", "evt_1", NOW, True)], "t2", NOW)
    assert (place.token, await place.last_event("1")) == ("t2", "evt_1")
    await place.close()


@on_a_loop
async def test_a_file_is_for_one_relay(path):
    place = FilePlace(path, "end")
    with pytest.raises(CannotStartError, match="another relay uses"):
        FilePlace(path, "end")
    await place.close()


JOB = Job(
    id="a", state=JobState.FAILED, attempt=1, revision=3, created_at=NOW, updated_at=NOW, started_at=NOW,
    finished_at=NOW,
)  # fmt: skip


def test_an_id_is_that_of_a_state_in_an_attempt_however_often_the_job_changes_in_it():
    job = replace(JOB, state=JobState.IN_PROGRESS, finished_at=None)
    assert event_id("/", job) == event_id("/", replace(job, revision=9, updated_at=NOW + MINUTE, progress=50.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "b"},
        {"attempt": 2},
        {"state": JobState.ABORTED},
        {"finished_at": NOW + MINUTE},  # of a store that was set back to a backup
        {"created_at": NOW - MINUTE},  # of an id that became free
    ],
    ids=str,
)
def test_another_event_has_another_id(changes):
    assert event_id("/", JOB) != event_id("/", replace(JOB, **changes))
    assert event_id("/", JOB) != event_id("/other", JOB)


@on_a_loop
async def test_a_file_is_never_a_database_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = FilePlace(":memory:", "end")
    await place.save([], "t1", NOW)
    await place.close()
    again = FilePlace(":memory:", "end")
    assert again.token == "t1"
    await again.close()


@pytest.mark.parametrize("damage", ["DELETE FROM place", "UPDATE place SET horizon = 'x'"])
@on_a_loop
async def test_a_damaged_file_is_refused(path, damage):
    await FilePlace(path, "end").close()
    with sqlite3.connect(path) as database:
        database.execute(damage)
    database.close()
    with pytest.raises(CannotStartError, match="cannot be used as --state-file"):
        FilePlace(path, "end")


@on_a_loop
async def test_a_file_that_cannot_be_written_is_refused_at_once(path):
    await FilePlace(path, "end").close()
    os.mkdir(f"{path}-journal")  # also for root, whom permissions do not stop
    with pytest.raises(CannotStartError, match="cannot be used as --state-file"):
        FilePlace(path, "end")


def test_a_line_for_which_there_is_no_room_is_not_written_in_part(tmp_path):
    path = tmp_path / "dead-letters"
    append_line(str(path), "first")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_line(str(path), "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append_line(str(path), "third")
    assert path.read_text() == "first\nthird\n"
