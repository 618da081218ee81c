"""grpc.health.v1: the health of the server, of its service, and of writing to its store.

The servicer of grpcio-health-checking writes under a lock, so that one client that does not read delays all others and
the drain, and it lacks List. Here a watcher has one pending wake-up, and reads the newest status when it wakes.
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

from jobstatus_grpc.errors import TooManyWatchersError
from jobstatus_grpc.server.places import Places, host_of
from jobstatus_grpc.server.transports.interface import CallContext, Method, StreamContext
from jobstatus_grpc.wire import status as error_status

__all__ = [
    "NOT_SERVING",
    "OVERALL",
    "SERVICE",
    "SERVICE_NAME",
    "SERVING",
    "WRITE",
    "HealthServicer",
    "methods",
]

SERVICE_NAME = "grpc.health.v1.Health"

OVERALL = ""

SERVICE = "jobstatus.v1.JobStatusService"

WRITE = f"{SERVICE}/write"
"""NOT_SERVING while the store cannot write; reads and watches may go on."""

SERVING = HealthCheckResponse.SERVING

NOT_SERVING = HealthCheckResponse.NOT_SERVING

MAX_SERVICE_BYTES = 256
"""Of the name of a service: a watcher keeps it, and may wait for a service that is not known yet."""

MAX_REQUEST_BYTES = 1024
"""Of a request, which a transport keeps until the call ends: a name, and fields of later versions."""

MAX_WATCHERS = 1000
"""Open watches of health: they need no identity, and one takes 20 kB."""

# List came with grpcio-health-checking 1.85; older ones have no messages for it, and it stays UNIMPLEMENTED.
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
        self._places = Places(MAX_WATCHERS)
        self._to_wake: set[_Watcher] = set()

    def set(self, service: str, status: int) -> None:
        """Report `service`, which is added if it is new, as SERVING or NOT_SERVING. Ignored once draining."""
        if self._draining or self._statuses.get(service) == status:
            return
        self._statuses[service] = status
        self._wake(watcher for watcher in self._watchers if watcher.service == service)

    def drain(self) -> None:
        """Report everything as NOT_SERVING from now on, and end each watch after it has sent that.

        A watch of a client that does not read ends with the server's grace, or its connection.
        """
        if self._draining:
            return
        self._draining = True
        self._statuses = dict.fromkeys(self._statuses, NOT_SERVING)
        self._wake(self._watchers)

    async def Check(self, data: bytes, context: CallContext) -> bytes:
        service, problem = _parse(data)
        data = b""  # grpcio keeps the exception of an abort, and its frames, until the garbage is collected
        if problem:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        status = self._statuses.get(service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return HealthCheckResponse(status=status).SerializeToString()

    async def List(self, data: bytes, context: CallContext) -> bytes:
        statuses = {service: HealthCheckResponse(status=status) for service, status in self._statuses.items()}
        response: bytes = _ListResponse(statuses=statuses).SerializeToString()
        return response

    # Not a generator: when one is cancelled in a write, its `finally` runs only once it is collected as garbage.
    async def Watch(self, data: bytes, context: StreamContext) -> None:
        service, problem = _parse(data)
        data = b""  # as in Check
        if problem:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        host = host_of(context.peer())
        if not self._places.has(host):
            error = TooManyWatchersError("the server has reached its limit of open watches of health; try again later")
            await context.abort(*error_status.status_of(error))
        watcher = _Watcher(service=service)
        self._places.take(host)
        self._watchers.add(watcher)
        try:
            await self._follow(watcher, context)
        finally:
            self._places.free(host)
            self._watchers.discard(watcher)
            self._to_wake.discard(watcher)

    async def _follow(self, watcher: _Watcher, context: StreamContext) -> None:
        """Send each new status; return after the last one has been sent."""
        sent = None
        while True:
            watcher.wake.clear()
            is_last = self._draining
            status = self._statuses.get(watcher.service, HealthCheckResponse.SERVICE_UNKNOWN)
            if status != sent:
                await context.write(HealthCheckResponse(status=status).SerializeToString())
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
        """Wake one watcher per turn of the event loop: thousands of writes in one turn would delay all other calls."""
        if not self._to_wake:
            return
        self._to_wake.pop().wake.set()
        if self._to_wake:
            asyncio.get_running_loop().call_soon(self._wake_one)


def methods(health: HealthServicer) -> list[Method]:
    """Return the RPCs of `health`; List only if the installed grpc_health has its messages."""
    found = [
        Method(f"/{SERVICE_NAME}/Check", health.Check, is_stream=False),
        Method(f"/{SERVICE_NAME}/Watch", health.Watch, is_stream=True),
    ]
    if _ListResponse is not None:
        found.append(Method(f"/{SERVICE_NAME}/List", health.List, is_stream=False))
    return found


def _parse(data: bytes) -> tuple[str, str]:
    """Return the service of a request, and what is wrong with the request; empty if nothing is."""
    if len(data) > MAX_REQUEST_BYTES:
        return "", f"the request must have at most {MAX_REQUEST_BYTES} bytes"
    try:
        service: str = HealthCheckRequest.FromString(data).service
    except DecodeError:
        return "", "malformed request"
    is_too_long = len(service.encode()) > MAX_SERVICE_BYTES
    return service, f"service must have at most {MAX_SERVICE_BYTES} bytes" if is_too_long else ""
