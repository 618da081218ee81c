"""The SQLite store's file: its path, lock, settings and schema, and what its errors mean."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Sequence
from urllib.parse import quote

from jobstatus_grpc.errors import CannotStartError, RetryableError, StoreFullError, StoreUnavailableError
from jobstatus_grpc.stores.sql.migrations import migrations

# Extended result codes: https://sqlite.org/rescode.html. The low byte is the primary code.
_IOERR, _CORRUPT, _FULL, _NOTADB = 10, 11, 13, 26

_IOERR_WRITE, _IOERR_FSYNC, _IOERR_DIR_FSYNC, _IOERR_TRUNCATE, _IOERR_SHMSIZE = 778, 1034, 1290, 1546, 4874


# Python 3.10 has no codes, and one message for all I/O errors: the worst of them is assumed.
_CODE_BY_MESSAGE = {
    "database or disk is full": _FULL,
    "disk I/O error": _IOERR_FSYNC,
    "database disk image is malformed": _CORRUPT,
    "file is not a database": _NOTADB,
}


def error_code(error: sqlite3.Error) -> int:
    """Return SQLite's extended result code; 0 if it is not known."""
    code = getattr(error, "sqlite_errorcode", None)
    return _CODE_BY_MESSAGE.get(str(error), 0) if code is None else int(code)


def is_fatal(error: sqlite3.Error) -> bool:
    """Return whether the file may be damaged.

    After a failed fsync the system may discard the data that it could not write, and report success for the next fsync.
    """
    code = error_code(error)
    return code in (_IOERR_FSYNC, _IOERR_DIR_FSYNC) or code & 0xFF in (_CORRUPT, _NOTADB)


def as_store_error(error: sqlite3.Error) -> RetryableError:
    """Return the error to raise. A write that a quota or a file size limit refused counts as a full disk."""
    if error_code(error) & 0xFF == _FULL or error_code(error) in (_IOERR_WRITE, _IOERR_TRUNCATE, _IOERR_SHMSIZE):
        return StoreFullError()
    return StoreUnavailableError(f"the store failed: {describe(error)}")


def describe(error: sqlite3.Error) -> str:
    """Return SQLite's message and the name of its code."""
    name = getattr(error, "sqlite_errorname", None)
    return f"{error} ({name})" if name else str(error)


URL_FORMS = "sqlite:///relative/path.db or sqlite:////absolute/path.db"

APPLICATION_ID = 0x4A6F6253
"""Marks our files among SQLite databases: "JobS"."""

PAGE_BYTES = 2048
"""The page size of new files, half of SQLite's default: a commit writes each page that it changes to the log. In groups
of 16 updates of 5,000 jobs, 2.9 kB are written per update, and 7.3 kB with the default."""


def path_of(url: str) -> str:
    """Return the absolute path that `url` names, without symbolic links, as the lock is named after it."""
    scheme, separator, path = url.partition(":///")
    if scheme != "sqlite" or not separator or not path or "\0" in path or path.startswith(":memory:"):
        raise CannotStartError(f"write the store's URL as {URL_FORMS}")
    return os.path.realpath(path)


class SqliteFile:
    """A database file that only this process has open. Any error while opening it is a CannotStartError of one line."""

    def __init__(self, path: str) -> None:
        """Create the file and its directories if they do not exist, accessible to the owner only, and lock it.

        Raises:
            CannotStartError: the path cannot be used, or another process uses it.
        """
        self.path = path
        self._lock: int | None = None
        try:
            _make_directories(os.path.dirname(path))
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self._lock = _lock(path)
            # SQLite gives its -wal and -shm files this file's mode.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            self.unlock()
            raise CannotStartError(f"cannot open the store {path}: {error.strerror}") from error

    def unlock(self) -> None:
        """Release the lock, so that other processes can open the file."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def connect_writer(self, steps: Sequence[str] | None = None) -> sqlite3.Connection:
        """Return the connection that writes and checkpoints, after bringing the schema up to date.

        Args:
            steps: the SQL from each schema version to the next; None: those of schema.sql.
        """
        connection = self._connect("rw")
        try:
            self._check_application(connection)
            _make_durable(connection, self.path)
            _migrate(connection, self.path, migrations(__package__) if steps is None else steps)
        except sqlite3.Error as error:
            connection.close()
            raise CannotStartError(f"cannot open the store {self.path}: {describe(error)}") from error
        except CannotStartError:
            connection.close()
            raise
        return connection

    def connect_reader(self) -> sqlite3.Connection:
        """Return a connection that cannot write."""
        return self._connect("ro")

    def _connect(self, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"file:{quote(self.path)}?mode={mode}",
            uri=True,
            isolation_level=None,
            # Each connection is opened, used and closed by one thread: the check would only cost time.
            check_same_thread=False,
        )

    def _check_application(self, connection: sqlite3.Connection) -> None:
        application_id = _pragma(connection, "application_id")
        if application_id == APPLICATION_ID:
            return
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise CannotStartError(f"cannot open the store {self.path}: it is a database of something else")
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")


def _make_directories(path: str) -> None:
    if not os.path.exists(path):
        parent = os.path.dirname(path)
        _make_directories(parent)
        os.mkdir(path, 0o700)
        # SQLite makes the names in this directory durable, but not the directory's own name in its parent.
        directory = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _lock(path: str) -> int:
    # The file is never removed: two processes could each lock a different file of this name.
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, 32).decode("ascii", "replace").strip()
        os.close(lock)
        raise CannotStartError(f"cannot open the store {path}: process {owner or '(unknown)'} has it open") from None
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    return lock


def _pragma(connection: sqlite3.Connection, name: str) -> object:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def _make_durable(connection: sqlite3.Connection, path: str) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    # The store runs checkpoints itself, between commits: errors of automatic ones are not reported.
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    settings = (_pragma(connection, "journal_mode"), _pragma(connection, "synchronous"))
    if settings != ("wal", 2):
        raise CannotStartError(f"cannot open the store {path}: its file system does not support WAL (got {settings})")


def _migrate(connection: sqlite3.Connection, path: str, steps: Sequence[str]) -> None:
    version = _pragma(connection, "user_version")
    assert isinstance(version, int)
    if version > len(steps):
        raise CannotStartError(
            f"cannot open the store {path}: its schema is version {version}, newer than the {len(steps)} known here; "
            "run the release that wrote it, or a later one"
        )
    for number, script in enumerate(steps[version:], start=version + 1):
        marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {number};"
        try:
            connection.executescript(f"BEGIN IMMEDIATE; {script}; {marks} COMMIT;")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
