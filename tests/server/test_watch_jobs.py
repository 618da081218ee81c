"""WatchJobs: snapshots, changes, resuming with a token, limits, and how streams end."""

from __future__ import annotations

import asyncio
import itertools
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timezone

import grpc
import psutil
import pytest
from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from jobstatus_grpc.watch import filter_watch
from tests.support.timing import admitted_within_a_second
from tests.support.watch_jobs import (
    HEARTBEAT,
    MIB,
    REMOVED,
    RESET,
    SNAPSHOT,
    SYNCED,
    UPDATED,
    Reader,
    events_of,
    pauses,
)

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
    """Read to SYNCED, and return the events before it and the message with SYNCED."""
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
    assert events_of(next(stream)) == [(SYNCED, "")]


def test_synced_comes_also_where_none_match(watch):
    assert events_of(next(watch())) == [(SYNCED, "")]


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
    assert events_of(next(stream)) == [(UPDATED, other.id)]


def test_a_job_whose_label_goes_is_removed_and_comes_back_with_it(any_service, make, watch, group):
    job = make()
    stream = watch()
    synced(stream)
    any_service.update(job.id, mask=["labels"])
    assert events_of(next(stream)) == [(REMOVED, job.id)]
    back = any_service.update(job.id, labels=group)
    assert list(next(stream).events) == [pb.JobEvent(type=UPDATED, job=back)]


def test_a_deleted_job_is_removed_with_its_id_and_the_revision_of_its_removal(any_service, make, watch):
    job = make("SUCCEEDED")
    stream = watch()
    synced(stream)
    any_service.stub.DeleteJob(pb.DeleteJobRequest(id=job.id))
    gone = pb.JobStatus(id=job.id, revision=job.revision + 1)
    assert list(next(stream).events) == [pb.JobEvent(type=REMOVED, job=gone)]


def test_jobs_that_do_not_match_are_not_sent(any_service, make, watch, new_id):
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
    assert events_of(next(stream)) == [(SYNCED, "")]
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
    assert events_of(next(stream)) == [(UPDATED, job.id)]


def test_minor_changes_wait_for_their_jobs_interval_and_others_do_not(any_service, make, watch):
    jobs = [make(), make()]
    stream = watch(min_update_interval=LONG)
    synced(stream)
    for job in jobs:
        any_service.update(job.id, progress=1)
        assert events_of(next(stream)) == [(UPDATED, job.id)]
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
    assert events_of(message) == [(UPDATED, jobs[1].id)]
    events, _ = synced(watch(resume_token=message.resume_token))
    assert held_back in [event.job for event in events]


@pytest.fixture
def watch_to_synced(any_service, group):
    """Read a watch of the test's jobs to SYNCED; return the stream, the events before it, and its token."""
    streams = []

    def watch_to_synced(token="", **fields):
        job_filter = pb.JobFilter(**{"labels": group, **fields})
        request = pb.WatchJobsRequest(filter=job_filter, resume_token=token, min_update_interval=NONE)
        stream = any_service.stub.WatchJobs(request, timeout=30)
        streams.append(stream)
        events: list[pb.JobEvent] = []
        for message in stream:
            if message.events[0].type == SYNCED:
                return stream, events, message.resume_token
            assert message.resume_token == token
            events += message.events
        raise AssertionError

    yield watch_to_synced
    for stream in streams:
        stream.cancel()


def delete(service, job):
    service.stub.DeleteJob(pb.DeleteJobRequest(id=job.id))


def test_what_changed_since_comes_once_with_its_newest_state_and_then_synced(any_service, make, watch_to_synced):
    jobs = [make() for _ in range(3)]
    _, _, token = watch_to_synced()
    for progress in range(1, 6):
        changed = any_service.update(jobs[1].id, progress=progress)
    new = make("PENDING")
    _, events, _ = watch_to_synced(token)
    assert events == [pb.JobEvent(type=UPDATED, job=changed), pb.JobEvent(type=UPDATED, job=new)]


