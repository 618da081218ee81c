"""Copies of a SQLite store in one file: made beside a running server, and copied back while none runs."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.stores.sql.migrations import migrations
from jobstatus_grpc.stores.sqlite.database import (
    APPLICATION_ID,
    check_log,
    connect,
    damaged_log_path,
    describe,
    find_damage,
    has_lost_commits,
    lock,
    lock_database,
    log_is_empty,
    path_of,
    rename_log,
)

logger = logging.getLogger(__name__)

_SUFFIXES = ("-wal", "-shm", "-journal", ".lock")
"""Of the names of files that SQLite and we keep beside a store."""


def back_up(url: str, target: str) -> int:
    """Write a verified copy of the store at `url` to the file `target`, and return the number of jobs in it.

    The copy has all writes that were acknowledged before the call; the store stays writable. `target` is replaced once
    the copy is whole; if the call fails, it stays as it was.

    Raises:
        CannotStartError: there is no store, it is damaged, or the copy cannot be written, as where `target` is a file
            of a store that is in use. The message says what to do.
    """
    path, target = path_of(url), os.path.realpath(target)
    if not os.path.isfile(path):
        raise CannotStartError(f"there is no store {path}; name the one to copy: --store sqlite:///PATH")
    try:
        _check_names(path, target)
        if not log_is_empty(path):
            _check_log_unless_in_use(path)
        with _locked_target(target):
            return _copy(path, target, mode="ro")
    except (OSError, sqlite3.Error) as error:
        raise CannotStartError(f"cannot back up the store {path} to {target}: {_text_of(error)}") from error


def restore(url: str, source: str) -> int:
    """Replace the store at `url` with the backup in the file `source`, and return the number of jobs in it.

    Tokens from after the backup are refused from then on: the next server's changes are another history. If the call
    fails, the store stays as it was.

    Raises:
        CannotStartError: a server has the store open, `source` is no backup or damaged, or the store cannot be written.
    """
    path, source = path_of(url), os.path.realpath(source)
    try:
        _check_names(source, path)
        check_log(source)
        with contextlib.ExitStack() as held:
            held.callback(os.close, lock(path))
            if os.path.exists(path):
                held.callback(os.close, lock_database(path))
            # Without a log, the backup is read without making files beside it: its directory may be read-only.
            has_lost = has_lost_commits(path)
            jobs = _copy(source, path, mode="ro&immutable=1" if log_is_empty(source) else "ro")
            if has_lost:
                os.replace(f"{path}-wal", damaged_log_path(path))
            # Only now: the store before has no changes without its log. Until then check_log refuses the log.
            for suffix in ("-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path + suffix)
            _sync_directory(path)
        return jobs
    except (OSError, sqlite3.Error) as error:
        raise CannotStartError(f"cannot restore the store {path} from {source}: {_text_of(error)}") from error


def _check_names(source: str, target: str) -> None:
    if not os.path.isfile(source):
        raise CannotStartError(f"there is no file {source}")
    if source == target or (os.path.exists(target) and os.path.samefile(source, target)):
        raise CannotStartError(f"{target} is the store itself; name another file")
    for suffix in _SUFFIXES:
        store = target.removesuffix(suffix)
        if store != target and os.path.exists(store):
            raise CannotStartError(f"{target} is a file of the store {store}; name another file")


@contextlib.contextmanager
def _locked_target(target: str) -> Iterator[None]:
    """Refuse a target that is a store in use, and let no process open it within the block. An older backup is none."""
    with contextlib.ExitStack() as held:
        try:
            if os.path.exists(f"{target}.lock"):  # no backup gets one
                held.callback(os.close, lock(target))
            if os.path.exists(target):
                # The old file may be read-only, or its file system without locks: it is replaced all the same.
                with contextlib.suppress(OSError):
                    held.callback(os.close, lock_database(target))
        except CannotStartError as error:
            raise CannotStartError(f"{error}; name another file for the backup") from None
        except OSError as error:
            why = f"{target}.lock cannot be locked: {error.strerror}"
            raise CannotStartError(f"{why}; name another file for the backup") from None
        if not log_is_empty(target):
            raise CannotStartError(
                f"{target}-wal is the log of a store, with writes in it; name another file for the backup"
            )
        yield


def _check_log_unless_in_use(path: str) -> None:
    """Refuse a foreign log, as opening does. While a server has the store open, the log is its own."""
    if not os.path.exists(f"{path}.lock"):  # the caller may be another user than the server's: it must not make one
        _check_log(path)
        return
    try:
        held = lock(path)
    except CannotStartError:
        return
    try:
        _check_log(path)
    finally:
        os.close(held)


def _check_log(path: str) -> None:
    check_log(path, may_lack_commits=True)
    if has_lost_commits(path):
        logger.warning(
            "the log of the store %s is damaged: the copy lacks the last writes, as far as they are lost", path
        )


def _copy(source: str, target: str, *, mode: str) -> int:
    """Copy a database to a file beside `target`, verify it there, rename it, and return its number of jobs."""
    handle, unfinished = tempfile.mkstemp(prefix=f"{os.path.basename(target)}.", dir=os.path.dirname(target))
    os.close(handle)
    try:
        with closing(connect(source, mode)) as database:
            _check_application(database, source)
            with closing(connect(unfinished, "rw")) as copy:
                database.backup(copy)
                damage = find_damage(copy, "integrity_check")
                if damage:
                    raise CannotStartError(f"{source} is damaged ({damage}); use an older backup")
                copy.execute("PRAGMA journal_mode = DELETE").fetchone()  # one file, without a log
                rename_log(copy)
                (jobs,) = copy.execute("SELECT count(*) FROM jobs").fetchone()
        if os.path.exists(target):
            _keep_owner(target, unfinished)
        os.replace(unfinished, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
        raise
    _sync_directory(target)
    assert isinstance(jobs, int)
    return jobs


def _check_application(connection: sqlite3.Connection, path: str) -> None:
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    if application_id != APPLICATION_ID:
        raise CannotStartError(f"{path} is not a store of jobstatus")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    known = len(migrations(__package__))
    if version > known:
        raise CannotStartError(f"{path} has schema version {version}, newer than the {known} known here")


def _keep_owner(old: str, new: str) -> None:
    """Give `new` the owner and the mode of `old`: root may restore a store of another user."""
    before = os.stat(old)
    os.chmod(new, before.st_mode & 0o777)
    with contextlib.suppress(PermissionError):
        os.chown(new, before.st_uid, before.st_gid)


def _sync_directory(path: str) -> None:
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _text_of(error: OSError | sqlite3.Error) -> str:
    return describe(error) if isinstance(error, sqlite3.Error) else error.strerror or str(error)
