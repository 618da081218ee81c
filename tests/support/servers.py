"""Real servers for tests: as processes, and within a test's event loop with a store of the test's own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from jobstatus_grpc.server.app import _Files, _Server
from jobstatus_grpc.server.config import ServerConfig
from jobstatus_grpc.server.logs import RequestLog, ServerLog
from jobstatus_grpc.stores.interface import JobStore

if TYPE_CHECKING:
    from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceAsyncStub

    from jobstatus_grpc.server.tracing import ServerTracing


TRANSPORT = os.environ.get("JOBSTATUS_TEST_TRANSPORT", "grpcio")
"""The default transport of servers."""


class NotStartedError(AssertionError):
    """A server has ended, or said something else, before it listened; the second argument is its exit code."""


class ServerProcess:
    """`jobstatus serve` as a process of its own; a context manager that ends it.

    `address` is where it answers, known once it is started. `restart` keeps the port and the store.
    """

    def __init__(
        self,
        *flags: str,
        store: str = "memory:",
        listen: str = "127.0.0.1:0",
        log: Path | None = None,
        program: Sequence[str] = ("-m", "jobstatus_grpc"),
    ) -> None:
        """`flags` are those of `jobstatus serve`; without `log`, warnings and errors go to this process's stderr.

        `program` are the arguments of Python that run `jobstatus`.
        """
        self._flags = flags
        self._program = program
        self.store = store
        self._listen = listen
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self.address = ""
        self.http = ""
        """The URL of the HTTP gateway, with the flag --http."""

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, *self._program, "serve", "--listen", self._listen, "--store", self.store]
        command += ["--transport", TRANSPORT]
        if self._log is None:
            # Lines of the server must not come between those of a command that a test captures in this process.
            command += ["--log-level", "warning"]
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self._log.open("a")) if self._log else None
            self._process = subprocess.Popen([*command, *self._flags], stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("listening on "):
            process = self._process
            self.kill()
            raise NotStartedError(f"the server said {line!r} instead of where it listens", process.returncode)
        self.address = self._listen = line.removeprefix("listening on ").strip()
        if "--http" in self._flags:
            self.http = self._process.stdout.readline().removeprefix("listening on ").strip()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, timeout_seconds: float = 30) -> int:
        """Wait for its end; return its exit code, negative where a signal ended it."""
        assert self._process is not None
        code = self._process.wait(timeout_seconds)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def terminate(self) -> int:
        """Ask it to drain and stop; return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.kill()
        self.wait()
        self._process = None

    def restart(self) -> None:
        """Start it again on the port and the store that it had."""
        self.kill()
        self.start()


@contextlib.asynccontextmanager
async def serving(store: JobStore, **settings: Any) -> AsyncIterator[JobStatusServiceAsyncStub]:
    """As serving_at, without the address."""
    async with serving_at(store, **settings) as (stub, _):
        yield stub


@contextlib.asynccontextmanager
async def serving_at(
    store: JobStore,
    *,
    drain_grace: timedelta = timedelta(seconds=2),
    request_log: RequestLog | None = None,
    tracing: ServerTracing | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[JobStatusServiceAsyncStub, str]]:
    """Serve a store within the running event loop, and yield a stub and the address.

    At the end of the block the server drains; running calls on the stub see that.
    """
    settings = {"transport": TRANSPORT, **settings}
    config = ServerConfig(listen=("127.0.0.1:0",), drain_grace=drain_grace, **settings)
    async with (
        contextlib.AsyncExitStack() as after_the_server,
        _Server(config, store, _Files(config), ServerLog(calls=request_log), tracing=tracing) as server,
    ):
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.aio.insecure_channel(server.addresses[0], options=options)
        # With a grace period: replies that are under way still arrive.
        after_the_server.push_async_callback(channel.close, 1)
        yield JobStatusServiceStub(channel), server.addresses[0]


@contextlib.asynccontextmanager
async def serving_web(store: JobStore, **settings: Any) -> AsyncIterator[str]:
    """Serve a store with an HTTP gateway within the running event loop, and yield the URL of the HTTP gateway."""
    config = ServerConfig(listen=("127.0.0.1:0",), http="127.0.0.1:0", drain_grace=timedelta(seconds=2), **settings)
    async with _Server(config, store, _Files(config), ServerLog()) as server:
        yield server.addresses[-1]