def test_where_nothing_changed_there_is_only_synced(make, watch_to_synced):
    make()
    _, _, token = watch_to_synced()
    _, events, again = watch_to_synced(token)
    assert events == []
    assert again


def test_a_changed_job_that_does_not_match_now_is_removed_whole(any_service, make, watch_to_synced):
    job = make()
    _, _, token = watch_to_synced(done=False)
    done = any_service.update(job.id, state="JOB_STATE_FAILED")
    _, events, _ = watch_to_synced(token, done=False)
    assert events == [pb.JobEvent(type=REMOVED, job=done)]


def test_of_a_job_that_ended_and_was_deleted_in_between_its_end_is_sent_and_its_removal(
    any_service, make, watch_to_synced
):
    job = make()
    _, _, token = watch_to_synced(ids=[job.id])
    ended = any_service.update(job.id, state="JOB_STATE_SUCCEEDED", labels=job.labels)
    delete(any_service, job)
    _, events, _ = watch_to_synced(token, ids=[job.id])
    gone = pb.JobStatus(id=job.id, revision=ended.revision + 1)
    assert events == [pb.JobEvent(type=UPDATED, job=ended), pb.JobEvent(type=REMOVED, job=gone)]


def test_jobs_that_can_never_have_matched_are_left_out(any_service, make, watch_to_synced, new_id):
    jobs = [make("SUCCEEDED", name=name, parent_id=parent) for name, parent in (("x", "p"), ("y", "p"), ("x", "q"))]
    others = {"ids": [new_id()], "names": ["z"], "name_prefix": "z", "parent_id": "z"}
    tokens = {name: watch_to_synced(**{name: value})[2] for name, value in others.items()}
    for job in jobs[:2]:
        delete(any_service, job)
    make(name="x")
    for name, value in others.items():
        events = watch_to_synced(tokens[name], **{name: value})[1]
        assert name == "ids" or {event.type for event in events} <= {REMOVED}
        assert [event for event in events if event.job.name or name == "ids"] == []


def test_a_job_that_did_not_change_is_known_to_be_held_and_is_removed_when_it_stops_matching(
    any_service, make, watch_to_synced
):
    job = make()
    _, _, token = watch_to_synced(done=False)
    make()
    stream, _, _ = watch_to_synced(token, done=False)
    done = any_service.update(job.id, state="JOB_STATE_SUCCEEDED")
    assert list(next(stream).events) == [pb.JobEvent(type=REMOVED, job=done)]


def test_a_job_that_did_not_change_is_removed_when_it_is_deleted(any_service, make, watch_to_synced):
    job = make("SUCCEEDED")
    _, _, token = watch_to_synced()
    stream, _, _ = watch_to_synced(token)
    delete(any_service, job)
    assert events_of(next(stream))[-1] == (REMOVED, job.id)


def test_a_list_gives_a_token_for_what_comes_after_it(any_service, make, watch_to_synced, group):
    jobs = [make() for _ in range(3)]
    request = pb.ListJobsRequest(filter=pb.JobFilter(labels=group), page_size=2)
    page = any_service.stub.ListJobs(request)
    changed = any_service.update(jobs[2].id, progress=1)
    request.page_token = page.next_page_token
    later = any_service.stub.ListJobs(request)
    assert later.resume_token == page.resume_token
    stream, events, _ = watch_to_synced(page.resume_token)
    if not events:  # the hub had not read the change by then
        events = next(stream).events
    assert changed in [event.job for event in events]


def test_a_token_is_good_for_many_more_changes_than_fit_a_batch(any_service, watch_to_synced, update_of, new_id, group):
    _, _, token = watch_to_synced()
    ids = [new_id() for _ in range(2500)]
    for start in range(0, len(ids), 500):
        any_service.batch(*(update_of(job_id, allow_missing=True, labels=group) for job_id in ids[start : start + 500]))
    _, events, _ = watch_to_synced(token)
    assert [event.job.id for event in events] == ids
    assert {event.type for event in events} == {UPDATED}


