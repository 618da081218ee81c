"""The SQLite store's file: its path, lock, settings, schema and write-ahead log, and what its errors mean."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import sqlite3
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import TypeAlias
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

QUICK_CHECK_BYTES = 256 * 1024 * 1024
"""The largest file that is checked after an unclean end: half a second if it is cached, three seconds at 100 MB/s."""


def path_of(url: str) -> str:
    """Return the absolute path that `url` names, without symbolic links, as the lock is named after it."""
    scheme, separator, path = url.partition(":///")
    if scheme != "sqlite" or not separator or not path or "\0" in path or path.startswith(":memory:"):
        raise CannotStartError(f"write the store's URL as {URL_FORMS}")
    return os.path.realpath(path)


_Identity: TypeAlias = tuple[int, int]
"""A file's device and inode."""


class SqliteFile:
    """A database file that only this process has open. Any error while opening it is a CannotStartError of one line."""

    def __init__(self, path: str) -> None:
        """Create the file if it does not exist, accessible to the owner only, and lock it.

        Raises:
            CannotStartError: the path cannot be used, or another process uses it.
        """
        self.path = path
        self._lock: int | None = None
        self._database: int | None = None
        self._identities: dict[str, _Identity] = {}
        try:
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self._lock = lock(path)
            check_log(path)
            # SQLite gives its -wal and -shm files this file's mode.
            self._database = lock_database(path, os.O_CREAT)
        except OSError as error:
            self.unlock()
            raise CannotStartError(f"cannot open the store {path}: {error.strerror}") from error
        except BaseException:
            self.unlock()
            raise

    def unlock(self) -> None:
        """Release the lock, so that other processes can open the file. All connections must be closed.

        Closing any descriptor of a file releases the POSIX locks that its process has on it, and so SQLite's.
        """
        for descriptor in (self._database, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._database = self._lock = None

    def record_place(self) -> None:
        """Remember the database and its -wal and -shm files, which SQLite keeps as long as there is a connection."""
        for path in (self.path, f"{self.path}-wal", f"{self.path}-shm"):
            with suppress(FileNotFoundError):
                self._identities[path] = _identity(os.stat(path))

    def find_displacement(self) -> str:
        """Return which of the files was deleted or replaced since `record_place`; empty if all are in place.

        If the lock's file was deleted, it is made and locked again, so that no other process opens the store.
        """
        self._keep_lock()
        for path, identity in self._identities.items():
            try:
                found = _identity(os.stat(path))
            except OSError as error:
                return f"{path} is gone ({error.strerror})"
            if found != identity:
                return f"{path} was replaced by another file"
        return ""

    def _keep_lock(self) -> None:
        if self._lock is None:
            return
        # Another process that has locked a new file of this name has found another database, or leaves at once.
        with suppress(OSError, CannotStartError):
            if not _is_at(f"{self.path}.lock", self._lock):
                removed, self._lock = self._lock, lock(self.path)
                os.close(removed)

    def connect_writer(self, steps: Sequence[str] | None = None) -> sqlite3.Connection:
        """Return the connection that writes and checkpoints, after bringing the schema up to date.

        Args:
            steps: the SQL from each schema version to the next; None: those of schema.sql.
        """
        connection = connect(self.path, "rw")
        try:
            self._check_application(connection)
            _make_durable(connection, self.path)
            if _migrate(connection, self.path, migrations(__package__) if steps is None else steps):
                # With all of the schema in the file, the first transaction begins a log; see begin_log.
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            connection.close()
            raise CannotStartError(f"cannot open the store {self.path}: {describe(error)}") from error
        except CannotStartError:
            connection.close()
            raise
        return connection

    def connect_reader(self) -> sqlite3.Connection:
        """Return a connection that cannot write.

        Raises:
            sqlite3.Error: the file cannot be opened, or it is not the one that was opened for writing.
        """
        displacement = self.find_displacement()
        if displacement:
            raise sqlite3.OperationalError(displacement)
        return connect(self.path, "ro")

    def _check_application(self, connection: sqlite3.Connection) -> None:
        application_id = _pragma(connection, "application_id")
        if application_id == APPLICATION_ID:
            return
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise CannotStartError(f"cannot open the store {self.path}: it is a database of something else")
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")


def connect(path: str, mode: str) -> sqlite3.Connection:
    """Return a connection.

    Args:
        path: the file.
        mode: `rw`, `ro`, or `ro&immutable=1`, which reads the file without its log.
    """
    return sqlite3.connect(
        f"file:{quote(path)}?mode={mode}",
        uri=True,
        isolation_level=None,
        # Each connection is opened, used and closed by one thread: the check would only cost time.
        check_same_thread=False,
    )


def lock(path: str) -> int:
    """Lock the store at `path` and return the lock's descriptor: the lock lasts until it is closed.

    Raises:
        CannotStartError: another process has the store open, or its directory does not exist.
    """
    directory = os.path.dirname(path)
    if not os.path.exists(directory):  # it is not created: three slashes may stand where four are meant
        raise CannotStartError(
            f"cannot open the store {path}: the directory {directory} does not exist; create it, or correct the URL: "
            f"{URL_FORMS}"
        )
    # We never remove the file: two processes could each lock a different file of this name.
    # A link in its place could lead to any file of the server's user, which the process id below would replace.
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, 32).decode("ascii", "replace").strip()
        os.close(lock)
        raise CannotStartError(f"cannot open the store {path}: process {owner or '(unknown)'} has it open") from None
    try:
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
    except OSError:  # the disk is full
        os.close(lock)
        raise
    return lock


