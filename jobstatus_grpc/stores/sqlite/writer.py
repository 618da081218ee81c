"""The writing half of the SQLite store: its thread, its connection, and whether writes succeed."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from itertools import chain
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

from jobstatus_grpc.errors import StoreUnavailableError
from jobstatus_grpc.job import is_report
from jobstatus_grpc.job.limits import TRANSITIONS_KEPT
from jobstatus_grpc.stores.batch import Batch
from jobstatus_grpc.stores.embedded import new_epoch
from jobstatus_grpc.stores.interface import Key
from jobstatus_grpc.stores.sql.rows import (
    CONSTANT_COLUMNS,
    COUNT_COLUMNS,
    LABEL_COLUMNS,
    REPORT_COLUMNS,
    REQUEST_COLUMNS,
    STORED_COLUMNS,
    TOMBSTONE_COLUMNS,
    TRANSITION_COLUMNS,
    Row,
    StoredJob,
    from_instant,
    job_row,
    label_changes,
    report_row,
    request_row,
    transition_row,
    write_final,
)
from jobstatus_grpc.stores.sqlite.database import (
    SqliteFile,
    as_store_error,
    begin_log,
    describe,
    is_fatal,
    log_is_empty,
    schema_version,
)
from jobstatus_grpc.stores.sqlite.queries import MAX_ROWS, keys_in, read_head

logger = logging.getLogger(__name__)

P = ParamSpec("P")

T = TypeVar("T")

CHECKPOINT_ROWS = 4000
"""The number of job rows written between checkpoints: a page that many commits have changed is copied once."""

MAX_EPOCHS = 10_000
"""The number of processes whose positions are valid: a day of a server that is restarted every ten seconds."""

CHECKPOINT_TEXT = 16 * 1024 * 1024
"""The number of characters in results written between checkpoints: large results fill the log before many rows do."""


class RequestKnownError(Exception):
    """One of a batch's requests is stored: its command was a repeat. Nothing was written."""


