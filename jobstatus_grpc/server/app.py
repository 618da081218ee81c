"""The life of a server: open the store, listen, serve, drain, stop. All parts are put together here."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import errno
import gc
import logging
import os
import resource
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import timedelta
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from jobstatus_grpc.address import is_loopback
from jobstatus_grpc.auth import chain
from jobstatus_grpc.commit_queue import CommitQueue
from jobstatus_grpc.errors import CannotStartError, DrainingError, StoreUnavailableError, StoreUnreachableError
from jobstatus_grpc.job_quota import JobQuota
from jobstatus_grpc.server import health, limits, reflection, responses, servicer, services, systemd
from jobstatus_grpc.server.access import Access
from jobstatus_grpc.server.addresses import CannotListenError, bind, held
from jobstatus_grpc.server.auth_file import AuthFile
from jobstatus_grpc.server.config import (
    ServerConfig,
    channel_options,
    host_and_port,
    max_stream_seconds,
    stop_signals,
)
from jobstatus_grpc.server.held_bytes import MIB, HeldBytes, default_limit
from jobstatus_grpc.server.limits import CallerLimits
from jobstatus_grpc.server.logs import ServerLog
from jobstatus_grpc.server.middleware import CallLimits, CallMiddleware
from jobstatus_grpc.server.operations import OperationsServicer
from jobstatus_grpc.server.places import Places
from jobstatus_grpc.server.servicer import JobStatusServicer
from jobstatus_grpc.server.transports import grpcio
from jobstatus_grpc.server.transports.interface import CallContext, Method, Transport
from jobstatus_grpc.service import JobService
from jobstatus_grpc.stores import open_store, store_name
from jobstatus_grpc.stores.interface import JobStore, utc_now
from jobstatus_grpc.sweeper import Sweeper
from jobstatus_grpc.watch.filter_watch import FilterHub
from jobstatus_grpc.watch.job_watch import JobHub
from jobstatus_grpc.watch.publisher import Publisher
from jobstatus_grpc.watch.watcher import WakeQueue

if TYPE_CHECKING:
    from jobstatus_grpc.server.metrics import Metrics, MetricsEndpoint
    from jobstatus_grpc.server.tls import Certificates
    from jobstatus_grpc.server.tracing import ServerTracing
    from jobstatus_grpc.server.transports.native import NativeServer
    from jobstatus_grpc.web.listener import WebListener

T = TypeVar("T")

COLLECT_AFTER = (20_000, 20, 20)
"""Thresholds of the garbage collector. Row `update`: with the default of 700 objects, a call takes a tenth more CPU."""


MALLOC_OPTIONS = ((-8, 2), (-1, 64 * 1024 * 1024))
"""M_ARENA_MAX and M_TRIM_THRESHOLD of glibc. Without them, memory that a burst of calls took in gRPC's threads is not
given back, nor used again by the next burst: each wave of 80,000 reset calls took 50 to 200 MB more."""


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on a new event loop and return what it returns."""
    gc.set_threshold(*COLLECT_AFTER)
    if (set_option := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for option in MALLOC_OPTIONS:
            set_option(*option)
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


log = logging.getLogger("jobstatus_grpc.server")

Ready = Callable[[Sequence[str]], None]

SERVICE_NAMES = tuple(service.full_name for service in services.SERVICES)

HEALTH_CHECK_SECONDS = 0.5

DESCRIPTOR_LOG_SECONDS = 60.0
"""Between two log lines about a lack of file descriptors, at least."""

EXIT_OK = 0

EXIT_BROKEN = 1


def run(config: ServerConfig, *, ready: Ready, server_log: ServerLog, private: str = "") -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP; return the process's exit code.

    `ready` is called once, with the bound addresses, when the server takes calls. A worker has a `private` address
    besides those that it shares: see Listener.

    Raises:
        CannotStartError: the message says what to do.
    """
    return run_loop(serve(config, ready=ready, server_log=server_log, private=private))


async def serve(config: ServerConfig, *, ready: Ready, server_log: ServerLog, private: str = "") -> int:
    """As `run`, in a running event loop."""
    config.check()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in stop_signals():
        loop.add_signal_handler(number, stopping.set)
    # Before the store: with wrong settings none is created.
    if config.transport == "native":
        _import_native()
    if config.http is not None:
        _import_web()
    tracing = _open_tracing() if config.otel else None
    files = _Files(config)
    store = await open_store(config.store, clock=utc_now, retention=config.retention)
    try:
        async with _Server(config, store, files, server_log, private, tracing) as server:
            log.info(
                "jobstatus %s serves the store %s on %s; transport %s",
                version("jobstatus-grpc"),
                store_name(config.store),
                ", ".join(server.addresses),
                config.transport,
            )
            ready(server.addresses)
            with systemd.announced():
                return await _serve_until(stopping, store)
    finally:
        await store.close()
        if tracing is not None:
            await loop.run_in_executor(None, tracing.close)


async def _serve_until(stopping: asyncio.Event, store: JobStore) -> int:
    """Wait for a signal or the store's end, and return the exit code that it means."""
    stopped, broken = asyncio.create_task(stopping.wait()), asyncio.create_task(store.closed())
    try:
        await asyncio.wait((stopped, broken), return_when=asyncio.FIRST_COMPLETED)
        if broken.done() and (error := broken.result()) is not None:
            log.critical("the store failed and cannot recover in this process, which ends now; restart it: %s", error)
            return EXIT_BROKEN
        log.info("draining")
        return EXIT_OK
    finally:
        stopped.cancel()
        broken.cancel()


class _Files:
    """The files that the settings name, other than the store."""

    def __init__(self, config: ServerConfig) -> None:
        """Read them.

        Raises:
            CannotStartError: one cannot be used.
        """
        self.auth = (
            None
            if config.auth is None
            else AuthFile(config.auth, {**chain.readers(), limits.SECTION: limits.read_limits})
        )
        self.certificates = config.open_certificates()
        if config.metrics is not None:
            self._check_metrics(config)
        if config.http is not None and self.certificates is not None:
            self.certificates.https_context(asks_clients=True)

    def _check_metrics(self, config: ServerConfig) -> None:
        from jobstatus_grpc.server.metrics import TokenFile

        if config.metrics_token_file is not None:
            TokenFile(config.metrics_token_file).read()
        if config.metrics_tls and self.certificates is not None:
            self.certificates.https_context()


class _Server:
    """Everything between the store and the port; serves for the length of a block, and drains at its end."""

    def __init__(
        self,
        config: ServerConfig,
        store: JobStore,
        files: _Files,
        server_log: ServerLog,
        private: str = "",
        tracing: ServerTracing | None = None,
    ) -> None:
        self._config = config
        self._log = server_log
        self._store = store
        self.addresses: list[str] = []
        max_age_seconds = config.max_connection_age.total_seconds()
        wake_queue = WakeQueue()
        self._job_hub = JobHub(
            wake_queue,
            render=responses.render_job_event,
            stamp=responses.each_millisecond(lambda: responses.stamp_job_message(utc_now())),
            max_age_seconds=max_age_seconds,
            trace_watch=tracing.watch if tracing else None,
        )
        self._filter_hub = FilterHub(
            wake_queue,
            render=responses.render_event,
            stamp=responses.each_millisecond(lambda: responses.stamp_jobs_message(utc_now())),
            max_age_seconds=max_age_seconds,
            trace_watch=tracing.watch if tracing else None,
        )
        self._auth_file = files.auth
        access = self._access = Access(self._auth_file)
        caller_limits = None if self._auth_file is None else CallerLimits.following(self._auth_file)
        self._certificates = files.certificates
        held = HeldBytes(default_limit(config.workers) if config.max_held_mib is None else config.max_held_mib * MIB)
        metrics, endpoint = _metrics_of(config, store, server_log, access, caller_limits, self._certificates, held)
        self._endpoint = endpoint
        self._publisher = Publisher(
            store, self._job_hub, self._filter_hub, observe_batch=metrics.observe_batch if metrics else None
        )
        # A store that commits one group at a time does so in this process, and gets the interpreter while it does.
        pause = wake_queue.paused if store.commits_at_once == 1 else contextlib.nullcontext
        new_queue = tracing.commit_queue if tracing else CommitQueue
        self._queue = new_queue(store, around_commit=pause, observe_commit=metrics.observe_commit if metrics else None)
        service = JobService(
            store=store,
            queue=self._queue,
            job_hub=self._job_hub,
            filter_hub=self._filter_hub,
            clock=utc_now,
            quota=None
            if caller_limits is None
            else JobQuota(store, caller_limits.max_jobs, refuse=caller_limits.refuse_job),
        )
        self._calls = CallMiddleware(
            CallLimits(config.max_requests, config.max_watchers, config.max_watchers_per_caller),
            held,
            access,
            server_log.calls,
            metrics.calls if metrics else None,
            caller_limits,
            tracing,
        )
        self._sweeper = Sweeper(store=store, queue=self._queue, fail_stalled_after=config.fail_stalled_after)
        self._health = health.HealthServicer([*SERVICE_NAMES, health.WRITE])
        self._draining = asyncio.Event()
        servicers = {services.JOB_STATUS: JobStatusServicer(service), services.OPERATIONS: OperationsServicer(service)}
        rpcs = (rpc for offered, answering in servicers.items() for rpc in servicer.rpcs(offered, answering))
        methods = [self._calls.wrap(rpc) for rpc in rpcs]
        methods += health.methods(self._health)
        self._transport = _open_transport(
            config, methods, draining=self._draining, private=private, certificates=self._certificates
        )
        self._web: WebListener | None = None
        self._health_listener = _open_health_listener(config, health.methods(self._health))
        self._methods = methods
        self._background: list[asyncio.Task[None]] = []
        self._held = contextlib.ExitStack()

    def _board_address(self) -> str:
        """Return the address for gRPC as a client takes it, `grpcs://…` with TLS."""
        is_tls = self._certificates is not None and not self.addresses[0].startswith("unix:")
        return f"grpcs://{self.addresses[0]}" if is_tls else self.addresses[0]

    def _other_listeners(self) -> list[WebListener | Transport]:
        return [each for each in (self._web, self._health_listener) if each is not None]

    async def __aenter__(self) -> _Server:
        try:
            position = await self._store.position()
        except StoreUnavailableError as error:
            raise StoreUnreachableError(f"the store was lost at start: {error}") from None
        self._background = [
            asyncio.create_task(self._publisher.follow(position)),
            asyncio.create_task(self._report_health()),
            asyncio.create_task(self._sweeper.run()),
        ]
        if self._auth_file is not None:
            self._background.append(asyncio.create_task(self._auth_file.follow()))
        if self._certificates is not None:
            self._background.append(asyncio.create_task(self._certificates.follow()))
        if self._access.watches is not None:
            self._background.append(asyncio.create_task(self._access.watches.follow()))
        try:
            if self._endpoint is not None:
                await self._endpoint.start()
            self._held.enter_context(held(self._config.listen))
            if self._config.http is not None:
                self._web = await _open_web(
                    self._config,
                    self._methods,
                    self._access,
                    self._certificates,
                    hold_body=self._calls.hold_body,
                    grpc_address=self._board_address,
                )
            if self._health_listener is not None:
                log.info("health on %s", *await self._health_listener.start())
            self.addresses = await self._transport.start()
            if self._web is not None:
                await self._web.start()
                self.addresses.append(self._web.url)
        except BaseException as error:
            await self._stop_background()
            await asyncio.gather(*(each.stop(0) for each in self._other_listeners()))
            self._held.close()
            if isinstance(error, CannotListenError):
                raise CannotStartError(str(error)) from None
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        grace_seconds = self._config.drain_grace.total_seconds()
        self._draining.set()
        self._health.drain()
        self._job_hub.close(DrainingError)
        self._filter_hub.close(DrainingError)
        await self._calls.drain(min(1.0, grace_seconds))
        listeners = [self._transport, *self._other_listeners()]
        await asyncio.gather(*(each.stop(grace_seconds) for each in listeners))
        self._held.close()
        # Handlers end within a few turns of the loop once their calls are over.
        ends = [asyncio.create_task(self._calls.finished()), asyncio.create_task(self._queue.close())]
        _, unended = await asyncio.wait(ends, timeout=1)
        if unended:
            log.warning("some calls have not ended within the grace of %g s; they are cut off", grace_seconds)
        for end in unended:
            end.cancel()
        await self._stop_background()
        if self._log.calls is not None:
            self._log.calls.flush()

    async def _report_health(self) -> None:
        """Keep the health of the write path in step with the store, and log a lack of file descriptors."""
        descriptors = DescriptorCheck()
        for name in (health.OVERALL, *SERVICE_NAMES):
            self._health.set(name, health.SERVING)
        while True:
            self._health.set(health.WRITE, health.SERVING if self._store.writable else health.NOT_SERVING)
            descriptors.run()
            await asyncio.sleep(HEALTH_CHECK_SECONDS)

    async def _stop_background(self) -> None:
        if self._endpoint is not None:
            await self._endpoint.close()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)


