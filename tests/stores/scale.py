"""What a store takes with many jobs, measured beside what it takes with few."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

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
