"""The numbers of children in the clients, and a cascade."""

from __future__ import annotations

from jobstatus_grpc import JobChangeType, JobFilter, JobState


def test_a_watch_yields_a_parent_again_when_its_children_change(client):
    parent = client.create()
    watch = iter(client.watch(parent.id, min_update_interval_seconds=0))
    assert next(watch).children == {}
    client.create(parent_id=parent.id, state=JobState.IN_PROGRESS, progress=40)
    updated = next(watch)
    assert (updated.revision, updated.children, updated.children_progress) == (1, {"in_progress": 1}, 40.0)
    client.cancel(parent.id)
    assert next(watch).state is JobState.CANCELLED


def test_a_watch_of_many_jobs_yields_a_parent_again_when_its_children_change(client):
    parent = client.create()
    changes = iter(client.watch_jobs(JobFilter(ids=[parent.id]), min_update_interval_seconds=0))
    assert [next(changes).type for _ in range(2)] == [JobChangeType.SNAPSHOT, JobChangeType.SYNCED]
    child = client.create(parent_id=parent.id)
    first = next(changes)
    assert (first.type, first.revision, first.job.children) == (JobChangeType.UPDATED, 1, {"pending": 1})
    client.cancel(child.id)
    assert next(changes).job.children == {"cancelled": 1}


def test_a_cascade_cancels_the_children(client):
    parent = client.create()
    child = client.create(parent_id=parent.id)
    assert client.cancel(parent.id, reason="stop", cascade=True).id == parent.id
    assert client.get(child.id).cancel_reason == "stop"