class DescriptorCheck:
    """Logs that no file descriptors are left, once a minute while that lasts. Neither transport does so usefully."""

    def __init__(self, *, seconds: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._quiet_until = float("-inf")
        self._is_logged = False

    def run(self) -> None:
        """Check once."""
        try:
            os.close(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._seconds() >= self._quiet_until:
                self._quiet_until, self._is_logged = self._seconds() + DESCRIPTOR_LOG_SECONDS, True
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                log.error(
                    "no file descriptors are left: new connections wait until others end. The limit of this process is "
                    "%d; raise it (ulimit -n, LimitNOFILE=), or lower --max-watchers: %s",
                    limit,
                    error.strerror,
                )
        else:
            if self._is_logged:
                self._is_logged = False
                log.info("file descriptors are available again")


def _open_transport(
    config: ServerConfig,
    methods: Sequence[Method],
    *,
    draining: asyncio.Event,
    private: str,
    certificates: Certificates | None,
) -> Transport:
    """Return what `config.transport` names, which listens once it is started; for `private` see Listener.

    Reflection is a stream of requests, which only grpcio can serve: the native transport passes it on to a server of
    grpcio, as it does with unknown methods. Reflection ends when `draining` is set.

    Raises:
        CannotStartError: it is not installed.
    """
    places = Places(reflection.MAX_STREAMS)

    def build(config: ServerConfig, methods: Sequence[Method]) -> grpc.aio.Server:
        server = grpc.aio.server(options=channel_options(config))
        grpcio.add_methods(server, methods)
        if not config.closed_reflection:
            names = [*SERVICE_NAMES, health.SERVICE_NAME]
            reflection.add_reflection(server, names, drain=draining, places=places)
        return server

    if config.transport != "native":
        return grpcio.Listener(
            lambda: build(config, methods),
            config.listen,
            private=private,
            open_credentials=None if certificates is None else lambda: grpcio.tls_credentials(certificates),
            unix_mode=config.unix_mode,
        )
    native_server = _import_native()
    # The front is the only client of the server behind it, and would lose a call when a connection reaches its age.
    lasting = dataclasses.replace(config, max_connection_age=timedelta(days=20))
    return native_server(
        config.listen,
        methods,
        lambda: build(lasting, ()),
        is_shared=config.workers > 1,
        max_stream_seconds=max_stream_seconds(config),
        unix_mode=config.unix_mode,
    )


def _open_health_listener(config: ServerConfig, methods: Sequence[Method]) -> Transport | None:
    """Return the listener of `config.health`, which serves health alone and without TLS once it is started."""
    if config.health is None:
        return None
    options = channel_options(dataclasses.replace(config, workers=1))  # each worker has an address of its own

    def build() -> grpc.aio.Server:
        server = grpc.aio.server(options=options)
        grpcio.add_methods(server, methods)
        return server

    return grpcio.Listener(build, [config.health])


def _import_native() -> type[NativeServer]:
    try:
        from jobstatus_grpc.server.transports.native import NativeServer
    except ModuleNotFoundError as error:
        if error.name != "pygrpc_native":
            raise
        raise CannotStartError("--transport native is not installed; pip install 'jobstatus-grpc[native]'") from None
    return NativeServer


async def _open_web(
    config: ServerConfig,
    methods: Sequence[Method],
    access: Access,
    certificates: Certificates | None,
    *,
    hold_body: Callable[[CallContext, int], Awaitable[Callable[[], None]]],
    grpc_address: Callable[[], str],
) -> WebListener:
    """Return the listener of the HTTP gateway, bound to its address, which serves once it is started.

    `hold_body` is that of CallMiddleware. `grpc_address` is called after that: the address that the board names.

    Raises:
        CannotListenError: the address cannot be listened on.
    """
    from jobstatus_grpc.web import board
    from jobstatus_grpc.web.gateway import Gateway
    from jobstatus_grpc.web.jobs import JobsApi
    from jobstatus_grpc.web.listener import WebListener
    from jobstatus_grpc.web.site import Site

    assert config.http is not None
    identify = None if access.file is None else lambda call: access.identify(call, call.invocation_metadata())
    gateway = Gateway(methods, identify=identify, max_stream_seconds=max_stream_seconds(config))
    site = Site(
        gateway,
        JobsApi(gateway),
        identify=identify,
        hold_body=hold_body,
        origins=config.http_origin,
        is_loopback=is_loopback(host_and_port(config.http)[0]),
    )
    site.routes.update(board.routes(grpc_address))
    return WebListener(
        site,
        await bind(config.http, is_shared=config.workers > 1),
        tls_context=None if certificates is None else lambda: certificates.https_context(asks_clients=True),
    )


def _import_web() -> None:
    try:
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "uvicorn":
            raise
        raise CannotStartError("--http needs an extra; pip install 'jobstatus-grpc[web]'") from None


def _open_tracing() -> ServerTracing:
    try:
        from jobstatus_grpc.server.tracing import ServerTracing

        return ServerTracing.open()
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("opentelemetry"):
            raise
        raise CannotStartError("--otel needs an extra; pip install 'jobstatus-grpc[otel]'") from None
    except Exception as error:  # the SDK raises several classes, some already when it is imported
        raise CannotStartError(f"--otel: OpenTelemetry refuses the value of a variable OTEL_…: {error}") from error


def _metrics_of(
    config: ServerConfig,
    store: JobStore,
    server_log: ServerLog,
    access: Access,
    caller_limits: CallerLimits | None,
    certificates: Certificates | None,
    held: HeldBytes,
) -> tuple[Metrics, MetricsEndpoint] | tuple[None, None]:
    if config.metrics is None:
        return None, None
    # Imported here because prometheus_client takes a while to load.
    from jobstatus_grpc.server.metrics import Metrics, MetricsEndpoint

    metrics = Metrics(
        store,
        clock=utc_now,
        log_lines_dropped=server_log.lines_dropped,
        access=access,
        caller_limits=caller_limits,
        certificates=certificates,
        held=held,
        max_watchers=config.max_watchers,
    )
    endpoint = MetricsEndpoint(
        config.metrics,
        metrics,
        https_context=certificates.https_context if certificates is not None and config.metrics_tls else None,
        token_file=config.metrics_token_file,
    )
    return metrics, endpoint
