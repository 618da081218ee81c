"""WatchJobs with a token: what changed since, no more and no less."""

from __future__ import annotations

import pytest
from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb

from tests.reader import REMOVED, SYNCED, UPDATED, told

NONE = duration_pb2.Duration()


@pytest.fixture
def watch(any_service, group):
    """Read a watch of the test's jobs to SYNCED; return the stream, the events before it, and its token."""
    streams = []

    def watch(token="", **fields):
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

    yield watch
    for stream in streams:
        stream.cancel()


def delete(service, job):
    service.stub.DeleteJob(pb.DeleteJobRequest(id=job.id))


def test_what_changed_since_comes_once_with_its_newest_state_and_then_synced(any_service, make, watch):
    jobs = [make() for _ in range(3)]
    _, _, token = watch()
    for progress in range(1, 6):
        changed = any_service.update(jobs[1].id, progress=progress)
    new = make("PENDING")
    _, events, _ = watch(token)
    assert events == [pb.JobEvent(type=UPDATED, job=changed), pb.JobEvent(type=UPDATED, job=new)]


def test_where_nothing_changed_there_is_only_synced(make, watch):
    make()
    _, _, token = watch()
    _, events, again = watch(token)
    assert events == []
    assert again


def test_a_changed_job_that_does_not_match_now_is_removed_whole(any_service, make, watch):
    job = make()
    _, _, token = watch(done=False)
    done = any_service.update(job.id, state="JOB_STATE_FAILED")
    _, events, _ = watch(token, done=False)
    assert events == [pb.JobEvent(type=REMOVED, job=done)]


def test_a_job_that_was_deleted_meanwhile_is_removed_with_id_and_revision(any_service, make, watch):
    job = make("SUCCEEDED")
    _, _, token = watch(ids=[job.id])
    delete(any_service, job)
    _, events, _ = watch(token, ids=[job.id])
    assert events == [pb.JobEvent(type=REMOVED, job=pb.JobStatus(id=job.id, revision=job.revision + 1))]


def test_jobs_that_can_never_have_matched_are_left_out(any_service, make, watch, new_id):
    jobs = [make("SUCCEEDED", name=name, parent_id=parent) for name, parent in (("x", "p"), ("y", "p"), ("x", "q"))]
    others = {"ids": [new_id()], "names": ["z"], "name_prefix": "z", "parent_id": "z"}
    tokens = {name: watch(**{name: value})[2] for name, value in others.items()}
    for job in jobs[:2]:
        delete(any_service, job)
    make(name="x")
    for name, value in others.items():
        events = watch(tokens[name], **{name: value})[1]
        assert name == "ids" or {event.type for event in events} <= {REMOVED}
        assert [event for event in events if event.job.name or name == "ids"] == []


def test_a_job_that_did_not_change_is_known_to_be_held_and_is_removed_when_it_stops_matching(any_service, make, watch):
    job = make()
    _, _, token = watch(done=False)
    make()
    stream, _, _ = watch(token, done=False)
    done = any_service.update(job.id, state="JOB_STATE_SUCCEEDED")
    assert list(next(stream).events) == [pb.JobEvent(type=REMOVED, job=done)]


def test_a_job_that_did_not_change_is_removed_when_it_is_deleted(any_service, make, watch):
    job = make("SUCCEEDED")
    _, _, token = watch()
    stream, _, _ = watch(token)
    delete(any_service, job)
    assert told(next(stream)) == [(REMOVED, job.id)]


def test_a_list_gives_a_token_for_what_comes_after_it(any_service, make, watch, group):
    jobs = [make() for _ in range(3)]
    request = pb.ListJobsRequest(filter=pb.JobFilter(labels=group), page_size=2)
    page = any_service.stub.ListJobs(request)
    changed = any_service.update(jobs[2].id, progress=1)
    request.page_token = page.next_page_token
    later = any_service.stub.ListJobs(request)
    assert later.resume_token == page.resume_token
    stream, events, _ = watch(page.resume_token)
    if not events:  # the hub had not heard of the change by then
        events = next(stream).events
    assert changed in [event.job for event in events]


def test_a_token_is_good_for_many_more_changes_than_fit_a_batch(any_service, watch, update_of, new_id, group):
    _, _, token = watch()
    ids = [new_id() for _ in range(2500)]
    for start in range(0, len(ids), 500):
        any_service.batch(*(update_of(job_id, allow_missing=True, labels=group) for job_id in ids[start : start + 500]))
    _, events, _ = watch(token)
    assert [event.job.id for event in events] == ids
    assert {event.type for event in events} == {UPDATED}


def test_the_order_of_a_filters_values_does_not_matter(any_service, make, watch):
    ids = [make().id, make().id]
    _, _, token = watch(ids=ids)
    assert watch(token, ids=ids[::-1])[1] == []


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


def test_all_that_is_wrong_with_a_watch_is_told_at_once(service, refused):
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
