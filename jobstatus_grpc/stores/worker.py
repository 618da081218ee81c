"""A thread beside the event loop, for calls that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """Runs functions in its own thread, one after another; what comes of each is told on the event loop."""

    def __init__(self, name: str) -> None:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]] | None]
        self._calls = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], T], done: Callable[[T, BaseException | None], None]) -> None:
        """Run `function` after those before it, then `done(result, error)` on the event loop."""
        self._calls.put((function, done))

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `function` returns. Cancelling the wait does not stop it."""
        waiter: asyncio.Future[T] = self._loop.create_future()

        def done(result: T, error: BaseException | None) -> None:
            resolve(waiter, result, error)

        self.submit(lambda: function(*args, **kwargs), done)
        return await waiter

    async def stop(self) -> None:
        """Run what was submitted, then end the thread."""
        if self._thread.is_alive():
            ended = self.call(lambda: self._calls.put(None))
            await ended
            self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            function, done = call
            result, error = None, None
            try:
                result = function()
            except BaseException as caught:
                error = caught
            with suppress(RuntimeError):  # the loop was closed before the store
                self._loop.call_soon_threadsafe(done, result, error)


def resolve(waiter: asyncio.Future[T], result: T, error: BaseException | None) -> None:
    """End the wait, unless it was cancelled."""
    if waiter.done():
        return
    if error is None:
        waiter.set_result(result)
    else:
        waiter.set_exception(error)
