"""The SQLite store's file: its path, lock, settings, schema and write-ahead log, and what its errors mean."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import sqlite3
import struct
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import BinaryIO, TypeAlias
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
    """Return whether a sync has failed.

    After that the system may discard the data that it could not write, and report success for the next sync.
    """
    return error_code(error) in (_IOERR_FSYNC, _IOERR_DIR_FSYNC)


def is_malformed(error: BaseException | None) -> bool:
    """Return whether the file's structure is damaged, or a part of it cannot be read: SQLite has one code for both."""
    return isinstance(error, sqlite3.Error) and error_code(error) & 0xFF in (_CORRUPT, _NOTADB)


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether the file is malformed, or a text in it."""
    return is_malformed(error) or str(error).startswith("Could not decode to UTF-8")


def as_store_error(error: sqlite3.Error) -> RetryableError:
    """Return the error to raise. A write that a quota or a file size limit refused counts as a full disk."""
    if error_code(error) & 0xFF == _FULL:
        return StoreFullError()
    if error_code(error) in (_IOERR_WRITE, _IOERR_TRUNCATE, _IOERR_SHMSIZE):
        return StoreFullError(f"the store's disk takes no writes: {describe(error)}; nothing was written")
    return StoreUnavailableError(f"the store failed: {describe(error)}")


def describe(error: sqlite3.Error | UnicodeDecodeError) -> str:
    """Return SQLite's message and the name of its code.

    UnicodeDecodeError: the message quotes a schema that is damaged.
    """
    name = getattr(error, "sqlite_errorname", None)
    return f"{error} ({name})" if name else str(error)


URL_FORMS = "sqlite:///relative/path.db or sqlite:////absolute/path.db"

APPLICATION_ID = 0x4A6F6253
"""Marks our files among SQLite databases: "JobS"."""

PAGE_BYTES = 2048
"""The page size of new files, half of SQLite's default: a commit writes each page that it changes to the log. In groups
of 16 updates of 5,000 jobs, 2.9 kB are written per update, and 7.3 kB with the default."""

RESERVE_BYTES = 4 * 1024 * 1024
"""The room on the disk that the lock's file takes, and gives up when the disk is full: the log is copied into the file
then, which makes it larger, and jobs can be removed."""

BUSY_MILLISECONDS = 5000
"""How long a connection waits for another process, such as a copy in progress."""

QUICK_CHECK_BYTES = 256 * 1024 * 1024
"""The largest file that is checked after an unclean end: half a second if it is cached, three seconds at 100 MB/s."""


# Of the index of the log, SQLite's -shm file: the number of pages up to the last commit that it has found.
_FRAMES_OFFSET = 16

_LOG_MAGIC = {b"\x37\x7f\x06\x82": "<", b"\x37\x7f\x06\x83": ">"}
"""How a log begins, and the byte order of its checksums: https://sqlite.org/fileformat2.html#walformat"""

