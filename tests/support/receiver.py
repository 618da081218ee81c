"""A receiver of webhooks that answers as a test wants, and `jobstatus relay` as a process."""

from __future__ import annotations

import bisect
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias

LONGEST_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Received:
    """A request."""

    number: int
    """From 0, in the order of arrival."""
    path: str
    headers: Mapping[str, str]
    body: bytes
    at: float
    """Of the monotonic clock."""
    status: int
    """Of the answer; 0: there was none."""

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def job(self) -> dict[str, Any]:
        """The job in the body of binary mode."""
        job: dict[str, Any] = json.loads(self.body)
        return job


Answer: TypeAlias = "tuple[int, dict[str, str]]"
"""Status and headers; 0: the connection is closed without an answer."""


class Receiver:
    """An HTTP server; a context manager. `answer` decides on each request, given its number from 0 and its headers."""

    def __init__(
        self,
        answer: Callable[[int, Mapping[str, str]], Answer] = lambda number, headers: (204, {}),
        context: ssl.SSLContext | None = None,
    ) -> None:
        """With a context it is a server of HTTPS."""
        self.answer = answer
        self._received: list[Received] = []
        self._count = 0
        self._change = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver._take(self, body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self._server.server_port}"
        if context is not None:
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def received(self) -> list[Received]:
        """All requests that were answered so far, in the order of their arrival: the next may overtake an answer."""
        with self._change:
            return list(self._received)

    @property
    def accepted(self) -> list[Received]:
        """The requests that were answered with 2xx."""
        return [each for each in self.received if 200 <= each.status < 300]

    def wait_until(self, condition: Callable[[list[Received]], bool]) -> list[Received]:
        """Wait until a condition holds for all requests so far, and return these."""
        with self._change:
            is_met = self._change.wait_for(lambda: condition(self._received), LONGEST_SECONDS)
            assert is_met, [(each.status, each.path, each.headers.get("webhook-id")) for each in self._received[-50:]]
            return list(self._received)

    def wait_for(self, count: int) -> list[Received]:
        """Wait until a number of requests were answered with 2xx, and return these."""
        self.wait_until(lambda received: sum(200 <= each.status < 300 for each in received) >= count)
        return self.accepted

    def _take(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        with self._change:
            number, self._count = self._count, self._count + 1
        headers = {name.lower(): value for name, value in handler.headers.items()}
        status, answer = self.answer(number, headers)
        if status:
            handler.send_response(status)
            for name, value in answer.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        handler.close_connection = True
        with self._change:
            request = Received(number, handler.path, headers, body, time.monotonic(), status)
            bisect.insort(self._received, request, key=attrgetter("number"))
            self._change.notify_all()


class RelayProcess:
    """`jobstatus relay` as a process of its own; a context manager that ends it."""

    def __init__(self, address: str, folder: Path, *flags: str, **variables: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("JOBSTATUS_")}
        self._environment = {**clean, "JOBSTATUS_ADDRESS": address, **variables}
        self.state_file = folder / "relay.state"
        self.dead_letter_file = folder / "relay.state.dead-letters"
        self._log = folder / "relay.log"
        self._flags = flags
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> RelayProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def said(self) -> str:
        """All that it has printed since it was started first."""
        return self._log.read_text()

    @property
    def dead_letters(self) -> list[dict[str, Any]]:
        """The lines of its file of dead letters."""
        if not self.dead_letter_file.exists():
            return []
        return [json.loads(line) for line in self.dead_letter_file.read_text().splitlines()]

    def command(self) -> list[str]:
        relay = [sys.executable, "-W", "error", "-m", "jobstatus_grpc", "relay"]
        return [*relay, "--state-file", str(self.state_file), *self._flags]

    def start(self, until: str = "relaying to ") -> None:
        """Start it and wait until it delivers, or prints another text."""
        before = self.said.count(until) if self._log.exists() else 0
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self.command(), env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True
            )
        ends_at = time.monotonic() + LONGEST_SECONDS
        while self.said.count(until) == before:
            assert self._process.poll() is None, self.said
            assert time.monotonic() < ends_at
            time.sleep(0.005)

    def run(self) -> subprocess.CompletedProcess[str]:
        """Run it to its end, where it should refuse to start."""
        return subprocess.run(
            self.command(), env=self._environment, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False
        )

    def wait_until_said(self, text: str) -> None:
        """Wait until it has printed a text."""
        ends_at = time.monotonic() + LONGEST_SECONDS
        while text not in self.said:
            assert time.monotonic() < ends_at, self.said
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send it a signal and return its exit code."""
        assert self._process is not None
        self.send(number)
        code = self._process.wait(LONGEST_SECONDS)
        self._process = None
        return code

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self.stop(signal.SIGKILL)
