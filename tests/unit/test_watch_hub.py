"""The watch hub on its own: who hears what, when, and rendered how often."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from jobstatus_grpc.job import JobState, evolve
from jobstatus_grpc.stores.interface import Change
from jobstatus_grpc.watch import job_watch
from tests.unit.hub import TENANT, Turns, registered, run, turns


def test_a_watcher_gets_snapshot_changes_and_end():
    async def scenario(hub):
        messages = asyncio.create_task(hub.read_all())
        await registered(hub, 1)
        await hub.update(reason="x")
        await turns(10)
        await hub.update(state=JobState.SUCCEEDED)
        return await messages

    assert run(scenario) == ["SNAPSHOT 1", "UPDATED 2", "UPDATED 3"]


def test_one_watcher_is_woken_in_a_turn_of_the_loop():
    async def scenario(hub):
        woken_in: Counter[int] = Counter()

        async def watch():
            async with hub.watcher() as watcher:
                await watcher.next()
                await watcher.next()
                woken_in[passed.count] += 1

        watches = [asyncio.create_task(watch()) for _ in range(200)]
        await registered(hub, 200)
        passed = Turns()
        await hub.update(labels={"a": "b"})
        await asyncio.gather(*watches)
        passed.stop()
        return woken_in

    woken_in = run(scenario)
    assert sum(woken_in.values()) == 200
    assert set(woken_in.values()) == {1}


def test_an_event_is_rendered_once_for_all_watchers():
    async def scenario(hub):
        watches = [asyncio.create_task(hub.read_all()) for _ in range(100)]
        await registered(hub, 100)
        await hub.update(labels={"a": "b"})
        await turns(300)
        await hub.update(state=JobState.FAILED)
        return await asyncio.gather(*watches), hub.rendered

    seen, rendered = run(scenario)
    assert {tuple(messages) for messages in seen} == {("SNAPSHOT 1", "UPDATED 2", "UPDATED 3")}
    assert set(rendered.values()) == {1}


def test_a_watcher_of_one_job_hears_nothing_of_another():
    async def scenario(hub):
        await hub.create("b")
        messages = asyncio.create_task(hub.read_all())
        await registered(hub, 1)
        await hub.update("b", state=JobState.SUCCEEDED)
        await turns(20)
        await hub.update(state=JobState.SUCCEEDED)
        return await messages, hub.rendered

    messages, rendered = run(scenario)
    assert messages == ["SNAPSHOT 1", "UPDATED 2"]
    assert {job_id for _, job_id, _ in rendered} == {"a"}


def test_states_in_between_may_be_skipped_by_who_is_slow_and_the_newest_arrives():
    async def scenario(hub):
        async with hub.watcher() as watcher:
            messages = [await watcher.next()]
            for number in range(50):
                await hub.update(labels={"n": str(number)})
                await turns(3)
            messages.append(await watcher.next())
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(watcher.next(), 0.05)
            return messages

    assert run(scenario) == [b"SNAPSHOT 1", b"UPDATED 51"]


def test_a_change_that_comes_late_does_not_take_the_job_back():
    async def scenario(hub):
        job = await hub.store.get(TENANT, "a")
        async with hub.watcher() as watcher:
            messages = [await watcher.next()]
            for revision in (3, 2, 3, 4):
                hub.hub.publish(Change(TENANT, "a", revision, evolve(job, {"revision": revision})))
            messages.append(await watcher.next())
            return messages

    assert run(scenario) == [b"SNAPSHOT 1", b"UPDATED 4"]


def test_a_feed_that_is_interrupted_is_told_of_when_it_begins_and_when_it_is_over(monkeypatch, caplog):
    monkeypatch.setattr(job_watch, "RETRY_SECONDS", 0)

    async def scenario(hub):
        hub.store.failures = 50
        await hub.update(reason="x")  # lets the hub read again
        await turns(200)

    run(scenario)
    assert caplog.messages == ["the change feed is interrupted: the disk is away", "the change feed goes on"]
