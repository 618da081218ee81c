"""Calls over a few connections, from one thread: single ones, all of a list, or a steady load."""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jobstatus.v1 import job_status_pb2 as pb

from benchmarks.http2 import Connection

TIMEOUT_SECONDS = 120.0
# Fewer than the calls that a server takes at once by default.
CALLS_AT_ONCE = 256

NextRequest = Callable[[], bytes]


def path(method: str) -> str:
    """Return where a method of our service is called."""
    return f"/{pb.DESCRIPTOR.services_by_name['JobStatusService'].full_name}/{method}"


class CallFailedError(Exception):
    """A call ended otherwise than with OK; the benchmark means nothing then."""


class Answer:
    """The reply to one unary call."""

    __slots__ = ("ended_at", "is_ok", "message")

    def __init__(self) -> None:
        self.message = b""
        self.is_ok = False
        self.ended_at: float | None = None

    def on_message(self, message: bytes) -> None:
        """Keep it."""
        self.message = message

    def on_end(self, is_ok: bool) -> None:
        """Note when and how the call ended."""
        self.is_ok = is_ok
        self.ended_at = time.perf_counter()


class Client:
    """Connections to one server, served by whoever calls a method here."""

    def __init__(self, address: str, *, connections: int) -> None:
        """Connect."""
        self.connections = [Connection(address) for _ in range(connections)]
        self._selector = selectors.DefaultSelector()
        for connection in self.connections:
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        for connection in self.connections:
            connection.close()

    def run_until(self, is_over: Callable[[], bool], *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Send and receive until `is_over`.

        Raises:
            CallFailedError: it took longer than `timeout_seconds`.
        """
        give_up_at = time.perf_counter() + timeout_seconds
        for connection in self.connections:
            connection.flush()
        while not is_over():
            if time.perf_counter() > give_up_at:
                raise CallFailedError(f"not done after {timeout_seconds:.0f} s")
            self._turn(1.0)

    def run_for(self, seconds: float) -> None:
        """Send and receive for `seconds`."""
        end_at = time.perf_counter() + seconds
        while (left := end_at - time.perf_counter()) > 0:
            self._turn(left)

    def call(self, method: str, request: bytes) -> bytes:
        """Call on the first connection, and return the reply."""
        answer = Answer()
        self.connections[0].call(path(method), request, answer)
        self.run_until(lambda: answer.ended_at is not None)
        return _message_of(method, answer)

    def call_all(self, method: str, requests: Sequence[bytes]) -> list[bytes]:
        """Call once with each of `requests`, in no order, and return the replies in order."""
        messages: list[bytes] = []
        for start in range(0, len(requests), CALLS_AT_ONCE):
            answers: list[Answer] = []
            for index, request in enumerate(requests[start : start + CALLS_AT_ONCE]):
                answers.append(Answer())
                self.connections[index % len(self.connections)].call(path(method), request, answers[-1])
            self.run_until(lambda answers=answers: all(answer.ended_at for answer in answers))  # type: ignore[misc]
            messages.extend(_message_of(method, answer) for answer in answers)
        return messages

    def _turn(self, timeout_seconds: float) -> None:
        for key, _ in self._selector.select(timeout_seconds):
            key.data.receive()
            key.data.flush()


def _message_of(method: str, answer: Answer) -> bytes:
    if not answer.is_ok:
        raise CallFailedError(f"a call of {method} failed")
    return answer.message


@dataclass(slots=True)
class Tally:
    """What a load has seen."""

    calls: int = 0
    """Answered with OK."""
    failures: int = 0
    latencies: list[float] = field(default_factory=list)
    """In seconds, one per call."""


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
        self._load.reply_bytes = len(message)

    def on_end(self, is_ok: bool) -> None:
        load = self._load
        tally = load.tally
        if is_ok:
            tally.calls += 1
        else:
            tally.failures += 1
        tally.latencies.append(time.perf_counter() - self._started_at)
        if load.is_running:
            self.start()
        else:
            load.in_flight -= 1


class Load:
    """A steady load of one method: as many calls in flight as there are lanes."""

    def __init__(self, client: Client, method: str, lanes: Sequence[NextRequest]) -> None:
        """Take one source of requests per lane; the connections are shared out among them."""
        self.path = path(method)
        self.tally = Tally()
        self.reply_bytes = 0
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
            raise CallFailedError(f"{self.tally.failures} calls failed beside {self.tally.calls} that did not")
        return self.tally
