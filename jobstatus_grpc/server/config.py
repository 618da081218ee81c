"""The settings of a server, and the options of its transports."""

from __future__ import annotations

import os
import re
import signal
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from jobstatus_grpc.address import is_loopback
from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.job import limits

if TYPE_CHECKING:
    from jobstatus_grpc.server.tls import Certificates

TRANSPORTS = ("grpcio", "native")

CONNECTION_AGE_GRACE_SECONDS = 30.0
"""Time for running calls to end once their connection has reached `max_connection_age`."""


_ORIGIN = re.compile(r"https?://[a-z0-9.\[\]:_-]+", re.ASCII)

MAX_UNIX_PATH_BYTES = 103 if sys.platform == "darwin" else 107
"""Of the path of a Unix socket: the operating system's limit."""


def stop_signals() -> list[signal.Signals]:
    """Return the signals on which a server drains and ends. A SIGHUP that is ignored, as under nohup, stays so."""
    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


KEEPALIVE_MILLISECONDS = 15_000
"""Time without data from a client after which it is pinged: with the timeout, a dead watcher is gone within 30 s."""

KEEPALIVE_TIMEOUT_MILLISECONDS = 10_000
"""Time for the answer to a ping: outlasts a stall of the client or the network."""


IDLE_MILLISECONDS = 300_000
"""Time without a call after which a connection is closed: long enough for a client that calls now and then, which
connects again by itself, and a limit for those that only take connections."""

MAX_STREAMS_PER_CONNECTION = 4000
"""Open calls of one connection, its watches included. With grpcio, a call that its client resets at once counts until
its handler has ended: so 80,000 such calls delay others by half a second and take 100 MB, and not by 4 s and 1 GB. gRPC
clients let further calls wait, and proxies open further connections."""


