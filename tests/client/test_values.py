"""Whatever callers pass: a job ends with what can be sent, and a call raises an error that names the argument."""

from __future__ import annotations

import enum
import logging
import math
import pathlib
import uuid
from collections.abc import Mapping
from datetime import date, datetime, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from jobstatus_grpc import InvalidFieldError, JobError, JobFilter, JobNotFoundError, JobState, JobUpdate
from jobstatus_grpc.errors import InternalError


class Mute:
    """A value that no method can read."""

    def __str__(self) -> str:
        raise RuntimeError

    def __repr__(self) -> str:
        raise RuntimeError

    def __float__(self) -> float:
        raise RuntimeError


class Broken(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise RuntimeError

    def __iter__(self) -> Any:
        raise RuntimeError

    def __len__(self) -> int:
        return 1


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = [value]
    return value


def doubled(times: int) -> Any:
    """2 ** times values that take little memory."""
    value: Any = 1
    for _ in range(times):
        value = [value, value]
    return value


def circular(width: int) -> list[Any]:
    items: list[Any] = []
    items.extend([items] * width)
    return items


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "jobstatus_grpc.client")
    return caplog


# A result, and the field that the log names.
UNSENDABLE_RESULTS = [
    ([1], "result"),
    ("done", "result"),
    (3, "result"),
    (Broken(), "result"),
    ({"a": 10**400}, "result['a']"),
    ({"a": 10**5000}, "result['a']"),
    ({"a": 2**53 + 1}, "result['a']"),
    ({"a": Decimal("0.12345678901234567890")}, "result['a']"),
    ({"a": circular(1)}, "result['a']"),
    ({"a": circular(2)}, "result['a']"),
    ({"a": doubled(30)}, "result"),
    ({"a": nested(600)}, "result['a']"),
    ({"a": nested(32)}, "result['a']"),
    ({"a": object()}, "result['a']"),
    ({"a": Mute()}, "result['a']"),
    ({"a": [1, {"b": {1, 2}}]}, "result['a'][1]['b']"),
    ({"a": math.nan}, "result['a']"),
    ({"a": b"bytes"}, "result['a']"),
    ({"a": "\ud800"}, "result['a']"),
    ({"\ud800": 1}, "result['\\ud800']"),
    ({7: 1}, "result[7]"),
    ({"a": "x" * 4_300_000}, "result"),
    ({"a": [0] * 3_000_000}, "result"),
]


@pytest.mark.parametrize(("result", "field"), UNSENDABLE_RESULTS, ids=range(len(UNSENDABLE_RESULTS)))
def test_a_job_ends_whatever_its_result_and_the_log_says_what_is_left_out(client, log, result, field):
    with client.track() as tracked:
        tracked.result = result
    assert client.get(tracked.id).state is JobState.SUCCEEDED
    assert any(tracked.id in line and f"{field}:" in line for line in log.messages), log.messages


def test_the_keys_of_a_result_that_can_be_sent_are_kept(client, log):
    with client.track() as tracked:
        tracked.result = {"rows": 3, "id": 2**60, "rest": {"a": [1]}}
    assert client.get(tracked.id).result == {"rows": 3, "rest": {"a": [1]}}
    assert len(log.messages) == 1


class Colour(enum.Enum):
    RED = "red"


