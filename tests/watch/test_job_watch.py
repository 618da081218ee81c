"""The hub of watches of one job: what each watcher gets and when, sends without a task, and ends."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from datetime import timedelta

import pytest

from jobstatus_grpc.errors import DrainingError, JobExpiredError, JobNotFoundError, StoreChangedError, StreamAgeError
from jobstatus_grpc.job import Delete, Expire, JobFilter, JobState, Update, evolve
from jobstatus_grpc.stores.interface import Change
from jobstatus_grpc.watch.job_watch import JobWatcher
from tests.support.hub import TENANT, UNRENDERABLE, Turns, registered, run, turns

COST = 8
"""Of a message that is sent without the task, as over the native transport."""


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


def test_an_event_that_cannot_be_rendered_ends_the_watches_of_its_job_and_no_other():
    async def scenario(hub):
        await hub.create("b")
        watches = [asyncio.create_task(hub.read_all(job_id)) for job_id in ("a", "a", "b")]
        await registered(hub, 3)
        await hub.update("a", reason=UNRENDERABLE)
        for ended in watches[:2]:
            with pytest.raises(ValueError, match=UNRENDERABLE):
                await ended
        await hub.update("b", state=JobState.SUCCEEDED)
        return await watches[2]

    assert run(scenario) == ["SNAPSHOT 1", "UPDATED 2"]


def test_a_watcher_of_one_job_gets_nothing_of_another():
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


def test_a_slow_watcher_may_skip_states_and_gets_the_newest():
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
        return hub.hub.watchers, hub.hub._topics, [each for each in gc.get_objects() if isinstance(each, JobWatcher)]

    assert run(scenario) == (0, {}, [])


def test_a_watcher_that_has_gone_does_not_wait_for_the_garbage_collector():
    async def scenario(hub):
        gc.collect()
        async with hub.watcher() as watcher:
            await watcher.next()
        del watcher
        await turns(5)
        return [each for each in gc.get_objects() if isinstance(each, JobWatcher)]

    gc.disable()
    try:
        assert run(scenario) == []
    finally:
        gc.enable()


def test_a_watcher_that_gives_up_while_waiting_delays_no_other():
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


LEFT = {
    "alone": [{"labels": {"team": "web"}}],
    "with its end": [{"labels": {"team": "web"}}, {"state": JobState.SUCCEEDED}],
}


@pytest.mark.parametrize("changes", LEFT.values(), ids=LEFT)
@pytest.mark.parametrize("try_send", [None, lambda message: COST], ids=["by the task", "without the task"])
def test_a_watch_ends_when_its_caller_may_not_see_the_job_any_more_as_if_it_were_not_there(changes, try_send):
    async def scenario(hub):
        await hub.update(labels={"team": "core"})
        async with hub.watcher(only=JobFilter(labels={"team": "core"}), try_send=try_send) as watcher:
            assert await watcher.next() == b"SNAPSHOT 2"
            for change in changes:
                await hub.update(**change)
            with pytest.raises(JobNotFoundError, match="no job has the id 'a'"):
                await watcher.next()
        return dict(hub.rendered)

    assert run(scenario) == {("SNAPSHOT", "a", 2): 1}


def test_nothing_is_sent_of_a_job_that_left_between_the_reading_and_the_first_message():
    async def scenario(hub):
        job = await hub.update(labels={"team": "core"})
        async with hub.watcher(only=JobFilter(labels={"team": "core"})) as watcher:
            hub.hub.publish(Change(TENANT, "a", 3, evolve(job, {"labels": {}, "revision": 3})))
            with pytest.raises(JobNotFoundError):
                await watcher.next()

    run(scenario)


@pytest.mark.parametrize("command", [Delete(id="a"), Expire(id="a")])
@pytest.mark.parametrize("in_one_batch", [True, False])
def test_the_end_is_sent_of_a_job_that_is_removed_before_it_was_published(command, in_one_batch):
    async def scenario(hub):
        hub.store._retention = timedelta(0)
        watch = asyncio.create_task(hub.read_all(min_update_seconds=30))
        await registered(hub, 1)
        commands = [Update(id="a", changes={"state": JobState.SUCCEEDED}), command]
        for batch in [commands] if in_one_batch else [[each] for each in commands]:
            await hub.store.commit(batch)
        return await watch

    assert run(scenario) == ["SNAPSHOT 1", "UPDATED 2"]


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


class Reader:
    """Accepts messages while it has room."""

    def __init__(self, room=1000):
        self.room = room
        self.messages = []

    def try_send(self, message):
        if not self.room:
            return 0
        self.room -= 1
        self.messages.append(message.decode())
        return COST


def test_changes_are_sent_without_the_task_which_gets_the_end_alone():
    async def scenario(hub):
        reader = Reader()
        returned = asyncio.create_task(hub.read_all(try_send=reader.try_send))
        await registered(hub, 1)
        for number in range(3):
            await hub.update(labels={"n": str(number)})
            await turns(10)
        await hub.update(state=JobState.SUCCEEDED)
        return await returned, reader.messages

    returned, sent = run(scenario)
    assert returned == ["SNAPSHOT 1"]
    assert sent == ["UPDATED 2", "UPDATED 3", "UPDATED 4", "UPDATED 5"]


def test_what_there_is_no_room_for_is_left_to_the_task():
    async def scenario(hub):
        reader = Reader(room=1)
        returned = asyncio.create_task(hub.read_all(try_send=reader.try_send))
        await registered(hub, 1)
        for number in range(2):
            await hub.update(labels={"n": str(number)})
            await turns(10)
        reader.room = 1
        await hub.update(labels={"n": "room again"})
        await turns(10)
        await hub.update(state=JobState.SUCCEEDED)
        return await returned, reader.messages

    returned, sent = run(scenario)
    assert returned == ["SNAPSHOT 1", "UPDATED 3", "UPDATED 5"]
    assert sent == ["UPDATED 2", "UPDATED 4"]


def test_nothing_is_sent_while_the_task_does_not_wait():
    async def scenario(hub):
        reader = Reader()
        async with hub.watcher(try_send=reader.try_send) as watcher:
            await watcher.next()
            for number in range(5):  # the task may be writing
                await hub.update(labels={"n": str(number)})
                await turns(10)
            before = list(reader.messages)
            waiting = asyncio.create_task(watcher.next())
            await turns(10)
            waiting.cancel()
        return before, reader.messages

    assert run(scenario) == ([], ["UPDATED 6"])


def test_heartbeats_are_sent_without_the_task_too():
    async def scenario(hub):
        reader = Reader(room=3)
        async with hub.watcher(heartbeat_seconds=0.01, try_send=reader.try_send) as watcher:
            await watcher.next()
            return [await watcher.next(), *reader.messages]

    assert run(scenario) == [b"HEARTBEAT 1", *["HEARTBEAT 1"] * 3]


def test_a_task_that_comes_back_after_the_end_gets_it():
    async def scenario(hub):
        reader = Reader()
        async with hub.watcher(try_send=reader.try_send) as watcher:
            await watcher.next()
            await hub.update(state=JobState.SUCCEEDED)
            await turns(20)  # the task is still writing
            return await watcher.next(), reader.messages

    assert run(scenario) == (None, ["UPDATED 2"])


def test_all_readers_are_sent_the_end_before_the_first_task_ends():
    async def scenario(hub):
        readers = [Reader() for _ in range(100)]
        watches = [asyncio.create_task(hub.read_all(try_send=reader.try_send)) for reader in readers]
        await registered(hub, 100)
        await hub.update(state=JobState.SUCCEEDED)
        await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
        received = [reader.messages for reader in readers]
        await asyncio.gather(*watches)
        return received

    assert run(scenario) == [["UPDATED 2"]] * 100


def test_what_ends_a_watch_ends_one_that_sends_by_itself():
    async def scenario(hub):
        returned = asyncio.create_task(hub.read_all(try_send=Reader().try_send))
        await registered(hub, 1)
        hub.hub.close(DrainingError)
        await returned

    with pytest.raises(DrainingError):
        run(scenario)


def test_a_few_are_sent_in_a_turn_of_the_loop():
    async def scenario(hub):
        sent_in: Counter[int] = Counter()

        def try_send(message):
            sent_in[passed.count] += 1
            return COST

        watches = [asyncio.create_task(hub.read_all(try_send=try_send)) for _ in range(200)]
        await registered(hub, 200)
        passed = Turns()
        await hub.update(labels={"a": "b"})
        while sent_in.total() < 200:
            await turns(1)
        passed.stop()
        await hub.update(state=JobState.SUCCEEDED)
        await asyncio.gather(*watches)
        return [count for at, count in sent_in.items() if at < passed.count]

    counts = run(scenario)
    assert max(counts) <= 10
    assert len(counts) >= 20
