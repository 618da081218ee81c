"""WatchJob: what is sent, when, and how it ends."""

from __future__ import annotations

import time
from typing import Any

import pytest
from google.protobuf import duration_pb2, timestamp_pb2
from jobstatus.v1 import job_status_pb2 as pb

from tests.support.watch_jobs import pauses

SNAPSHOT, UPDATED, HEARTBEAT = pb.JOB_EVENT_TYPE_SNAPSHOT, pb.JOB_EVENT_TYPE_UPDATED, pb.JOB_EVENT_TYPE_HEARTBEAT
ENDS = ["SUCCEEDED", "ABORTED", "FAILED", "CANCELLED"]
SECOND = duration_pb2.Duration(seconds=1)
LONG = duration_pb2.Duration(seconds=3600)
NONE = duration_pb2.Duration()


def of(message):
    return message.event.type, message.event.job


@pytest.fixture
def running(any_service, new_id):
    return any_service.job_in("IN_PROGRESS", id=new_id(), name="n", result={"rows": 1})


def test_the_first_message_is_a_snapshot_of_the_whole_job(any_service, running):
    stream = any_service.watch(running.id)
    message = next(stream)
    assert of(message) == (SNAPSHOT, any_service.get(running.id))
    assert abs(message.server_time.ToNanoseconds() - time.time_ns()) < 60 * 10**9
    stream.cancel()


def test_a_watch_of_an_unknown_job_is_not_found(any_service, refused, new_id):
    refusal = refused(lambda: list(any_service.watch(new_id())))
    assert refusal.kind == ("NOT_FOUND", "JOB_NOT_FOUND")


@pytest.mark.parametrize("state", ENDS)
def test_a_watch_of_a_done_job_is_its_snapshot_and_ok(any_service, new_id, state):
    job = any_service.job_in(state, id=new_id())
    assert [of(message) for message in any_service.watch(job.id)] == [(SNAPSHOT, job)]


@pytest.mark.parametrize("state", ENDS)
def test_a_watch_ends_with_ok_once_the_end_was_sent(any_service, running, state):
    stream = any_service.watch(running.id)
    next(stream)
    job = any_service.update(running.id, state=f"JOB_STATE_{state}")
    assert [of(message) for message in stream] == [(UPDATED, job)]


def test_a_pending_job_that_is_cancelled_ends_its_watches(any_service, new_id):
    job = any_service.create(id=new_id())
    stream = any_service.watch(job.id)
    next(stream)
    cancelled = any_service.cancel(job.id)
    assert [of(message) for message in stream] == [(UPDATED, cancelled)]


def test_the_newest_state_always_arrives_and_revisions_rise(any_service, running):
    stream = any_service.watch(running.id, min_update_interval=NONE)
    for number in range(200):
        last = any_service.update(running.id, reason=str(number), labels={"n": str(number)})
    revisions = [next(stream).event.job.revision]
    while revisions[-1] < last.revision:
        revisions.append(next(stream).event.job.revision)
    assert revisions == sorted(set(revisions))
    any_service.update(running.id, state="JOB_STATE_SUCCEEDED")
    assert [message.event.job.revision for message in stream] == [last.revision + 1]


def test_every_message_shows_a_state_that_was(any_service, running):
    stream = any_service.watch(running.id, min_update_interval=NONE)
    stored = {running.revision: running}
    for number in range(50):
        job = any_service.update(running.id, progress=number, reason=str(number))
        stored[job.revision] = job
    job = any_service.update(running.id, state="JOB_STATE_FAILED", error={"code": 8})
    stored[job.revision] = job
    for message in stream:
        assert message.event.job == stored[message.event.job.revision]


def test_a_heartbeat_of_the_worker_wakes_no_watcher(any_service, running):
    stream = any_service.watch(running.id)
    next(stream)
    for _ in range(5):
        any_service.update(running.id)
    changed = any_service.update(running.id, labels={"a": "b"})
    assert of(next(stream)) == (UPDATED, changed)
    stream.cancel()


def test_resuming_is_calling_again(any_service, running):
    stream = any_service.watch(running.id)
    next(stream)
    stream.cancel()
    job = any_service.update(running.id, progress=5)
    again = any_service.watch(running.id)
    assert of(next(again)) == (SNAPSHOT, job)
    again.cancel()


def test_a_heartbeat_repeats_the_job_last_sent_after_the_interval_of_silence(service, new_id):
    running = service.job_in("IN_PROGRESS", id=new_id())
    stream = service.watch(running.id, heartbeat_interval=SECOND, min_update_interval=LONG)
    next(stream)
    sent = service.update(running.id, progress=1)
    messages = [next(stream)]
    service.update(running.id, progress=2)
    messages += [next(stream), next(stream)]
    assert [of(message) for message in messages] == [(UPDATED, sent), (HEARTBEAT, sent), (HEARTBEAT, sent)]
    assert min(pauses(messages)) > 0.9
    job = service.update(running.id, state="JOB_STATE_SUCCEEDED")
    assert [of(message) for message in stream if message.event.type == UPDATED] == [(UPDATED, job)]


