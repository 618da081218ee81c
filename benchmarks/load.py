"""A steady load of one method: as many calls in flight as there are callers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.client import CallFailedError, Client
from benchmarks.http2 import Connection

NextRequest = Callable[[], bytes]


@dataclass(slots=True)
class Tally:
    """What a load has seen."""

    latencies: list[float] = field(default_factory=list)
    """In seconds, one per call."""
    failures: int = 0
    """How many of them did not end with OK."""


class _Lane:
    """One caller: as soon as it has its answer it calls again."""

    __slots__ = ("_connection", "_load", "_next_request", "_started_at")

    def __init__(self, load: Load, connection: Connection, next_request: NextRequest) -> None:
        self._load = load
        self._connection = connection
        self._next_request = next_request
        self._started_at = 0.0

    def start(self) -> None:
        self._started_at = time.perf_counter()
        self._connection.call(self._load.path, self._next_request(), self)

    def on_message(self, message: bytes) -> None:
        return

    def on_end(self, is_ok: bool) -> None:
        load = self._load
        tally = load.tally
        if not is_ok:
            tally.failures += 1
        tally.latencies.append(time.perf_counter() - self._started_at)
        if load.is_running:
            self.start()
        else:
            load.in_flight -= 1


class Load:
    """A steady load of one method: as many calls in flight as there are lanes."""

    def __init__(self, client: Client, method: str, lanes: Sequence[NextRequest]) -> None:
        """Take the method's path, and one source of requests per lane; the connections are shared out among them."""
        self.path = method
        self.tally = Tally()
        self.is_running = False
        self.in_flight = 0
        self._client = client
        connections = client.connections
        self._lanes = [_Lane(self, connections[i % len(connections)], source) for i, source in enumerate(lanes)]

    def start(self) -> None:
        """Send the first call of each lane."""
        self.is_running = True
        self.in_flight = len(self._lanes)
        for lane in self._lanes:
            lane.start()
        for connection in self._client.connections:
            connection.flush()

    def measure(self, seconds: float) -> Tally:
        """Return what is answered within the next `seconds`.

        Raises:
            CallFailedError: a call failed.
        """
        self.tally = Tally()
        self._client.run_for(seconds)
        return self._checked()

    def stop(self) -> None:
        """Let the calls in flight end.

        Raises:
            CallFailedError: one of them failed.
        """
        self.is_running = False
        self.tally = Tally()
        self._client.run_until(lambda: self.in_flight == 0)
        self._checked()

    def _checked(self) -> Tally:
        if self.tally.failures:
            raise CallFailedError(f"{self.tally.failures} of {len(self.tally.latencies)} calls of {self.path} failed")
        return self.tally
