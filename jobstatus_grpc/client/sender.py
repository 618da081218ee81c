"""Who sends reports: a task or a thread of its own. What to send and when is up to the reports."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from google.protobuf.message import Message

from jobstatus_grpc.client.retry import pause


class Reports(Protocol):
    """What is to be sent; see Reporting and Gathering."""

    wake: Callable[[], None]

    def due_in_seconds(self) -> float | None: ...
    def next_step(self) -> tuple[Step, float]: ...
    def succeeded(self, step: Step, response: Any) -> None: ...
    def failed(self, step: Step, error: Exception) -> None: ...
    def put_back(self, step: Step) -> None: ...


class AsyncSender:
    """Sends reports from a task: what holds up the event loop holds them up too."""

    def __init__(
        self,
        reports: Reports,
        send: Callable[[Step, float], Awaitable[Any]],
        answered: Callable[[], None] = lambda: None,
    ) -> None:
        """Take what is to be sent, how, and what to call after each answer."""
        self._reports = reports
        self._send = send
        self._answered = answered
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send, in the running event loop."""
        loop = asyncio.get_running_loop()
        self._reports.wake = lambda: set_from_any_thread(self._wake, loop)
        self._task = loop.create_task(self._send_all())

    async def finish(self, timeout_seconds: float | None = None) -> None:
        """Wait until nothing more is to be sent; a call that is under way after `timeout_seconds` is cancelled."""
        assert self._task is not None
        try:
            await asyncio.wait({self._task}, timeout=timeout_seconds)
            if not self._task.done():
                await self.stop()
            # Where the event loop ends, it cancels that task too, and the end is still to be told.
            await self._send_all()
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Send nothing more."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _send_all(self) -> None:
        while (due_in_seconds := self._reports.due_in_seconds()) is not None:
            if due_in_seconds > 0:
                await pause(due_in_seconds, unless=self._wake)
                self._wake.clear()
                continue
            step, timeout_seconds = self._reports.next_step()
            try:
                response = await self._send(step, timeout_seconds)
            except asyncio.CancelledError:
                self._reports.put_back(step)
                raise
            except Exception as error:
                self._reports.failed(step, error)
            else:
                self._reports.succeeded(step, response)
            self._answered()


def set_from_any_thread(event: asyncio.Event, loop: asyncio.AbstractEventLoop) -> None:
    """Set an event that a task of `loop` may wait for."""
    with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
        loop.call_soon_threadsafe(event.set)


class Sender:
    """Sends reports from a thread."""

    def __init__(
        self,
        reports: Reports,
        send: Callable[[Step, float], Any],
        answered: Callable[[], None] = lambda: None,
        *,
        name: str,
    ) -> None:
        """Take what is to be sent, how, what to call after each answer, and the thread's name."""
        self._reports = reports
        self._send = send
        self._answered = answered
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name=name, daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._reports.wake = self._wake.set
        self._thread.start()

    def finish(self, timeout_seconds: float | None = None) -> None:
        """Wait until nothing more is to be sent; a call that is under way after `timeout_seconds` is left alone."""
        self._thread.join(timeout_seconds)
        self._reports.due_in_seconds()  # the reports give up by their own clock

    def _send_all(self) -> None:
        while (due_in_seconds := self._reports.due_in_seconds()) is not None:
            if due_in_seconds > 0:
                self._wake.wait(due_in_seconds)
                self._wake.clear()
                continue
            step, timeout_seconds = self._reports.next_step()
            try:
                response = self._send(step, timeout_seconds)
            except Exception as error:
                self._reports.failed(step, error)
            else:
                self._reports.succeeded(step, response)
            self._answered()


@dataclass(frozen=True, slots=True)
class Step:
    """One call to make: the RPC's name, its request, and the changes in it that count as reported once it succeeds."""

    method: str
    request: Message
    changes: Mapping[str, Any] = field(default_factory=dict)
    begun_at: float = 0.0
