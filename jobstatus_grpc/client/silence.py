"""End streams that fall silent: reading one never returns by itself when its server hangs."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from typing import Protocol


class Call(Protocol):
    """What is ended."""

    def cancel(self) -> object: ...


class AsyncSilenceTimer:
    """Cancels a call unless something is heard from it in time; `has_fired` tells. Ends with `cancel`."""

    def __init__(self, call: Call, seconds: float) -> None:
        self.has_fired = False
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._due_at = self._loop.time() + seconds
        self._handle = self._loop.call_at(self._due_at, self._check)

    def heard(self, seconds: float) -> None:
        """Allow `seconds` of silence from now on."""
        self._due_at = self._loop.time() + seconds

    def cancel(self) -> None:
        """Stop watching over the call."""
        self._handle.cancel()

    def _check(self) -> None:
        # Moving the due time is all that a message costs; whether it has come is asked once it could have.
        if self._loop.time() < self._due_at:
            self._handle = self._loop.call_at(self._due_at, self._check)
        else:
            self.has_fired = True
            self._call.cancel()


class SilenceTimer:
    """As AsyncSilenceTimer, for the sync client; made by its Watchdog."""

    def __init__(self, call: Call, seconds: float, news: queue.SimpleQueue[SilenceTimer]) -> None:
        self.has_fired = False
        self.is_over = False
        self.due_at = time.monotonic() + seconds
        self._call = call
        self._news = news

    def heard(self, seconds: float) -> None:
        """Allow `seconds` of silence from now on."""
        self.due_at = time.monotonic() + seconds

    def cancel(self) -> None:
        """Stop watching over the call."""
        if not self.is_over:
            self.is_over = True
            self._news.put(self)

    def fire(self) -> None:
        """End the call."""
        self.is_over = self.has_fired = True
        self._call.cancel()


class Watchdog:
    """Fires the timers of all of a client's watches, in one thread that lives while there are any."""

    def __init__(self) -> None:
        # Timers end in finalizers too, which may run anywhere: SimpleQueue is the one lock-free way to a thread.
        self._news: queue.SimpleQueue[SilenceTimer] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._is_running = False

    def watch_over(self, call: Call, seconds: float) -> SilenceTimer:
        """Return a timer that cancels `call` after `seconds` of silence."""
        timer = SilenceTimer(call, seconds, self._news)
        with self._starting:
            self._news.put(timer)
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="jobstatus-watchdog", daemon=True).start()
        return timer

    def _run(self) -> None:
        timers: set[SilenceTimer] = set()
        while True:
            due_at = min((timer.due_at for timer in timers), default=0.0)
            try:
                timer = self._news.get(timeout=max(due_at - time.monotonic(), 0.0))
            except queue.Empty:
                if not timers and self._may_stop():
                    return
                for timer in [timer for timer in timers if timer.due_at <= time.monotonic()]:
                    timers.discard(timer)
                    timer.fire()
            else:
                if timer.is_over:
                    timers.discard(timer)
                else:
                    timers.add(timer)

    def _may_stop(self) -> bool:
        with self._starting:
            self._is_running = not self._news.empty()
            return not self._is_running
