"""Around every call of our service: its limits, its errors as status, one line in the log."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import grpc

from jobstatus_grpc.errors import (
    DrainingError,
    InternalError,
    JobStatusError,
    TooManyRequestsError,
    TooManyWatchersError,
)
from jobstatus_grpc.server.logs import RequestLog
from jobstatus_grpc.server.servicer import Context
from jobstatus_grpc.watch.watcher import TrySend
from jobstatus_grpc.wire import status

if TYPE_CHECKING:
    from jobstatus_grpc.server.metrics import CallTally

log = logging.getLogger("jobstatus_grpc.server")

REQUEST_ID_KEY = "x-request-id"

MAX_LOGGED_CHARACTERS = 128

QUIET_SECONDS = 0.05

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in its stubs only

Behaviour: TypeAlias = Callable[[bytes, Context], Awaitable[bytes | None]]

Gate: TypeAlias = Callable[[Context], None]


@dataclass(frozen=True, slots=True)
class CallLimits:
    """How much may be open at once. Unary calls and watches are counted apart, so that neither starves the other."""

    max_requests: int
    max_watchers: int
    max_watchers_per_caller: int | None = None


class CallMiddleware:
    """Admits calls, turns errors into status, logs, counts. One instance serves all servers of a process.

    It wraps handlers before a transport gets them, so that all transports serve the same.
    """

    def __init__(
        self,
        limits: CallLimits,
        request_log: RequestLog | None = None,
        tallies: Mapping[str, CallTally] | None = None,
    ) -> None:
        """Take the limits, where to note calls, and where to count them, by method; None: nowhere."""
        self._limits = limits
        self._log = request_log
        self._tallies = tallies or {}
        self._requests = 0
        self._watches = 0
        self._watches_of: Counter[str] = Counter()
        self._is_draining = False
        self._refused = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self, at_most_seconds: float) -> None:
        """Refuse new calls, with an error that says when to try again, until none has come for a moment.

        What the core has received and nobody has taken yet would be CANCELLED when the server stops.
        """
        self._is_draining = True
        ends_at = time.monotonic() + at_most_seconds
        seen = -1
        while seen != self._refused and time.monotonic() < ends_at:
            seen = self._refused
            await asyncio.sleep(QUIET_SECONDS)

    async def finished(self) -> None:
        """Wait until no call is running."""
        await self._idle.wait()

    def wrap(self, name: str, handler: Handler) -> Handler:
        """Return the handler of the method `name` of our service, wrapped."""
        if handler.response_streaming:
            behaviour = cast(Behaviour, handler.unary_stream)
            tally = self._tallies.get(name)
            if tally is not None:
                behaviour = _counting_messages(behaviour, tally)
            watch = self._around(name, behaviour, self._admit_watch, self._end_watch)
            return grpc.unary_stream_rpc_method_handler(cast(Any, watch))
        behaviour = cast(Behaviour, handler.unary_unary)
        request = self._around(name, behaviour, self._admit_request, self._end_request)
        return grpc.unary_unary_rpc_method_handler(cast(Any, request))

    def _admit_request(self, context: Context) -> None:
        if self._requests >= self._limits.max_requests:
            raise TooManyRequestsError
        self._requests += 1
        self._idle.clear()

    def _end_request(self, context: Context) -> None:
        self._requests -= 1
        self._note_end()

    def _admit_watch(self, context: Context) -> None:
        if self._watches >= self._limits.max_watchers:
            raise TooManyWatchersError
        host = _host_of(context)
        of_caller = self._limits.max_watchers_per_caller
        if of_caller is not None and self._watches_of[host] >= of_caller:
            raise TooManyWatchersError("you have as many open watches as you may; end some, or try again later")
        self._watches += 1
        self._watches_of[host] += 1
        self._idle.clear()

    def _end_watch(self, context: Context) -> None:
        host = _host_of(context)
        self._watches -= 1
        self._watches_of[host] -= 1
        if not self._watches_of[host]:
            del self._watches_of[host]
        self._note_end()

    def _note_end(self) -> None:
        if not self._requests and not self._watches:
            self._idle.set()

    def _around(self, name: str, behaviour: Behaviour, admit: Gate, end: Gate) -> Behaviour:
        tally = self._tallies.get(name)

        async def answered(data: bytes, context: Context) -> bytes | None:
            started = time.perf_counter()
            code = "OK"
            if tally is not None:
                tally.started += 1
            try:
                if self._is_draining:
                    self._refused += 1
                    raise DrainingError
                admit(context)
                try:
                    return await behaviour(data, context)
                finally:
                    end(context)
            except JobStatusError as error:
                code = status.code_of(error).name
                await _abort(context, error)
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except grpc.aio.InternalError:
                # How a write ends that the client's departure interrupts. grpc logs a traceback for anything else.
                code = "CANCELLED"
                raise asyncio.CancelledError from None
            except Exception as error:
                code = "INTERNAL"
                await _abort(context, _masked(name, error))
            finally:
                seconds = time.perf_counter() - started
                if tally is not None:
                    tally.end(code, seconds)
                if self._log is not None:
                    self._log.write(name, code, seconds, context.peer(), _request_id(context))
            return None

        return answered


class _CountingContext:
    """A stream's context that counts the messages written."""

    __slots__ = ("_context", "_tally", "try_send")

    def __init__(self, context: Context, tally: CallTally) -> None:
        self._context = context
        self._tally = tally
        try_send = getattr(context, "try_send", None)
        self.try_send = None if try_send is None else self._counting(try_send)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: bytes) -> None:
        await self._context.write(message)
        self._tally.sent += 1

    def _counting(self, try_send: TrySend) -> TrySend:
        def try_and_count(message: bytes) -> bool:
            is_sent = try_send(message)
            self._tally.sent += is_sent
            return is_sent

        return try_and_count


def _counting_messages(behaviour: Behaviour, tally: CallTally) -> Behaviour:
    return lambda data, context: behaviour(data, cast(Context, _CountingContext(context, tally)))


async def _abort(context: Context, error: JobStatusError) -> None:
    await context.abort(status.code_of(error), status.short_message(error), status.trailers_of(error))


def _masked(name: str, error: Exception) -> InternalError:
    """Log an error that nobody foresaw, and return what its caller may see of it."""
    error_id = uuid.uuid4().hex
    log.error("%s failed, error id %s", name, error_id, exc_info=error)
    return InternalError(f"the server failed; its log has the details under the id {error_id}", error_id=error_id)


def _host_of(context: Context) -> str:
    return context.peer().rpartition(":")[0]


def _request_id(context: Context) -> str:
    """Return the caller's own id for this call, if it sent one."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY:
            return str(value)[:MAX_LOGGED_CHARACTERS]
    return ""