def change_foreign_jobs(service, update_of, new_id, count):
    for _ in range(count // 500):
        service.batch(*(update_of(new_id(), allow_missing=True, labels={"other": "x"}) for _ in range(500)))


def test_a_resume_beside_many_foreign_changes_is_a_reset_and_the_jobs_that_match(
    any_service, make, watch_to_synced, update_of, new_id, group
):
    job = make()
    _, _, token = watch_to_synced()
    change_foreign_jobs(any_service, update_of, new_id, 3000)
    changed = any_service.update(job.id, progress=1)
    request = pb.WatchJobsRequest(filter=pb.JobFilter(labels=group), resume_token=token)
    messages = list(until_synced(any_service.stub.WatchJobs(request, timeout=30)))
    events = [event for message in messages for event in message.events]
    at = [event.type for event in events].index(RESET)
    assert at <= filter_watch.MAX_GUESSES + 2
    assert events[at + 1 :] == [pb.JobEvent(type=SNAPSHOT, job=changed), pb.JobEvent(type=SYNCED)]
    _, again, _ = watch_to_synced(messages[-2].resume_token)
    assert again == events[at:-1], "a stream that was cut before SYNCED"
    assert watch_to_synced(messages[-1].resume_token)[1] == []


def each_event(stream):
    return (event for message in stream for event in events_of(message))


def until_synced(stream):
    for message in stream:
        yield message
        if message.events[-1].type == SYNCED:
            break


def test_a_resume_is_free_of_jobs_that_cannot_have_matched(any_service, make, watch_to_synced, update_of, new_id):
    job = make("FAILED")
    _, _, token = watch_to_synced(states=[pb.JOB_STATE_FAILED])
    change_foreign_jobs(any_service, update_of, new_id, 500)
    any_service.stub.DeleteJob(pb.DeleteJobRequest(id=job.id))
    _, events, _ = watch_to_synced(token, states=[pb.JOB_STATE_FAILED])
    assert {event.job.id for event in events} == {job.id}


def test_a_resume_of_more_jobs_than_have_changed_elsewhere_is_no_reset(
    any_service, watch_to_synced, update_of, new_id, group
):
    any_service.batch(*(update_of(new_id(), allow_missing=True, labels=group) for _ in range(500)))
    _, _, token = watch_to_synced()
    change_foreign_jobs(any_service, update_of, new_id, 500)
    _, events, _ = watch_to_synced(token)
    assert {event.type for event in events} == {REMOVED}
    assert len(events) <= 500


def test_a_foreign_job_that_keeps_changing_is_removed_once_at_most(
    any_service, make, watch_to_synced, update_of, new_id
):
    job, foreign = make(), new_id()
    _, _, token = watch_to_synced()
    is_over, changes = threading.Event(), threading.Semaphore(0)

    def change():
        for number in itertools.takewhile(lambda _: not is_over.is_set(), itertools.count()):
            any_service.batch(update_of(foreign, allow_missing=True, progress=number % 100, labels={"n": str(number)}))
            changes.release()

    with ThreadPoolExecutor() as threads:
        changing = threads.submit(change)
        try:
            stream, _, _ = watch_to_synced(token)
            assert all(changes.acquire(timeout=10) for _ in range(30))
            any_service.update(job.id, progress=1)
            later = list(itertools.takewhile(lambda event: event != (UPDATED, job.id), each_event(stream)))
            assert later in ([], [(REMOVED, foreign)])
        finally:
            is_over.set()
    changing.result()


def test_the_order_of_a_filters_values_does_not_matter(any_service, make, watch_to_synced):
    ids = [make().id, make().id]
    _, _, token = watch_to_synced(ids=ids)
    assert watch_to_synced(token, ids=ids[::-1])[1] == []


@pytest.mark.parametrize("text", ["x", "=", "\n", "A" * 100_000, "Ä", "AAAA"])
def test_a_malformed_token_is_refused_at_once(service, refused, text):
    refusal = refused(lambda: list(service.stub.WatchJobs(pb.WatchJobsRequest(resume_token=text), timeout=20)))
    assert refusal.kind == ("INVALID_ARGUMENT", "INVALID_TOKEN")


def test_a_token_for_another_filter_is_refused(service, refused, new_id):
    stream = service.stub.WatchJobs(pb.WatchJobsRequest(filter=pb.JobFilter(ids=[new_id()])), timeout=20)
    token = next(stream).resume_token
    stream.cancel()
    for job_filter in (pb.JobFilter(), pb.JobFilter(ids=[new_id()]), pb.JobFilter(done=False)):
        request = pb.WatchJobsRequest(filter=job_filter, resume_token=token)
        refusal = refused(lambda request=request: list(service.stub.WatchJobs(request, timeout=20)))
        assert refusal.kind == ("INVALID_ARGUMENT", "INVALID_TOKEN")


def test_a_page_token_is_no_resume_token(service, refused, new_id):
    for _ in range(2):
        service.create(id=new_id())
    token = service.stub.ListJobs(pb.ListJobsRequest(page_size=1)).next_page_token
    refusal = refused(lambda: list(service.stub.WatchJobs(pb.WatchJobsRequest(resume_token=token), timeout=20)))
    assert refusal.kind == ("INVALID_ARGUMENT", "INVALID_TOKEN")


def test_all_violations_of_a_watch_are_reported_at_once(service, refused):
    request = pb.WatchJobsRequest(
        filter=pb.JobFilter(ids=["/"], parent_id="/", names=["\0"]),
        resume_token="x",
        heartbeat_interval=duration_pb2.Duration(nanos=1),
        min_update_interval=duration_pb2.Duration(seconds=-1),
    )
    refusal = refused(lambda: list(service.stub.WatchJobs(request, timeout=20)))
    assert refusal.kind == ("INVALID_ARGUMENT", "INVALID_FIELD")
    fields = {"filter.ids", "filter.parent_id", "filter.names", "heartbeat_interval", "min_update_interval"}
    assert set(refusal.fields) == fields


LARGE = {"text": "x" * 60_000}


def open_watch(service, **fields):
    return service.stub.WatchJobs(pb.WatchJobsRequest(min_update_interval=NONE, **fields), timeout=30)


def test_watches_of_many_and_of_one_count_together(serve, refused, new_id):
    service = serve("--max-watchers", "2")
    job = service.create(id=new_id())
    streams = [open_watch(service), service.watch(job.id)]
    for stream in streams:
        next(stream)
    for watch in (lambda: list(open_watch(service)), lambda: list(service.watch(job.id))):
        assert refused(watch).kind == ("RESOURCE_EXHAUSTED", "TOO_MANY_WATCHERS")
    for stream in streams:
        stream.cancel()
    admitted_within_a_second(lambda: open_watch(service)).cancel()


@pytest.mark.parametrize("moment", ["amid snapshots", "synced", "waiting"])
@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_watch_whose_client_has_gone_is_free_within_a_second(serve, new_id, moment, how):
    service = serve("--max-watchers", "1")
    for _ in range(300 if moment == "amid snapshots" else 1):
        service.create(id=new_id(), result=LARGE)
    leaver = type(service)(service.address)
    stream = open_watch(leaver)
    next(stream)
    if moment == "waiting":
        next(stream)
    if how == "cancel":
        stream.cancel()
    else:
        leaver.close()
    admitted_within_a_second(lambda: open_watch(service)).cancel()
    leaver.close()


def test_a_drain_ends_watches_and_says_to_call_again(serve, refused, new_id):
    service = serve()
    streams = [open_watch(service) for _ in range(3)]
    for stream in streams:
        next(stream)
    service.process.signal(signal.SIGTERM)
    for stream in streams:
        refusal = refused(lambda stream=stream: list(stream))
        assert refusal.kind == ("UNAVAILABLE", "DRAINING")
        assert refusal.retry_seconds > 0
    assert service.process.wait() == 0


def test_a_watch_ends_at_its_age_also_where_jobs_never_rest(serve, refused, new_id):
    service = serve("--max-connection-age", "1s")
    job = service.create(id=new_id())
    started = time.monotonic()
    stream = open_watch(service)
    reader = Reader()

    def read():
        for number, message in enumerate(stream):
            reader.take(message)
            service.update(job.id, labels={"n": str(number)})

    refusal = refused(read)
    assert refusal.kind == ("UNAVAILABLE", "STREAM_AGE")
    assert refusal.retry_seconds > 0
    assert time.monotonic() - started > 0.8
    assert len(reader.jobs) == 1


def test_a_watch_goes_on_where_it_was_after_its_server_was_restarted(serve, new_id, tmp_path):
    service = serve(store=f"sqlite:///{tmp_path}/jobs.db")
    jobs = [service.job_in("IN_PROGRESS", id=new_id()) for _ in range(3)]
    reader = Reader()
    stream = service.stub.WatchJobs(reader.begin())
    while not reader.is_synced:
        reader.take(next(stream))
    service.update(jobs[0].id, state="JOB_STATE_SUCCEEDED")
    service.process.restart()
    service = type(service)(service.process.address)
    service.update(jobs[1].id, progress=5)
    stream = service.stub.WatchJobs(reader.begin())
    messages = []
    while not reader.is_synced:
        messages.append(next(stream))
        reader.take(messages[-1])
    assert reader.resets == 0
    assert jobs[2].id not in [job_id for message in messages for _, job_id in events_of(message)]
    assert reader.jobs == {job.id: service.get(job.id) for job in jobs}
    service.close()


def test_a_token_of_a_store_that_is_gone_leads_to_reset_and_snapshots(serve, new_id):
    service = serve()
    service.create(id=new_id())
    reader = Reader()
    stream = service.stub.WatchJobs(reader.begin())
    while not reader.is_synced:
        reader.take(next(stream))
    service.process.restart()
    service = type(service)(service.process.address)
    job = service.create(id=new_id())
    stream = service.stub.WatchJobs(reader.begin())
    while not reader.is_synced:
        reader.take(next(stream))
    assert reader.resets == 1
    assert reader.jobs == {job.id: job}
    service.close()


def memory(service):
    return psutil.Process(service.process.pid).memory_info().rss


def test_readers_that_do_not_read_cost_the_newest_change_of_each_job_only(serve, new_id):
    service = serve()
    jobs = [service.job_in("IN_PROGRESS", id=new_id(), result=LARGE) for _ in range(5)]
    idle = [open_watch(type(service)(service.address)) for _ in range(20)]
    for stream in idle:
        next(stream)
    keen = open_watch(service)
    reader = Reader()
    while not reader.is_synced:
        reader.take(next(keen))
    before = memory(service)
    for number in range(200):
        job = service.update(jobs[number % 5].id, labels={"n": str(number)})
        while reader.jobs[job.id] != job:
            reader.take(next(keen))
    assert memory(service) - before < 60 * MIB
    for stream in (*idle, keen):
        stream.cancel()


def test_a_reader_that_reads_again_gets_the_newest_of_every_job(serve, new_id):
    service = serve()
    jobs = [service.job_in("IN_PROGRESS", id=new_id(), result=LARGE) for _ in range(5)]
    stream = open_watch(service)
    reader = Reader()
    while not reader.is_synced:
        reader.take(next(stream))
    for number in range(600):
        last = service.update(jobs[number % 5].id, labels={"n": str(number)})
    count = 0
    while reader.jobs[last.id] != last:
        reader.take(next(stream))
        count += 1
    assert count < 400
    assert reader.jobs == {job.id: service.get(job.id) for job in jobs}
    stream.cancel()


COUNT = 1000
BATCH = 500
CHANGES = 2000
CALLERS = 4


def filter_of(number):
    """A filter that only one job matches, or one with a few similar jobs."""
    kinds = [
        pb.JobFilter(ids=[f"job-{number}"]),
        pb.JobFilter(labels={"n": str(number)}),
        pb.JobFilter(names=[f"name-{number}"]),
        pb.JobFilter(parent_id=f"parent-{number // 4}"),
    ]
    return kinds[number % 4]


def job_of(number, **fields):
    labels = {"n": str(number)}
    return pb.JobStatus(
        id=f"job-{number}", name=f"name-{number}", parent_id=f"parent-{number // 4}", labels=labels, **fields
    )


class Watcher:
    """Records the age of each job on arrival, and the newest revision of each."""

    def __init__(self):
        self.is_synced = asyncio.Event()
        self.delays: list[float] = []
        self.revisions: dict[str, int] = {}

    async def follow(self, stub, number):
        request = pb.WatchJobsRequest(filter=filter_of(number), min_update_interval=NONE)
        async for message in stub.WatchJobs(request):
            for event in message.events:
                if event.type == SYNCED:
                    self.is_synced.set()
                else:
                    self.revisions[event.job.id] = event.job.revision
                    changed_at = event.job.updated_at.ToDatetime(tzinfo=timezone.utc).timestamp()
                    if self.is_synced.is_set():
                        self.delays.append(time.time() - changed_at)


async def change(stub, numbers, newest):
    for number in numbers:
        job = job_of(number % COUNT, reason=str(number))
        reply = await stub.UpdateJob(pb.UpdateJobRequest(job=job))
        newest[reply.job.id] = max(reply.job.revision, newest.get(reply.job.id, 0))


async def until_seen(watchers, newest):
    def is_behind(number):
        return watchers[number].revisions.get(f"job-{number}", 0) < newest[f"job-{number}"]

    while any(is_behind(number) for number in range(COUNT)):  # noqa: ASYNC110 - each watcher has its own stream
        await asyncio.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_a_thousand_watchers_see_the_changes_of_a_thousand_jobs_soon(serve, tmp_path, store, capsys):
    service = serve(store="memory:" if store == "memory" else f"sqlite:///{tmp_path}/jobs.db")

    async def scenario(stub):
        for start in range(0, COUNT, BATCH):
            updates = [
                pb.UpdateJobRequest(job=job_of(number), allow_missing=True) for number in range(start, start + BATCH)
            ]
            await stub.BatchUpdateJobs(pb.BatchUpdateJobsRequest(updates=updates))
        watchers = [Watcher() for _ in range(COUNT)]
        following = [asyncio.ensure_future(watcher.follow(stub, n)) for n, watcher in enumerate(watchers)]
        await asyncio.gather(*(watcher.is_synced.wait() for watcher in watchers))
        newest = {f"job-{number}": 1 for number in range(COUNT)}
        numbers = iter(range(CHANGES))
        await asyncio.gather(*(change(stub, numbers, newest) for _ in range(CALLERS)))
        await until_seen(watchers, newest)
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        return sorted(itertools.chain.from_iterable(watcher.delays for watcher in watchers))

    async def run():
        async with grpc.aio.insecure_channel(service.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            return await asyncio.wait_for(scenario(JobStatusServiceStub(channel)), 50)

    delays = asyncio.run(run())
    p50, p95, p99 = (1000 * delays[int(len(delays) * share)] for share in (0.5, 0.95, 0.99))
    with capsys.disabled():
        print(f"\n{store}: {CHANGES} changes, {len(delays)} events; p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f} ms")
    assert len(delays) > 100
    assert p95 < 2000