def lock_database(path: str, flags: int = 0) -> int:
    """Lock the database file itself, in case the lock's file was deleted; return the descriptor as `lock` does.

    SQLite locks the file with POSIX locks, which do not see this one.

    Raises:
        CannotStartError: another process has the store open.
    """
    database = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(database, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(database)
        raise CannotStartError(f"cannot open the store {path}: another process has it open") from None
    return database


def _is_at(path: str, descriptor: int) -> bool:
    """Return whether the open file is the one at `path`."""
    try:
        return _identity(os.stat(path)) == _identity(os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


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


def _migrate(connection: sqlite3.Connection, path: str, steps: Sequence[str]) -> bool:
    """Bring the schema up to date, and return whether it was not."""
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
    return version < len(steps)


def check_log(path: str) -> None:
    """Refuse a write-ahead log that is not the file's own, and a file that is damaged after an unclean end.

    SQLite would replay any log that is there: pages of another state of the file, or of another file, would get between
    the file's own. A process that ends cleanly leaves no log.

    Raises:
        CannotStartError: the message says what to do.
    """
    log_path = f"{path}-wal"
    if not _size(log_path):
        return
    if not _size(path):
        raise CannotStartError(
            f"cannot open the store {path}: it is gone, but its log {log_path} is there; put the file back, or remove "
            f"the log to begin with an empty store"
        )
    try:
        # A connection that cannot write does not copy the log into the file when it is closed.
        with closing(connect(path, "ro")) as connection:
            is_own = _is_own_log(connection, path)
            is_checked = is_own and _size(path) + _size(log_path) <= QUICK_CHECK_BYTES
            damage = find_damage(connection, "quick_check") if is_checked else ""
    except sqlite3.OperationalError:
        return  # the file cannot be opened: the caller's connection says why
    except sqlite3.DatabaseError:
        is_own, damage = False, ""
    if not is_own:
        raise CannotStartError(
            f"cannot open the store {path}: {log_path} is the log of another file or of another state of this one, as "
            f"after a backup was copied over the file of a killed process; copy backups back with jobstatus restore, "
            f"or remove {log_path} and {path}-shm to go on with the file as it is"
        )
    if damage:
        raise CannotStartError(
            f"cannot open the store {path}: it is damaged ({damage}); copy a backup back with jobstatus restore"
        )


def _is_own_log(connection: sqlite3.Connection, path: str) -> bool:
    """Return whether the log that `connection` reads the file with was begun when the file was as it is.

    The file may be further: the log may be copied in part, so that SQLite could not read the file alone. Copies that
    SQLite makes have a schema_version of their own.
    """
    if not _has_log_names(connection):
        return True
    previous_log, log_schema = connection.execute("SELECT previous_log, log_schema FROM store").fetchone()
    if previous_log is None:  # the first log has not begun
        return True
    (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'store'").fetchone()
    page_bytes = _pragma(connection, "page_size")
    assert isinstance(page_bytes, int)
    with open(path, "rb") as file:
        header = file.read(100)
        file.seek((root - 1) * page_bytes)
        page = file.read(page_bytes)
    schema = int.from_bytes(header[40:44], "big")
    return previous_log.encode() in page and log_schema <= schema <= schema_version(connection)


def _has_log_names(connection: sqlite3.Connection) -> bool:
    """Return whether the schema is new enough."""
    return any(name == "log" for _, name, *_ in connection.execute("PRAGMA table_info(store)"))


def find_damage(connection: sqlite3.Connection, check: str) -> str:
    """Return the first damage that `quick_check` or `integrity_check` finds, in one line; empty if there is none."""
    try:
        (finding,) = connection.execute(f"PRAGMA {check}(1)").fetchone()
    except sqlite3.DatabaseError as error:
        return describe(error)
    return "" if finding == "ok" else " ".join(str(finding).split())


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def log_is_empty(path: str) -> bool:
    """Return whether the file has all changes, and its log has none."""
    return not _size(f"{path}-wal")


def schema_version(connection: sqlite3.Connection) -> int:
    """Return the number of schema changes of the file."""
    version = _pragma(connection, "schema_version")
    assert isinstance(version, int)
    return version


def rename_log(connection: sqlite3.Connection) -> None:
    """Make a copy different from its original, whose log must not be replayed over it."""
    if _has_log_names(connection):
        connection.execute("PRAGMA secure_delete = ON").fetchone()  # _is_own_log searches the page for the name before
        connection.execute("UPDATE store SET log = ?, previous_log = NULL", (secrets.token_hex(8),))


def begin_log(connection: sqlite3.Connection, log_schema: int) -> None:
    """Name a new log, in its first transaction.

    Args:
        connection: a connection within that transaction.
        log_schema: the schema_version of the file when it had all of the log before.
    """
    connection.execute(
        "UPDATE store SET previous_log = log, log = ?, log_schema = ?", (secrets.token_hex(8), log_schema)
    )
    # Setting it writes the file's first page, which has the schema_version, to the log.
    connection.execute(f"PRAGMA user_version = {_pragma(connection, 'user_version')}")
