"""Sends calls that a state machine decides on (TrackState, ReporterState), from a task or a thread."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from google.protobuf.message import Message

from jobstatus_grpc.client.fork import renew_in_children
from jobstatus_grpc.client.retry import pause


@dataclass(frozen=True, slots=True)
class Call:
    """One call to make."""

    method: str
    """The RPC's name."""
    request: Message
    changes: Mapping[str, Any] = field(default_factory=dict)
    """The fields that count as reported once the call succeeds."""


class Calls(Protocol):
    """Decides what to send and when. Its methods may be called from any thread."""

    wake: Callable[[], None]
    """Set by the sender; called when the next call may be due sooner than `due_in_seconds` last said."""

    def due_in_seconds(self) -> float | None:
        """Return the time until the next call is due; None: there is none, sending is over."""

    def next_call(self) -> tuple[Call, float]:
        """Return the call to send now, and its deadline in seconds."""
        ...

    def succeeded(self, call: Call, response: Any) -> None:
        """Take the response to a call."""

    def failed(self, call: Call, error: Exception) -> None:
        """Take the error of a call; whether to retry is decided here."""

    def crashed(self, error: Exception) -> None:
        """Take an error that sending cannot go on after; `due_in_seconds` returns None from now on."""

    def put_back(self, call: Call) -> None:
        """Take back a call that was cancelled on this side: it may or may not have taken effect."""

    def after_fork(self) -> None:
        """Begin anew in a forked child: what was pending is the parent's to send."""

    def has_pending(self) -> bool:
        """Return whether there is something to send, other than heartbeats."""
        ...


