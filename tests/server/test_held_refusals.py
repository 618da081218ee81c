"""Refusals that are sent later: how long they are held, and when they are sent early."""

from __future__ import annotations

import asyncio

from jobstatus_grpc.server.held_refusals import (
    HELD_AT_ONCE,
    HOLD_SECONDS,
    MAX_HELD_BYTES,
    REFUSED_AT_ONCE,
    HeldCount,
    HeldRefusals,
    hold_seconds,
)
from tests.support.loop import run


def no_deadline():
    return None


def test_calls_are_held_longer_the_more_of_them_there_are():
    assert HOLD_SECONDS <= hold_seconds(HeldCount(HELD_AT_ONCE), None) <= 2 * HOLD_SECONDS
    assert 2 * HOLD_SECONDS <= hold_seconds(HeldCount(2 * HELD_AT_ONCE), None) <= 4 * HOLD_SECONDS


def test_held_calls_are_refused_when_they_are_released_and_later_ones_at_once():
    async def scenario():
        refusals, caller = HeldRefusals(), HeldCount()
        tasks = [asyncio.ensure_future(refusals.hold(60, caller, request_bytes=10)) for _ in range(3)]
        await asyncio.sleep(0)
        assert caller.value == 3
        refusals.release()
        await asyncio.gather(*tasks)
        await refusals.hold(60, caller, request_bytes=10)
        assert caller.value == 0

    run(scenario)


def test_beyond_a_sum_of_bytes_the_calls_held_longest_are_refused_early():
    async def scenario():
        refusals = HeldRefusals()
        half = MAX_HELD_BYTES // 2
        tasks = [asyncio.ensure_future(refusals.hold(60, HeldCount(), request_bytes=half)) for _ in range(3)]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert done == {tasks[0]}
        refusals.release()
        await asyncio.gather(*tasks)

    run(scenario)


def test_the_first_calls_without_a_place_are_refused_at_once_and_the_many_after_them_later():
    async def scenario():
        refusals = HeldRefusals()
        for _ in range(REFUSED_AT_ONCE):
            assert not is_held(refusals)
        assert is_held(refusals)
        refusals.release()

    run(scenario)


def is_held(refusals):
    """Refuse a call for which there is no place; return whether that has to wait."""
    refusing = refusals.hold_without_place(no_deadline, request_bytes=10)
    try:
        refusing.send(None)
    except StopIteration:
        return False
    refusing.close()
    return True