class Writer:
    """The connection that writes the file, for one thread. A method that raises sqlite3.Error has written nothing."""

    def __init__(self, file: SqliteFile) -> None:
        """Open the file for writing.

        Raises:
            CannotStartError: the file cannot be used.
        """
        self.file = file
        self.connection = file.connect_writer()
        self.head = read_head(self.connection)
        file.record_place()
        """The file's state when it was opened."""
        self.epochs = [*self.head.epochs, new_epoch(self.head.sequence + 1)]
        """The last one is this process's, and is written with its first change."""
        self._is_epoch_written = False
        self._last_key = self.head.last_key
        schema = schema_version(self.connection)
        self._log_schema = schema if log_is_empty(file.path) else None
        """Set if the file has all changes, so that the next transaction begins a log; see begin_log."""
        self._rows_since_checkpoint = 0
        self._text_since_checkpoint = 0

    @classmethod
    def open(cls, path: str) -> Writer:
        """Return a writer for the file at `path`, which is created if it does not exist. Raises as `__init__`."""
        file = SqliteFile(path)
        try:
            return cls(file)
        except BaseException:
            file.unlock()
            raise

    def close(self) -> None:
        """Close the connection. The file stays locked: its readers may still be open."""
        self.connection.close()

    @property
    def wants_checkpoint(self) -> bool:
        """Whether the write-ahead log is large enough for a checkpoint."""
        return self._rows_since_checkpoint >= CHECKPOINT_ROWS or self._text_since_checkpoint >= CHECKPOINT_TEXT

    def write(
        self, batch: Batch, before: Mapping[Key, StoredJob], *, sequence: int, now: datetime
    ) -> dict[Key, StoredJob]:
        """Write `batch` in one durable transaction.

        Args:
            batch: what to write.
            before: the jobs as they are stored; a job of the batch that is missing here is new.
            sequence: the number of the last change before this batch.
            now: the store's time.

        Returns:
            The jobs that were written, as they are stored now.

        Raises:
            RequestKnownError: one of the batch's requests is stored already.
        """
        last_key = self._last_key
        written: dict[Key, StoredJob] = {}
        rows: list[Row] = []
        reports: list[Row] = []
        for key, job in batch.jobs.items():
            stored = before.get(key)
            if stored is None:
                last_key += 1
            written[key] = next_stored = StoredJob(stored.key if stored else last_key, job)
            if stored is not None and is_report(stored.job, job):
                reports.append(report_row(next_stored))
            else:
                rows.append(job_row(next_stored))
        counts = [(int(state), rise) for state, rise in batch.counts.items() if rise]
        # Few statements with many rows: each call into SQLite releases the GIL, and must acquire it again.
        with self.transaction():
            if batch.removed:
                self._remove(batch, now)
            # Row `batch`: with all columns for reports too, indexes are written and a quarter fewer updates are made.
            self._execute(_write_reports, reports)
            self._execute(_write_jobs, rows)
            old_labels, new_labels = label_changes(before, written, batch.removed)
            self._execute(_delete_labels, old_labels)
            self._execute(_write_labels, new_labels)
            self._execute(_write_counts, counts)
            self._execute(_write_changes, _change_rows(batch, sequence))
            if batch.requests:
                self._write_requests(batch, before, written, sequence)
            if batch.changes and not self._is_epoch_written:
                self._write_epoch()
            if batch.transitions:
                self._write_history(batch)
        self._last_key = last_key
        self._is_epoch_written = self._is_epoch_written or bool(batch.changes)
        self._rows_since_checkpoint += max(len(written), len(batch.requests))
        self._text_since_checkpoint += sum(len(row[-1]) for row in rows if row[-1])
        return written

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block in a durable transaction. If it raises, nothing is written."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            if self._log_schema is not None:
                begin_log(self.connection, self._log_schema)
            yield self.connection
            self.connection.execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise
        self._log_schema = None

    def checkpoint(self) -> None:
        """Copy the write-ahead log into the database, as far as readers allow."""
        self._rows_since_checkpoint = self._text_since_checkpoint = 0
        schema = schema_version(self.connection)  # before: afterwards the log may have a newer one
        busy, in_log, copied = self.connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if not busy and in_log == copied:  # busy: another process runs a checkpoint, and the numbers are -1
            self._log_schema = schema

    def probe(self) -> None:
        """Write one small row durably; raises sqlite3.Error as long as the disk is full."""
        self.checkpoint()  # may free space within the log
        with self.transaction() as connection:
            connection.execute("UPDATE store SET probes = probes + 1")

    def _execute(self, statement: Callable[[int], str], rows: Sequence[Row]) -> None:
        for start in range(0, len(rows), MAX_ROWS):
            chunk = rows[start : start + MAX_ROWS]
            self.connection.execute(statement(len(chunk)), list(chain.from_iterable(chunk)))

    def _remove(self, batch: Batch, now: datetime) -> None:
        keys = list(batch.removed)
        self._execute(_delete_jobs, keys)
        self._execute(_delete_transitions, keys)
        removed_at = from_instant(now)
        tombstones = [(*key, tombstone.revision, removed_at) for key, tombstone in batch.removed.items()]
        self._execute(_write_tombstones, tombstones)
        self.connection.execute("UPDATE store SET last_key = ?", (self._last_key,))

    def _write_requests(
        self, batch: Batch, before: Mapping[Key, StoredJob], written: Mapping[Key, StoredJob], sequence: int
    ) -> None:
        rows: list[Row] = []
        for (tenant, job_id, request_id), payload_hash in batch.requests.items():
            key = (tenant, job_id)
            job_key = (before.get(key) or written[key]).key
            rows.append((sequence, *request_row(job_key, request_id, payload_hash)))
        changes_before = self.connection.total_changes
        self._execute(_write_requests, rows)
        if self.connection.total_changes - changes_before < len(rows):
            raise RequestKnownError

    def _write_epoch(self) -> None:
        self.connection.execute("INSERT INTO epochs (first_sequence, name) VALUES (?, ?)", self.epochs[-1])
        self.connection.execute(_TRIM_EPOCHS, (MAX_EPOCHS,))

    def _write_history(self, batch: Batch) -> None:
        self._execute(_write_transitions, [transition_row(key, entry) for key, entry in batch.transitions])
        # A job has no more entries than revisions.
        for tenant, job_id in {key for key, entry in batch.transitions if entry.revision > TRANSITIONS_KEPT}:
            self.connection.execute(_TRIM_TRANSITIONS, {"tenant": tenant, "id": job_id})

    def _roll_back(self) -> None:
        if self.connection.in_transaction:
            with suppress(sqlite3.Error):  # the error that caused the rollback is raised
                self.connection.execute("ROLLBACK")


def _values(table: str, columns: Sequence[str], count: int) -> str:
    row = f"({', '.join('?' * len(columns))})"
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES {', '.join([row] * count)}"


# ON CONFLICT (key), because the key is known from the cache: (tenant, id) would search another index.
def _upsert_jobs(columns: Sequence[str], count: int) -> str:
    changes = ", ".join(f"{name} = excluded.{name}" for name in columns if name not in CONSTANT_COLUMNS)
    return f"{_values('jobs', columns, count)} ON CONFLICT (key) DO UPDATE SET {changes}"


