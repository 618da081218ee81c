"""Runs the calls that a native front has taken: on the event loop, with as few tasks as can be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import grpc
from pygrpc_native import EVENT_CANCEL, NativeGrpcFront

from jobstatus_grpc import limits
from jobstatus_grpc.errors import DrainingError, InternalError, JobStatusError
from jobstatus_grpc.server.native_context import CallContext, CallEndedError, Details, StreamContext
from jobstatus_grpc.wire import status

_log = logging.getLogger("jobstatus_grpc.server")


@dataclass(frozen=True, slots=True)
class Method:
    """How calls of one method are answered, from bytes to bytes."""

    path: str
    behaviour: Callable[[bytes, Any], Awaitable[bytes | None]]
    is_stream: bool


_Call: TypeAlias = tuple[int, Method, bytes, Details]
"""The front's number for it, and what came with it."""


def method_of(path: str, handler: grpc.RpcMethodHandler[Any, Any]) -> Method:
    """Return the method that a handler answers; where it wants messages they are parsed, and its own serialised."""
    is_stream = handler.response_streaming
    behaviour = cast(Any, handler.unary_stream if is_stream else handler.unary_unary)
    parse, serialise = handler.request_deserializer, handler.response_serializer
    if parse is None or serialise is None:
        return Method(path, behaviour, is_stream)

    async def answer(data: bytes, context: CallContext) -> bytes:
        return serialise(await behaviour(parse(data), context))

    async def stream(data: bytes, context: StreamContext) -> None:
        await behaviour(parse(data), _MessageContext(context, serialise))

    return Method(path, stream if is_stream else answer, is_stream)


class _MessageContext:
    """A stream's context that serialises the messages written."""

    def __init__(self, context: StreamContext, serialise: Callable[[Any], bytes]) -> None:
        self.abort = context.abort
        self._context = context
        self._serialise = serialise

    async def write(self, message: Any) -> None:
        await self._context.write(self._serialise(message))


class FrontCalls:
    """The calls of one front, whose methods are `methods`, in their order. Belongs to one event loop.

    Calls share tasks, and so context variables.
    """

    def __init__(self, front: NativeGrpcFront, methods: Sequence[Method], *, max_stream_seconds: float) -> None:
        """Run nothing yet; a stream whose reader does not read ends after `max_stream_seconds`."""
        self._front = front
        self._methods = methods
        self._max_stream_seconds = max_stream_seconds
        self._loop = asyncio.get_running_loop()
        self._running: dict[int, asyncio.Task[Any]] = {}

    @property
    def are_running(self) -> bool:
        """Whether there are any."""
        return bool(self._running)

    def begin(self, events: Sequence[Any]) -> None:
        """Take what the front tells: calls that came, and calls whose clients have left or whose deadlines are over."""
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
        """Answer one call after another, as long as none has to wait; then this is the task of that one.

        A task for each call costs twice what all else here does. By the time that the one that waits goes on,
        `_answer_apart` has taken the rest.
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
        try:
            if len(payload) > limits.MAX_REQUEST_BYTES:
                await CallContext(front, call_id, details).abort(*_too_large(payload))
            if method.is_stream:
                context = StreamContext(front, call_id, details, max_seconds=self._max_stream_seconds)
                await method.behaviour(payload, context)
                front.stream_end(call_id)
            else:
                reply = await method.behaviour(payload, CallContext(front, call_id, details))
                front.respond(call_id, reply or b"")
        except CallEndedError:
            pass
        except asyncio.CancelledError:
            # Nobody hears of it but those whom we cut off.
            self._fail(call_id, DrainingError())
            raise
        except JobStatusError as error:
            self._fail(call_id, error)
        except Exception:
            _log.exception("%s failed", method.path)
            self._fail(call_id, InternalError("the server failed; its log has the details"))
        finally:
            self._running.pop(call_id, None)

    def _fail(self, call_id: int, error: JobStatusError) -> None:
        self._front.fail(call_id, status.code_number(error), status.short_message(error), status.trailers_of(error))


def _too_large(payload: bytes) -> tuple[grpc.StatusCode, str]:
    """Return what grpcio says, whose core refuses such a request before it is read."""
    text = f"SERVER: Received message larger than max ({len(payload)} vs. {limits.MAX_REQUEST_BYTES})"
    return grpc.StatusCode.RESOURCE_EXHAUSTED, text
