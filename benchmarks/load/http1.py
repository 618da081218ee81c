"""The load generator's end of connections of HTTP/1.1: requests already encoded, one in flight on a connection."""

from __future__ import annotations

import re
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from benchmarks.load.client import TIMEOUT_SECONDS, CallFailedError

NextRequest = Callable[[], bytes]

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


def request(method: str, path: str, body: bytes = b"", content_type: str = "application/json") -> bytes:
    """Return the bytes of a request."""
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    if body:
        head += f"content-type: {content_type}\r\ncontent-length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


class Caller:
    """A connection that sends its next request as soon as it has the response to the one before."""

    def __init__(self, port: int, next_request: NextRequest) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._next_request = next_request
        self._input = b""
        self._sent_at = 0.0

    def send(self) -> None:
        self._sent_at = time.perf_counter()
        self.socket.sendall(self._next_request())

    def receive(self) -> float | None:
        """Read what has arrived; return how long the call took, in seconds, None if the response is not whole."""
        arrived = self.socket.recv(1 << 16)
        if not arrived:
            raise CallFailedError("the server closed the connection")
        self._input += arrived
        head, end, body = self._input.partition(b"\r\n\r\n")
        if not end:
            return None
        if not self._input.startswith(b"HTTP/1.1 200 "):
            raise CallFailedError(f"the answer was {self._input[:300]!r}")
        length = _LENGTH.search(head)
        assert length is not None
        if len(body) < int(length[1]):
            return None
        self._input = b""
        return time.perf_counter() - self._sent_at


class Callers(ExitStack):
    """Callers of one server, each with a connection of its own."""

    def __init__(self, port: int, lanes: Sequence[NextRequest]) -> None:
        super().__init__()
        self._selector = self.enter_context(selectors.DefaultSelector())
        self._callers = [Caller(port, lane) for lane in lanes]
        for caller in self._callers:
            self.enter_context(caller.socket)
            self._selector.register(caller.socket, selectors.EVENT_READ, caller)

    def measure(self, seconds: float) -> list[float]:
        """Load the server for a time; return the seconds that each call took which ended in it."""
        taken: list[float] = []
        for caller in self._callers:
            caller.send()
        ends_at, waiting = time.perf_counter() + seconds, len(self._callers)
        while waiting:
            for key, _ in self._selector.select(1.0):
                if (call_seconds := key.data.receive()) is None:
                    continue
                if time.perf_counter() < ends_at:
                    taken.append(call_seconds)
                    key.data.send()
                else:
                    waiting -= 1
            if time.perf_counter() > ends_at + TIMEOUT_SECONDS:
                raise CallFailedError("calls are not over")
        return taken


class Followers(ExitStack):
    """Streams of one server, each on a connection of its own."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self._selector = self.enter_context(selectors.DefaultSelector())
        self._inputs: dict[socket.socket, bytes] = {}

    def open(self, first: bytes, count: int, *, until: bytes) -> None:
        """Open a number of streams, and wait until each of them has received a text."""
        opened = [socket.create_connection(("127.0.0.1", self._port), timeout=30) for _ in range(count)]
        for connection in opened:
            self.enter_context(connection)
            self._selector.register(connection, selectors.EVENT_READ)
            connection.sendall(first)
            self._inputs[connection] = b""
        self._wait_for(until, set(opened))

    def wait_for(self, mark: bytes) -> list[float]:
        """Wait until each has received a text; return when, by the monotonic clock."""
        return self._wait_for(mark, set(self._inputs))

    def _wait_for(self, mark: bytes, missing: set[socket.socket]) -> list[float]:
        reached_at: list[float] = []
        ends_at = time.perf_counter() + TIMEOUT_SECONDS
        while missing:
            for key, _ in self._selector.select(1.0):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                arrived = connection.recv(1 << 16)
                if not arrived:
                    raise CallFailedError("the server ended a stream")
                self._inputs[connection] += arrived
                if connection in missing and mark in self._inputs[connection]:
                    reached_at.append(time.perf_counter())
                    missing.discard(connection)
                    self._inputs[connection] = b""
            if time.perf_counter() > ends_at:
                raise CallFailedError(f"{len(missing)} streams did not receive {mark!r}")
        return reached_at