class AsyncFinishing:
    """What a client's blocks still send after their end: a block that is cancelled is left at once."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    async def finish(self, sending: Coroutine[Any, Any, None]) -> None:
        """Wait for the end of `sending`; a caller that is cancelled leaves at once, and the sending goes on.

        A cancellation may come again with every await: anyio cancels a scope for as long as a task is in it.
        """
        task = asyncio.get_running_loop().create_task(sending)
        for tasks in (self._tasks, _finishing):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.shield(task)

    async def close(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Call `close` once all is sent."""
        if self._tasks:
            await self.finish(self._close(set(self._tasks), close))
        else:
            await close()

    async def _close(self, tasks: set[asyncio.Task[None]], close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await outlast_cancellation(lambda: asyncio.wait(tasks))
        await close()


_finishing: set[asyncio.Task[None]] = set()
"""Of all clients: an event loop itself does not keep its tasks alive."""


async def outlast_cancellation(wait: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Await `wait()` to its end: the end of an event loop cancels all tasks, and then waits for them."""
    while True:
        try:
            await wait()
        except asyncio.CancelledError:
            if sys.version_info >= (3, 11):
                task = asyncio.current_task()
                assert task is not None
                task.uncancel()
        else:
            return


class AsyncSender:
    """Sends from a task: code that blocks the event loop delays the calls."""

    def __init__(
        self,
        calls: Calls,
        send: Callable[[Call, float], Awaitable[Any]],
        finishing: AsyncFinishing,
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        self._calls = calls
        self._send = send
        self._finishing = finishing
        self._on_answer = on_answer
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send, in the running event loop."""
        loop = asyncio.get_running_loop()
        self._calls.wake = lambda: set_from_any_thread(self._wake, loop)
        self._task = loop.create_task(self._send_all())

    async def finish(self, timeout_seconds: float | None = None) -> None:
        """Wait until there is nothing more to send; a call in flight after `timeout_seconds` is cancelled.

        A caller that is cancelled leaves at once, and the sending goes on.
        """
        await self._finishing.finish(self._finish(timeout_seconds))

    async def _finish(self, timeout_seconds: float | None) -> None:
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds

        async def send_all() -> None:
            assert self._task is not None
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            await asyncio.wait({self._task}, timeout=left)
            await self.stop()
            # An event loop that ends cancels the task too; the last calls are then made here.
            await self._send_all()

        await outlast_cancellation(send_all)

    async def stop(self) -> None:
        """Send nothing more."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _send_all(self) -> None:
        try:
            await self._send_while_due()
        except Exception as error:
            # Otherwise the task would end silently, and the job would never be done.
            self._calls.crashed(error)
            self._on_answer()

    async def _send_while_due(self) -> None:
        while (due_in_seconds := self._calls.due_in_seconds()) is not None:
            if due_in_seconds > 0:
                await pause(due_in_seconds, unless=self._wake)
                self._wake.clear()
                continue
            call, timeout_seconds = self._calls.next_call()
            try:
                response = await self._send(call, timeout_seconds)
            except asyncio.CancelledError:
                self._calls.put_back(call)
                raise
            except Exception as error:
                self._calls.failed(call, error)
            else:
                self._calls.succeeded(call, response)
            self._on_answer()


def set_from_any_thread(event: asyncio.Event, loop: asyncio.AbstractEventLoop) -> None:
    """Set an event of `loop`; does nothing once the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)


class Finishing:
    """What a client's blocks still send after their end: an interrupt ends the block at once."""

    def __init__(self) -> None:
        self._sent: set[threading.Event] = set()
        renew_in_children(self, Finishing.__init__)  # the threads of the parent do not run in the child

    def finish(self, all_sent: threading.Event, timeout_seconds: float | None) -> bool:
        """Wait for `all_sent` and return whether it is set. After an interrupt, `close` waits for it."""
        # Not `join`, which takes a thread for ended once it was interrupted.
        self._sent.add(all_sent)
        is_set = all_sent.wait(timeout_seconds)
        self._sent.discard(all_sent)
        return is_set

    def close(self, close: Callable[[], None]) -> None:
        """Call `close` once all is sent."""
        try:
            for all_sent in list(self._sent):
                all_sent.wait()
        finally:
            close()


EXIT_CHECK_SECONDS = 0.2
"""How often a thread of a forked child looks whether the process ends."""


class Sender:
    """Sends from a thread."""

    def __init__(
        self,
        calls: Calls,
        send: Callable[[Call, float], Any],
        finishing: Finishing,
        on_answer: Callable[[], None] = lambda: None,
        *,
        name: str,
    ) -> None:
        self._calls = calls
        self._send = send
        self._finishing = finishing
        self._on_answer = on_answer
        self._wake = threading.Event()
        self._all_sent = threading.Event()
        # With the context of the caller, so that the calls are in its trace.
        run, arguments = contextvars.copy_context().run, (self._run, self._send_while_due)
        self._thread = threading.Thread(target=run, args=arguments, name=name, daemon=True)
        self._starting = threading.Lock()
        self._is_running = self._is_leaving = False

    def after_fork(self) -> bool:
        """In a forked child, send what it reports, in a thread that runs while there is anything to send.

        Returns:
            False: the parent had not begun to send, and this process may.
        """
        if self._thread.ident is None:
            return False
        self.send_in_child()
        return True

    def send_in_child(self) -> None:
        """Send without having been started: what this process reports on a job of another."""
        self._wake = threading.Event()
        self._starting = threading.Lock()
        self._is_running = self._is_leaving = False
        self._calls.after_fork()
        self._calls.wake = self._wake_in_child

    def finish_in_child(self) -> None:
        """Wait until everything is sent, or cannot be sent now."""
        self._is_leaving = True
        if self._is_running:
            self._thread.join()

    def _wake_in_child(self) -> None:
        with self._starting:
            self._wake.set()
            if not self._is_running:
                self._is_running = True
                # No daemon: the process ends when all is sent.
                self._thread = threading.Thread(target=self._run, args=(self._send_in_child,), name=self._thread.name)
                self._thread.start()

    def _send_in_child(self) -> None:
        while True:
            with self._starting:
                if not self._calls.has_pending():
                    self._is_running = False
                    return
            due_in_seconds = self._calls.due_in_seconds()
            is_exiting = self._is_leaving or not threading.main_thread().is_alive()
            if due_in_seconds is None:
                self._is_running = False
                return
            if due_in_seconds > 0 and not is_exiting:
                self._wake.wait(min(due_in_seconds, EXIT_CHECK_SECONDS))
                self._wake.clear()
                continue
            if not self._send_one() and is_exiting:
                return

    def start(self) -> None:
        """Begin to send."""
        self._calls.wake = self._wake.set
        self._thread.start()

    def finish(self, timeout_seconds: float | None = None) -> None:
        """Wait until there is nothing more to send; a call in flight after `timeout_seconds` is not waited for."""
        if self._finishing.finish(self._all_sent, timeout_seconds):
            self._thread.join()
        self._calls.due_in_seconds()  # while the thread is in a call, the timeout is noticed here

    def _run(self, send: Callable[[], None]) -> None:
        try:
            send()
        except Exception as error:
            # Otherwise the thread would end silently, and the job would never be done.
            self._calls.crashed(error)
            self._on_answer()
        finally:
            self._all_sent.set()

    def _send_while_due(self) -> None:
        while (due_in_seconds := self._calls.due_in_seconds()) is not None:
            if due_in_seconds > 0:
                self._wake.wait(due_in_seconds)
                self._wake.clear()
                continue
            self._send_one()

    def _send_one(self) -> bool:
        """Make the next call; return whether it succeeded."""
        call, timeout_seconds = self._calls.next_call()
        try:
            response = self._send(call, timeout_seconds)
        except Exception as error:
            self._calls.failed(call, error)
            is_success = False
        else:
            self._calls.succeeded(call, response)
            is_success = True
        self._on_answer()
        return is_success
