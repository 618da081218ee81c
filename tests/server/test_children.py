"""The numbers of children on the wire, in watches, and CancelJob.cascade."""

from __future__ import annotations

import pytest
from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Role
from tests.support.auth import AuthText, bearer
from tests.support.servers import ServerProcess
from tests.support.service import Service

SNAPSHOT, UPDATED, SYNCED = pb.JOB_EVENT_TYPE_SNAPSHOT, pb.JOB_EVENT_TYPE_UPDATED, pb.JOB_EVENT_TYPE_SYNCED
NONE = duration_pb2.Duration()
SECONDS = 20.0


@pytest.fixture
def parent(any_service, new_id):
    return any_service.job_in("IN_PROGRESS", id=new_id())


def numbers_of(job):
    return dict(job.children), job.children_progress if job.HasField("children_progress") else None


def jobs_with(stream, wanted):
    """Read a WatchJob until these numbers come, and return the jobs."""
    jobs: list[pb.JobStatus] = []
    while not jobs or numbers_of(jobs[-1]) != wanted:
        jobs.append(next(stream).event.job)
    return jobs


def test_get_and_list_show_the_numbers_of_children(any_service, parent, new_id):
    children = [any_service.create(id=new_id(), parent_id=parent.id) for _ in range(3)]
    any_service.update(children[0].id, state="JOB_STATE_IN_PROGRESS", attempt=1, progress=50)
    any_service.cancel(children[1].id)
    shown = any_service.get(parent.id)
    assert numbers_of(shown) == ({"pending": 1, "in_progress": 1, "cancelled": 1}, 50.0)
    assert (shown.revision, shown.updated_at) == (parent.revision, parent.updated_at)
    request = pb.ListJobsRequest(filter=pb.JobFilter(ids=[parent.id]))
    assert list(any_service.stub.ListJobs(request, timeout=SECONDS).jobs) == [shown]


def test_a_watch_of_the_parent_gets_the_numbers_with_the_same_revision(any_service, parent, new_id):
    stream = any_service.watch(parent.id, min_update_interval=NONE)
    assert numbers_of(next(stream).event.job) == ({}, None)
    child = any_service.create(id=new_id(), parent_id=parent.id)
    any_service.job_in("SUCCEEDED", id=new_id(), parent_id=parent.id)
    jobs = jobs_with(stream, ({"pending": 1, "succeeded": 1}, 50.0))
    assert {job.revision for job in jobs} == {parent.revision}
    any_service.update(child.id, reason="no change of the numbers")
    ended = any_service.update(parent.id, state="JOB_STATE_SUCCEEDED")
    (last,) = [message.event.job for message in stream]
    assert (last.revision, numbers_of(last)) == (ended.revision, ({"pending": 1, "succeeded": 1}, 50.0))


def test_many_changes_of_children_are_few_events(any_service, parent, new_id):
    stream = any_service.watch(parent.id, min_update_interval=duration_pb2.Duration(nanos=500_000_000))
    next(stream)
    children = [new_id() for _ in range(100)]
    for child in children:
        any_service.create(id=child, parent_id=parent.id)
    any_service.batch(
        *(pb.UpdateJobRequest(job=pb.JobStatus(id=child, state=pb.JOB_STATE_SUCCEEDED)) for child in children)
    )
    assert len(jobs_with(stream, ({"succeeded": 100}, 100.0))) < 50
    stream.cancel()


@pytest.mark.parametrize("resumes", [False, True])
def test_a_watch_of_many_jobs_gets_the_numbers_of_a_parent(any_service, parent, new_id, resumes):
    request = pb.WatchJobsRequest(filter=pb.JobFilter(ids=[parent.id]), min_update_interval=NONE)
    child = any_service.create(id=new_id(), parent_id=parent.id)
    stream = any_service.stub.WatchJobs(request, timeout=SECONDS)
    events: list[pb.JobEvent] = []
    while not events or events[-1].type != SYNCED:
        message = next(stream)
        events += message.events
    assert [(event.type, numbers_of(event.job)) for event in events[:-1]] == [(SNAPSHOT, ({"pending": 1}, 0.0))]
    if resumes:
        stream.cancel()
    any_service.cancel(child.id)
    if resumes:
        request.resume_token = message.resume_token
        stream = any_service.stub.WatchJobs(request, timeout=SECONDS)
    events = []
    while not any(event.type == UPDATED for event in events):
        events += next(stream).events
    (updated,) = [event.job for event in events if event.type == UPDATED]
    assert (updated.revision, numbers_of(updated)) == (parent.revision, ({"cancelled": 1}, 100.0))
    stream.cancel()


def test_a_done_parent_shows_its_numbers_and_its_watch_ends_at_once(any_service, new_id):
    parent = any_service.job_in("SUCCEEDED", id=new_id())
    any_service.create(id=new_id(), parent_id=parent.id)
    (only,) = list(any_service.watch(parent.id))
    assert numbers_of(only.event.job) == ({"pending": 1}, 0.0)


