"""WatchJobs: what is there, and what changes."""

from __future__ import annotations

import time

import pytest
from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb

from tests.reader import HEARTBEAT, MIB, REMOVED, SNAPSHOT, SYNCED, UPDATED, pauses, told

SECOND = duration_pb2.Duration(seconds=1)
LONG = duration_pb2.Duration(seconds=3600)
NONE = duration_pb2.Duration()


@pytest.fixture
def watch(any_service, group):
    """Open a watch of the test's jobs; it is cancelled at the end."""
    streams = []

    def watch(*, heartbeat_interval=LONG, min_update_interval=NONE, resume_token="", **fields):
        request = pb.WatchJobsRequest(
            filter=pb.JobFilter(**{"labels": group, **fields}),
            resume_token=resume_token,
            heartbeat_interval=heartbeat_interval,
            min_update_interval=min_update_interval,
        )
        streams.append(any_service.stub.WatchJobs(request, timeout=30))
        return streams[-1]

    yield watch
    for stream in streams:
        stream.cancel()


def synced(stream):
    """Read to SYNCED, and return what came before it and the message with SYNCED."""
    events: list[pb.JobEvent] = []
    for message in stream:
        if message.events[0].type == SYNCED:
            return events, message
        events += message.events
    raise AssertionError


def test_all_that_match_come_as_snapshots_and_then_synced(any_service, make, watch):
    jobs = [make(state) for state in ("PENDING", "IN_PROGRESS", "SUCCEEDED")]
    any_service.create()
    stream = watch()
    first = next(stream)
    assert [event.type for event in first.events] == [SNAPSHOT] * 3
    assert [event.job for event in first.events] == jobs[::-1]
    assert told(next(stream)) == [(SYNCED, "")]


def test_synced_comes_also_where_none_match(watch):
    assert told(next(watch())) == [(SYNCED, "")]


def test_a_message_has_a_token_from_synced_on_and_always_the_time(any_service, make, watch):
    job = make()
    stream = watch()
    messages = [next(stream), next(stream)]
    any_service.update(job.id, progress=1)
    messages.append(next(stream))
    assert [bool(message.resume_token) for message in messages] == [False, True, True]
    assert messages[1].resume_token != messages[2].resume_token
    for message in messages:
        assert abs(message.server_time.ToNanoseconds() - time.time_ns()) < 60 * 10**9


def test_changes_come_as_updated_and_so_do_new_jobs(any_service, make, watch):
    job = make()
    stream = watch()
    synced(stream)
    changed = any_service.update(job.id, labels={**job.labels, "a": "b"})
    assert list(next(stream).events) == [pb.JobEvent(type=UPDATED, job=changed)]
    new = make("PENDING")
    assert list(next(stream).events) == [pb.JobEvent(type=UPDATED, job=new)]


def test_a_job_that_stops_matching_comes_whole_as_removed_and_is_then_forgotten(any_service, make, watch):
    job, other = make(), make()
    stream = watch(done=False)
    synced(stream)
    done = any_service.update(job.id, state="JOB_STATE_SUCCEEDED")
    assert list(next(stream).events) == [pb.JobEvent(type=REMOVED, job=done)]
    any_service.stub.DeleteJob(pb.DeleteJobRequest(id=job.id))
    any_service.update(other.id, progress=1)
    assert told(next(stream)) == [(UPDATED, other.id)]


def test_a_job_whose_label_goes_is_removed_and_comes_back_with_it(any_service, make, watch, group):
    job = make()
    stream = watch()
    synced(stream)
    any_service.update(job.id, mask=["labels"])
    assert told(next(stream)) == [(REMOVED, job.id)]
    back = any_service.update(job.id, labels=group)
    assert list(next(stream).events) == [pb.JobEvent(type=UPDATED, job=back)]


def test_a_deleted_job_is_removed_with_its_id_and_the_revision_of_its_removal(any_service, make, watch):
    job = make("SUCCEEDED")
    stream = watch()
    synced(stream)
    any_service.stub.DeleteJob(pb.DeleteJobRequest(id=job.id))
    gone = pb.JobStatus(id=job.id, revision=job.revision + 1)
    assert list(next(stream).events) == [pb.JobEvent(type=REMOVED, job=gone)]