MIN_HELD_MIB = 40
"""The least memory for open calls: with less, the largest request would never be admitted, see held_bytes.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The settings of `jobstatus serve`; the defaults are its flags' defaults."""

    listen: tuple[str, ...] = ("127.0.0.1:50051",)
    """`host:port`, where port 0 picks a free one, or `unix:/path`."""
    store: str = field(default="sqlite:///jobstatus.db", repr=False)
    """The URL, which may hold a password."""
    transport: str = "grpcio"
    """`grpcio`, or `native`, which needs the extra of that name; see transports/."""
    retention: timedelta = timedelta(days=7)
    drain_grace: timedelta = timedelta(seconds=10)
    fail_stalled_after: timedelta | None = None
    """Time after which a stalled job fails; None: never."""
    max_watchers: int = 20_000
    max_watchers_per_caller: int | None = None
    """None: no limit. A caller is a host."""
    max_requests: int = 1024
    """Unary calls in flight."""
    max_held_mib: int | None = None
    """Memory for open calls, in MiB, at least MIN_HELD_MIB. None: half of the memory of the machine or its cgroup,
    divided by `workers`."""
    max_connection_age: timedelta = timedelta(hours=1)
    tls_cert: str | None = None
    """Path of a PEM file with the server's certificate, then its chain. None: no TLS. Unix sockets never use TLS."""
    tls_key: str | None = None
    tls_client_ca: str | None = None
    """Path of a PEM file with the CAs of the clients' certificates."""
    tls_require_client_cert: bool = False
    auth: str | None = None
    """Path of the TOML file that says which callers may do what. None: every caller is an operator."""
    insecure: bool = False
    """Allow listening beyond loopback without TLS or without `auth`."""
    closed_reflection: bool = False
    """Serve no reflection, which needs no identity: clients then need the .proto."""
    unix_mode: int = 0o600
    """Permissions of Unix sockets."""
    http: str | None = None
    """`host:port` of the HTTP gateway. None: nowhere."""
    http_origin: tuple[str, ...] = ()
    """Origins, `scheme://host[:port]`, whose pages may call the HTTP gateway; its own always may."""
    health: str | None = None
    """`host:port` to serve health on, and nothing else, without TLS. None: only on `listen`."""
    metrics: str | None = None
    """`host:port` to serve metrics on, beyond loopback too: they hold no data of single jobs. None: nowhere."""
    metrics_tls: bool = False
    """Serve metrics over HTTPS, with the server's certificate."""
    metrics_token_file: str | None = None
    """Path of a file with the bearer token that a scrape of metrics needs. None: it needs none."""
    otel: bool = False
    """Export spans by OpenTelemetry, as the variables `OTEL_*` say; needs the extra of that name."""
    workers: int = 1
    """Number of processes that share the addresses and the store. All other settings apply per process."""

    def check(self) -> None:
        """Raise CannotStartError if the settings do not fit together."""
        for address in self.listen:
            host = _host_of(address)
            if not self.insecure and host is not None and not is_loopback(host):
                self._check_closed("--listen", address)
        self._check_http()
        for flag, own_address in (("--metrics", self.metrics), ("--health", self.health)):
            if own_address is not None:
                _check_address(flag, own_address)
        self._check_tls()

    def _check_http(self) -> None:
        if self.http is None:
            if self.http_origin:
                raise CannotStartError("--http-origin needs --http too")
            return
        host = _check_address("--http", self.http)
        if not self.insecure and not is_loopback(host):
            self._check_closed("--http", self.http)
        for origin in self.http_origin:
            if _ORIGIN.fullmatch(origin) is None:
                raise CannotStartError(
                    f"--http-origin {origin} is not an origin; write it as browsers do, such as https://board.example"
                )

    def _check_closed(self, flag: str, address: str) -> None:
        missing = {"encryption (--tls-cert, --tls-key)": self.tls_cert, "authentication (--auth)": self.auth}
        if names := " and without ".join(name for name, value in missing.items() if value is None):
            raise CannotStartError(
                f"{flag} {address} would be open to other machines without {names}; add what is missing, listen on "
                f"127.0.0.1{' or unix:/path' if flag == '--listen' else ''}, or add --insecure if all that can connect "
                "are trusted"
            )

    def _check_tls(self) -> None:
        flags = {
            "--tls-key": (self.tls_key, "--tls-cert", self.tls_cert),
            "--tls-cert": (self.tls_cert, "--tls-key", self.tls_key),
            "--tls-client-ca": (self.tls_client_ca, "--tls-cert", self.tls_cert),
            "--tls-require-client-cert": (self.tls_require_client_cert, "--tls-client-ca", self.tls_client_ca),
            "--metrics-tls": (self.metrics_tls, "--tls-cert", self.tls_cert),
        }
        for flag, (value, needed, needed_value) in flags.items():
            if value and not needed_value:
                raise CannotStartError(f"{flag} needs {needed} too")
        if self.tls_client_ca and not self.tls_require_client_cert:
            raise CannotStartError(
                "--tls-client-ca needs --tls-require-client-cert too: grpcio requires certificates or asks for "
                "none. Serve clients that have only a token from another server, or through a proxy"
            )
        if (self.metrics_tls or self.metrics_token_file) and not self.metrics:
            raise CannotStartError(f"--metrics-{'tls' if self.metrics_tls else 'token-file'} needs --metrics too")
        if self.tls_cert is None:
            return
        if self.transport == "native":
            raise CannotStartError(
                "--transport native has no TLS; use --transport grpcio, or leave out the --tls-… flags and let a proxy "
                "terminate TLS and pass each connection on to --listen unix:/path, see docs/security.md"
            )
        self.open_certificates()

    def open_certificates(self) -> Certificates | None:
        """Read the certificate, its key and the CAs of clients; None: no TLS.

        Raises:
            CannotStartError: they cannot be used, or the extra for it is not installed.
        """
        if self.tls_cert is None or self.tls_key is None:
            return None
        try:
            from jobstatus_grpc.server.tls import Certificates, TlsFiles
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "cryptography":
                raise
            raise CannotStartError("--tls-cert needs an extra; pip install 'jobstatus-grpc[security]'") from None
        return Certificates(TlsFiles(cert=self.tls_cert, key=self.tls_key, client_ca=self.tls_client_ca))


def _check_address(flag: str, address: str) -> str:
    """Return the host of `host:port`; raise CannotStartError if it is not of this form."""
    try:
        return host_and_port(address)[0]
    except ValueError:
        raise CannotStartError(f"{flag} {address} is not an address; write HOST:PORT") from None


