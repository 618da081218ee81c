"""`jobstatus serve`: flags → ServerConfig → the server."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import click

from jobstatus_grpc.cli import exits, parsers
from jobstatus_grpc.cli.options import duration_flag, flag, stored
from jobstatus_grpc.server.config import MIN_HELD_MIB, TRANSPORTS, ServerConfig

DEFAULTS = ServerConfig()

LOG_LEVELS = ("debug", "info", "warning", "error")

COUNT = parsers.count(2**31 - 1, smallest=1)

HELD_MIB = parsers.count(2**31 - 1, smallest=MIN_HELD_MIB)

WORKERS = parsers.count(256, smallest=1)

COUNT_OR_OFF = parsers.count(2**31 - 1, smallest=1, or_off=True)

YEAR = timedelta(days=365)


@click.command()
@flag(
    "--listen HOST:PORT",
    "The address, or unix:/path; port 0: a free port. May be repeated.",
    multiple=True,
    default=DEFAULTS.listen,
)
@stored("sqlite:///FILE, postgresql://USER@HOST/NAME, or memory: (lost at exit).", default=DEFAULTS.store)
@flag(
    "--transport NAME",
    f"The HTTP/2 implementation: {' or '.join(TRANSPORTS)}. native needs less time per call, and the extra `native`.",
    type=click.Choice(TRANSPORTS),
    default=DEFAULTS.transport,
)
@duration_flag(
    "--retention DURATION",
    "How long a done job is kept.",
    default=parsers.spell(DEFAULTS.retention),
    longest=100 * YEAR,
)
@duration_flag(
    "--drain-grace DURATION",
    "How long running calls may take when the server shuts down.",
    default=parsers.spell(DEFAULTS.drain_grace),
    longest=YEAR,
)
@duration_flag(
    "--fail-stalled-after DURATION",
    "Fail jobs that are stalled for this time.",
    default="off",
    longest=YEAR,
    or_off=True,
)
@flag("--max-watchers N", "Limit of open watches.", type=COUNT, default=DEFAULTS.max_watchers)
@flag("--max-watchers-per-caller N", "Limit of open watches per caller.", type=COUNT_OR_OFF, default="off")
@flag("--max-requests N", "Limit of other calls in flight.", type=COUNT, default=DEFAULTS.max_requests)
@flag(
    "--max-held-mib N",
    "Limit of the memory for open calls, in MiB. Default: half of the memory, divided by --workers.",
    type=HELD_MIB,
)
@duration_flag(
    "--max-connection-age DURATION",
    "Close connections after this time, ±10 %; clients reconnect.",
    default=parsers.spell(DEFAULTS.max_connection_age),
    shortest=timedelta(seconds=1),
    longest=timedelta(days=20),
)
@flag(
    "--auth FILE", "Accept only callers that this TOML file admits: docs/security.md. It is read again when it changes."
)
@flag("--tls-cert FILE", "Use TLS with this certificate and its chain (PEM), which is read again when it changes.")
@flag("--tls-key FILE", "The private key of --tls-cert (PEM).")
@flag("--tls-client-ca FILE", "The CAs of the clients' certificates (PEM); with --tls-require-client-cert.")
@flag("--tls-require-client-cert", "Accept only clients with a certificate of --tls-client-ca.")
@flag(
    "--unix-mode MODE",
    "Permissions of Unix sockets, such as 0660.",
    type=parsers.file_mode,
    default=f"{DEFAULTS.unix_mode:04o}",
)
@flag(
    "--http HOST:PORT",
    "Serve HTTP on this address: the RPCs for browsers and curl, see docs/web.md; port 0: a free port. Needs "
    "the extra `web`.",
)
@flag("--http-origin ORIGIN", "An origin whose pages may call the HTTP gateway. May be repeated.", multiple=True)
@flag(
    "--health HOST:PORT",
    "Serve gRPC health checks, and nothing else, on this address, without TLS and to anyone: for the probes of "
    "Kubernetes.",
)
@flag("--metrics HOST:PORT", "Serve Prometheus metrics over HTTP on this address; port 0: a free port.")
@flag("--metrics-tls", "Serve metrics over HTTPS, with --tls-cert.")
@flag("--metrics-token-file FILE", "Serve metrics only to requests with the bearer token in this file.")
@flag(
    "--otel",
    "Export spans by OpenTelemetry, as its variables OTEL_… say: docs/telemetry.md. Needs the extra `otel`.",
)
@flag(
    "--workers N",
    "Server processes on the same port; needs a store that can be shared. Limits and metrics are per process: the "
    "first process serves metrics on the port of --metrics, the others on the ports after it; so with --health.",
    type=WORKERS,
    default=DEFAULTS.workers,
)
# JOBSTATUS_INSECURE is of clients, and jobstatus run sets it for its command: that must open no server.
@flag("--closed-reflection", "Serve no gRPC reflection, which needs no identity.")
@flag(
    "--insecure",
    "Allow --listen on addresses beyond this machine without TLS or without --auth. Its variable is "
    "JOBSTATUS_SERVE_INSECURE.",
    envvar="JOBSTATUS_SERVE_INSECURE",
)
@flag(
    "--log-format FORMAT",
    "text or json. Default: text on a terminal, json otherwise.",
    type=click.Choice(["text", "json"]),
)
@flag("--log-level LEVEL", f"{', '.join(LOG_LEVELS)}.", type=click.Choice(LOG_LEVELS), default="info")
@flag("--log-calls", "Log a line for each call. Without it calls are logged at level debug only; jobs always at info.")
@click.pass_context
def serve(ctx: click.Context, /, *, log_format: str | None, log_level: str, log_calls: bool, **settings: Any) -> None:
    """Run the server until SIGTERM or Ctrl-C.

    Prints `listening on HOST:PORT` once it is ready. The log goes to stderr.
    """
    config = ServerConfig(**settings)
    config.check()
    # What a server creates is for its user alone: the store, its locks, its sockets until they have their own mode.
    os.umask(0o077)
    from jobstatus_grpc.server import logs

    log_format = log_format or ("text" if sys.stderr.isatty() else "json")
    server_log = logs.configure(log_format, log_level, calls=log_calls, has_spans=config.otel)
    if config.workers > 1:
        from jobstatus_grpc.server import supervisor

        ctx.exit(
            supervisor.run(config, ready=_announce, log_format=log_format, log_level=log_level, log_calls=log_calls)
        )
    from jobstatus_grpc.server import app

    ctx.exit(app.run(config, ready=_announce, server_log=server_log))


def _announce(addresses: Sequence[str]) -> None:
    try:
        for address in addresses:
            print(f"listening on {address}", flush=True)
    except OSError:  # stdout is closed, or full; the server runs anyway
        exits.drop_unwritten(sys.stdout)