def test_the_numbers_outlive_the_server(tmp_path):
    store = f"sqlite:///{tmp_path}/jobs.db"
    with ServerProcess(store=store) as server:
        service = Service(server.address)
        service.create(id="p")
        service.job_in("IN_PROGRESS", id="c", parent_id="p")
        service.close()
    with ServerProcess(store=store) as server:
        service = Service(server.address)
        assert numbers_of(service.get("p")) == ({"in_progress": 1}, 0.0)
        service.cancel("c", force=True)
        service.update("c", state="JOB_STATE_FAILED")
        assert numbers_of(service.get("p")) == ({"failed": 1}, 100.0)
        service.close()


def test_a_watch_on_another_replica_gets_the_numbers(postgres_url):
    with ServerProcess(store=postgres_url) as one, ServerProcess(store=postgres_url) as two:
        writer, watcher = Service(one.address), Service(two.address)
        writer.create(id="p")
        stream = watcher.watch("p", min_update_interval=NONE)
        next(stream)
        writer.job_in("SUCCEEDED", id="c", parent_id="p")
        assert {job.revision for job in jobs_with(stream, ({"succeeded": 1}, 100.0))} == {1}
        assert numbers_of(watcher.get("p")) == ({"succeeded": 1}, 100.0)
        writer.close()
        watcher.close()


# CancelJob.cascade


def family_of(service, new_id, state="PENDING"):
    """Create a job, two children and three grandchildren; return their ids by level."""
    root = service.job_in("IN_PROGRESS", id=new_id()).id
    children = [service.job_in(state, id=new_id(), parent_id=root).id for _ in range(2)]
    grandchildren = [service.create(id=new_id(), parent_id=children[number % 2]).id for number in range(3)]
    return root, children, grandchildren


def test_a_cascade_cancels_all_descendants(any_service, new_id):
    root, children, grandchildren = family_of(any_service, new_id, "IN_PROGRESS")
    done = any_service.job_in("SUCCEEDED", id=new_id(), parent_id=root)
    below = any_service.create(id=new_id(), parent_id=done.id)
    answer = any_service.cancel(root, reason="stop", cascade=True)
    assert (answer.id, answer.cancel_requested) == (root, True)
    asked = [any_service.get(job_id) for job_id in children]
    assert [(job.cancel_requested, job.cancel_reason) for job in asked] == [(True, "stop")] * 2
    ended = [any_service.get(job_id).state for job_id in (*grandchildren, below.id)]
    assert ended == [pb.JOB_STATE_CANCELLED] * 4
    assert any_service.get(done.id).revision == done.revision


def test_without_cascade_only_the_job_is_cancelled(any_service, new_id):
    root, children, _ = family_of(any_service, new_id)
    any_service.cancel(root)
    assert [any_service.get(job_id).state for job_id in children] == [pb.JOB_STATE_PENDING] * 2


def test_a_cascade_of_a_circle_ends(any_service, new_id):
    one, two = new_id(), new_id()
    any_service.create(id=one, parent_id=two)
    any_service.create(id=two, parent_id=one)
    assert any_service.cancel(one, cascade=True).state == pb.JOB_STATE_CANCELLED
    assert any_service.get(two).state == pb.JOB_STATE_CANCELLED


def test_a_repeated_cascade_cancels_what_is_left(any_service, new_id):
    root, children, grandchildren = family_of(any_service, new_id)
    request = pb.CancelJobRequest(id=root, request_id=new_id(), cascade=True)
    any_service.stub.CancelJob(request, timeout=SECONDS)
    late = any_service.create(id=new_id(), parent_id=grandchildren[0])
    any_service.stub.CancelJob(request, timeout=SECONDS)
    assert any_service.get(late.id).state == pb.JOB_STATE_CANCELLED
    assert any_service.get(children[0]).revision == 2


def test_a_cascade_takes_many_children(any_service, parent, new_id):
    ids = [new_id() for _ in range(450)]
    any_service.batch(
        *(pb.UpdateJobRequest(job=pb.JobStatus(id=each, parent_id=parent.id), allow_missing=True) for each in ids)
    )
    any_service.cancel(parent.id, cascade=True)
    assert numbers_of(any_service.get(parent.id)) == ({"cancelled": 450}, 100.0)


def test_a_limited_caller_cancels_only_what_it_sees_and_sees_the_numbers_of_all(tmp_path):
    auth = AuthText(tmp_path / "auth.toml")
    tokens = [auth.admit("boss", Role.OPERATOR)]
    tokens.append(auth.admit("limited", Role.OPERATOR, more='only = { labels = { team = "a" } }'))
    with ServerProcess("--auth", str(auth.path)) as server:
        boss, limited = [Service(server.address, metadata=bearer(token)) for token in tokens]
        boss.create(id="p", labels={"team": "a"})
        boss.create(id="seen", parent_id="p", labels={"team": "a"})
        boss.create(id="unseen", parent_id="p")
        limited.cancel("p", cascade=True)
        assert numbers_of(limited.get("p")) == ({"pending": 1, "cancelled": 1}, 50.0)
        assert [boss.get(job_id).state for job_id in ("seen", "unseen")] == [
            pb.JOB_STATE_CANCELLED,
            pb.JOB_STATE_PENDING,
        ]
        boss.close()
        limited.close()