def _host_of(address: str) -> str | None:
    """Return the host of `host:port`, None for a Unix socket."""
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        if not path:
            raise CannotStartError(f"--listen {address} names no path; write unix:/path")
        if (size := len(os.fsencode(path))) > MAX_UNIX_PATH_BYTES:
            raise CannotStartError(
                f"--listen {address} is a path of {size} bytes; a Unix socket's has at most {MAX_UNIX_PATH_BYTES}"
            )
        return None
    try:
        return host_and_port(address)[0]
    except ValueError:
        raise CannotStartError(f"--listen {address} is not an address; write HOST:PORT or unix:/path") from None


def host_and_port(address: str) -> tuple[str, int]:
    """Split `host:port`; brackets around an IPv6 address are removed.

    Raises:
        ValueError: it is not an address of this form.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"not an address: {address!r}")
    return host.strip("[]"), int(port)


def max_stream_seconds(config: ServerConfig) -> float:
    """Return the time after which a stream with a reader that does not read ends, where grpcio does not end it."""
    return 1.1 * config.max_connection_age.total_seconds() + CONNECTION_AGE_GRACE_SECONDS


def channel_options(config: ServerConfig) -> list[tuple[str, int]]:
    """Return grpcio's options of the server; the comments say what goes wrong without each."""
    age_ms = round(config.max_connection_age.total_seconds() * 1000)
    return [
        # Without 0 a second server on this port would get a part of the connections. Workers share the port; their
        # supervisor holds it against others, see addresses.py.
        ("grpc.so_reuseport", int(config.workers > 1)),
        # Every watch is a stream: the default of 100 would make watchers behind one connection wait for ever.
        ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
        # A body larger than this is refused by the core before it is read whole.
        ("grpc.max_receive_message_length", limits.MAX_REQUEST_BYTES),
        ("grpc.max_metadata_size", 16 * 1024),
        # A peer that connects and sends nothing would keep its connection.
        ("grpc.server_handshake_timeout_ms", 10_000),
        # A restart brings all watchers back at once; the defaults of 1,000 and 3,000 refuse most of them. Calls of more
        # connections than that are pending only in an attack, and each takes 10 kB.
        ("grpc.server.max_pending_requests", config.max_watchers + MAX_STREAMS_PER_CONNECTION),
        ("grpc.server.max_pending_requests_hard_limit", config.max_watchers + 2 * MAX_STREAMS_PER_CONNECTION),
        # A peer that opens connections and makes no calls would keep them until their age.
        ("grpc.max_connection_idle_ms", IDLE_MILLISECONDS),
        # Notice within half a minute that a peer's machine is gone.
        ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MILLISECONDS),
        # The timeout of pings, those of the keepalive included: by default 60 s, whatever the option above says.
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MILLISECONDS),
        ("grpc.http2.max_pings_without_data", 0),
        # Clients may ping every 10 s, also without calls; the default counts that as abuse and cuts them off.
        ("grpc.http2.min_ping_interval_without_data_ms", 9_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 9_000),
        ("grpc.http2.max_ping_strikes", 10),
        ("grpc.keepalive_permit_without_calls", 1),
        # A reader that stalls for ever would keep its stream. This also spreads clients over replicas; ±10 % is added.
        ("grpc.max_connection_age_ms", age_ms),
        ("grpc.max_connection_age_grace_ms", round(CONNECTION_AGE_GRACE_SECONDS * 1000)),
    ]


def front_options() -> dict[str, Any]:
    """Return the options of a front of pygrpc-native, as far as it has those of `channel_options`."""
    return {
        # One thread speaks HTTP/2 faster than Python can answer; a second one only adds switches.
        "io_threads": 1,
        # Peers, metadata, and the cancellation of unary calls.
        "call_details": True,
        # Without it a call that is refused at once has headers already, and clients do not retry it.
        "delay_stream_headers": True,
        # For NativeServer.stop, to wait until all statuses are sent.
        "metrics": True,
        "max_concurrent_streams": MAX_STREAMS_PER_CONNECTION,
        # The most that grpcio takes in any case.
        "max_metadata_size": 20 * 1024,
        "keepalive_time_ms": KEEPALIVE_MILLISECONDS,
        "keepalive_timeout_ms": KEEPALIVE_TIMEOUT_MILLISECONDS,
        "keepalive_permit_without_calls": True,
    }
