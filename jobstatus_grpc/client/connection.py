"""What a client holds: its channel, the calls and the watches on it."""

from __future__ import annotations

import asyncio
import atexit
import sys
import threading
import weakref
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import Message
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from jobstatus_grpc.client.endpoint import Endpoint, Pems
from jobstatus_grpc.client.fork import background_call, keep_for_ever, renew_in_children, renewed
from jobstatus_grpc.client.retry import ClientClosedError, Liveness, ProxyRefusals, RetryBudget, pause
from jobstatus_grpc.client.sender import Call
from jobstatus_grpc.client.watch import (
    AsyncJobsWatch,
    AsyncPage,
    AsyncWatch,
    AsyncWatchIterator,
    JobsWatch,
    JobsWatchState,
    JobWatchState,
    Page,
    Watch,
    Watchdog,
    WatchIterator,
)
from jobstatus_grpc.errors import DeadlineExceededError, JobStatusError, UnavailableError
from jobstatus_grpc.wire import status

if TYPE_CHECKING:
    from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceAsyncStub

    from jobstatus_grpc.telemetry import ClientTracing

_WITHOUT_SPAN: AbstractContextManager[None] = nullcontext()

SERVICE = pb.DESCRIPTOR.services_by_name["JobStatusService"].full_name

DEFAULT_TIMEOUT_SECONDS = 10.0
"""Deadline of a call: outlasts a restart of the server, which takes a few seconds."""


def open_tracing() -> ClientTracing:
    """Return what makes spans with the program's provider; raise ModuleNotFoundError if OpenTelemetry is missing."""
    try:
        from jobstatus_grpc.telemetry import ClientTracing
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("opentelemetry"):
            raise
        raise ModuleNotFoundError("tracing needs an extra; pip install 'jobstatus-grpc[otel]'") from None
    return ClientTracing()


class AsyncLine:
    """A channel of one event loop."""

    def __init__(self, endpoint: Endpoint, pems: Pems | None, *, before: AsyncLine | None) -> None:
        """Open a channel with `pems` in the place of another; None: there is none."""
        self.pems = pems
        self.channel = endpoint.open_aio(pems)
        self.stub: JobStatusServiceAsyncStub = JobStatusServiceStub(self.channel)
        self.liveness: Liveness = Liveness(before.liveness if before is not None else None)
        self.closing = asyncio.Event()

    async def close(self) -> None:
        """End all calls."""
        self.closing.set()
        await self.channel.close()


_is_aio_used = False
"""Whether this process, or the one that it was forked from, has opened a channel of asyncio."""

_is_aio_lost = False
"""Whether this process was forked after that: grpc.aio does not work then, calls would hang."""

AIO_LOST = (
    "gRPC's asyncio does not work in a process that was forked after its parent used it; "
    "start processes with multiprocessing's spawn or forkserver"
)


class _CallSettings:
    """What the calls of a connection have in common, on an event loop or in threads."""

    def __init__(self, endpoint: Endpoint, timeout_seconds: float, tracing: ClientTracing | None) -> None:
        self.timeout_seconds = timeout_seconds
        self.tracing = tracing
        """Makes the spans of calls; None: without."""
        self._endpoint = endpoint
        self.target = endpoint.target

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._endpoint, self.timeout_seconds, self.tracing)

    @property
    def trace_parent(self) -> str:
        """The active span as a W3C traceparent; empty if it is not sampled, or calls are not traced."""
        return "" if self.tracing is None else self.tracing.trace_parent()

    def retry_budget(self, timeout_seconds: float | None) -> RetryBudget:
        """Return the budget of a call that begins now; a timeout of None is the client's."""
        return RetryBudget(self.timeout_seconds if timeout_seconds is None else timeout_seconds)

    def _metadata(self) -> tuple[tuple[str, str], ...] | None:
        metadata = self._endpoint.metadata
        return metadata if self.tracing is None else (*(metadata or ()), *self.tracing.metadata())

    def _span(self, method: str) -> AbstractContextManager[Any]:
        """Return a context for a call: its span, if calls are traced."""
        return _WITHOUT_SPAN if self.tracing is None else self.tracing.call(SERVICE, method)

    def _prepare(self, state: JobWatchState | JobsWatchState) -> None:
        """Give a new watch what it needs of the connection."""
        state.renew_token = self._endpoint.renew_token
        state.on_received = None if self.tracing is None else self.tracing.received


