"""For tests that say how long something takes: this machine may stand still at any moment, for seconds."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

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
