"""The native transport: pygrpc-native speaks HTTP/2 in threads of its own, and calls run on the event loop.

A front for each address takes the calls of the service and of health. It passes all others, such as reflection, on to a
grpcio server behind it, on a Unix socket of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias, cast

import grpc
from pygrpc_native import EVENT_CANCEL, STREAM_CLOSED, STREAM_FULL, STREAM_SENT, NativeGrpcFront

from jobstatus_grpc.errors import DrainingError, InternalError, JobStatusError, StreamAgeError
from jobstatus_grpc.job import limits
from jobstatus_grpc.server.addresses import CannotListenError, private_folder, require_free, unix_path
from jobstatus_grpc.server.config import front_options
from jobstatus_grpc.server.transports.grpcio import Listener
from jobstatus_grpc.server.transports.interface import Metadata, Method
from jobstatus_grpc.wire import status

_log = logging.getLogger("jobstatus_grpc.server")

QUICK_TURNS = 4
"""Turns of the event loop in which a full stream is tried again without a pause."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.001, 0.25
"""Pauses between tries of a full stream; each is half as long again as the one before."""

SEND_MICROSECONDS = 4
"""The cost of a message to a stream. Row `change`: with twice as much, a change takes 6 % longer to reach the last of
1,000 watchers. Row `fanout`: with half of it, an update's p99 during the burst is half as long again."""

Details: TypeAlias = tuple[Metadata, str, "float | None"]
"""What the front says of a call: metadata, peer, and the seconds left until its deadline."""


class CallEndedError(Exception):
    """The call has been given its status; nothing is left to do."""


