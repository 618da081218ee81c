"""Time limits in tests, on a machine that may pause at any moment, for seconds."""

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


class Clock:
    """A clock that a test sets."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


# An attempt that takes longer was paused; the rest does not count.
MAX_ATTEMPT_SECONDS = 0.1
Store = TypeVar("Store")
REPEATS, ROUNDS = 40, 3
MEASUREMENTS = REPEATS * ROUNDS
"""`use` gets numbers below this, each at most once, so that each call can touch other rows."""

MAX_PAUSE_SECONDS = 3.0
"""The longest pause of the machine that a time limit in a test must allow for."""

_TICK_SECONDS = 0.01
_RUNS = 4


def rerun_after_pause(seconds: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Rerun a test that failed while this process was paused for `seconds` or longer, at most 3 times."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*arguments: Any, **fixtures: Any) -> None:
            for runs_left in reversed(range(_RUNS)):
                with _pauses() as pauses:
                    try:
                        return test(*arguments, **fixtures)
                    except (Exception, pytest.fail.Exception) as error:
                        failure = error
                if not runs_left or max(pauses) < seconds:
                    raise failure

        return run

    return decorate


@contextlib.contextmanager
def _pauses() -> Iterator[list[float]]:
    """The pauses of this process during the block, in seconds."""
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


def within_a_second(is_so: Callable[[], bool]) -> bool:
    """Whether a condition becomes true within a second: the time that a cancelled watch may take to free its place."""
    seconds = 0.0
    while seconds < 1:
        began_at = time.monotonic()
        if is_so():
            return True
        seconds += min(time.monotonic() - began_at, MAX_ATTEMPT_SECONDS)
    return False


def admitted_within_a_second(watch: Callable[[], Any]) -> Any:
    """Open a watch, and retry for a second until it is admitted."""
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


async def ratio(few: Store, many: Store, use: Callable[[Store, int], Awaitable[object]]) -> float:
    """How many times longer `use(store, number)` takes with many jobs; measured again if above 2, and the best counts.

    Other load may slow one side in one round, but hardly in every round.
    """
    numbers = itertools.count()
    ratios: list[float] = []
    while not ratios or (ratios[-1] > 2 and len(ratios) < ROUNDS):
        ratios.append(await _ratio(few, many, use, itertools.islice(numbers, REPEATS)))
    return min(ratios)


async def _ratio(
    few: Store, many: Store, use: Callable[[Store, int], Awaitable[object]], numbers: Iterable[int]
) -> float:
    """The ratio of medians, measured in turns."""
    taken: tuple[list[float], list[float]] = ([], [])
    for number in numbers:
        for store, seconds in zip((few, many), taken, strict=True):
            began_at = time.perf_counter()
            await use(store, number)
            seconds.append(time.perf_counter() - began_at)
    return statistics.median(taken[1]) / statistics.median(taken[0])
