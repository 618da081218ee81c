"""Where it is chosen who speaks HTTP/2: grpcio, or pygrpc-native."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import grpc

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.server import health, reflection, servicer
from jobstatus_grpc.server.config import CONNECTION_AGE_GRACE_SECONDS, ServerConfig, channel_options
from jobstatus_grpc.server.health import HealthServicer
from jobstatus_grpc.server.middleware import CallMiddleware
from jobstatus_grpc.server.servicer import JobStatusServicer
from jobstatus_grpc.server.transports.grpcio import Listener


class Transport(Protocol):
    """Takes calls until it is stopped."""

    async def start(self) -> list[str]:
        """Listen, and return the addresses as bound; raise CannotListenError where one cannot be."""
        ...

    async def stop(self, grace_seconds: float) -> None:
        """Take no more calls, give the running ones `grace_seconds`, then cut them off."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What is served: our service behind its middleware, health, and reflection until `draining` is set."""

    servicer: JobStatusServicer
    calls: CallMiddleware
    health: HealthServicer
    draining: asyncio.Event

    def methods(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Return the handlers of our service behind its middleware, by the method's name."""
        return {name: self.calls.wrap(name, handler) for name, handler in servicer.methods(self.servicer).items()}


def open_transport(config: ServerConfig, services: Services, *, private: str = "") -> Transport:
    """Return what `config.transport` names, which listens once it is started; for `private` see Listener.

    Raises:
        CannotStartError: it is not installed.
    """
    if config.transport == "native":
        return _native(config, services)
    return Listener(lambda: _grpcio(config, services), config.listen, private=private)


def _grpcio(config: ServerConfig, services: Services) -> grpc.aio.Server:
    server = grpc.aio.server(options=channel_options(config))
    ours = grpc.method_handlers_generic_handler(servicer.SERVICE_NAME, services.methods())
    server.add_generic_rpc_handlers((ours,))
    health.add_health(server, services.health)
    _add_reflection(server, services)
    return server


def _native(config: ServerConfig, services: Services) -> Transport:
    try:
        from jobstatus_grpc.server.transports import native
    except ModuleNotFoundError as error:
        if error.name != "pygrpc_native":
            raise
        raise CannotStartError("--transport native is not installed; pip install 'jobstatus-grpc[native]'") from None
    methods = [
        native.method_of(f"/{servicer.SERVICE_NAME}/{name}", handler) for name, handler in services.methods().items()
    ]
    methods += [
        native.method_of(f"/{health.SERVICE_NAME}/{name}", handler)
        for name, handler in health.methods(services.health).items()
    ]
    return native.NativeServer(
        config.listen,
        methods,
        lambda: _rest(config, services),
        is_shared=config.workers > 1,
        max_stream_seconds=1.1 * config.max_connection_age.total_seconds() + CONNECTION_AGE_GRACE_SECONDS,
    )


def _rest(config: ServerConfig, services: Services) -> grpc.aio.Server:
    """Return the server of what the native transport does not speak: streams of requests, and unknown methods."""
    # Its only client is the front, which would lose a call where a connection reaches its age.
    lasting = dataclasses.replace(config, max_connection_age=timedelta(days=20))
    server = grpc.aio.server(options=channel_options(lasting))
    _add_reflection(server, services)
    return server


def _add_reflection(server: grpc.aio.Server, services: Services) -> None:
    reflection.add_reflection(server, [servicer.SERVICE_NAME, health.SERVICE_NAME], drain=services.draining)
