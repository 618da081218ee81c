"""The row of TLS: what it costs beside plaintext, for calls and for watchers."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.report import Table, Target, row
from benchmarks.rows.calls import CALLERS, COST, JOBS, SPEED, reading, take_turns
from benchmarks.rows.watching import MEMORY, SETTLE_SECONDS, Audience, single_changes
from benchmarks.servers import BARE, GRPCIO, Bench, Server, numbered_jobs
from tests.support.certificates import Authority

COLUMNS = PLAINTEXT, TLS = "plaintext", "TLS"
"""They are no sides: both are served with grpcio."""

BARE_COLUMNS = BARE_PLAINTEXT, BARE_TLS = "bare, plaintext", "bare, TLS"
"""A bare grpc.aio server, for what a watch takes in gRPC itself."""

WATCHES_PER_CONNECTION = 50


@row("tls", "TLS beside plaintext")
def tls(bench: Bench, table: Table) -> None:
    """GetJob of 256 jobs with 64 calls in flight over 8 connections, and, once, single changes to many watchers. The
    memory of a watch is measured with 50 on a connection, and with a connection for each; of the latter, gRPC itself
    takes nearly all.
    """
    if GRPCIO not in bench.sides:
        return
    job_ids, watchers = numbered_jobs(JOBS), bench.plan.audience
    with bench.folder() as folder, contextlib.ExitStack() as stack:
        servers = {column: stack.enter_context(_run(bench, column, folder)) for column in COLUMNS}
        for server in servers.values():
            server.create(job_ids)
        subjects = {column: reading(server, job_ids) for column, server in servers.items()}
        take_turns(bench.plan, table, subjects, [(kind, CALLERS) for kind in (*SPEED, *COST)], "GetJob: ")
    for column in (*COLUMNS, *BARE_COLUMNS):
        for per_connection in (WATCHES_PER_CONNECTION, 1):
            with bench.folder() as folder, _run(bench, column, folder) as server:
                figures = _watch(server, watchers, per_connection)
            heading = f"{watchers:,} watchers, {per_connection} on a connection"
            table.add(column, {f"{heading}: {name}": value for name, value in figures.items()})
    memory = f"{watchers:,} watchers, {WATCHES_PER_CONNECTION} on a connection: {MEMORY}"
    table.expect(memory, f"{watchers:,} watchers over TLS, {MEMORY}", Target(TLS, "≤", 45))


def _watch(server: Server, watchers: int, per_connection: int) -> dict[str, float]:
    with Audience(server, ["warm-up"], WATCHES_PER_CONNECTION) as audience:
        audience.open(WATCHES_PER_CONNECTION)
    before = server.memory_bytes()
    with Audience(server, ["watched"], watchers, watches_per_connection=per_connection) as audience:
        audience.open(watchers)
        audience.run_for(SETTLE_SECONDS)
        memory = (server.memory_bytes() - before) / watchers / 1e3
        return {MEMORY: memory, **single_changes(audience)}


@contextlib.contextmanager
def _run(bench: Bench, column: str, folder: Path) -> Iterator[Server]:
    """Run the server of a column, each with a store of its own."""
    home = folder / column
    home.mkdir()
    side = GRPCIO if column in COLUMNS else BARE
    if column in (PLAINTEXT, BARE_PLAINTEXT):
        with bench.run(side, home) as server:
            yield server
        return
    authority = Authority()
    cert, key = authority.issue().write(home, "server")
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.set_alpn_protocols(["h2"])
    flags = ("--tls-cert", cert, "--tls-key", key) if side == GRPCIO else (cert, key)
    with bench.run(side, home, *flags) as server:
        yield replace(server, tls=context)