CONVERTED = {
    "float64": (np.float64(0.5), 0.5),
    "float32": (np.float32(0.5), 0.5),
    "int64": (np.int64(7), 7),
    "bool": (np.bool_(True), True),
    "longdouble": (np.longdouble(0.5), 0.5),
    "array": (np.array(3), 3),
    "decimal": (Decimal("0.1"), 0.1),
    "datetime": (datetime(2030, 1, 2, tzinfo=timezone.utc), "2030-01-02T00:00:00+00:00"),
    "date": (date(2030, 1, 2), "2030-01-02"),
    "path": (pathlib.PurePosixPath("/a/b"), "/a/b"),
    "uuid": (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    "enum": (Colour.RED, "red"),
    "state": (JobState.FAILED, 6),
    "tuple": ((1, "a"), [1, "a"]),
    "integer": (2**53, 2**53),
}


def test_values_of_libraries_are_converted(client, log):
    given = {name: value for name, (value, _) in CONVERTED.items()}
    with client.track() as tracked:
        tracked.result = given
    stored = {name: value for name, (_, value) in CONVERTED.items()}
    assert client.get(tracked.id).result == client.create(result=given).result == stored
    assert log.messages == []


def test_a_strict_block_raises_what_it_left_out_of_its_result_and_its_job_is_done(client):
    with pytest.raises(InvalidFieldError, match=r"result\['a'\]"), client.track(strict=True) as tracked:
        tracked.result = {"a": object(), "b": 1}
    job = client.get(tracked.id)
    assert (job.state, job.result) == (JobState.SUCCEEDED, {"b": 1})


def test_progress_never_raises_and_reports_go_on(client, log):
    with client.track() as tracked:
        for bad in ("half", Mute(), object(), 10**400):
            tracked.progress(bad)
        tracked.progress(np.float64(40), Mute())
        tracked.progress(None, None)
    job = client.get(tracked.id)
    assert (job.state, job.progress) == (JobState.SUCCEEDED, 100)
    assert [line.split(": ")[2] for line in log.messages] == ["progress", "reason"]


def test_a_block_may_say_its_end_in_any_value(client):
    with client.track() as failed:
        failed.fail(Mute(), reason=Mute(), code="x")
    with client.track() as aborted:
        aborted.abort(Mute())
    with client.track() as retried:
        retried.retry(Mute(), reason=Mute())
    assert client.get(failed.id).error == JobError(2, "", "")
    assert client.get(aborted.id).state is JobState.ABORTED
    assert client.get(retried.id).state is JobState.RETRYING


@pytest.mark.parametrize("name", ["a\nb", "\ud800", "é" * 300, "\x1b[31mred\x1b[0m", 5, Mute()])
def test_a_job_of_any_name_is_reported(client, name):
    with client.track(name) as tracked:
        pass
    assert client.get(tracked.id).state is JobState.SUCCEEDED
    with client.track(name, id=f"{tracked.id}-2") as tracked:
        pass


# Labels or a parent that cannot be sent or would be refused, and the field that the log names.
UNSENDABLE_FACTS = [
    ({"labels": {"team": "a", "epoch": 3}}, "labels['epoch']"),
    ({"labels": {"team": "a", 3: "x"}}, "labels[3]"),
    ({"labels": {"team": "a", "note": "a\nb"}}, "labels['note']"),
    ({"labels": {"team": "a", "note": "x" * 300}}, "labels['note']"),
    ({"labels": {"team": "a", "note": "\ud800"}}, "labels['note']"),
    ({"labels": {"team": "a"}, "parent_id": "a b"}, "parent_id"),
    ({"labels": {"team": "a"}, "parent_id": 5}, "parent_id"),
    ({"labels": {"team": "a", **{f"x{number}": "" for number in range(64)}}}, "labels['x9']"),
]


@pytest.mark.parametrize(("facts", "field"), UNSENDABLE_FACTS, ids=range(len(UNSENDABLE_FACTS)))
def test_a_job_is_created_without_the_facts_that_cannot_be_sent(client, log, new_id, facts, field):
    with client.track("n", **facts) as created, client.track("n", id=new_id(), **facts) as claimed:
        pass
    assert client.get(created.id).labels["team"] == client.get(claimed.id).labels["team"] == "a"
    assert [f"{created.id}: " in log.messages[0], f"{claimed.id}: " in log.messages[1]] == [True, True]
    assert all(field in line for line in log.messages)
    with pytest.raises(InvalidFieldError), client.track("n", strict=True, **facts):
        raise AssertionError


@pytest.mark.parametrize("id", [5, "a b", "\ud800", uuid.UUID(int=1), Mute()])
def test_a_job_of_no_id_breaks_no_work_and_a_strict_block_does_not_begin(client, log, id):
    with client.track(id=id) as tracked:
        assert isinstance(tracked.error, InvalidFieldError)
    assert len(log.messages) == 1
    with pytest.raises(InvalidFieldError, match=r"^id: "), client.track(id=id, strict=True):
        raise AssertionError


def test_a_fault_in_the_client_ends_the_reports_with_an_error_and_not_in_silence(client, log, monkeypatch):
    def fail(update: JobUpdate) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("jobstatus_grpc.client.requests.sendable_update", fail)
    with pytest.raises(InternalError, match="ZeroDivisionError"), client.track(strict=True) as tracked:
        tracked.progress(3)
    assert tracked.id in log.messages[0]


BAD_UPDATES = [
    ({"result": [1]}, "result"),
    ({"result": {"a": circular(1)}}, "result['a']"),
    ({"result": {"a": nested(600)}}, "result['a']"),
    ({"result": {"a": 2**60}}, "result['a']"),
    ({"result": {"a": "x" * 4_300_000}}, "result"),
    ({"labels": {"epoch": 3}}, "labels['epoch']"),
    ({"labels": ["a"]}, "labels"),
    ({"labels": Broken()}, "labels"),
    ({"reason": Mute()}, "reason"),
    ({"reason": "\ud800"}, "reason"),
    ({"progress": "half"}, "progress"),
    ({"progress": 10**400}, "progress"),
    ({"reports_progress": "yes"}, "reports_progress"),
    ({"state": "done"}, "state"),
    ({"state": 99}, "state"),
    ({"state": Mute()}, "state"),
    ({"error": JobError("boom")}, "error.code"),  # type: ignore[arg-type]
    ({"error": ValueError("boom")}, "error"),
    ({"estimated_completion": "2030-01-01"}, "estimated_completion"),
    ({"estimated_completion": datetime(2030, 1, 1)}, "estimated_completion"),  # noqa: DTZ001
    ({"heartbeat_timeout_seconds": "30s"}, "heartbeat_timeout_seconds"),
    ({"heartbeat_timeout_seconds": 1e300}, "heartbeat_timeout_seconds"),
    ({"attempt": 2**40}, "attempt"),
    ({"attempt": "1"}, "attempt"),
    ({"expected_revision": "1"}, "expected_revision"),
    ({"request_id": 5}, "request_id"),
    ({"allow_missing": True, "name": None}, "name"),
    ({"allow_missing": True, "parent_id": 5}, "parent_id"),
]


@pytest.mark.parametrize(("fields", "field"), BAD_UPDATES, ids=range(len(BAD_UPDATES)))
def test_an_update_that_cannot_be_sent_names_the_argument_and_stops_no_other(client, fields, field):
    job = client.create(state=JobState.IN_PROGRESS)
    with pytest.raises(InvalidFieldError) as caught:
        client.update(job.id, **fields)
    assert [violation.field for violation in caught.value.violations] == [field]

    refused = []
    with client.reporter(on_error=lambda update, error: refused.append((update.id, str(error)))) as reporter:
        reporter.update(job.id, progress=1)
        reporter.update(job.id, **fields)
        reporter.update(job.id, progress=2)
    assert refused == [(job.id, str(caught.value))]

    first, bad, last = client.batch_update([JobUpdate(job.id), JobUpdate(job.id, **fields), JobUpdate(job.id)])
    assert (first.progress, str(bad), last.progress) == (2, str(caught.value), 2)


@pytest.mark.parametrize("id", [5, ["a"], Mute(), "\ud800"])
def test_a_reporter_tells_an_update_of_no_id_alone(client, log, id):
    job = client.create()
    with client.reporter() as reporter:
        reporter.update(id, progress=1)
        reporter.update(job.id, progress=1)
    assert client.get(job.id).progress == 1
    assert "id: " in log.messages[0]


CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "id": ("get", (5,), {}),
    "timeout_seconds": ("get", ("a",), {"timeout_seconds": "1s"}),
    "name": ("create", (5,), {}),
    "reason": ("cancel", ("a",), {"reason": b"\xff"}),
    "request_id": ("cancel", ("a",), {"request_id": 5}),
    "expected_revision": ("delete", ("a",), {"expected_revision": 2**70}),
    "page_size": ("list", (), {"page_size": "10"}),
    "filter": ("list", ({"done": True},), {}),
    "filter.names": ("list", (JobFilter(names=[5]),), {}),  # type: ignore[list-item]
    "filter.ids": ("list", (JobFilter(ids=[5, "a"]),), {}),  # type: ignore[list-item]
    "filter.labels": ("list", (JobFilter(labels={"a": 5}),), {}),  # type: ignore[dict-item]
    "filter.created_after": ("list", (JobFilter(created_after="today"),), {}),  # type: ignore[arg-type]
    "page_token": ("history", ("a",), {"page_token": 5}),
    "heartbeat_interval_seconds": ("watch_jobs", (), {"heartbeat_interval_seconds": "x"}),
    "min_update_interval_seconds": ("watch", ("a",), {"min_update_interval_seconds": "x"}),
    "give_up_seconds": ("watch", ("a",), {"give_up_seconds": "x"}),
    "timeout": ("wait", ("a",), {"timeout": "x"}),
    "heartbeat_timeout_seconds": ("track", (), {"heartbeat_timeout_seconds": "x"}),
    "finish_timeout_seconds": ("track", (), {"finish_timeout_seconds": "x"}),
    "retries": ("track", (), {"retries": "x"}),
    "flush_interval_seconds": ("reporter", (), {"flush_interval_seconds": "x"}),
    "max_pending": ("reporter", (), {"max_pending": "x"}),
    "updates[0]": ("batch_update", ([{"id": "a"}],), {}),
    "updates": ("batch_update", (5,), {}),
}


