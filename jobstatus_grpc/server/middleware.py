"""Around each call of the service: its caller, limits of open calls, errors as status, a line in the log, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from jobstatus_grpc.auth import Identity, Role
from jobstatus_grpc.errors import (
    DrainingError,
    InternalError,
    JobStatusError,
    ResourceExhaustedError,
    TooManyRequestsError,
    TooManyWatchersError,
)
from jobstatus_grpc.server.access import LEAST_ROLES, Access
from jobstatus_grpc.server.held_bytes import (
    REQUEST_FACTOR,
    RESPONSE_FACTOR,
    UNCOUNTED_MESSAGE_BYTES,
    UNCOUNTED_REQUEST_BYTES,
    UNCOUNTED_RESPONSE_BYTES,
    WATCH_BYTES,
    HeldBytes,
    OpenCall,
)
from jobstatus_grpc.server.held_refusals import HeldRefusals
from jobstatus_grpc.server.limits import CallerLimits
from jobstatus_grpc.server.logs import RequestLog
from jobstatus_grpc.server.places import Places, host_of
from jobstatus_grpc.server.requests import subject_of, updates_in
from jobstatus_grpc.server.transports.interface import CallContext, Metadata, Method, Rpc, StreamContext
from jobstatus_grpc.wire import status

if TYPE_CHECKING:
    from jobstatus_grpc.server.metrics import CallTally
    from jobstatus_grpc.server.tracing import ServerTracing

log = logging.getLogger("jobstatus_grpc.server")

REQUEST_ID_KEY = "x-request-id"

MAX_LOGGED_CHARACTERS = 128

MAX_REFUSED_BYTES = 64 * 1024
"""Of the request of a call that is refused unread: a larger one is not parsed for the log."""

QUIET_SECONDS = 0.05
"""Time without a new call after which a drain is over."""

_UNGUARDED: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

Admit: TypeAlias = Callable[[Identity, str, int], OpenCall]
"""Counts a call that begins, of a caller (in its own tenant) in a tenant, with a request of this size; raises the error
if there is no place for it."""

End: TypeAlias = Callable[[Identity, str, OpenCall], None]
"""Counts it no more."""

Handler: TypeAlias = Callable[[bytes, Identity, Any], Awaitable["bytes | None"]]
"""From a request's bytes, its caller and a CallContext to the response, or from a StreamContext to None at the end."""


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Limits of open calls. Unary calls and watches are counted separately, so that neither starves the other.

    A long poll counts as a watch.
    """

    max_requests: int
    max_watchers: int
    max_watchers_per_caller: int | None = None


class CallMiddleware:
    """Admits calls, turns errors into status, logs, counts. One instance per process.

    It wraps methods before a transport gets them, so that all transports serve the same.
    """

    def __init__(
        self,
        limits: CallLimits,
        held: HeldBytes,
        access: Access,
        request_log: RequestLog | None = None,
        tallies: Mapping[str, CallTally] | None = None,
        caller_limits: CallerLimits | None = None,
        tracing: ServerTracing | None = None,
    ) -> None:
        """Take the log of calls, the counters by the method's name, the limits of callers, spans; None: without."""
        self._tracing = tracing
        self._limits = limits
        self._held = held
        self._access = access
        self._caller_limits = caller_limits
        self._refusals = HeldRefusals()
        self._log = request_log
        self._tallies = tallies or {}
        self._requests = Places(limits.max_requests)
        self._watches = Places(limits.max_watchers)
        self._is_draining = False
        self._refused = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self, at_most_seconds: float) -> None:
        """Refuse new calls with DrainingError until none has come for QUIET_SECONDS, or `at_most_seconds` are over.

        Calls that grpcio's core has received and not yet passed on would be CANCELLED when the server stops.
        """
        self._is_draining = True
        self._refusals.release()
        ends_at = time.monotonic() + at_most_seconds
        seen = -1
        while seen != self._refused and time.monotonic() < ends_at:
            seen = self._refused
            await asyncio.sleep(QUIET_SECONDS)

    async def finished(self) -> None:
        """Wait until no call is running."""
        await self._idle.wait()

    def wrap(self, rpc: Rpc[Handler]) -> Method:
        """Return an RPC of the service as the method of a transport."""
        if rpc.is_lasting:
            return self._around(rpc, self._admit_watch, self._end_watch)
        return self._around(rpc, self._admit_request, self._end_request)

    async def hold_body(self, context: CallContext, size: int) -> Callable[[], None]:
        """Count `size` bytes of a request that arrive before its call begins, and return what frees them.

        Raises:
            JobStatusError: its caller has no identity, or holds as much memory as it may.
        """
        metadata = context.invocation_metadata() or ()
        caller = self._access.known(context, metadata) or await self._access.identify(context, metadata)
        call = OpenCall(self._share_of(caller), TooManyRequestsError)
        self._held.add(call, size)
        return lambda: self._held.free(call)

    def _admit_request(self, caller: Identity, tenant: str, request_bytes: int) -> OpenCall:
        call = OpenCall(self._share_of(caller), TooManyRequestsError)
        if not self._requests.has(call.caller):
            raise TooManyRequestsError
        if request_bytes > UNCOUNTED_REQUEST_BYTES:
            self._held.add(call, REQUEST_FACTOR * request_bytes)
        self._requests.take(call.caller)
        self._idle.clear()
        return call

    def _end_request(self, caller: Identity, tenant: str, call: OpenCall) -> None:
        self._held.free(call)
        self._requests.free(call.caller)
        self._note_end()

    def _admit_watch(self, caller: Identity, tenant: str, request_bytes: int) -> OpenCall:
        call = OpenCall(self._share_of(caller), TooManyWatchersError)
        if not self._watches.has(call.caller):
            raise TooManyWatchersError
        of_caller = self._limits.max_watchers_per_caller
        if of_caller is not None and self._watches.taken_by(call.caller) >= of_caller:
            raise TooManyWatchersError(
                "you have reached the limit of open watches of one caller; end some, or try again later"
            )
        # grpcio keeps the request as long as the watch is open.
        self._held.add(call, WATCH_BYTES + request_bytes)
        if self._caller_limits is not None:
            try:
                self._caller_limits.begin_watch(caller, tenant)
            except BaseException:
                self._held.free(call)
                raise
        self._watches.take(call.caller)
        self._idle.clear()
        return call

    def _end_watch(self, caller: Identity, tenant: str, call: OpenCall) -> None:
        if self._caller_limits is not None:
            self._caller_limits.end_watch(caller, tenant)
        self._held.free(call)
        self._watches.free(call.caller)
        self._note_end()

    def _share_of(self, caller: Identity) -> str:
        """Return what calls are counted by: without authentication a caller is a host."""
        return host_of(caller.principal) if self._access.file is None else f"{caller.tenant} {caller.principal}"

    def _note_end(self) -> None:
        if not self._requests.taken and not self._watches.taken:
            self._idle.set()

    def _hold_response(self, call: OpenCall, size: int, context: CallContext, *, is_refusable: bool) -> None:
        """Count a response until it is sent, which its client may delay; not refusable is that of a write."""
        response = OpenCall(call.caller, TooManyRequestsError)
        self._held.add(response, RESPONSE_FACTOR * size, is_refusable=is_refusable)
        context.add_done_callback(lambda _: self._held.free(response))

    def _around(self, rpc: Rpc[Handler], admit: Admit, end: End) -> Method:
        name, handler, tally, access = rpc.name, rpc.behaviour, self._tallies.get(rpc.name), self._access
        service = rpc.path.split("/")[1]
        tracing = self._tracing
        caller_limits, refusals = self._caller_limits, self._refusals
        ends_with_its_caller = rpc.is_lasting and access.watches is not None
        is_read = LEAST_ROLES[name] <= Role.WATCHER

        async def answered(data: bytes, context: CallContext) -> bytes | None:
            started = time.perf_counter()
            code, reason, reply, principal, x_request_id = "OK", "", None, "", ""
            ended_with = span = None
            is_admitted = False
            if tally is not None:
                tally.started += 1
            metadata: Metadata = ()
            try:
                metadata = context.invocation_metadata() or ()  # once: grpcio decodes it each time
                if tracing is not None:
                    span = tracing.begin(service, name, metadata, context)
                if self._log is not None:
                    x_request_id = _x_request_id(metadata)
                if self._is_draining:
                    self._refused += 1
                    raise DrainingError
                own = access.known(context, metadata) or await access.identify(context, metadata)
                principal = own.principal
                # Limits of one caller are by its own tenant: an admin selects any other.
                caller = access.authorize(name, own, metadata)
                tenant = caller.tenant
                if caller_limits is not None:
                    refusal = caller_limits.admit(own, tenant, lambda: updates_in(name, data), context.time_remaining)
                    if refusal is not None:
                        await refusals.hold(refusal.hold_seconds, refusal.held, request_bytes=len(data))
                        raise refusal.error
                try:
                    call = admit(own, tenant, len(data))
                except ResourceExhaustedError:
                    if len(data) <= UNCOUNTED_REQUEST_BYTES:  # a larger one takes memory while it is held
                        await refusals.hold_without_place(context.time_remaining, request_bytes=len(data))
                    raise
                is_admitted = True
                try:
                    guard = access.watch(name, caller, context, metadata) if ends_with_its_caller else _UNGUARDED
                    metadata = ()  # else kept as long as a stream is open
                    with guard:
                        if rpc.is_stream:
                            async with WatchStream(cast(StreamContext, context), self._held, call, tally) as stream:
                                await handler(data, caller, stream)
                        else:
                            reply = await handler(data, caller, context)
                            if len(reply or b"") > UNCOUNTED_RESPONSE_BYTES:
                                self._hold_response(call, len(reply or b""), context, is_refusable=is_read)
                finally:
                    end(own, tenant, call)
            except JobStatusError as error:
                code, reason = status.code_of(error).name, error.reason
                ended_with = status.status_of(error)
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except Exception as error:
                code = "INTERNAL"
                ended_with = status.status_of(_masked(name, error))
            finally:
                seconds = time.perf_counter() - started
                try:
                    if tally is not None:
                        tally.end(code, seconds)
                    if self._log is not None or span is not None:
                        is_parsed = is_admitted or len(data) <= MAX_REFUSED_BYTES
                        job_id, request_id = subject_of(name, data, reply) if is_parsed else ("", "")
                    if span is not None:
                        span.end(code, reason, job_id)
                    if self._log is not None:
                        self._log.write(
                            name,
                            code,
                            reason,
                            seconds,
                            peer := context.peer(),
                            principal if principal != peer else "",
                            x_request_id,
                            job_id,
                            request_id,
                            span.fields if span is not None else None,
                        )
                except Exception:
                    # The call may have been stored, and is answered: nothing here may change that.
                    log.exception("a call of %s cannot be counted or logged; the call itself is not affected", name)
            if ended_with is None:
                return reply
            # grpcio keeps the exception of an abort in a cycle, until the garbage is collected: nothing that the call
            # holds may be in the frames of its traceback.
            abort = [context.abort(*ended_with)]
            data, metadata, reply = b"", (), None
            del context, ended_with
            return await abort.pop()

        return Method(rpc.path, answered, rpc.is_stream)


