"""The numbers of children in watches: when they are sent, and which are the newest."""

from __future__ import annotations

import pytest

from jobstatus_grpc.job import Create, JobFilter, Update
from jobstatus_grpc.job.model import JobState
from jobstatus_grpc.stores.interface import Change
from jobstatus_grpc.watch.backlog import Backlog, News
from jobstatus_grpc.watch.numbers import read_numbers
from tests.support.hub import TENANT, run, turns
from tests.support.jobs import job_in
from tests.support.stores import done, end


def children(**counts):
    return {"children": counts, "children_progress": 0.0}


def of_children(**fields):
    job = job_in(JobState.IN_PROGRESS, **{"revision": 3, **fields})
    return News(Change(TENANT, "a", job.revision, job), "0", is_of_children=True)


@pytest.fixture
def backlog():
    return Backlog(object(), TENANT, JobFilter(names=["n"]), {}, min_update_seconds=0.0)


def taken(backlog):
    return backlog.take(0.0, lambda event_type, change: f"{event_type.name} {dict(change.job.children)}".encode())


def test_other_numbers_of_a_job_that_the_client_has_are_sent_once(backlog):
    backlog.hold(job_in(JobState.IN_PROGRESS, revision=3, name="n"))
    news = {"name": "n", **children(pending=1)}
    assert backlog.add(of_children(**news), 0.0) is not None
    assert taken(backlog) == [b"UPDATED {'pending': 1}"]
    assert backlog.add(of_children(**news), 0.0) is None
    assert backlog.add(of_children(name="n"), 0.0) is not None
    assert taken(backlog) == [b"UPDATED {}"]


def test_the_newest_numbers_replace_those_that_wait(backlog):
    backlog.hold(job_in(JobState.IN_PROGRESS, revision=3, name="n", **children(pending=1)))
    backlog.add(of_children(name="n", **children(pending=2)), 0.0)
    backlog.add(of_children(name="n", **children(pending=3)), 0.0)
    assert taken(backlog) == [b"UPDATED {'pending': 3}"]


def test_numbers_that_are_again_those_that_the_client_has_are_not_sent(backlog):
    backlog.hold(job_in(JobState.IN_PROGRESS, revision=3, name="n", **children(pending=1)))
    backlog.add(of_children(name="n", **children(pending=2)), 0.0)
    assert backlog.add(of_children(name="n", **children(pending=1)), 0.0) is None
    assert taken(backlog) == []


def test_numbers_of_an_older_revision_or_of_a_job_that_does_not_match_are_not_sent(backlog):
    backlog.hold(job_in(JobState.IN_PROGRESS, revision=3, name="n"))
    assert backlog.add(of_children(name="n", revision=2, **children(pending=1)), 0.0) is None
    assert backlog.add(of_children(name="other", revision=4, **children(pending=1)), 0.0) is None


def test_changes_of_many_children_are_one_event_within_the_interval():
    async def scenario(hub):
        async with hub.watcher(min_update_seconds=0.05) as watcher:
            events = [await watcher.next()]
            for number in range(50):
                await done(hub.store, Create(id=f"{number}", parent_id="a"))
            await turns(20)
            assert watcher.latest().children == {"pending": 50}
            events.append(await watcher.next())
            await hub.update(state=JobState.SUCCEEDED)
            events.append(await watcher.next())
            return events, await watcher.next()

    events, last = run(scenario)
    assert (events, last) == ([b"SNAPSHOT 1", b"UPDATED 1", b"UPDATED 2"], None)


def test_a_change_of_a_child_that_changes_no_number_is_no_event():
    async def scenario(hub):
        await done(hub.store, Create(id="c", parent_id="a"))
        async with hub.watcher() as watcher:
            await watcher.next()
            await done(hub.store, Update(id="c", changes={"reason": "reading"}))
            await hub.update(reason="last")
            return await watcher.next()

    assert run(scenario) == b"UPDATED 2"


def test_a_parent_that_has_changed_too_is_also_read_as_a_parent():
    async def scenario(hub):
        await done(hub.store, Create(id="c", parent_id="a"))
        changes = [Change(TENANT, job_id, 1, await hub.store.get(TENANT, job_id)) for job_id in "ac"]
        found = await read_numbers(hub.store, changes, is_watched=lambda _: True, is_parent_watched=lambda _: True)
        return [change.id for change in found.parents]

    assert run(scenario) == ["a"]


def test_changes_are_published_without_numbers_that_cannot_be_read(monkeypatch, caplog):
    async def broken(keys):
        raise ValueError

    async def scenario(hub):
        async with hub.watcher() as watcher:
            await watcher.next()
            monkeypatch.setattr(hub.store, "jobs", broken)
            await done(hub.store, Create(id="c", parent_id="a"))
            await hub.update(reason="last")
            return await watcher.next()

    assert run(scenario) == b"UPDATED 2"
    assert "published without them" in caplog.text


def test_only_open_parents_that_are_watched_are_read():
    async def scenario(hub):
        await done(hub.store, Create(id="c", parent_id="a"), Create(id="d", parent_id="b"), Create(id="b"))
        await done(hub.store, Create(id="e", parent_id="f"), Create(id="f"), end("f"))
        changes = [Change(TENANT, job_id, 1, await hub.store.get(TENANT, job_id)) for job_id in "cde"]
        found = await read_numbers(
            hub.store, changes, is_watched=lambda _: False, is_parent_watched=lambda key: key[1] in "af"
        )
        return [(change.id, change.job and change.job.children) for change in found.parents]

    assert run(scenario) == [("a", {"pending": 1})]