def test_jobs_that_do_not_match_are_not_told(any_service, make, watch, new_id):
    stream = watch(done=True)
    synced(stream)
    pending = make("PENDING")
    any_service.job_in("SUCCEEDED", id=new_id())
    done = any_service.update(pending.id, state="JOB_STATE_SUCCEEDED")
    assert list(next(stream).events) == [pb.JobEvent(type=UPDATED, job=done)]


def test_a_message_holds_at_most_256_events(any_service, watch, update_of, group, new_id):
    updates = [update_of(new_id(), allow_missing=True, labels=group) for _ in range(600)]
    any_service.batch(*updates[:500])
    any_service.batch(*updates[500:])
    stream = watch()
    messages = [next(stream) for _ in range(3)]
    assert [len(message.events) for message in messages] == [256, 256, 88]
    assert told(next(stream)) == [(SYNCED, "")]
    assert len({event.job.id for message in messages for event in message.events}) == 600
    any_service.batch(*(update_of(update.job.id, reason="x") for update in updates[:500]))
    counts = [len(next(stream).events)]
    while sum(counts) < 500:
        counts.append(len(next(stream).events))
    assert max(counts) <= 256


def test_a_message_is_about_a_mebibyte_at_most(make, watch):
    for _ in range(40):
        make(result={"text": "x" * 60_000})
    stream = watch()
    sizes = []
    while (message := next(stream)).events[0].type != SYNCED:
        sizes.append(message.ByteSize())
    assert len(sizes) == 3
    assert max(sizes) < MIB + 1000


def test_heartbeats_come_after_silence_with_the_token_only(any_service, make, watch):
    job = make()
    stream = watch(heartbeat_interval=SECOND)
    _, last = synced(stream)
    beats = [next(stream), next(stream)]
    assert min(pauses([last, *beats])) > 0.9
    for beat in beats:
        assert list(beat.events) == [pb.JobEvent(type=HEARTBEAT)]
        assert beat.resume_token == last.resume_token
        assert beat.HasField("server_time")
    any_service.update(job.id, progress=1)
    assert told(next(stream)) == [(UPDATED, job.id)]


def test_minor_changes_wait_for_their_jobs_interval_and_others_do_not(any_service, make, watch):
    jobs = [make(), make()]
    stream = watch(min_update_interval=LONG)
    synced(stream)
    for job in jobs:
        any_service.update(job.id, progress=1)
        assert told(next(stream)) == [(UPDATED, job.id)]
    any_service.update(jobs[0].id, progress=2)
    changed = any_service.update(jobs[1].id, labels={**jobs[1].labels, "a": "b"})
    assert list(next(stream).events) == [pb.JobEvent(type=UPDATED, job=changed)]
    done = any_service.update(jobs[0].id, state="JOB_STATE_SUCCEEDED")
    assert list(next(stream).events) == [pb.JobEvent(type=UPDATED, job=done)]


def test_the_last_minor_change_comes_when_the_interval_is_over(any_service, make, watch):
    job = make()
    stream = watch(min_update_interval=duration_pb2.Duration(nanos=300_000_000))
    synced(stream)
    started = time.monotonic()
    for progress in range(1, 21):
        last = any_service.update(job.id, progress=progress)
    messages = [next(stream)]
    while messages[-1].events[0].job.revision < last.revision:
        messages.append(next(stream))
    assert len(messages) <= (time.monotonic() - started) / 0.3 + 2
    assert messages[-1].events[0].job == last


def test_no_token_passes_a_change_that_is_held_back(any_service, make, watch):
    jobs = [make(), make()]
    stream = watch(min_update_interval=LONG)
    synced(stream)
    any_service.update(jobs[0].id, progress=1)
    next(stream)
    held_back = any_service.update(jobs[0].id, progress=2)
    any_service.update(jobs[1].id, progress=1)
    message = next(stream)
    assert told(message) == [(UPDATED, jobs[1].id)]
    events, _ = synced(watch(resume_token=message.resume_token))
    assert held_back in [event.job for event in events]