def test_messages_are_no_silence(service, new_id):
    job = service.job_in("IN_PROGRESS", id=new_id())
    stream = service.watch(job.id, heartbeat_interval=SECOND, min_update_interval=NONE)
    messages = [next(stream)]
    started = time.monotonic()
    while time.monotonic() - started < 2.2:
        service.update(job.id, labels={"number": str(len(messages))})
        messages.append(next(stream))
    beats = [message.event.type == HEARTBEAT for message in messages[1:]]
    assert all(pause > 0.9 for pause, is_beat in zip(pauses(messages), beats, strict=True) if is_beat)


MINOR: dict[str, dict[str, Any]] = {
    "progress": {"progress": 50.0},
    "reason": {"reason": "x"},
    "estimated_completion": {"estimated_completion": timestamp_pb2.Timestamp(seconds=2_000_000_000)},
    "cleared progress": {"mask": ["reports_progress"]},
}
URGENT: dict[str, dict[str, Any]] = {
    "state": {"state": "JOB_STATE_RETRYING"},
    "end": {"state": "JOB_STATE_FAILED"},
    "claim": {"state": "JOB_STATE_IN_PROGRESS", "attempt": 2},
    "labels": {"labels": {"a": "b"}},
    "result": {"result": {"rows": 2}},
    "heartbeat_timeout": {"heartbeat_timeout": SECOND},
}


@pytest.mark.parametrize("urgent", URGENT)
@pytest.mark.parametrize("minor", MINOR)
def test_minor_changes_wait_but_no_other_change_is_delayed(service, new_id, minor, urgent):
    job = service.job_in("IN_PROGRESS", id=new_id(), progress=1.0)
    stream = service.watch(job.id, min_update_interval=LONG)
    next(stream)
    first = service.update(job.id, progress=2)
    assert of(next(stream)) == (UPDATED, first), "the first after a quiet time is sent at once"
    service.update(job.id, **MINOR[minor])
    changed = service.update(job.id, **URGENT[urgent])
    assert of(next(stream)) == (UPDATED, changed)
    stream.cancel()


def test_a_request_to_cancel_is_not_delayed(any_service, running):
    stream = any_service.watch(running.id, min_update_interval=LONG)
    next(stream)
    first = any_service.update(running.id, progress=2)
    assert of(next(stream)) == (UPDATED, first)
    any_service.update(running.id, progress=3)
    asked = any_service.cancel(running.id)
    assert of(next(stream)) == (UPDATED, asked)
    stream.cancel()


def test_an_error_is_not_delayed(any_service, new_id):
    job = any_service.job_in("RETRYING", id=new_id())
    stream = any_service.watch(job.id, min_update_interval=LONG)
    next(stream)
    first = any_service.update(job.id, reason="a")
    assert of(next(stream)) == (UPDATED, first)
    any_service.update(job.id, reason="b")
    changed = any_service.update(job.id, error={"code": 8})
    assert of(next(stream)) == (UPDATED, changed)
    stream.cancel()


@pytest.mark.parametrize("interval_ms", [None, 250])
def test_minor_changes_come_at_most_every_interval_and_the_last_one_always(service, new_id, interval_ms):
    fields = {} if interval_ms is None else {"min_update_interval": duration_pb2.Duration(nanos=interval_ms * 10**6)}
    running = service.job_in("IN_PROGRESS", id=new_id())
    seconds = (interval_ms or 100) / 1000
    stream = service.watch(running.id, **fields)
    next(stream)
    updated_at = [started := time.monotonic()]
    while updated_at[-1] - started < 1 or len(updated_at) < 40:
        last = service.update(running.id, progress=0.01 * len(updated_at))
        updated_at.append(time.monotonic())
    messages = [next(stream)]
    while messages[-1].event.job.revision < last.revision:
        messages.append(next(stream))
    elapsed = time.monotonic() - started
    busy_intervals = len({(at - started) // seconds for at in updated_at})
    assert busy_intervals * 0.3 <= len(messages) <= elapsed / seconds + 2
    assert min(pauses(messages)) > seconds * 0.9
    stream.cancel()


def test_without_an_interval_nothing_waits(any_service, running):
    stream = any_service.watch(running.id, min_update_interval=NONE)
    next(stream)
    started = time.monotonic()
    for progress in range(1, 51):
        job = any_service.update(running.id, progress=progress)
        assert of(next(stream)) == (UPDATED, job)
    assert time.monotonic() - started < 50 * 0.1


def test_each_watcher_has_its_own_interval(any_service, running):
    slow = any_service.watch(running.id, min_update_interval=LONG)
    fast = any_service.watch(running.id, min_update_interval=NONE)
    assert next(slow).event.job == next(fast).event.job
    for progress in range(1, 21):
        job = any_service.update(running.id, progress=progress)
        assert next(fast).event.job == job
    end = any_service.update(running.id, state="JOB_STATE_SUCCEEDED")
    assert [message.event.job.progress for message in slow] == [1, end.progress]
    assert [message.event.job for message in fast] == [end]
