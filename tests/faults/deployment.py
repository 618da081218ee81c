"""A server on SQLite behind a TCP proxy, with a clock that can be set, and the faults that a test causes in it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from unittest import mock

from tests.support.servers import ServerProcess
from tests.support.tcp_proxy import TcpProxy

FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
"""The library of the Debian package `faketime`; None if it is not installed."""


class Deployment:
    """A context manager. Clients call `address`, the proxy's; each fault returns when the server answers again."""

    def __init__(self, folder: Path, *, seed: int, suspended_seconds: float) -> None:
        """`suspended_seconds` is how long `suspend` stops the server."""
        self._suspended_seconds = suspended_seconds
        self._chance = random.Random(seed)
        self._server = ServerProcess(store=f"sqlite:///{folder}/jobs.db")
        self._clock = folder / "clock"
        self._proxy: TcpProxy | None = None

    def __enter__(self) -> Deployment:
        with mock.patch.dict(os.environ, self._environment()):
            self._server.start()
        self._proxy = TcpProxy(self._server.address)
        self._proxy.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.proxy.__exit__(kind, error, trace)
        self._server.kill()

    @property
    def address(self) -> str:
        return self.proxy.address

    @property
    def proxy(self) -> TcpProxy:
        assert self._proxy is not None
        return self._proxy

    async def kill(self) -> None:
        """End the server as a crash does, and start it again."""
        await self._start_after(self._server.kill)

    async def replace(self) -> None:
        """Let the server drain, and start it again."""
        await self._start_after(self._server.terminate)

    async def suspend(self) -> None:
        """Stop the server's process with SIGSTOP, and continue it."""
        self._server.signal(signal.SIGSTOP)
        await asyncio.sleep(self._suspended_seconds)
        self._server.signal(signal.SIGCONT)

    async def set_clock(self) -> None:
        """Set the server's clock to a time up to 12 hours from now, before or after."""
        self._clock.write_text(f"{self._chance.uniform(-12, 12):+.4f}h\n")
        await asyncio.sleep(1)  # the library reads the file once a second

    async def cut(self) -> None:
        """Reset all connections."""
        self.proxy.cut()

    async def cut_after_bytes(self) -> None:
        """Reset each connection after a random number of bytes, for a second."""
        for _ in range(10):
            self.proxy.max_bytes = self._chance.randrange(10, 30_000)
            self.proxy.max_request_bytes = self._chance.randrange(10, 30_000)
            self.proxy.cut()
            await asyncio.sleep(0.1)
        self.proxy.max_bytes = self.proxy.max_request_bytes = None
        self.proxy.cut()

    async def black_hole(self) -> None:
        """Pass nothing on, and reset the connections two seconds later."""
        self.proxy.freeze()
        await asyncio.sleep(2)
        self.proxy.cut()

    async def delay(self) -> None:
        """Delay what is sent by up to 0.3 s, in each connection and direction by another time, for two seconds."""
        self.proxy.delay_seconds = lambda: self._chance.uniform(0, 0.3)
        await asyncio.sleep(2)
        self.proxy.delay_seconds = float

    def faults(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """All faults, by what they are in docs/reliability.md."""
        return {
            "`kill -9` of the server": self.kill,
            "SIGTERM and a new start": self.replace,
            f"SIGSTOP of the server for {self._suspended_seconds:g} s": self.suspend,
            **({"the server's clock set by up to 12 hours, both ways": self.set_clock} if FAKETIME else {}),
            "all connections reset": self.cut,
            "each connection reset after 10 to 30,000 bytes": self.cut_after_bytes,
            "a black hole for 2 s, then a reset": self.black_hole,
            "each connection delayed by up to 0.3 s": self.delay,
        }

    async def _start_after(self, end: Callable[[], object]) -> None:
        with mock.patch.dict(os.environ, self._environment()):
            await asyncio.to_thread(end)
            await asyncio.to_thread(self._server.start)

    def _environment(self) -> dict[str, str]:
        """Return what lets the server's wall clock follow a file. Its monotonic clock stays as it is."""
        if FAKETIME is None:
            return {}
        if not self._clock.exists():
            self._clock.write_text("+0\n")
        return {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(self._clock),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
