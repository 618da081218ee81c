"""The watch hub on its own, with a store in memory and events rendered as words."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections import Counter

import pytest

from jobstatus_grpc.commands import Create, Update
from jobstatus_grpc.errors import DrainingError, JobExpiredError, StoreChangedError, StreamAgeError
from jobstatus_grpc.record import evolve
from jobstatus_grpc.state import JobState
from jobstatus_grpc.stores.interface import Change
from jobstatus_grpc.stores.memory import MemoryStore
from jobstatus_grpc.watch_hub import WatchHub
from jobstatus_grpc.watcher import Watcher

TENANT = "default"


class Hub:
    """A hub that follows a store; it renders an event as its type, its job's revision and the number of rendering."""

    def __init__(self, **settings):
        self.store = MemoryStore()
        self.rendered: Counter[tuple[str, str, int]] = Counter()
        self.hub = WatchHub(render=self._render, stamp=lambda: b"", **settings)

    def _render(self, event_type, job):
        self.rendered[event_type.name, job.id, job.revision] += 1
        return f"{event_type.name} {job.revision}".encode()

    @contextlib.asynccontextmanager
    async def followed(self):
        following = asyncio.create_task(self.hub.follow(self.store, await self.store.position()))
        try:
            yield self
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def create(self, job_id="a"):
        (job,) = await self.store.commit([Create(id=job_id, state=JobState.IN_PROGRESS)])
        return job

    async def update(self, job_id="a", **changes):
        (job,) = await self.store.commit([Update(id=job_id, changes=changes)])
        return job

    @contextlib.asynccontextmanager
    async def watcher(self, job_id="a", *, heartbeat_seconds=30.0, min_update_seconds=0.0):
        with self.hub.watcher(
            TENANT, job_id, heartbeat_seconds=heartbeat_seconds, min_update_seconds=min_update_seconds
        ) as watcher:
            self.hub.offer(watcher, await self.store.get(TENANT, job_id))
            yield watcher

    async def read_all(self, job_id="a", **settings):
        """Watch to the end, and return the messages."""
        async with self.watcher(job_id, **settings) as watcher:
            return [message async for message in until_none(watcher)]


async def until_none(watcher):
    while (message := await watcher.next()) is not None:
        yield message.decode()


def run(scenario, **settings):
    async def with_hub():
        async with Hub(**settings).followed() as hub:
            await hub.create()
            return await scenario(hub)

    return asyncio.run(asyncio.wait_for(with_hub(), 20))


async def registered(hub, count):
    while hub.hub.watchers < count:  # noqa: ASYNC110 - the hub has no event to wait for
        await asyncio.sleep(0)
    await turns(5)


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


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
        turn = 0
        woken_in: Counter[int] = Counter()

        def count_turns():
            nonlocal turn
            turn += 1
            ticking.append(loop.call_soon(count_turns))
            ticking.pop(0)

        async def watch():
            async with hub.watcher() as watcher:
                await watcher.next()
                await watcher.next()
                woken_in[turn] += 1

        loop = asyncio.get_running_loop()
        watches = [asyncio.create_task(watch()) for _ in range(200)]
        await registered(hub, 200)
        ticking = [loop.call_soon(count_turns)]
        await hub.update(labels={"a": "b"})
        await asyncio.gather(*watches)
        ticking[0].cancel()
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


def test_nothing_is_left_behind_once_all_watchers_have_gone():
    async def scenario(hub):
        async def watch(leave):
            async with hub.watcher() as watcher:
                await watcher.next()
                if not leave:
                    await watcher.next()

        watches = [asyncio.create_task(watch(leave)) for leave in (True, False) * 50]
        await turns(20)
        await hub.update(labels={"a": "b"})
        for task in watches[1::4]:
            task.cancel()
        ends = await asyncio.gather(*watches, return_exceptions=True)
        assert {type(end) for end in ends} == {type(None), asyncio.CancelledError}
        await hub.update(labels={"a": "c"})
        await turns(200)
        del watches, ends, task
        gc.collect()
        return hub.hub.watchers, hub.hub._topics, [each for each in gc.get_objects() if isinstance(each, Watcher)]

    assert run(scenario) == (0, {}, [])


def test_a_watcher_that_gives_up_while_waiting_holds_up_nobody():
    async def scenario(hub):
        watches = [asyncio.create_task(hub.read_all()) for _ in range(20)]
        await registered(hub, 20)
        await hub.update(state=JobState.SUCCEEDED)
        for task in watches[::2]:
            task.cancel()
        return await asyncio.gather(*watches[1::2])

    assert {messages[-1] for messages in run(scenario)} == {"UPDATED 2"}


def test_a_watch_ends_at_its_age_though_its_heartbeats_are_rarer():
    async def scenario(hub):
        with pytest.raises(StreamAgeError):
            await asyncio.wait_for(hub.read_all(heartbeat_seconds=30), 5)

    run(scenario, max_age_seconds=0.2)


def test_a_watch_of_a_job_that_never_rests_ends_at_its_age_too():
    async def scenario(hub):
        watch = asyncio.create_task(hub.read_all())
        deadline = asyncio.get_running_loop().time() + 5
        number = 0
        while not watch.done() and asyncio.get_running_loop().time() < deadline:
            number += 1
            await hub.update(labels={"n": str(number)})
            await asyncio.sleep(0)
        assert watch.done()
        with pytest.raises(StreamAgeError):
            await watch

    run(scenario, max_age_seconds=0.2)


@pytest.mark.parametrize("error", [DrainingError, StoreChangedError])
def test_open_watches_end_with_what_ended_the_hub_and_a_drained_one_takes_no_more(error):
    async def scenario(hub):
        watches = [asyncio.create_task(hub.read_all()) for _ in range(10)]
        await registered(hub, 10)
        hub.hub.close(error)
        ends = await asyncio.gather(*watches, return_exceptions=True)
        assert [type(end) for end in ends] == [error] * 10
        with pytest.raises(error):
            await hub.read_all()

    run(scenario)


def test_a_done_state_is_sent_before_the_hub_ends():
    async def scenario(hub):
        watches = [asyncio.create_task(hub.read_all(min_update_seconds=30)) for _ in range(10)]
        await registered(hub, 10)
        hub.hub.publish(Change(TENANT, "a", 2, await hub.update(state=JobState.SUCCEEDED)))
        hub.hub.close(DrainingError)
        return await asyncio.gather(*watches)

    assert run(scenario) == [["SNAPSHOT 1", "UPDATED 2"]] * 10


def test_a_watch_of_a_job_that_was_removed_says_so():
    async def scenario(hub):
        watch = asyncio.create_task(hub.read_all())
        await registered(hub, 1)
        hub.hub.publish(Change(TENANT, "a", 2, None))
        with pytest.raises(JobExpiredError):
            await watch

    run(scenario)


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


def test_a_store_that_was_replaced_by_an_older_one_is_believed_though_a_slow_reader_is_left():
    async def scenario(hub):
        old = evolve(await hub.store.get(TENANT, "a"), {"revision": 10, "state": JobState.SUCCEEDED})
        async with hub.watcher() as slow:
            await slow.next()
            hub.hub.publish(Change(TENANT, "a", 10, old))
            hub.hub.end_all(StoreChangedError)
            async with hub.watcher() as again:
                return await again.next()

    assert run(scenario) == b"SNAPSHOT 1"
