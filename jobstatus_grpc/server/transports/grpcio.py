"""The grpcio transport: a `grpc.aio` server that is replaced if it stops accepting connections.

The accept loop of a `grpc.aio` server is one task, and an error in it, which bytes from outside can cause, ends it for
good: new connections are refused, open streams go on, and no error is raised. Here the end of that task is detected at
once, and probes detect other causes. Then a new server takes over the addresses, and the old one keeps its open calls
until they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from jobstatus_grpc.server.addresses import (
    CannotListenError,
    grpc_target,
    private_folder,
    reach,
    require_free,
    unix_path,
)
from jobstatus_grpc.server.transports.interface import Behaviour, Method
from jobstatus_grpc.wire.channel import OWN_CONNECTION, WITHOUT_PROXY

if TYPE_CHECKING:
    from jobstatus_grpc.server.tls import Certificates, Identity

_log = logging.getLogger("jobstatus_grpc.server")


def tls_credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """Return credentials for one port, with which each new connection gets the newest certificate.

    Clients need a certificate if there are CAs for it: grpcio cannot leave that to the client.
    """
    given = certificates.current

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Return what has changed since the last handshake on this port: to read the same again costs every client."""
        nonlocal given
        if given is certificates.current:
            return None
        given = certificates.current
        return _configuration(given)

    # The stubs lack None, which stands for no change.
    return grpc.dynamic_ssl_server_credentials(
        _configuration(given),
        fetch,  # type: ignore[arg-type]
        given.client_ca is not None,
    )


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.cert)], identity.client_ca)


def add_methods(server: grpc.aio.Server, methods: Iterable[Method]) -> None:
    """Serve `methods` on `server`, which has not been started."""
    services: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
    for method in methods:
        handlers = services.setdefault(method.path[1:].rpartition("/")[0], {})
        if method.is_stream:
            handlers[method.name] = grpc.unary_stream_rpc_method_handler(_stream_handler(method.behaviour))
        else:
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(method.behaviour)
    generic = (grpc.method_handlers_generic_handler(name, handlers) for name, handlers in services.items())
    server.add_generic_rpc_handlers(tuple(generic))


