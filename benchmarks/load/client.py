"""Calls over a few connections, from one thread: a single call, a list of calls, or a steady load."""

from __future__ import annotations

import selectors
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Protocol

from benchmarks.load import http2

TIMEOUT_SECONDS = 120.0
"""Bounds every wait. The longest is for a watch that replays a million changes, about 10 s."""
CALLS_AT_ONCE = 256
"""Bounds the calls in flight of one list: fewer than a server accepts on a connection by default."""

NextRequest = Callable[[], bytes]


class Reply(Protocol):
    """Receives the messages and the end of one call."""

    def on_message(self, message: bytes) -> None: ...

    def on_end(self, is_ok: bool) -> None:
        """`is_ok`: the server answered without an error."""


class Connection(Protocol):
    """One connection. `call` queues a call, `flush` sends what is queued, `receive` passes on what came back."""

    socket: socket.socket

    def call(self, path: str, message: bytes, reply: Reply, *, is_last: bool = True) -> None:
        """Queue a call of the method at `path`; `is_last`: it has no further requests."""

    def flush(self) -> None:
        """Send what is queued."""

    def receive(self) -> None:
        """Read what has arrived and pass it to the replies. An exception that a reply raises breaks the connection."""


class CallFailedError(Exception):
    """A call did not end with OK, or not in time. No figure of its row means anything then."""


def shared_out(sources: Sequence[NextRequest], callers: int) -> Iterator[NextRequest]:
    """Return each caller's requests: one from each source of its share, in turn."""
    for caller in range(callers):
        share = cycle(sources[caller::callers])
        yield lambda share=share: next(share)()  # type: ignore[misc]


class Client(ExitStack):
    """Connections to one server. They send and receive only while a method runs; after an error, open a new client.

    All methods raise CallFailedError.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: ssl.SSLContext | None = None,
        connections: int = 1,
        token: str = "",
        connect: Callable[[str], Connection] | None = None,
    ) -> None:
        """Connect; `connect` opens a connection that does not speak HTTP/2 with gRPC."""
        super().__init__()
        connect = connect or (lambda address: http2.Connection(address, tls, token))
        self.connections = [connect(address) for _ in range(connections)]
        self._selector = self.enter_context(selectors.DefaultSelector())
        for connection in self.connections:
            self.enter_context(connection.socket)
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """Send and receive until `is_over`, or TIMEOUT_SECONDS have passed."""
        ends_at = time.perf_counter() + TIMEOUT_SECONDS
        for connection in self.connections:
            connection.flush()
        while not is_over():
            if time.perf_counter() > ends_at:
                raise CallFailedError(f"not done after {TIMEOUT_SECONDS:.0f} s")
            self._receive(1.0)

    def run_for(self, seconds: float) -> None:
        """Send and receive for `seconds`."""
        ends_at = time.perf_counter() + seconds
        while (left := ends_at - time.perf_counter()) > 0:
            self._receive(left)

    def call(self, path: str, request: bytes) -> bytes:
        """Call the method at `path`, on the first connection, and return the reply."""
        return self.call_all(path, [request])[0]

    def timed(self, path: str, request: bytes) -> float:
        """Call like `call`, and return how long the call took, in seconds."""
        started = time.perf_counter()
        self.call_all(path, [request])
        return time.perf_counter() - started

    def call_all(self, path: str, requests: Sequence[bytes]) -> list[bytes]:
        """Call once with each request, up to CALLS_AT_ONCE concurrently; return the replies in the requests' order."""
        answers = [Answer(path) for _ in requests]
        for start in range(0, len(requests), CALLS_AT_ONCE):
            group = answers[start : start + CALLS_AT_ONCE]
            for index, answer in enumerate(group):
                self.connections[index % len(self.connections)].call(path, requests[start + index], answer)
            self.run_until(lambda group=group: all(answer.is_over for answer in group))  # type: ignore[misc]
        return [answer.message for answer in answers]

    @contextmanager
    def load(self, path: str, lanes: Sequence[NextRequest], *, may_fail: bool = False) -> Iterator[Load]:
        """Load the server within the block, with one call in flight in each lane; then wait for the calls' ends."""
        load = Load(self, path, lanes, may_fail=may_fail)
        yield load
        load.is_running = False
        self.run_until(lambda: all(lane.is_over for lane in load.lanes))

    def _receive(self, timeout_seconds: float) -> None:
        for key, _ in self._selector.select(timeout_seconds):
            key.data.receive()
            key.data.flush()


class Answer:
    """The reply to a unary call."""

    def __init__(self, path: str) -> None:
        self.message = b""
        self.is_over = False
        self._path = path

    def on_message(self, message: bytes) -> None:
        self.message = message

    def on_end(self, is_ok: bool) -> None:
        if not is_ok:
            raise CallFailedError(f"a call of {self._path} failed")
        self.is_over = True


class Load:
    """A steady load of one method: a lane calls again as soon as its call has ended."""

    def __init__(self, client: Client, path: str, lanes: Sequence[NextRequest], *, may_fail: bool) -> None:
        self.latencies: list[float] = []
        self.may_fail = may_fail
        self.failures = 0
        """The number of calls that failed since `measure` began."""
        self.is_running = True
        self._client, connections = client, client.connections
        self.lanes = [Lane(self, path, connections[i % len(connections)], each) for i, each in enumerate(lanes)]

    def measure(self, seconds: float) -> list[float]:
        """Return the latency, in seconds, of each call that ends within the next `seconds`, of one call at least."""
        self.latencies, self.failures = [], 0
        self._client.run_for(seconds)
        if not self.may_fail:
            self._client.run_until(lambda: bool(self.latencies))
        return self.latencies


class Lane(Answer):
    """One call after the other over a connection."""

    def __init__(self, load: Load, path: str, connection: Connection, next_request: NextRequest) -> None:
        super().__init__(path)
        self._load = load
        self._connection = connection
        self._next_request = next_request
        self._call()
        connection.flush()

    def _call(self) -> None:
        self.is_over = False
        self._started_at = time.perf_counter()
        self._connection.call(self._path, self._next_request(), self)

    def on_end(self, is_ok: bool) -> None:
        super().on_end(is_ok or self._load.may_fail)
        if is_ok:
            self._load.latencies.append(time.perf_counter() - self._started_at)
        else:
            self._load.failures += 1
        if self._load.is_running:
            self._call()
