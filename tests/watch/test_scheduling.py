"""The queue of watchers to wake, and its pauses for commits."""

from __future__ import annotations

import asyncio

from jobstatus_grpc.watch import watcher
from jobstatus_grpc.watch.watcher import WAKE, WakeQueue
from tests.support import loop


class Crowd:
    """Watchers that stay in the queue for a number of turns."""

    def __init__(self, queue, size):
        self.left = size
        self._queue = queue
        queue.enqueue(self)

    def run(self):
        self.left -= 1
        if self.left:
            self._queue.enqueue(self)
        return WAKE


def run(scenario):
    async def with_queue():
        await scenario(WakeQueue())

    loop.run(with_queue)


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


def test_no_watcher_is_woken_during_a_pause():
    async def scenario(queue):
        async with queue.paused():
            background_tasks = Crowd(queue, 10)
            await turns(100)
            assert background_tasks.left == 10
        await turns(20)
        assert not background_tasks.left

    run(scenario)


def test_a_pause_that_follows_another_waits_until_the_queue_is_empty():
    async def scenario(queue):
        async with queue.paused():
            background_tasks = Crowd(queue, 1000)
        queue._may_pause_at = asyncio.get_running_loop().time() + 3600  # as if it had taken an hour
        async with queue.paused():
            assert not background_tasks.left

    run(scenario)


def test_a_pause_waits_no_longer_than_the_one_before_took():
    async def scenario(queue):
        async with queue.paused():
            background_tasks = Crowd(queue, 10**9)
            await asyncio.sleep(0.01)
        async with queue.paused():
            assert 0 < background_tasks.left < 10**9

    run(scenario)


def test_a_long_pause_makes_the_next_wait_for_a_moment_only(monkeypatch):
    monkeypatch.setattr(watcher, "LONGEST_SHARE_SECONDS", 0)

    async def scenario(queue):
        async with queue.paused():
            background_tasks = Crowd(queue, 10**9)
            await asyncio.sleep(0.01)
        async with queue.paused():
            assert background_tasks.left == 10**9

    run(scenario)


def test_a_pause_begins_at_once_if_the_queue_is_empty():
    async def scenario(queue):
        for _ in range(3):
            async with queue.paused():
                await asyncio.sleep(0.001)
            pause = queue.paused()
            coroutine = pause.__aenter__()
            try:
                coroutine.send(None)
            except StopIteration:
                await pause.__aexit__(None, None, None)
            else:
                raise AssertionError("it waited")

    run(scenario)