def _stream_handler(behaviour: Behaviour) -> Any:
    async def answer(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        answering = behaviour(data, _Stream(context))
        data = b""  # else kept with the exception of an abort, until the garbage is collected
        await answering

    return answer


SEND_MICROSECONDS = 24
"""The cost of a message to a stream: three in each iteration of the event loop.

Row `change`: with one in each, a change takes a third longer to reach the last of 1,000 watchers. Row `fanout`: with
eight, an update's p99 during the burst is 1.7 times as long.
"""


class _Stream:
    """A grpcio context as a StreamContext."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self._sending: asyncio.Task[None] | None = None
        self.peer = context.peer
        self.invocation_metadata = context.invocation_metadata
        self.auth_context = context.auth_context
        self.time_remaining = context.time_remaining
        self.add_done_callback = context.add_done_callback
        self.abort = context.abort

    def try_send(self, message: bytes) -> int:
        """Send a message in a task of its own: to wake that of the stream, through all its coroutines, takes longer.

        Row `change`: without it, a change takes a sixth longer to reach 1,000 watchers.
        """
        if self._sending is not None:  # grpcio takes one message at a time
            return 0
        self._sending = asyncio.get_running_loop().create_task(self._send(message))
        return SEND_MICROSECONDS

    async def write(self, message: bytes) -> None:
        await self.flush()
        try:
            await self._context.write(message)
        except grpc.aio.InternalError:
            # Raised when the client leaves during the write. grpcio logs a traceback for all but CancelledError.
            raise asyncio.CancelledError from None

    async def flush(self) -> None:
        """See StreamContext."""
        if self._sending is not None:
            await asyncio.wait([self._sending])

    async def _send(self, message: bytes) -> None:
        try:
            await self._context.write(message)
        except grpc.aio.BaseError:
            pass  # the client has left: grpcio cancels the task of the stream
        finally:
            self._sending = None


class Listener:
    """Serves calls on `addresses` (`host:port` or `unix:/path`) until it is stopped, whatever bytes arrive there.

    `build` makes a server with its handlers, and is called again for each replacement. It must

    * set the option `("grpc.so_reuseport", 0)`, or two processes that start at once could share a port; 1 only with
      `private`;
    * add handlers with `add_generic_rpc_handlers` only. Methods registered by name, as the generated
      `add_…Servicer_to_server` does, are freed while the core still writes to them when the accept loop ends.

    A server is replaced when its accept loop has ended, when an address that was reached before refuses connections
    twice in a row, or when connections are accepted but a health check is unanswered for `silence_ticks` ticks although
    the same server answered one before. Any status is an answer, and a blocked event loop has no ticks: a busy server
    is not replaced.

    If other processes listen on `addresses` too, pass `private`, a `unix:/path` of this process alone: any of them may
    answer a probe of a shared address, so `private` is listened on as well, and probed instead.

    With `open_credentials`, each `host:port` uses credentials of its own from there. Unix sockets do not: their files'
    mode decides which users can connect. Health checks could not pass a server that requires a client certificate, so
    they go through a socket in a private folder.
    """

    def __init__(
        self,
        build: Callable[[], grpc.aio.Server],
        addresses: Sequence[str],
        *,
        private: str = "",
        open_credentials: Callable[[], grpc.ServerCredentials] | None = None,
        unix_mode: int = 0o600,
        retire_seconds: float = 3600.0,
        tick_seconds: float = 1.5,
        silence_ticks: int = 40,
    ) -> None:
        self._build = build
        self._addresses = [*addresses, *filter(None, [private])]
        self._private = private
        self._is_shared = bool(private)
        self._open_credentials = open_credentials
        self._unix_mode = unix_mode
        self._retire_seconds = retire_seconds
        self._tick_seconds = tick_seconds
        self._silence_ticks = silence_ticks
        self._server: grpc.aio.Server | None = None
        self._retired: dict[grpc.aio.Server, asyncio.Task[None]] = {}
        self._accept_loops: list[asyncio.Task[object]] = []
        self._reached: set[str] = set()
        self._supervisor: asyncio.Task[None] | None = None
        self._probes: list[asyncio.Task[str]] = []
        self._undo = contextlib.ExitStack()

    async def start(self) -> list[str]:
        """Listen, and return the addresses as bound: port 0 is resolved here, once.

        Start one listener at a time: the accept loop is found among the tasks that the start creates.

        Raises:
            CannotListenError: nothing listens.
            CannotStartError: there is no place for a private folder; nothing listens.
            RuntimeError: `build` registers methods by name; nothing listens.
        """
        with contextlib.ExitStack() as undo:
            if self._open_credentials is not None and not self._private:
                self._private = f"unix:{undo.enter_context(private_folder())}/health"
                self._addresses.append(self._private)
            for address in self._own_addresses():
                await require_free(address)
            await self._serve()
            self._undo = undo.pop_all()
        self._supervisor = asyncio.create_task(self._supervise())
        return [address for address in self._addresses if address != self._private]

    async def stop(self, grace_seconds: float) -> None:
        """Take no more calls, give the running ones `grace_seconds`, then cancel them.

        Returns a second after the grace at the latest, even if grpcio fails to stop a server.
        """
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor, *self._probes], timeout=0.5)
        servers = [server for server in (self._server, *self._retired) if server is not None]
        stops = {asyncio.create_task(_stop(server, grace_seconds)) for server in servers}
        unfinished = (await asyncio.wait(stops, timeout=grace_seconds + 0.5))[1] if stops else set()
        if unfinished:
            _log.warning(
                "%d of %d gRPC servers have not stopped within %g s; their calls are cut off when the process ends",
                len(unfinished),
                len(servers),
                grace_seconds,
            )
        for task in (*unfinished, *self._retired.values()):
            task.cancel()
        self._undo.close()

    def _own_addresses(self) -> list[str]:
        return [self._private] if self._is_shared else self._addresses

    async def _serve(self) -> None:
        server = self._server = self._build()
        others = asyncio.all_tasks()
        try:
            self._addresses = [self._bind(server, address) for address in self._addresses]
        except CannotListenError:
            # A server releases the addresses that it has bound only after it was started and stopped.
            await server.start()
            await _stop(server, 0)
            raise
        await server.start()
        names = {task: getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks() - others}
        if any(name.endswith("._request_registered_call") for name in names.values()):
            await _stop(server, 0)
            raise RuntimeError("methods are registered by name: add handlers with add_generic_rpc_handlers only")
        self._accept_loops = [task for task, name in names.items() if name.endswith("._server_main_loop")]
        if not self._accept_loops:
            _log.warning(
                "The accept loop of grpcio %s was not found: if it ends, only probes detect that, which takes longer",
                grpc.__version__,
            )

    def _bind(self, server: grpc.aio.Server, address: str) -> str:
        """Bind `address`, and return it with port 0 resolved."""
        path, target = unix_path(address), grpc_target(address)
        try:
            if path or self._open_credentials is None:
                port = server.add_insecure_port(target)
            else:
                port = server.add_secure_port(target, self._open_credentials())
            if path:
                os.chmod(path, self._unix_mode)
        except (RuntimeError, OSError) as error:
            raise CannotListenError(address, errno.EADDRNOTAVAIL, str(error)) from None
        return address if path else f"{address.rpartition(':')[0]}:{port}"

    async def _supervise(self) -> None:
        while True:
            trouble = await self._find_trouble()
            noticed_at, where = time.monotonic(), ", ".join(self._addresses)
            _log.error("The listener on %s has ended: %s. It is being replaced; open calls go on", where, trouble)
            await self._replace()
            _log.info("Listening on %s again, %.3f s later", where, time.monotonic() - noticed_at)

    async def _find_trouble(self) -> str:
        """Wait until the server accepts no calls any more, and return the symptom."""
        probe = asyncio.create_task(self._probe())
        self._probes = [probe]
        try:
            await asyncio.wait([probe, *self._accept_loops], return_when=asyncio.FIRST_COMPLETED)
            ends = [_how_it_ended(task) for task in self._accept_loops if task.done()]
            return ends[0] if ends else probe.result()
        finally:
            probe.cancel()

    async def _replace(self) -> None:
        """Serve from a new server. The old one releases its addresses now, and keeps its calls until they end."""
        if (old := self._server) is not None:
            self._retired[old] = asyncio.create_task(_stop(old, self._retire_seconds))
            self._retired[old].add_done_callback(lambda _: self._retired.pop(old, None))
        pause_seconds = 0.01
        if not any(task.done() for task in self._accept_loops):
            await asyncio.sleep(pause_seconds)  # the old server still has its sockets to close
        while True:
            try:
                for address in filter(unix_path, self._addresses):
                    await require_free(address)  # before the old server has unlinked its path, it would unlink ours
                return await self._serve()
            except Exception as error:
                if pause_seconds > 0.3:
                    _log.exception(
                        "The listener cannot be replaced: %s. No new connections until it is; trying again", error
                    )
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, 1.0)

    async def _probe(self) -> str:
        """Probe the server from outside once a tick until it certainly accepts no calls, and return the symptom."""
        check = _HealthCheck(self._private or self._addresses[0])
        try:
            while True:
                for address in self._own_addresses():
                    reached = await reach(address)
                    if reached:
                        self._reached.add(address)
                    elif reached is False and address in self._reached:
                        await asyncio.sleep(0.05)
                        if await reach(address) is False:
                            return f"{address} refuses connections"
                    if address == check.address and reached:
                        check.tick()
                        if check.silent_ticks >= self._silence_ticks:
                            return f"health checks are unanswered for {check.silent_ticks} ticks"
                await asyncio.sleep(self._tick_seconds)
        finally:
            await check.close()


class _HealthCheck:
    """Health checks, one at a time on a connection of their own, without a deadline: a busy server answers late."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.silent_ticks = 0
        self._call: asyncio.Task[None] | None = None
        self._ticks = 0
        self._was_answered = False

    def tick(self) -> None:
        """Count a tick in which connections were accepted, and start a call in every fifth if none is open."""
        self._ticks += 1
        if self._call is not None and self._call.done():
            self._was_answered |= self._call.exception() is None
            self._call, self.silent_ticks = None, 0
        if self._call is None:
            if self._ticks % 5 == 1:
                self._call = asyncio.create_task(self._ask())
        elif self._was_answered:  # one that never got through says more about the check than about the server
            self.silent_ticks += 1

    async def close(self) -> None:
        if self._call is not None:
            self._call.cancel()
            await asyncio.wait([self._call])

    async def _ask(self) -> None:
        options = [OWN_CONNECTION, *WITHOUT_PROXY]
        async with grpc.aio.insecure_channel(grpc_target(self.address), options) as channel:
            check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
            try:
                await check(b"", wait_for_ready=True)
            except grpc.aio.AioRpcError:
                return  # any status shows that calls are accepted


async def _stop(server: grpc.aio.Server, grace_seconds: float) -> None:
    for _ in range(2):  # the first stop() after the accept loop has ended may raise what ended it; the second one stops
        stopping = asyncio.ensure_future(server.stop(grace_seconds))
        await asyncio.wait([stopping])
        if not stopping.cancelled() and stopping.exception() is None:
            return


def _how_it_ended(accept_loop: asyncio.Task[object]) -> str:
    error = None if accept_loop.cancelled() else accept_loop.exception()
    if error is None:
        return "its accept loop was stopped"
    return f"its accept loop failed with {type(error).__name__}: {error}"[:300]
