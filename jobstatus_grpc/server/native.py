"""The native transport: pygrpc-native speaks HTTP/2 in threads of its own, and our calls run on the event loop.

A front for each address takes the calls of our service and of health. All others, reflection among them, it passes on
to a grpcio server behind it, on a Unix socket of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from pygrpc_native import NativeGrpcFront

from jobstatus_grpc.server.addresses import CannotListenError, require_free, unix_path
from jobstatus_grpc.server.config import front_options
from jobstatus_grpc.server.listener import Listener
from jobstatus_grpc.server.native_calls import FrontCalls, Method

MAX_EVENTS = 64
"""Taken in one turn of the loop; the rest waits for the next, so that watches and replies have theirs."""
LOOK_SECONDS = 0.01
SEND_SECONDS = 1.0
FLUSH_SECONDS = 0.05
END_SECONDS = 0.5


class NativeServer:
    """Serves `methods` on `addresses` (`host:port` or `unix:/path`), and what the server of `build_rest` serves.

    With `is_shared` other processes listen on the addresses too, and somebody else sees to it that nobody else does.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        methods: Sequence[Method],
        build_rest: Callable[[], grpc.aio.Server],
        *,
        is_shared: bool,
        max_stream_seconds: float,
    ) -> None:
        """Listen nowhere yet; a stream whose reader does not read ends after `max_stream_seconds`."""
        self._addresses = addresses
        self._methods = methods
        self._build_rest = build_rest
        self._is_shared = is_shared
        self._max_stream_seconds = max_stream_seconds
        self._fronts: list[_Front] = []
        self._undo = contextlib.AsyncExitStack()

    async def start(self) -> list[str]:
        """Listen, and return the addresses as bound.

        Raises:
            CannotListenError: nothing listens.
        """
        async with contextlib.AsyncExitStack() as undo:
            rest = undo.enter_context(tempfile.TemporaryDirectory(prefix="jobstatus-", ignore_cleanup_errors=True))
            rest += "/rest"
            for address in self._addresses:
                if not self._is_shared:
                    await require_free(address)
                self._fronts.append(self._bind(address, rest))
                undo.push_async_callback(self._fronts[-1].close)
            self._rest = Listener(self._build_rest, [f"unix:{rest}"])
            await self._rest.start()
            for front in self._fronts:
                front.start()
            self._undo = undo.pop_all()
        return [front.address for front in self._fronts]

    async def stop(self, grace_seconds: float) -> None:
        """Give the running calls `grace_seconds`, then cut them off. New ones are served until then."""
        ends_at = time.monotonic() + grace_seconds
        await asyncio.gather(self._rest.stop(grace_seconds), *(front.finish(ends_at) for front in self._fronts))
        await self._undo.aclose()

    def _bind(self, address: str, rest: str) -> _Front:
        paths = [(method.path, method.is_stream) for method in self._methods]
        try:
            front = NativeGrpcFront(address, paths, reuse_port=self._is_shared, **front_options())
        except OSError as error:
            raise CannotListenError(address, error.errno, str(error.strerror)) from None
        front.set_fallback(rest)
        bound = address if unix_path(address) else f"{address.rpartition(':')[0]}:{front.bound_port}"
        return _Front(bound, front, FrontCalls(front, self._methods, max_stream_seconds=self._max_stream_seconds))


class _Front:
    """A front, and the thread that waits for its calls."""

    def __init__(self, address: str, front: NativeGrpcFront, calls: FrontCalls) -> None:
        self.address = address
        self._front = front
        self._calls = calls
        self._loop = asyncio.get_running_loop()
        self._is_quiet = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._wait_for_calls, name=f"native {address}", daemon=True)

    def start(self) -> None:
        self._front.start()
        self._thread.start()

    async def finish(self, ends_at: float) -> None:
        """Wait until the calls that run are answered and have been told so; cut them off when it is too late."""
        await self._wait_while(lambda: self._calls.are_running, ends_at)
        # There may always be some: clients whose calls are refused come back at once.
        await self._wait_while(self._is_sending, min(ends_at, time.monotonic() + SEND_SECONDS))
        await self._calls.cut_off(END_SECONDS)
        # What has been written is on its way to the sockets; closing would throw it away.
        await asyncio.sleep(FLUSH_SECONDS)

    async def close(self) -> None:
        await asyncio.to_thread(self._front.close)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    async def _wait_while(self, condition: Callable[[], bool], until: float) -> None:
        while condition() and time.monotonic() < until:  # noqa: ASYNC110 - the front has no event for it
            await asyncio.sleep(LOOK_SECONDS)

    def _is_sending(self) -> bool:
        """Return whether there are calls whose status has not been sent."""
        metrics: Any = self._front.metrics()
        methods = metrics["methods"].values()
        return any(of["started"] > sum(ends["count"] for ends in of["status"].values()) for of in methods)

    def _wait_for_calls(self) -> None:
        while (events := self._front.recv_batch_details(MAX_EVENTS)) is not None:
            try:
                self._loop.call_soon_threadsafe(self._take, events)
            except RuntimeError:
                return  # the loop is closed
            self._is_quiet.acquire()

    def _take(self, events: Sequence[Any]) -> None:
        try:
            self._calls.begin(events)
        finally:
            self._loop.call_soon(self._take_more)

    def _take_more(self) -> None:
        """Take what has come meanwhile. The thread waits again only when nothing has: its turns cost two switches."""
        events = self._front.recv_batch_details(MAX_EVENTS, 0)
        if events:
            self._take(events)
        else:
            self._is_quiet.release()