_FRAME_BYTES = 24
"""Before each page in a log: its number, the pages of the file if a commit ends here, the salt, and a checksum."""


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
        self._log_index: int | None = None
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
        self.free_reserve()
        for descriptor in (self._log_index, self._database, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._log_index = self._database = self._lock = None

    def record_place(self) -> None:
        """Remember the database and its -wal and -shm files, which SQLite keeps as long as there is a connection."""
        for path in (self.path, f"{self.path}-wal", f"{self.path}-shm"):
            with suppress(FileNotFoundError):
                self._identities[path] = _identity(os.stat(path))
        self._log_index = os.open(f"{self.path}-shm", os.O_RDONLY | os.O_CLOEXEC)

    def frames_in_log(self) -> int:
        """Return the number of pages in the log since it began; see https://sqlite.org/walformat.html."""
        assert self._log_index is not None
        return int.from_bytes(os.pread(self._log_index, 4, _FRAMES_OFFSET), sys.byteorder)

    def keep_reserve(self, *, beside_bytes: int = 0) -> bool:
        """Take RESERVE_BYTES of room on the disk, if there are `beside_bytes` besides; return whether there are."""
        if self._lock is None:
            return False
        try:
            os.posix_fallocate(self._lock, 0, RESERVE_BYTES + beside_bytes)
            os.ftruncate(self._lock, RESERVE_BYTES)
        except OSError:
            self.free_reserve()
            return False
        return True

    def free_reserve(self) -> None:
        """Give the room back."""
        if self._lock is not None:
            os.ftruncate(self._lock, len(_lock_text()))

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
                self.keep_reserve()

    def connect_writer(self, steps: Sequence[str] | None = None) -> sqlite3.Connection:
        """Return the connection that writes and checkpoints, after bringing the schema up to date.

        Args:
            steps: the SQL from each schema version to the next; None: those of schema.sql.
        """
        connection = connect(self.path, "rw")
        try:
            self._check_application(connection)
            _make_durable(connection, self.path)
            _migrate(connection, self.path, migrations(__package__) if steps is None else steps)
            _truncate_log(connection)
        except (sqlite3.Error, UnicodeDecodeError) as error:
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
        connection = connect(self.path, "ro")
        connection.execute("SELECT count(*) FROM store").fetchone()  # the first read opens the log
        return connection

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
        timeout=BUSY_MILLISECONDS / 1000,
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
        owner = os.read(lock, 32).decode("ascii", "replace").partition("\n")[0]
        os.close(lock)
        raise CannotStartError(f"cannot open the store {path}: process {owner or '(unknown)'} has it open") from None
    try:
        os.ftruncate(lock, 0)
        os.write(lock, _lock_text())
    except OSError:  # the disk is full
        os.close(lock)
        raise
    return lock


def _lock_text() -> bytes:
    return f"{os.getpid()}\n".encode()


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
    # A log that was larger once, because of a long query, does not stay so.
    connection.execute(f"PRAGMA journal_size_limit = {RESERVE_BYTES}")
    settings = (_pragma(connection, "journal_mode"), _pragma(connection, "synchronous"))
    if settings != ("wal", 2):
        raise CannotStartError(f"cannot open the store {path}: its file system does not support WAL (got {settings})")


def _truncate_log(connection: sqlite3.Connection) -> None:
    """Copy the log of an earlier process into the file. The next transaction begins a log; see begin_log.

    It would grow with each process that ends before its first checkpoint, and `_lost_commits` would find in it what was
    left of a transaction without a commit.
    """
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.OperationalError as error:
        if not isinstance(as_store_error(error), StoreFullError):  # it can be read, and jobs be removed
            raise


def _migrate(connection: sqlite3.Connection, path: str, steps: Sequence[str]) -> None:
    """Bring the schema up to date."""
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


def check_log(path: str, *, may_lack_commits: bool = False) -> None:
    """Refuse a write-ahead log that is not the file's own or damaged, and a file that is damaged after an unclean end.

    SQLite would replay any log that is there: pages of another state of the file, or of another file, would get between
    the file's own. A process that ends cleanly leaves no log.

    Args:
        path: the file.
        may_lack_commits: accept a log with acknowledged transactions that cannot be read, which SQLite leaves out.

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
            lost = _lost_commits(path) if is_own and not may_lack_commits else 0
            is_checked = is_own and not lost and _size(path) + _size(log_path) <= QUICK_CHECK_BYTES
            damage = find_damage(connection, "quick_check") if is_checked else ""
    except sqlite3.OperationalError:
        return  # the file cannot be opened: the caller's connection says why
    except (sqlite3.DatabaseError, UnicodeDecodeError):
        is_own, lost, damage = False, 0, ""
    if not is_own:
        raise CannotStartError(
            f"cannot open the store {path}: {log_path} is the log of another file or of another state of this one, as "
            f"after a backup was copied over the file of a killed process; copy backups back with jobstatus restore, "
            f"or remove {log_path} and {path}-shm to go on with the file as it is"
        )
    if lost:
        raise CannotStartError(
            f"cannot open the store {path}: its log {log_path} is damaged, and {lost} or more transactions, which were "
            f"acknowledged, cannot be read; copy a backup back with jobstatus restore, or go on without them: copy "
            f"what can be read with jobstatus backup, and that back with jobstatus restore, which keeps the log as "
            f"{damaged_log_path(path)}"
        )
    if damage:
        raise CannotStartError(
            f"cannot open the store {path}: it is damaged ({damage}); copy a backup back with jobstatus restore"
        )


def damaged_log_path(path: str) -> str:
    """Return where the log of a store is kept that had lost transactions."""
    return f"{path}-wal.damaged"


def has_lost_commits(path: str) -> bool:
    """Return whether the log has acknowledged transactions that cannot be read."""
    if log_is_empty(path):  # to open the file would make a log
        return False
    try:
        with closing(connect(path, "ro")) as connection:
            _has_log_names(connection)
            return _lost_commits(path) > 0
    except (OSError, sqlite3.Error, UnicodeDecodeError):
        return False


def _lost_commits(path: str) -> int:
    """Return the number of transactions in the log after the last one that SQLite has found, without the very last.

    SQLite reads a log up to the first page with a wrong checksum. That is where a loss of power has cut a transaction
    that was not acknowledged yet: only the last one, as the log is synced after each. If others follow, the disk has
    damaged what was written. A connection must have read the file with its log, and be open.
    """
    with open(f"{path}-shm", "rb") as index:
        index.seek(_FRAMES_OFFSET)
        found = int.from_bytes(index.read(4), sys.byteorder)
    with open(f"{path}-wal", "rb") as log, open(path, "rb") as file:
        header = log.read(32)
        page_bytes, salt = int.from_bytes(header[8:12], "big"), header[16:24]
        if not _is_sound_header(header):
            page_bytes = int.from_bytes(file.read(100)[16:18], "big")
            salt = log.read(_FRAME_BYTES)[8:16]
        return _count_commits(log, 32 + found * (_FRAME_BYTES + page_bytes), page_bytes, salt)


def _is_sound_header(header: bytes) -> bool:
    """Return whether the checksum of a log's header is right."""
    if len(header) < 32 or header[:4] not in _LOG_MAGIC:
        return False
    order = _LOG_MAGIC[header[:4]]
    first = second = 0
    for number in range(0, 24, 8):
        one, two = struct.unpack(f"{order}II", header[number : number + 8])
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + two + first) & 0xFFFFFFFF
    return struct.pack(">II", first, second) == header[24:]


def _count_commits(log: BinaryIO, start: int, page_bytes: int, salt: bytes) -> int:
    """Return the number of transactions from `start` on that others follow. Pages of earlier logs have other salts."""
    commits = last_page = 0
    size = os.fstat(log.fileno()).st_size
    for offset in range(start, size - _FRAME_BYTES, _FRAME_BYTES + page_bytes):
        log.seek(offset)
        header = log.read(_FRAME_BYTES)
        if header[8:16] != salt:
            continue
        page, pages_of_file = struct.unpack(">II", header[:8])
        if last_page and page != last_page:  # the last page of a commit may be repeated, to fill a sector
            commits, last_page = commits + 1, 0
        if pages_of_file:
            last_page = page
    return commits


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
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
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
