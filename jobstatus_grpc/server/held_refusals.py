"""Refusals that are sent later: a caller that calls again at once must not take the server's time with refusals."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from jobstatus_grpc.server.token_bucket import Rate, TokenBucket

HOLD_SECONDS = 0.5
"""How long a refusal is held, and up to twice as long at random. With grpcio it costs as much as an answer."""

HELD_AT_ONCE = 200
"""A caller with more calls held has them held longer in proportion: with up to 1,000 in flight it gets about 270
refusals a second."""

MAX_HOLD_SECONDS = 5.0

MAX_HOLD_SHARE = 0.5
"""Of the time until the call's deadline: the refusal must reach the client before that."""

MAX_HELD = 10_000
"""Calls that are held, of all callers; beyond that they are refused at once. Each takes about 20 kB with grpcio."""

MAX_HELD_BYTES = 160 * 1024 * 1024
"""Of the requests of held calls, of all callers: the transports keep a request until its call ends. Beyond it
those held longest are refused early."""

REFUSED_AT_ONCE = 100
"""Calls a second that are refused at once because the server has no place for them; beyond it the refusals are held.

Row `share`: without holding them, the server answers a third as many updates at 10 times its capacity.
"""


@dataclass(slots=True)
class HeldCount:
    """The number of refusals of one caller that are held."""

    value: int = 0


def hold_seconds(held: HeldCount, time_remaining: float | None) -> float:
    """Return how long to hold one more refusal, of a call with this time until its deadline; None: it has none."""
    longer = max(held.value / HELD_AT_ONCE, 1.0)
    seconds = min(random.uniform(HOLD_SECONDS, 2 * HOLD_SECONDS) * longer, MAX_HOLD_SECONDS)
    return seconds if time_remaining is None else min(seconds, time_remaining * MAX_HOLD_SHARE)


class HeldRefusals:
    """The refused calls that have not been sent their error. For one event loop."""

    def __init__(self) -> None:
        self._held: dict[asyncio.Future[None], int] = {}
        """The bytes of the request of each call, the oldest call first."""
        self._held_bytes = 0
        self._is_released = False
        self._without_place = HeldCount()
        self._at_once = TokenBucket(Rate(REFUSED_AT_ONCE, REFUSED_AT_ONCE), time.monotonic())

    async def hold(self, seconds: float, held: HeldCount, *, request_bytes: int) -> None:
        """Wait before the error of a refused call is sent, unless `release` is called."""
        if not seconds or self._is_released or len(self._held) >= MAX_HELD:
            return
        loop = asyncio.get_running_loop()
        waiting = loop.create_future()
        timer = loop.call_later(seconds, _resolve, waiting)
        self._held[waiting] = request_bytes
        self._held_bytes += request_bytes
        while self._held_bytes > MAX_HELD_BYTES:
            self._end(next(iter(self._held)))
        held.value += 1
        try:
            await waiting
        finally:
            held.value -= 1
            self._end(waiting)
            timer.cancel()

    async def hold_without_place(self, time_remaining: Callable[[], float | None], *, request_bytes: int) -> None:
        """Hold the refusal of a call for which there is no place, if there are many of them."""
        now = time.monotonic()
        if self._at_once.seconds_until_room(now):
            held = self._without_place
            await self.hold(hold_seconds(held, time_remaining()), held, request_bytes=request_bytes)
        else:
            self._at_once.take(1)

    def release(self) -> None:
        """Hold no more calls: the server drains."""
        self._is_released = True
        for waiting in self._held:
            _resolve(waiting)

    def _end(self, waiting: asyncio.Future[None]) -> None:
        self._held_bytes -= self._held.pop(waiting, 0)
        _resolve(waiting)


def _resolve(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