class NativeCall:
    """A unary call on a front."""

    __slots__ = ("_began_at", "_call_id", "_details", "_front", "done_callback")

    def __init__(self, front: NativeGrpcFront, call_id: int, details: Details) -> None:
        self._front = front
        self._call_id = call_id
        self._details = details
        self._began_at = time.monotonic()
        self.done_callback: Callable[[Any], None] | None = None

    def add_done_callback(self, callback: Callable[[Any], None], /) -> None:
        assert self.done_callback is None, "one is all that is needed"
        self.done_callback = callback

    def invocation_metadata(self) -> Metadata:
        return self._details[0]

    def peer(self) -> str:
        return self._details[1]

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        return {}  # pygrpc-native has no TLS

    def time_remaining(self) -> float | None:
        seconds = self._details[2]
        return None if seconds is None else max(self._began_at + seconds - time.monotonic(), 0.0)

    def fail(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> None:
        """End the call with a status; without effect where it has ended."""
        self._front.fail(self._call_id, code.value[0], details, trailing_metadata)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        self.fail(code, details, trailing_metadata)
        raise CallEndedError


class NativeStream(NativeCall):
    """A call on a front that is answered with a stream."""

    __slots__ = ("_ends_at",)

    def __init__(self, front: NativeGrpcFront, call_id: int, details: Details, *, max_seconds: float) -> None:
        super().__init__(front, call_id, details)
        self._ends_at = time.monotonic() + max_seconds

    def try_send(self, message: bytes) -> int:
        return SEND_MICROSECONDS if self._front.stream_try_send(self._call_id, message) == STREAM_SENT else 0

    async def flush(self) -> None:
        pass  # what is sent is with the front

    async def write(self, message: bytes) -> None:
        sent = self._front.stream_try_send(self._call_id, message)
        if sent == STREAM_FULL:
            sent = await self._write_when_there_is_room(message)
        if sent == STREAM_CLOSED:
            raise asyncio.CancelledError

    async def _write_when_there_is_room(self, message: bytes) -> int:
        # The front has no event for room in a stream: a quick reader makes room within microseconds, and a slow one is
        # polled less and less often.
        pause_seconds = FIRST_PAUSE_SECONDS
        for _ in range(QUICK_TURNS):
            await asyncio.sleep(0)
            sent = self._front.stream_try_send(self._call_id, message)
            if sent != STREAM_FULL:
                return sent
        while time.monotonic() < self._ends_at:
            await asyncio.sleep(pause_seconds)
            sent = self._front.stream_try_send(self._call_id, message)
            if sent != STREAM_FULL:
                return sent
            pause_seconds = min(pause_seconds * 1.5, LONGEST_PAUSE_SECONDS)
        raise StreamAgeError


LOOK_SECONDS = 0.1
"""Between two looks at the number of unsent responses, while one has a callback."""


_Call: TypeAlias = tuple[int, Method, bytes, Details]
"""The front's number for it, and what came with it."""


class FrontCalls:
    """The calls of one front, which was made with the paths of `methods` in this order. Belongs to one event loop.

    Calls may share a task, and so context variables.
    """

    def __init__(self, front: NativeGrpcFront, methods: Sequence[Method], *, max_stream_seconds: float) -> None:
        """A stream with a reader that does not read ends after `max_stream_seconds`."""
        self._front = front
        self._methods = methods
        self._max_stream_seconds = max_stream_seconds
        self._loop = asyncio.get_running_loop()
        self._running: dict[int, asyncio.Task[Any]] = {}
        self._open_streams = 0
        self._unsent: deque[Callable[[Any], None]] = deque()
        """The callbacks of responses that may not have been sent; the front has no event for that."""

    @property
    def are_running(self) -> bool:
        """Whether a call is in progress."""
        return bool(self._running)

    @property
    def unary_running(self) -> int:
        """The number of calls in progress that are not streams."""
        return len(self._running) - self._open_streams

    def begin(self, events: Sequence[Any]) -> None:
        """Handle events of the front: new calls, and calls cancelled by their client or deadline."""
        calls: list[_Call] = []
        for kind, call_id, method_id, payload, _, details in events:
            if kind == EVENT_CANCEL:
                task = self._running.pop(call_id, None)
                if task is not None:
                    task.cancel()
                continue
            call = (call_id, self._methods[method_id], payload, details)
            if call[1].is_stream:
                self._answer_apart([call])
            else:
                calls.append(call)
        if calls:
            rest = iter(calls)
            self._loop.create_task(self._answer_in_turn(rest))
            self._loop.call_soon(self._answer_apart, rest)

    async def cut_off(self, at_most_seconds: float) -> None:
        """End all calls, and wait for their ends."""
        tasks = [*self._running.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=at_most_seconds)

    async def _answer_in_turn(self, calls: Iterator[_Call]) -> None:
        """Answer one call after another until one has to wait; this is its task from then on.

        When the waiting call resumes, `_answer_apart` has taken the rest. Row `get`: with a task for each call, 64
        callers get 5 % fewer responses.
        """
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        for call in calls:
            self._running[call[0]] = task
            await self._answer(*call)

    def _answer_apart(self, calls: Iterable[_Call]) -> None:
        """Answer each call in a task of its own."""
        for call in calls:
            self._running[call[0]] = self._loop.create_task(self._answer(*call))

    async def _answer(self, call_id: int, method: Method, payload: bytes, details: Details) -> None:
        front = self._front
        context = (
            NativeStream(front, call_id, details, max_seconds=self._max_stream_seconds)
            if method.is_stream
            else NativeCall(front, call_id, details)
        )
        self._open_streams += method.is_stream
        try:
            if len(payload) > limits.MAX_REQUEST_BYTES:
                await context.abort(*_too_large(payload))
            if details[2] is not None and details[2] <= 0:  # the front has no event for it, and the client is gone
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
            reply = await method.behaviour(payload, context)
            if method.is_stream:
                front.stream_end(call_id)
            else:
                front.respond(call_id, reply or b"")
        except CallEndedError:
            pass
        except asyncio.CancelledError:
            # The client gets this status if the server cuts the call off; if it left, it gets none.
            context.fail(*status.status_of(DrainingError()))
            raise
        except JobStatusError as error:
            context.fail(*status.status_of(error))
        except Exception:
            _log.exception("%s failed; the client gets INTERNAL. This is a bug in the server: report it", method.path)
            context.fail(*status.status_of(InternalError("the server failed; its log has the details")))
        finally:
            self._running.pop(call_id, None)
            self._open_streams -= method.is_stream
            if context.done_callback is not None:
                self._unsent.append(context.done_callback)
                if len(self._unsent) == 1:
                    self._loop.call_later(LOOK_SECONDS, self._look_at_unsent)

    def _look_at_unsent(self) -> None:
        """Call the callbacks of responses that have been sent, as far as their number shows; and look again."""
        unsent = self._unfinished_unary_calls() - self.unary_running
        # Fewer than none: a client has cancelled a call that is still running.
        while len(self._unsent) > max(unsent, 0):
            self._unsent.popleft()(None)
        if self._unsent:
            self._loop.call_later(LOOK_SECONDS, self._look_at_unsent)

    def _unfinished_unary_calls(self) -> int:
        paths = {method.path for method in self._methods if not method.is_stream}
        return sum(count for path, count in unfinished_calls(self._front).items() if path in paths)


def unfinished_calls(front: NativeGrpcFront) -> dict[str, int]:
    """Return, by path, the number of calls that have not been sent their status."""
    metrics: Any = front.metrics()
    return {
        path: of["started"] - sum(ends["count"] for ends in of["status"].values())
        for path, of in metrics["methods"].items()
    }


def _too_large(payload: bytes) -> tuple[grpc.StatusCode, str]:
    """Return the status with which grpcio's core refuses a request of this size."""
    text = f"SERVER: Received message larger than max ({len(payload)} vs. {limits.MAX_REQUEST_BYTES})"
    return grpc.StatusCode.RESOURCE_EXHAUSTED, text


MAX_EVENTS = 64
"""Events handled in one turn of the event loop, so that watches and responses get their turns in between."""
POLL_SECONDS = 0.01
"""Interval at which a stop looks at the calls and at what is being sent."""
SEND_SECONDS = 1.0
"""Time for a stop to wait for statuses being sent."""
FLUSH_SECONDS = 0.05
"""Time between the last write and closing the sockets, which would discard unsent bytes."""
END_SECONDS = 0.5
"""Time for calls that are cut off to end."""


class NativeServer:
    """Serves `methods` on `addresses` (`host:port` or `unix:/path`), and everything else by the server of `build_rest`.

    With `is_shared` other workers listen on the addresses too; their supervisor has checked that they are free.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        methods: Sequence[Method],
        build_rest: Callable[[], grpc.aio.Server],
        *,
        is_shared: bool,
        max_stream_seconds: float,
        unix_mode: int = 0o600,
    ) -> None:
        """A stream with a reader that does not read ends after `max_stream_seconds`."""
        self._addresses = addresses
        self._methods = methods
        self._build_rest = build_rest
        self._is_shared = is_shared
        self._max_stream_seconds = max_stream_seconds
        self._unix_mode = unix_mode
        self._fronts: list[_Front] = []
        self._undo = contextlib.AsyncExitStack()

    async def start(self) -> list[str]:
        """Listen, and return the addresses as bound.

        Raises:
            CannotListenError: nothing listens.
        """
        async with contextlib.AsyncExitStack() as undo:
            rest = f"{undo.enter_context(private_folder())}/rest"
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
            if path := unix_path(address):
                os.chmod(path, self._unix_mode)
        except OSError as error:
            raise CannotListenError(address, error.errno, str(error.strerror)) from None
        front.set_fallback(rest)
        bound = address if path else f"{address.rpartition(':')[0]}:{front.bound_port}"
        return _Front(bound, front, FrontCalls(front, self._methods, max_stream_seconds=self._max_stream_seconds))


class _Front:
    """A front, and the thread that waits for its events."""

    def __init__(self, address: str, front: NativeGrpcFront, calls: FrontCalls) -> None:
        self.address = address
        self._front = front
        self._calls = calls
        self._loop = asyncio.get_running_loop()
        self._is_quiet = threading.Lock()  # free once, when the loop has taken all events
        self._is_quiet.acquire()
        self._thread = threading.Thread(target=self._wait_for_calls, name=f"native {address}", daemon=True)

    def start(self) -> None:
        self._front.start()
        self._thread.start()

    async def finish(self, ends_at: float) -> None:
        """Wait until the running calls have ended and their statuses are sent; after `ends_at` cut them off."""
        await self._wait_while(lambda: self._calls.are_running, ends_at)
        # Bounded, because clients retry calls that are refused: there may always be another status to send.
        await self._wait_while(self._is_sending, min(ends_at, time.monotonic() + SEND_SECONDS))
        await self._calls.cut_off(END_SECONDS)
        await asyncio.sleep(FLUSH_SECONDS)

    async def close(self) -> None:
        await asyncio.to_thread(self._front.close)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    async def _wait_while(self, condition: Callable[[], bool], until: float) -> None:
        while condition() and time.monotonic() < until:  # noqa: ASYNC110 - the front has no event for it
            await asyncio.sleep(POLL_SECONDS)

    def _is_sending(self) -> bool:
        """Return whether a call has not been sent its status."""
        return any(unfinished_calls(self._front).values())

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
            self._loop.call_soon(self._wait_or_take_more, len(events) == 1)

    def _wait_or_take_more(self, is_lone: bool) -> None:
        """Let the thread wait again at once if a lone call waits for its commit, else take more events before.

        In the next turn the commit is passed to the store's thread, with which this thread competes for the interpreter
        until it waits. Row `update`: without this, an update by one caller takes a tenth longer.
        """
        if is_lone and self._calls.unary_running:
            self._loop.call_soon(self._is_quiet.release)
        else:
            self._take_more()

    def _take_more(self) -> None:
        """Handle events that have come since. Without any, let the thread wait again: waking it costs two switches.

        Row `get`: without this, a lone caller gets a quarter fewer responses.
        """
        events = self._front.recv_batch_details(MAX_EVENTS, 0)
        if events:
            self._take(events)
        else:
            self._is_quiet.release()
