"""How watches of one job end, and what is left of those that have."""

from __future__ import annotations

import asyncio
import gc

import pytest

from jobstatus_grpc.errors import DrainingError, JobExpiredError, StoreChangedError, StreamAgeError
from jobstatus_grpc.job import JobState, evolve
from jobstatus_grpc.stores.interface import Change
from jobstatus_grpc.watch.job_watch import Watcher
from tests.unit.hub import TENANT, registered, run, turns


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


def test_a_watcher_that_has_gone_does_not_wait_for_the_garbage_collector():
    async def scenario(hub):
        gc.collect()
        async with hub.watcher() as watcher:
            await watcher.next()
        del watcher
        await turns(5)
        return [each for each in gc.get_objects() if isinstance(each, Watcher)]

    gc.disable()
    try:
        assert run(scenario) == []
    finally:
        gc.enable()


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