class AsyncConnection(_CallSettings):
    """A channel in each event loop that makes calls, which opens with the first call; closed once.

    The place of a channel that died, or that uses old credentials, is taken by a new one; it is closed when its last
    call has ended.
    """

    def __init__(self, endpoint: Endpoint, timeout_seconds: float, tracing: ClientTracing | None = None) -> None:
        super().__init__(endpoint, timeout_seconds, tracing)
        self._lines: dict[asyncio.AbstractEventLoop, AsyncLine] = {}
        self._dead_lines: dict[AsyncLine, asyncio.AbstractEventLoop] = {}
        self._closes: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._watches: weakref.WeakSet[AsyncWatchIterator[Any]] = weakref.WeakSet()
        self._proxy_refusals: defaultdict[str, ProxyRefusals] = defaultdict(ProxyRefusals)
        renew_in_children(self, AsyncConnection._after_fork)

    def _after_fork(self) -> None:
        global _is_aio_lost
        _is_aio_lost = _is_aio_used
        keep_for_ever((self._lines, self._dead_lines))
        self._lines, self._dead_lines = {}, {}

    def _line(self) -> AsyncLine:
        """Return the channel of the running event loop.

        Raises:
            ClientClosedError: the client is closed.
            UnavailableError: this process was forked after its parent used gRPC's asyncio.
        """
        global _is_aio_used
        if self._is_closed:
            raise ClientClosedError
        if _is_aio_lost:
            raise UnavailableError(AIO_LOST)
        _is_aio_used = True
        loop = asyncio.get_running_loop()
        line = self._lines.get(loop)
        pems = self._endpoint.pems()
        if line is None or line.liveness.is_dead or line.pems is not pems:
            for other in [other for other in list(self._lines) if other.is_closed()]:
                del self._lines[other]
            if line is not None:
                self._dead_lines[line] = loop
            line = self._lines[loop] = AsyncLine(self._endpoint, pems, before=line)
        if self._dead_lines:
            self._close_idle_lines(loop)
        return line

    def _close_idle_lines(self, running: asyncio.AbstractEventLoop) -> None:
        for line, loop in list(self._dead_lines.items()):
            if loop.is_closed() or (loop is running and line.liveness.is_idle):
                del self._dead_lines[line]
                if loop is running:
                    close = loop.create_task(line.close())
                    self._closes.add(close)
                    close.add_done_callback(self._closes.discard)

    async def call(
        self, method: str, request: Message, timeout_seconds: float | None = None, budget: RetryBudget | None = None
    ) -> Any:
        """Call `method`, and again as the budget allows; by default that of `retry_budget(timeout_seconds)`."""
        budget = budget or self.retry_budget(timeout_seconds)
        with self._span(method):
            return await self._call(method, request, budget)

    async def _call(self, method: str, request: Message, budget: RetryBudget) -> Any:
        while True:
            line = self._line()
            try:
                return await self._send(line, method, request, budget.left_seconds)
            except grpc.RpcError as error:
                pause_seconds = budget.pause_seconds(error)
            await pause(pause_seconds, unless=line.closing)
            if self._is_closed:
                raise ClientClosedError

    async def send_once(self, call: Call, timeout_seconds: float) -> Any:
        """Make a call of a tracked job or a reporter, which retry by their own rules."""
        refusals = self._proxy_refusals[call.method]
        try:
            with self._span(call.method):
                response = await self._send(self._line(), call.method, call.request, timeout_seconds)
            refusals.service_answered()
            return response
        except grpc.RpcError as error:
            raise _meaning_of(error, refusals) from error

    async def _send(self, line: AsyncLine, method: str, request: Message, timeout_seconds: float) -> Any:
        call, liveness = object(), line.liveness
        liveness.begin(call)
        try:
            response = await getattr(line.stub, method)(request, timeout=timeout_seconds, metadata=self._metadata())
            liveness.received()
            return response
        except grpc.RpcError as error:
            liveness.failed(error)
            raise
        except asyncio.CancelledError:
            self._raise_if_closed()
            raise
        finally:
            liveness.end(call)

    def watch(self, state: JobWatchState) -> AsyncWatch:
        """Return a watch that opens its streams on this connection."""
        self._prepare(state)
        watch = AsyncWatch(state, lambda: self._open_stream(state))
        self._watches.add(watch)
        return watch

    def watch_jobs(self, state: JobsWatchState) -> AsyncJobsWatch:
        """Return a watch of many jobs that opens its streams on this connection."""
        self._prepare(state)
        watch = AsyncJobsWatch(state, lambda: self._open_stream(state))
        self._watches.add(watch)
        return watch

    def _open_stream(self, state: JobWatchState | JobsWatchState) -> tuple[Any, Liveness]:
        line = self._line()
        page = state.list_request if isinstance(state, JobsWatchState) else None
        if page is not None:
            call = line.stub.ListJobs(page, timeout=state.begin(), metadata=self._metadata())
            return AsyncPage(call), line.liveness
        method = getattr(line.stub, state.METHOD)
        return method(state.request, timeout=state.begin(), metadata=self._metadata()), line.liveness

    async def close(self) -> None:
        """End all calls and watches with ClientClosedError, and refuse new ones."""
        self._is_closed = True
        running = asyncio.get_running_loop()
        for watch in list(self._watches):
            watch.abandon(ClientClosedError())
        lines = [*((line, loop) for loop, line in self._lines.items()), *self._dead_lines.items()]
        self._lines, self._dead_lines = {}, {}
        for line, loop in lines:
            if loop is running:
                await line.close()
            elif not loop.is_closed():
                asyncio.run_coroutine_threadsafe(line.close(), loop)

    def _raise_if_closed(self) -> None:
        """Raise ClientClosedError if `close` cancelled the call and not another task; impossible in Python 3.10."""
        task = asyncio.current_task()
        if self._is_closed and task is not None and sys.version_info >= (3, 11) and not task.cancelling():
            raise ClientClosedError from None


