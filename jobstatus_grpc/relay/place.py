"""The place of a relay in the changes of jobs: what it has delivered, durably, for one relay at a time.

It is in a file, or in a PostgreSQL database that relays on several machines share (see shared_place.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from datetime import datetime, timezone
from typing import NamedTuple, Protocol

from jobstatus_grpc.errors import CannotStartError

_APPLICATION_ID = 0x6A73726C
"""In the header of the file, so that no other database is taken for one."""

_SCHEMA = """
CREATE TABLE place (one INTEGER PRIMARY KEY CHECK (one = 1), kind TEXT, token TEXT, horizon TEXT);
CREATE TABLE delivered (job TEXT PRIMARY KEY, event TEXT, at TEXT, is_end INTEGER) WITHOUT ROWID;
CREATE INDEX delivered_ends ON delivered (at) WHERE is_end;
"""

BEGINNING = datetime.fromtimestamp(0, timezone.utc)
"""The horizon of a relay that has not begun."""


class Delivered(NamedTuple):
    """The event of a job that was delivered last."""

    job_id: str
    event_id: str
    at: datetime
    is_end: bool


class PlaceError(Exception):
    """The place cannot be read or written: it is as it was before the call, and this relay must not go on."""


class PlaceLostError(PlaceError):
    """This relay may not use the place any more: another one may have it by now. It can be opened again."""


class Place(Protocol):
    """The newest resume token of which everything before has been delivered, and the events delivered lately.

    Every method may raise PlaceError.
    """

    token: str
    """"" before the first `save`."""
    horizon: datetime
    """Ends up to it have been delivered, or were before the relay began."""

    async def last_event(self, job_id: str) -> str | None:
        """Return the id of the job's event that was delivered last; None: it is not kept, or there is none."""
        ...

    async def save(self, delivered: Iterable[Delivered], token: str, horizon: datetime) -> None:
        """Keep what was delivered and a new place, all or nothing; ends that are older than `horizon` are forgotten."""
        ...

    async def forget(self, job_id: str) -> None:
        """Forget a job that is not to be delivered again."""
        ...

    async def forget_open_jobs(self, *, unless: Collection[str]) -> None:
        """Forget the jobs that were not done, except some."""
        ...

    def check(self) -> None:
        """Raise PlaceLostError unless this relay may deliver now."""
        ...

    async def hold(self) -> None:
        """Keep the place for this relay; return never, but raise PlaceLostError once it is lost."""
        ...

    async def close(self) -> None:
        """Release it for another relay."""
        ...


class FilePlace:
    """A place in an SQLite database: a delivery changes a few bytes of it, whatever has been delivered before."""

    def __init__(self, path: str, kind: str) -> None:
        """Open the file, or create it, and lock it.

        Args:
            path: of the file.
            kind: what is delivered, such as `end`: a file is good for one.

        Raises:
            CannotStartError: it cannot be used; the message says why.
        """
        self._path = path
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            # Without isolation_level, transactions begin and end where this file says so. To SQLite a relative path can
            # be a name for a database in memory.
            self._database = sqlite3.connect(os.path.abspath(path), timeout=0, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise _cannot_use(path, error) from None
        try:
            found, self.token, horizon = self._open(kind)
            self.horizon = datetime.fromisoformat(horizon)
        except (sqlite3.Error, ValueError) as error:
            self._database.close()
            raise _cannot_use(path, error) from None
        if found != kind:
            self._database.close()
            raise CannotStartError(f"{path} is of a relay with --on {found}; give this one a --state-file of its own")

    def _open(self, kind: str) -> tuple[str, str, str]:
        """Lock the file until it is closed, create what is missing, and return its kind, token and horizon."""
        self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute("BEGIN EXCLUSIVE")
        (application,) = self._database.execute("PRAGMA application_id").fetchone()
        (tables,) = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables and not application:
            for statement in filter(str.strip, _SCHEMA.split(";")):
                self._database.execute(statement)
            self._database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            self._database.execute("INSERT INTO place VALUES (1, ?, '', ?)", (kind, BEGINNING.isoformat()))
        elif application != _APPLICATION_ID:
            raise sqlite3.DatabaseError("it is another file")
        # Fails now, and not after the first delivery, where the file cannot be written.
        self._database.execute("UPDATE place SET one = one")
        self._database.execute("COMMIT")
        rows = self._database.execute("SELECT kind, token, horizon FROM place").fetchall()
        if len(rows) != 1:
            raise sqlite3.DatabaseError("it is damaged")
        found, token, horizon = rows[0]
        return found, token, horizon

    async def close(self) -> None:
        self._database.close()

    def check(self) -> None:
        pass

    async def hold(self) -> None:
        await asyncio.Event().wait()

    async def last_event(self, job_id: str) -> str | None:
        with self._reporting():
            row = self._database.execute("SELECT event FROM delivered WHERE job = ?", (job_id,)).fetchone()
        return None if row is None else str(row[0])

    async def save(self, delivered: Iterable[Delivered], token: str, horizon: datetime) -> None:
        rows = [(each.job_id, each.event_id, _text(each.at), each.is_end) for each in delivered]
        with self._transaction():
            self._database.executemany("INSERT OR REPLACE INTO delivered VALUES (?, ?, ?, ?)", rows)
            if (token, horizon) != (self.token, self.horizon):
                self._database.execute("UPDATE place SET token = ?, horizon = ?", (token, _text(horizon)))
                self._database.execute("DELETE FROM delivered WHERE is_end AND at < ?", (_text(horizon),))
        self.token, self.horizon = token, horizon

    async def forget(self, job_id: str) -> None:
        if await self.last_event(job_id) is not None:
            with self._transaction():
                self._database.execute("DELETE FROM delivered WHERE job = ?", (job_id,))

    async def forget_open_jobs(self, *, unless: Collection[str]) -> None:
        with self._transaction():
            rows = self._database.execute("SELECT job FROM delivered WHERE NOT is_end").fetchall()
            gone = [(job_id,) for (job_id,) in rows if job_id not in unless]
            self._database.executemany("DELETE FROM delivered WHERE job = ?", gone)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Make the block one durable transaction."""
        with self._reporting():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # some errors, such as a full disk, have ended it
                    self._database.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise PlaceError(f"--state-file {self._path} cannot be used any more: {error}") from error


def _cannot_use(path: str, error: OSError | sqlite3.Error | ValueError) -> CannotStartError:
    if "locked" in str(error):
        return CannotStartError(f"another relay uses {path}; give each relay a --state-file of its own")
    why = getattr(error, "strerror", None) or error
    return CannotStartError(f"{path} cannot be used as --state-file: {why}")


def _text(instant: datetime) -> str:
    """Return an instant in a form that sorts as text."""
    return instant.astimezone(timezone.utc).isoformat(timespec="microseconds")