@pytest.mark.parametrize("argument", CALLS)
def test_a_call_names_the_argument_that_is_wrong(client, argument):
    method, args, kwargs = CALLS[argument]
    with pytest.raises(InvalidFieldError) as caught:
        getattr(client, method)(*args, **kwargs)
    assert [violation.field for violation in caught.value.violations] == [argument]


def test_states_and_errors_may_be_plain_strings(client):
    job = client.create(state="in_progress")
    client.update(job.id, state="failed", error="boom")
    assert client.get(job.id).error == JobError(2, "boom")
    assert client.list(JobFilter(states=["failed"], ids=[job.id])).jobs == (client.get(job.id),)  # type: ignore[list-item]


def test_a_filter_says_which_of_its_states_is_none():
    with pytest.raises(ValueError, match=r"states: must be one of PENDING, .*, is 'done'"):
        JobFilter(states=["done"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="ids must be a collection"):
        JobFilter(ids=5)  # type: ignore[arg-type]


DIRTY = JobError(2, "\x1b[31mbad\x1b[0m\r\nworse\x00\ud800" + "x" * 5000, "A\r\nB" + "C" * 200)


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.RETRYING])
def test_the_texts_of_an_end_are_cleaned_and_not_refused_with_it(client, state):
    job, other = client.create(state=JobState.IN_PROGRESS), client.create(state=JobState.IN_PROGRESS)
    stored = client.update(job.id, state=state, error=DIRTY, reason="\x1b]0;title\x07done\r\n")
    assert stored.error.message.startswith("bad\nworse ?xxx")
    assert (stored.error.reason[:6], stored.reason) == ("A BCCC", "done\n")
    with client.reporter() as reporter:
        reporter.update(other.id, state=state, error=DIRTY, reason="\x1b]0;title\x07done\r\n")
    assert client.get(other.id).error == stored.error


def test_the_texts_of_a_tracked_jobs_end_are_cleaned(client):
    with client.track() as tracked:
        tracked.progress(1, "\x1b[2K\r\n 40 %")
        tracked.fail("\x1b[31mbad\x1b[0m\r\n")
    job = client.get(tracked.id)
    assert (job.error.message, job.reason) == ("bad\n", "\n 40 %")


def test_an_infinite_timeout_is_long(client):
    with pytest.raises(JobNotFoundError):
        client.get("no-such-job", timeout_seconds=math.inf)
