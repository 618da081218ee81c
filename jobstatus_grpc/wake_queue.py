"""Lets watchers have their turns, one or a few in each turn of the event loop.

An update that arrives while a thousand watchers are to be woken waits for one of them, not for all: each wake costs a
hundred microseconds, most of them in gRPC, and the loop takes what has arrived between two turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator
from typing import Protocol

# What a step costs, in microseconds or so.
LOOK, SEND, WAKE = 1, 8, 64
TURN = 64
YIELD_SECONDS = 0.05
"""So long after a commit met watchers in the queue, threads that carry requests and replies come first on the core."""
LONGEST_SHARE_SECONDS = 0.02
"""A commit that waits for watchers waits no longer."""


class Wakeable(Protocol):
    """What can stand in the queue."""

    def step(self) -> int:
        """Look at one watcher, send something or wake it; tell which. Whoever has more to do enqueues itself again."""
        ...


class WakeQueue:
    """Steps through what stands in it, first come first served. Lives on one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[Wakeable] = deque()
        self._is_turning = False
        self._is_paused = False
        self._may_pause_at = 0.0
        self._is_empty = asyncio.Event()
        self._yields_until = 0.0

    def enqueue(self, item: Wakeable) -> None:
        """Let `item` step in its turn. It may stand in the queue more than once; better it does not."""
        self._items.append(item)
        self._turn_soon()

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Wake nobody while the block runs: a thread that commits gets the interpreter only when this one rests.

        The block begins when those in the queue have had as long as the last one took, 20 ms at most, or there are
        none: so a stream of commits cannot starve watchers, nor they it. For one task at a time.
        """
        if self._items:
            await self._let_them_have_their_share()
        began_at = self._loop.time()
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            now = self._loop.time()
            self._may_pause_at = now + min(now - began_at, LONGEST_SHARE_SECONDS)
            self._turn_soon()

    async def _let_them_have_their_share(self) -> None:
        now = self._loop.time()
        self._yields_until = now + YIELD_SECONDS
        if now < self._may_pause_at:
            self._is_empty.clear()
            end = self._loop.call_at(self._may_pause_at, self._is_empty.set)
            try:
                await self._is_empty.wait()
            finally:
                end.cancel()

    def _turn_soon(self) -> None:
        if self._items and not self._is_turning and not self._is_paused:
            self._is_turning = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        if not self._is_paused:
            left = TURN
            for _ in range(min(TURN, len(self._items))):
                left -= self._items.popleft().step()
                if left <= 0:
                    break
        self._is_turning = False
        if not self._items:
            self._is_empty.set()
        elif self._loop.time() < self._yields_until:
            _yield_core()
        self._turn_soon()


def _yield_core() -> None:
    if hasattr(os, "sched_yield"):  # Windows has none
        os.sched_yield()
