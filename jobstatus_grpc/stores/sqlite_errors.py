"""What an error of SQLite means to the store."""

from __future__ import annotations

import sqlite3

from jobstatus_grpc.errors import RetryableError, StoreFullError, StoreUnavailableError

# Extended result codes: https://sqlite.org/rescode.html. The low byte is the primary code.
_IOERR, _CORRUPT, _FULL, _NOTADB = 10, 11, 13, 26
_IOERR_WRITE, _IOERR_FSYNC, _IOERR_DIR_FSYNC, _IOERR_TRUNCATE, _IOERR_SHMSIZE = 778, 1034, 1290, 1546, 4874

# Python 3.10 tells no codes. It says the same of every failed input or output: the worst has to be assumed.
_CODE_BY_MESSAGE = {
    "database or disk is full": _FULL,
    "disk I/O error": _IOERR_FSYNC,
    "database disk image is malformed": _CORRUPT,
    "file is not a database": _NOTADB,
}


def error_code(error: sqlite3.Error) -> int:
    """Return SQLite's extended result code, 0 where it is not known."""
    code = getattr(error, "sqlite_errorcode", None)
    return _CODE_BY_MESSAGE.get(str(error), 0) if code is None else int(code)


def is_fatal(error: sqlite3.Error) -> bool:
    """Tell whether the file can be trusted no longer.

    After a failed fsync the system may drop what it could not write and report success to the next one.
    """
    code = error_code(error)
    return code in (_IOERR_FSYNC, _IOERR_DIR_FSYNC) or code & 0xFF in (_CORRUPT, _NOTADB)


def as_store_error(error: sqlite3.Error) -> RetryableError:
    """Return what callers are told. A write that a quota or a limit refused counts as a full disk."""
    if error_code(error) & 0xFF == _FULL or error_code(error) in (_IOERR_WRITE, _IOERR_TRUNCATE, _IOERR_SHMSIZE):
        return StoreFullError()
    return StoreUnavailableError(f"the store cannot do this now: {describe(error)}")


def describe(error: sqlite3.Error) -> str:
    """Return SQLite's message and the name of its code, for people."""
    name = getattr(error, "sqlite_errorname", None)
    return f"{error} ({name})" if name else str(error)