class Line:
    """A channel that threads may share."""

    def __init__(self, endpoint: Endpoint, pems: Pems | None, *, before: Line | None) -> None:
        """Open a channel with `pems` in the place of another; None: there is none."""
        self.pems = pems
        self.channel = endpoint.open(pems)
        self.stub = JobStatusServiceStub(self.channel)
        self.liveness: Liveness = Liveness(before.liveness if before is not None else None)


class Connection(_CallSettings):
    """As AsyncConnection, for threads, which share one channel."""

    def __init__(self, endpoint: Endpoint, timeout_seconds: float, tracing: ClientTracing | None = None) -> None:
        super().__init__(endpoint, timeout_seconds, tracing)
        self._current: Line | None = None
        self._dead_lines: list[Line] = []
        self._closing = threading.Event()
        self._watches: weakref.WeakSet[WatchIterator[Any]] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._watchdog = Watchdog()
        self._proxy_refusals: defaultdict[str, ProxyRefusals] = defaultdict(ProxyRefusals)
        _opened.add(self)
        renew_in_children(self, Connection._after_fork)

    def _after_fork(self) -> None:
        keep_for_ever((self._current, self._dead_lines))
        self._current, self._dead_lines = None, []
        self._lock = threading.Lock()
        self._closing = renewed(self._closing)

    def _line(self) -> Line:
        """As of AsyncConnection."""
        line, pems = self._current, self._endpoint.pems()
        is_current = line is not None and line.pems is pems and not line.liveness.is_dead
        if line is None or not is_current or self._dead_lines or self._closing.is_set():
            with self._lock:
                line = self._line_locked()
        return line

    def _line_locked(self) -> Line:
        if self._closing.is_set():
            raise ClientClosedError
        line, pems = self._current, self._endpoint.pems()
        if line is None or line.liveness.is_dead or line.pems is not pems:
            if line is not None:
                self._dead_lines.append(line)
            line = self._current = Line(self._endpoint, pems, before=line)
        for idle in [line for line in self._dead_lines if line.liveness.is_idle]:
            self._dead_lines.remove(idle)
            idle.channel.close()
        return line

    def call(
        self, method: str, request: Message, timeout_seconds: float | None = None, budget: RetryBudget | None = None
    ) -> Any:
        """As of AsyncConnection."""
        budget = budget or self.retry_budget(timeout_seconds)
        with self._span(method):
            return self._call(method, request, budget)

    def _call(self, method: str, request: Message, budget: RetryBudget) -> Any:
        while True:
            try:
                return self._send(self._line(), method, request, budget.left_seconds)
            except grpc.RpcError as error:
                pause_seconds = 0.0 if self._closing.is_set() else budget.pause_seconds(error)
            if self._closing.wait(pause_seconds):
                raise ClientClosedError

    def send_once(self, call: Call, timeout_seconds: float) -> Any:
        """As of AsyncConnection."""
        refusals = self._proxy_refusals[call.method]
        try:
            with background_call, self._span(call.method):
                response = self._send(self._line(), call.method, call.request, timeout_seconds)
            refusals.service_answered()
            return response
        except grpc.RpcError as error:
            raise (ClientClosedError() if self._closing.is_set() else _meaning_of(error, refusals)) from error

    def _send(self, line: Line, method: str, request: Message, timeout_seconds: float) -> Any:
        call, liveness = object(), line.liveness
        liveness.begin(call)
        try:
            response = getattr(line.stub, method)(request, timeout_seconds, self._metadata())
            liveness.received()
            return response
        except grpc.RpcError as error:
            liveness.failed(error)
            # Without the frames of grpc: their variables have the token, and error trackers send variables.
            raise error.with_traceback(None) from None
        except ValueError as error:  # the channel is closed
            raise (ClientClosedError() if self._closing.is_set() else error.with_traceback(None)) from None
        finally:
            liveness.end(call)

    def watch(self, state: JobWatchState) -> Watch:
        """As of AsyncConnection."""
        self._prepare(state)
        watch = Watch(state, lambda: self._open_stream(state), self._watchdog)
        with self._lock:
            self._watches.add(watch)
        return watch

    def watch_jobs(self, state: JobsWatchState) -> JobsWatch:
        """As of AsyncConnection."""
        self._prepare(state)
        watch = JobsWatch(state, lambda: self._open_stream(state), self._watchdog)
        with self._lock:
            self._watches.add(watch)
        return watch

    def _open_stream(self, state: JobWatchState | JobsWatchState) -> tuple[Any, Liveness]:
        line = self._line()
        page = state.list_request if isinstance(state, JobsWatchState) else None
        try:
            if page is not None:
                return Page(line.stub.ListJobs.future(page, state.begin(), self._metadata())), line.liveness
            return getattr(line.stub, state.METHOD)(state.request, state.begin(), self._metadata()), line.liveness
        except ValueError as error:  # the channel is closed; without frames, as in `_send`
            raise (ClientClosedError() if self._closing.is_set() else error.with_traceback(None)) from None

    def close(self) -> None:
        """End all calls and watches with ClientClosedError, and refuse new ones."""
        self._closing.set()
        with self._lock:
            watches = list(self._watches)
            lines = [*self._dead_lines, *filter(None, [self._current])]
        for watch in watches:
            watch.abandon(ClientClosedError())
        for line in lines:
            line.channel.close()


def _meaning_of(error: grpc.RpcError, refusals: ProxyRefusals) -> JobStatusError:
    meaning = status.from_rpc_error(error)
    if not refusals.is_outage(error) or isinstance(meaning, DeadlineExceededError):
        return meaning
    return UnavailableError(f"a proxy refused the call: {meaning}")


_opened: weakref.WeakSet[Connection] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close what was left open: grpc may hang at the end of the interpreter while calls are open."""
    for connection in list(_opened):
        connection.close()
