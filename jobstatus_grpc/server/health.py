"""Answers grpc.health.v1: do the server, its service, and writing to its store work.

The stock asyncio servicer writes under a lock, so that one client that does not read holds up the others and the
drain, and it lacks List. Here a watcher has one pending wake-up, and reads the newest status when it wakes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

__all__ = [
    "NOT_SERVING",
    "OVERALL",
    "SERVICE",
    "SERVICE_NAME",
    "SERVING",
    "WRITE",
    "HealthServicer",
    "add_health",
    "methods",
]

SERVICE_NAME = "grpc.health.v1.Health"

OVERALL = ""

SERVICE = "jobstatus.v1.JobStatusService"

WRITE = f"{SERVICE}/write"
"""Not serving while the store cannot write; reads and watches may go on."""

SERVING = HealthCheckResponse.SERVING

NOT_SERVING = HealthCheckResponse.NOT_SERVING


# List came with grpcio-health-checking 1.85; below it has no messages, and the method stays UNIMPLEMENTED.
_ListRequest: Any = getattr(health_pb2, "HealthListRequest", None)

_ListResponse: Any = getattr(health_pb2, "HealthListResponse", None)


@dataclass(slots=True, eq=False, kw_only=True)
class _Watcher:
    service: str
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class HealthServicer:
    """Report each of `services`, and the server as a whole (""), as NOT_SERVING until `set` says otherwise.

    Belongs to one event loop: `set` and `drain` are called on it, and return at once.
    """

    def __init__(self, services: Iterable[str] = ()) -> None:
        self._statuses: dict[str, int] = dict.fromkeys((OVERALL, *services), NOT_SERVING)
        self._draining = False
        self._watchers: set[_Watcher] = set()
        self._to_wake: set[_Watcher] = set()

    def set(self, service: str, status: int) -> None:
        """Report `service`, known from now on, as SERVING or NOT_SERVING. Ignored once draining."""
        if self._draining or self._statuses.get(service) == status:
            return
        self._statuses[service] = status
        self._wake(watcher for watcher in self._watchers if watcher.service == service)

    def drain(self) -> None:
        """Report everything as NOT_SERVING for good, and end each watch once it has said so.

        A watch whose client does not read cannot be ended so: it ends with the server's grace, or its connection.
        """
        if self._draining:
            return
        self._draining = True
        self._statuses = dict.fromkeys(self._statuses, NOT_SERVING)
        self._wake(self._watchers)

    async def Check(
        self, request: HealthCheckRequest | None, context: grpc.aio.ServicerContext[Any, Any]
    ) -> HealthCheckResponse:
        if request is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "malformed request")
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return HealthCheckResponse(status=status)

    async def List(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        statuses = {service: HealthCheckResponse(status=status) for service, status in self._statuses.items()}
        return _ListResponse(statuses=statuses)

    # Not a generator: where one is cancelled in a write, its `finally` waits for the garbage collector.
    async def Watch(self, request: HealthCheckRequest | None, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if request is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "malformed request")
        watcher = _Watcher(service=request.service)
        self._watchers.add(watcher)
        try:
            await self._follow(watcher, context)
        except grpc.aio.InternalError as error:
            # How a write ends that the client's departure interrupts; grpc would log it as a failure of ours.
            raise asyncio.CancelledError from error
        finally:
            self._watchers.discard(watcher)
            self._to_wake.discard(watcher)

    async def _follow(self, watcher: _Watcher, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Send the newest status whenever it is another one; return once the last has been sent."""
        sent = None
        while True:
            watcher.wake.clear()
            is_last = self._draining
            status = self._statuses.get(watcher.service, HealthCheckResponse.SERVICE_UNKNOWN)
            if status != sent:
                await context.write(HealthCheckResponse(status=status))
                sent = status
            if is_last:
                return
            await watcher.wake.wait()

    def _wake(self, watchers: Iterable[_Watcher]) -> None:
        is_waking = bool(self._to_wake)
        self._to_wake.update(watchers)
        if self._to_wake and not is_waking:
            asyncio.get_running_loop().call_soon(self._wake_one)

    def _wake_one(self) -> None:
        """Wake one watcher a turn of the loop: thousands of writes in one turn would hold up every other call."""
        if not self._to_wake:
            return
        self._to_wake.pop().wake.set()
        if self._to_wake:
            asyncio.get_running_loop().call_soon(self._wake_one)


def add_health(server: grpc.aio.Server, health: HealthServicer) -> None:
    """Serve `health` on `server`, which has not been started."""
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, methods(health)),))


def methods(health: HealthServicer) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    """Return the handlers of `health`, by the method's name."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Check": grpc.unary_unary_rpc_method_handler(health.Check, _parse, HealthCheckResponse.SerializeToString),
        "Watch": grpc.unary_stream_rpc_method_handler(health.Watch, _parse, HealthCheckResponse.SerializeToString),
    }
    if _ListResponse is not None:
        handlers["List"] = grpc.unary_unary_rpc_method_handler(
            health.List, _ListRequest.FromString, _ListResponse.SerializeToString
        )
    return handlers


def _parse(data: bytes) -> HealthCheckRequest | None:
    """None where `data` is malformed: an exception here would reach the client as UNKNOWN with its text."""
    try:
        return HealthCheckRequest.FromString(data)
    except DecodeError:
        return None
