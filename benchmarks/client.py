"""Calls over a few connections, from one thread: single ones, or all of a list. A steady load is in load.py."""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Sequence

from jobstatus.v1 import job_status_pb2 as pb

from benchmarks.http2 import Connection

TIMEOUT_SECONDS = 120.0
# Fewer than the calls that a server takes at once by default.
CALLS_AT_ONCE = 256


def path(method: str) -> str:
    """Return the path of a method of our service."""
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
        """Call the method at a path, on the first connection, and return the reply."""
        answer = Answer()
        self.connections[0].call(method, request, answer)
        self.run_until(lambda: answer.ended_at is not None)
        return _message_of(method, answer)

    def call_all(self, method: str, requests: Sequence[bytes]) -> list[bytes]:
        """Call once with each of `requests`, in no order, and return the replies in order."""
        messages: list[bytes] = []
        for start in range(0, len(requests), CALLS_AT_ONCE):
            answers: list[Answer] = []
            for index, request in enumerate(requests[start : start + CALLS_AT_ONCE]):
                answers.append(Answer())
                self.connections[index % len(self.connections)].call(method, request, answers[-1])
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
