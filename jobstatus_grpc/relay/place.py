"""The place of a relay in the changes of jobs: a file that survives `kill -9`, and that one relay at a time can open.

It is an SQLite database: a delivery changes a few bytes of it, durably, whatever has been delivered before.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from datetime import datetime, timezone
from typing import NamedTuple

from jobstatus_grpc.errors import CannotStartError

_APPLICATION_ID = 0x6A73726C
"""In the header of the file, so that no other database is taken for one."""

_SCHEMA = """
CREATE TABLE place (one INTEGER PRIMARY KEY CHECK (one = 1), kind TEXT, token TEXT, horizon TEXT);
CREATE TABLE delivered (job TEXT PRIMARY KEY, event TEXT, at TEXT, is_end INTEGER) WITHOUT ROWID;
CREATE INDEX delivered_ends ON delivered (at) WHERE is_end;
"""


class Delivered(NamedTuple):
    """The event of a job that was delivered last."""

    job_id: str
    event_id: str
    at: datetime
    is_end: bool


class Place:
    """The newest resume token of which everything before has been delivered, and the events delivered lately.

    `token` is "" before `begin`. Ends up to `horizon` have been delivered, or were before the relay began.

    Every method may raise sqlite3.Error, if the disk is full for example; the file is as it was before then.
    """

    def __init__(self, path: str, kind: str) -> None:
        """Open the file, or create it.

        Args:
            path: of the file.
            kind: what is delivered, such as `end`: a file is good for one.

        Raises:
            CannotStartError: it cannot be used; the message says why.
        """
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
            self.close()
            raise _cannot_use(path, error) from None
        if found != kind:
            self.close()
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
            began = datetime.min.replace(tzinfo=timezone.utc)
            self._database.execute("INSERT INTO place VALUES (1, ?, '', ?)", (kind, began.isoformat()))
        elif application != _APPLICATION_ID:
            raise sqlite3.DatabaseError("it is another file")
        self._database.execute("COMMIT")
        rows = self._database.execute("SELECT kind, token, horizon FROM place").fetchall()
        if len(rows) != 1:
            raise sqlite3.DatabaseError("it is damaged")
        found, token, horizon = rows[0]
        return found, token, horizon

    def close(self) -> None:
        """Release the file."""
        self._database.close()

    def begin(self, token: str, horizon: datetime, known: Iterable[Delivered]) -> None:
        """Begin at a token; `known` are states that need no delivery."""
        self.save(known, token, horizon)

    def last_event(self, job_id: str) -> str | None:
        """Return the id of the job's event that was delivered last; None: it is not kept, or there is none."""
        row = self._database.execute("SELECT event FROM delivered WHERE job = ?", (job_id,)).fetchone()
        return None if row is None else str(row[0])

    def save(self, delivered: Iterable[Delivered], token: str, horizon: datetime) -> None:
        """Keep what was delivered and a new place, all or nothing; ends that are older than `horizon` are forgotten."""
        rows = [(each.job_id, each.event_id, _text(each.at), each.is_end) for each in delivered]
        with _transaction(self._database):
            self._database.executemany("INSERT OR REPLACE INTO delivered VALUES (?, ?, ?, ?)", rows)
            if (token, horizon) != (self.token, self.horizon):
                self._database.execute("UPDATE place SET token = ?, horizon = ?", (token, _text(horizon)))
                self._database.execute("DELETE FROM delivered WHERE is_end AND at < ?", (_text(horizon),))
        self.token, self.horizon = token, horizon

    def forget(self, job_id: str) -> None:
        """Forget a job that is not to be delivered again."""
        if self.last_event(job_id) is not None:
            with _transaction(self._database):
                self._database.execute("DELETE FROM delivered WHERE job = ?", (job_id,))

    def forget_open_jobs(self, *, unless: Collection[str]) -> None:
        """Forget the jobs that were not done, except some."""
        rows = self._database.execute("SELECT job FROM delivered WHERE NOT is_end").fetchall()
        with _transaction(self._database):
            gone = [(job_id,) for (job_id,) in rows if job_id not in unless]
            self._database.executemany("DELETE FROM delivered WHERE job = ?", gone)


def _cannot_use(path: str, error: OSError | sqlite3.Error | ValueError) -> CannotStartError:
    if "locked" in str(error):
        return CannotStartError(f"another relay uses {path}; give each relay a --state-file of its own")
    why = getattr(error, "strerror", None) or error
    return CannotStartError(f"{path} cannot be used as --state-file: {why}")


def _text(instant: datetime) -> str:
    """Return an instant in a form that sorts as text."""
    return instant.astimezone(timezone.utc).isoformat(timespec="microseconds")


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Make the block one durable transaction."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:  # some errors, such as a full disk, have ended it
            database.execute("ROLLBACK")
        raise
