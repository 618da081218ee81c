"""What every watcher does by the clock: it says something now and then, holds back what is minor, and grows old."""

from __future__ import annotations

import asyncio
import random

from jobstatus_grpc.wake_queue import WakeQueue

# A timer may fire a little before its time.
CLOCK_RESOLUTION_SECONDS = 0.002


class TimedWatcher:
    """Stands in the queue of those to be woken when it has been silent for too long, is too old, or told itself to."""

    __slots__ = (
        "_ends_at", "_heartbeat_seconds", "_heartbeat_timer", "_is_queued", "_loop", "_sent_at", "_throttle_timer",
        "_wakes",
    )  # fmt: skip

    def __init__(self, wakes: WakeQueue, *, heartbeat_seconds: float, max_age_seconds: float | None) -> None:
        self._wakes = wakes
        self._is_queued = False
        self._loop = asyncio.get_running_loop()
        self._heartbeat_seconds = heartbeat_seconds
        self._sent_at = now = self._loop.time()
        self._ends_at = now + max_age_seconds * random.uniform(0.9, 1.1) if max_age_seconds else float("inf")
        self._throttle_timer: asyncio.TimerHandle | None = None
        self._arm_heartbeat(now + heartbeat_seconds)

    def step(self) -> int:
        """Look, in its turn; see WakeQueue."""
        raise NotImplementedError

    def wake_soon(self) -> None:
        """Look, in its turn, whether there is something to do."""
        if not self._is_queued:
            self._is_queued = True
            self._wakes.enqueue(self)

    def note_sent(self) -> None:
        """Count the silence from now on. That does not move the timer: it looks when it fires."""
        self._sent_at = self._loop.time()

    def close(self) -> None:
        """Stop the timers."""
        self._heartbeat_timer.cancel()
        if self._throttle_timer is not None:
            self._throttle_timer.cancel()

    def _heartbeat_due_at(self) -> float:
        """Return the loop's time at which it is time for a HEARTBEAT, or for the end."""
        return min(self._sent_at + self._heartbeat_seconds, self._ends_at)

    def _is_heartbeat_due(self, now: float) -> bool:
        return now + CLOCK_RESOLUTION_SECONDS >= self._heartbeat_due_at()

    def _is_too_old(self, now: float) -> bool:
        return now + CLOCK_RESOLUTION_SECONDS >= self._ends_at

    def _wake_at(self, due_at: float) -> None:
        """Wake up then, unless that happens earlier anyway."""
        if self._throttle_timer is not None:
            if self._throttle_timer.when() <= due_at:
                return
            self._throttle_timer.cancel()
        self._throttle_timer = self._loop.call_at(due_at, self._on_throttle_end)

    def _on_throttle_end(self) -> None:
        self._throttle_timer = None
        self.wake_soon()

    def _on_heartbeat_timer(self) -> None:
        now = self._loop.time()
        next_at = self._sent_at + self._heartbeat_seconds
        if self._is_heartbeat_due(now):
            self.wake_soon()
            next_at = now + self._heartbeat_seconds
        self._arm_heartbeat(next_at)

    def _arm_heartbeat(self, next_at: float) -> None:
        if self._loop.time() < self._ends_at < next_at:
            next_at = self._ends_at
        self._heartbeat_timer = self._loop.call_at(next_at, self._on_heartbeat_timer)