@cache
def _write_jobs(count: int) -> str:
    return _upsert_jobs(STORED_COLUMNS, count)


@cache
def _write_reports(count: int) -> str:
    return _upsert_jobs(("key", *REPORT_COLUMNS), count)


@cache
def _write_changes(count: int) -> str:
    return _values("changes", ("sequence", "tenant", "id", "revision", "removed", "final"), count)


@cache
def _write_requests(count: int) -> str:
    return f"{_values('requests', ('sequence', *REQUEST_COLUMNS), count)} ON CONFLICT (request, job_key) DO NOTHING"


@cache
def _write_transitions(count: int) -> str:
    return _values("transitions", TRANSITION_COLUMNS, count)


@cache
def _write_tombstones(count: int) -> str:
    replace = "ON CONFLICT (tenant, id) DO UPDATE SET revision = excluded.revision, removed_at = excluded.removed_at"
    return f"{_values('tombstones', TOMBSTONE_COLUMNS, count)} {replace}"


@cache
def _write_labels(count: int) -> str:
    return _values("labels", LABEL_COLUMNS, count)


@cache
def _write_counts(count: int) -> str:
    return f"{_values('counts', COUNT_COLUMNS, count)} ON CONFLICT (state) DO UPDATE SET jobs = jobs + excluded.jobs"


@cache
def _delete_labels(count: int) -> str:
    # With IN, SQLite would scan all jobs that have the label.
    row = f"({', '.join(LABEL_COLUMNS)}) = ({', '.join('?' * len(LABEL_COLUMNS))})"
    return f"DELETE FROM labels WHERE {' OR '.join([row] * count)}"


@cache
def _delete_jobs(count: int) -> str:
    return f"DELETE FROM jobs WHERE {keys_in(count)}"


@cache
def _delete_transitions(count: int) -> str:
    return f"DELETE FROM transitions WHERE {keys_in(count)}"


def _change_rows(batch: Batch, sequence: int) -> list[Row]:
    """Return the rows of the batch's changes, numbered from `sequence` + 1."""
    return [
        (
            number,
            change.tenant,
            change.id,
            change.revision,
            1 if change.job is None else 0,
            None if change.final is None else write_final(change.final),
        )
        for number, change in enumerate(batch.changes.values(), start=sequence + 1)
    ]


_TRIM_EPOCHS = """
    DELETE FROM epochs WHERE first_sequence <= (
        SELECT first_sequence FROM epochs ORDER BY first_sequence DESC LIMIT 1 OFFSET ?
    )
"""

_TRIM_TRANSITIONS = f"""
    DELETE FROM transitions WHERE tenant = :tenant AND id = :id AND revision <= (
        SELECT revision FROM transitions WHERE tenant = :tenant AND id = :id
        ORDER BY revision DESC LIMIT 1 OFFSET {TRANSITIONS_KEPT}
    )
"""


DISPLACEMENT_SECONDS = 0.5
"""The interval between looks at the file's place, and so the time in which writes to a deleted file are lost."""