class WatchStream:
    """A stream that counts the messages it sends, and what it holds."""

    def __init__(self, stream: StreamContext, held: HeldBytes, call: OpenCall, tally: CallTally | None) -> None:
        self._stream = stream
        self._held = held
        self._call = call
        self._tally = tally
        self._state_bytes = 0
        self.peer = stream.peer
        self.invocation_metadata = stream.invocation_metadata
        self.auth_context = stream.auth_context
        self.time_remaining = stream.time_remaining
        self.abort = stream.abort
        try_send = stream.try_send
        self.try_send = None if try_send is None else _counting(try_send, tally)

    async def __aenter__(self) -> WatchStream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Keep the place of the watch until the last message is sent, unless the client has left."""
        if kind is None or issubclass(kind, Exception):
            await self._stream.flush()

    def hold(self, size: int) -> None:
        """Count `size` bytes for the state of the watch, in place of those counted before; raises as HeldBytes.add."""
        if size != self._state_bytes:
            self._held.add(self._call, size - self._state_bytes)
            self._state_bytes = size

    async def write(self, message: bytes) -> None:
        size = len(message) if len(message) > UNCOUNTED_MESSAGE_BYTES else 0
        self._held.add(self._call, size)
        try:
            await self._stream.write(message)
        finally:
            self._held.add(self._call, -size)
        if self._tally is not None:
            self._tally.sent += 1


def _counting(try_send: Callable[[bytes], int], tally: CallTally | None) -> Callable[[bytes], int]:
    def try_and_count(message: bytes) -> int:
        if len(message) > UNCOUNTED_MESSAGE_BYTES:  # `write` counts what it holds while it waits
            return 0
        cost = try_send(message)
        if cost and tally is not None:
            tally.sent += 1
        return cost

    return try_and_count


def _masked(name: str, error: Exception) -> InternalError:
    """Log an unexpected error, and return an error without its details for the client."""
    error_id = uuid.uuid4().hex
    log.error("%s failed, its client got INTERNAL; error id %s", name, error_id, exc_info=error)
    return InternalError(f"the server failed; its log has the details under the id {error_id}", error_id=error_id)


def _x_request_id(metadata: Metadata) -> str:
    """Return the id that the client gave the call, empty if none."""
    for key, value in metadata:
        if key == REQUEST_ID_KEY:
            return str(value)[:MAX_LOGGED_CHARACTERS]
    return ""
