"""Watchers that can send without a task: what goes that way, and what their task hears of it."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from jobstatus_grpc.errors import DrainingError
from jobstatus_grpc.job import JobState
from tests.unit.hub import Turns, registered, run, turns


class Reader:
    """Takes messages as long as it has room."""

    def __init__(self, room=1000):
        self.room = room
        self.messages = []

    def try_send(self, message):
        if not self.room:
            return False
        self.room -= 1
        self.messages.append(message.decode())
        return True


def test_what_changes_is_sent_without_the_task_which_hears_of_the_end_alone():
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


def test_a_task_that_comes_back_after_the_end_hears_of_it():
    async def scenario(hub):
        reader = Reader()
        async with hub.watcher(try_send=reader.try_send) as watcher:
            await watcher.next()
            await hub.update(state=JobState.SUCCEEDED)
            await turns(20)  # the task is still writing
            return await watcher.next(), reader.messages

    assert run(scenario) == (None, ["UPDATED 2"])


def test_all_readers_are_told_the_end_before_the_first_task_ends():
    async def scenario(hub):
        readers = [Reader() for _ in range(100)]
        watches = [asyncio.create_task(hub.read_all(try_send=reader.try_send)) for reader in readers]
        await registered(hub, 100)
        await hub.update(state=JobState.SUCCEEDED)
        await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
        told = [reader.messages for reader in readers]
        await asyncio.gather(*watches)
        return told

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
            return True

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
