"""For tests that say how long something takes: this machine may stand still at any moment, for seconds."""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar

import grpc
import pytest

STANDSTILL_SECONDS = 3.0
"""For so long at most, so that a limit which leaves room for it can tell."""

_TICK_SECONDS = 0.01
_RUNS = 4


def in_peace(seconds: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test again that failed while this process stood still for `seconds` or longer; a few times at most."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*arguments: Any, **fixtures: Any) -> None:
            for runs_left in reversed(range(_RUNS)):
                with _standstills() as standstills:
                    try:
                        return test(*arguments, **fixtures)
                    except (Exception, pytest.fail.Exception) as error:
                        failure = error
                if not runs_left or max(standstills) < seconds:
                    raise failure

        return run

    return decorate


@contextlib.contextmanager
def _standstills() -> Iterator[list[float]]:
    """How long this process stood still, each time that it did, while the block runs."""
    seconds = [0.0]
    is_over = threading.Event()

    def tick() -> None:
        has_ended, ticked_at = False, time.monotonic()
        while not has_ended:
            has_ended = is_over.wait(_TICK_SECONDS)
            ticked_at, before = time.monotonic(), ticked_at
            seconds.append(ticked_at - before - _TICK_SECONDS)

    ticking = threading.Thread(target=tick)
    ticking.start()
    try:
        yield seconds
    finally:
        is_over.set()
        ticking.join()


# What a try takes beyond this, the machine stood still.
LONGEST_TRY_SECONDS = 0.1


def within_a_second(is_so: Callable[[], bool]) -> bool:
    """Look again and again; tell whether it became so within a second, which is what a watch may take to be gone."""
    seconds = 0.0
    while seconds < 1:
        began_at = time.monotonic()
        if is_so():
            return True
        seconds += min(time.monotonic() - began_at, LONGEST_TRY_SECONDS)
    return False


def admitted_within_a_second(watch: Callable[[], Any]) -> Any:
    """Open a watch, again and again until it is admitted."""
    admitted = []

    def is_admitted() -> bool:
        stream = watch()
        try:
            next(stream)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            return False
        admitted.append(stream)
        return True

    assert within_a_second(is_admitted)
    return admitted[0]


Store = TypeVar("Store")

REPEATS, ROUNDS = 40, 3
MEASUREMENTS = REPEATS * ROUNDS
"""`use` gets numbers below this, each at most once: what it touches need not come from memory."""


async def ratio(few: Store, many: Store, use: Callable[[Store, int], Awaitable[object]]) -> float:
    """How many times longer `use(store, number)` takes with many jobs; if twice, measured again, and the best counts.

    What else runs on this machine may make one round slow on one side only; not every round.
    """
    numbers = itertools.count()
    ratios: list[float] = []
    while not ratios or (ratios[-1] > 2 and len(ratios) < ROUNDS):
        ratios.append(await _ratio(few, many, use, itertools.islice(numbers, REPEATS)))
    return min(ratios)


async def _ratio(
    few: Store, many: Store, use: Callable[[Store, int], Awaitable[object]], numbers: Iterable[int]
) -> float:
    """Of medians, taken in turns."""
    taken: tuple[list[float], list[float]] = ([], [])
    for number in numbers:
        for store, seconds in zip((few, many), taken, strict=True):
            began_at = time.perf_counter()
            await use(store, number)
            seconds.append(time.perf_counter() - began_at)
    return statistics.median(taken[1]) / statistics.median(taken[0])