class Health:
    """Whether the store is writable, broken or closed.

    After a failed write it is probed until a write succeeds. While the file is not where it was opened, writes are
    refused: they would be lost when the process ends.
    """

    def __init__(
        self,
        path: str,
        probe: Callable[[Callable[[None, BaseException | None], None]], None],
        find_displacement: Callable[[Callable[[str, BaseException | None], None]], None],
        recovered: Callable[[], None],
        *,
        interval_seconds: float,
    ) -> None:
        """Start as writable.

        Args:
            path: the file's path, for messages.
            probe: writes a small row, and then calls its argument with None and the error, if any.
            find_displacement: calls its argument with what was deleted or replaced, and the error, if any.
            recovered: called when writes succeed after a time in which they could not.
            interval_seconds: the interval between probes.
        """
        self._path = path
        self._probe = probe
        self._find_displacement = find_displacement
        self._recovered = recovered
        self._interval_seconds = interval_seconds
        self._displacement = ""
        self._is_failing = False
        self._is_probing = False
        self._timer: asyncio.TimerHandle | None = None
        self._refusal = ""
        self._cause: BaseException | None = None
        self.end: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        """The store's end: the error that broke it, or None once it is closed."""
        self._place_timer = self._look_later()

    @property
    def writable(self) -> bool:
        """Whether the last write or probe succeeded, and the store is in its place and neither broken nor closed."""
        return not self._is_failing and not self._refusal and not self._displacement

    @property
    def is_broken(self) -> bool:
        """Whether an error has shown that the file may be damaged."""
        return self._cause is not None

    def check(self) -> None:
        """Raise StoreUnavailableError if the store is closed or broken."""
        if self._refusal:
            raise StoreUnavailableError(self._refusal)

    def check_writes(self) -> None:
        """Raise StoreUnavailableError if the store is closed or broken, or its file is not in its place."""
        self.check()
        if self._displacement:
            raise StoreUnavailableError(f"writes are refused: {self._displacement}")

    def succeeded(self) -> None:
        """Record that a write succeeded."""
        if self._is_failing:
            self._is_failing = False
            self._recovered()
            logger.warning("the store %s is writable again", self._path)

    def failed(self, error: BaseException, *, is_write: bool) -> BaseException:
        """Record that a read or a write failed with `error`, and return the error to raise."""
        if not isinstance(error, sqlite3.Error):
            return error
        if is_fatal(error):
            self._break(error)
            return StoreUnavailableError(self._refusal)
        if not isinstance(error, sqlite3.OperationalError):
            return error  # a bug, not the database's state
        if is_write:
            self._begin_probing(error)
        return as_store_error(error)

    def refuse(self, why: str) -> None:
        """Refuse all calls from now on. The first reason given is the one that callers get."""
        self._refusal = self._refusal or why
        self._place_timer.cancel()
        if self._timer is not None:
            self._timer.cancel()

    def finish(self) -> None:
        """Record the store's end, unless it is broken."""
        if not self.end.done():
            self.end.set_result(None)

    def _look_later(self) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        return loop.call_later(DISPLACEMENT_SECONDS, self._find_displacement, self._looked)

    def _looked(self, displacement: str, error: BaseException | None) -> None:
        if self._refusal:
            return
        self._place_timer = self._look_later()
        if error is not None or displacement == self._displacement:
            return
        self._displacement = displacement
        if displacement:
            logger.error(
                "writes to the store %s are refused, and reads return what it held before: %s; put the files back, or "
                "stop the server and copy a backup back with jobstatus restore",
                self._path,
                displacement,
            )
        else:
            logger.warning("the files of the store %s are back: it is writable again", self._path)
            self._recovered()

    def _break(self, error: sqlite3.Error) -> None:
        if self._cause is None:
            self._cause = error
            self.refuse(f"the store {self._path} is broken: {describe(error)}")
            logger.critical("%s", self._refusal)
        if not self.end.done():
            broken = StoreUnavailableError(self._refusal)
            broken.__cause__ = error
            self.end.set_result(broken)

    def _begin_probing(self, error: sqlite3.Error) -> None:
        if not self._is_failing:
            self._is_failing = True
            logger.error(
                "cannot write to the store %s: %s; writes are tried again every %g s",
                self._path,
                describe(error),
                self._interval_seconds,
            )
        if not self._is_probing and not self._refusal:
            self._is_probing = True
            self._timer = asyncio.get_running_loop().call_later(self._interval_seconds, self._probe, self._probed)

    def _probed(self, _: None, error: BaseException | None) -> None:
        self._is_probing = False
        if error is None:
            self.succeeded()
        else:
            self.failed(error, is_write=True)


class WorkerThread:
    """Runs functions in a thread, in order, and passes their results to the event loop."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]] | None]
        self._calls = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], T], done: Callable[[T, BaseException | None], None]) -> None:
        """Run `function` after all earlier ones, then call `done(result, error)` on the event loop."""
        self._calls.put((function, done))

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of `function`. Cancelling the call does not stop the function."""
        waiter: asyncio.Future[T] = self._loop.create_future()

        def done(result: T, error: BaseException | None) -> None:
            resolve(waiter, result, error)

        self.submit(lambda: function(*args, **kwargs), done)
        return await waiter

    async def stop(self) -> None:
        """End the thread, after all functions that were submitted."""
        if self._thread.is_alive():
            ended = self.call(lambda: self._calls.put(None))
            await ended
            self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            function, done = call
            result, error = None, None
            try:
                result = function()
            except BaseException as caught:
                error = caught
            with suppress(RuntimeError):  # the event loop is closed already
                self._loop.call_soon_threadsafe(done, result, error)


def resolve(waiter: asyncio.Future[T], result: T, error: BaseException | None) -> None:
    """Set the future's result or error, unless it was cancelled."""
    if waiter.done():
        return
    if error is None:
        waiter.set_result(result)
    else:
        waiter.set_exception(error)
