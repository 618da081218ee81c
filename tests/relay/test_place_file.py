"""The file of a relay's place, and the ids of events."""

from __future__ import annotations

import resource
import sqlite3
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.job import Job, JobState
from jobstatus_grpc.relay.event import event_id
from jobstatus_grpc.relay.place import Delivered, Place
from jobstatus_grpc.relay.relay import append_line

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
MINUTE = timedelta(minutes=1)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "relay.state")


@pytest.fixture
def place(path):
    place = Place(path, "end")
    place.begin("t1", NOW, [Delivered("open", "evt_open", NOW - MINUTE, False)])
    yield place
    place.close()


def test_a_new_file_has_no_place(path):
    place = Place(path, "end")
    assert (place.token, place.last_event("a")) == ("", None)
    place.close()


def test_what_was_saved_is_there_when_the_file_is_opened_again(path, place):
    place.save([Delivered("a", "evt_a", NOW, True)], "t2", NOW)
    place.close()
    again = Place(path, "end")
    assert (again.token, again.horizon, again.last_event("a")) == ("t2", NOW, "evt_a")
    again.close()


def test_the_end_of_an_old_delivery_is_forgotten_and_an_open_job_is_not(place):
    place.save([Delivered("old", "evt_1", NOW, True), Delivered("new", "evt_2", NOW + MINUTE, True)], "t2", NOW)
    place.save([], "t3", NOW + MINUTE)
    assert [place.last_event(job_id) for job_id in ("old", "new", "open")] == [None, "evt_2", "evt_open"]


def test_open_jobs_that_are_gone_are_forgotten(place):
    place.save([Delivered("other", "evt_1", NOW, False), Delivered("done", "evt_2", NOW, True)], "t2", NOW)
    place.forget_open_jobs(unless={"other"})
    place.forget("unknown")
    assert [place.last_event(job_id) for job_id in ("open", "other", "done")] == [None, "evt_1", "evt_2"]


def test_a_save_that_fails_changes_nothing(path, place):
    place._database.execute("PRAGMA max_page_count = 1")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        place.save([Delivered(f"{number}", "evt_x" * 50, NOW, True) for number in range(1000)], "t2", NOW)
    assert (place.token, place.last_event("1")) == ("t1", None)
    place._database.execute("PRAGMA max_page_count = 1000")
    place.save([Delivered("1", "evt_1", NOW, True)], "t2", NOW)
    assert (place.token, place.last_event("1")) == ("t2", "evt_1")


def test_a_file_is_good_for_one_relay_and_for_one_kind(path, place):
    with pytest.raises(CannotStartError, match="another relay uses"):
        Place(path, "end")
    place.close()
    with pytest.raises(CannotStartError, match="--on end"):
        Place(path, "state")


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


def test_a_file_is_never_a_database_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = Place(":memory:", "end")
    place.begin("t1", NOW, [])
    place.close()
    again = Place(":memory:", "end")
    assert again.token == "t1"
    again.close()


@pytest.mark.parametrize("damage", ["DELETE FROM place", "UPDATE place SET horizon = 'x'"])
def test_a_damaged_file_is_refused(path, place, damage):
    place.close()
    with sqlite3.connect(path) as database:
        database.execute(damage)
    database.close()
    with pytest.raises(CannotStartError, match="cannot be used as --state-file"):
        Place(path, "end")


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
