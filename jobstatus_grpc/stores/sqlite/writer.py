"""The writing half of the SQLite store: its thread, its connection, and whether writes succeed."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from datetime import datetime
from functools import cache
from itertools import chain
from queue import SimpleQueue
from typing import Any, NamedTuple, ParamSpec, TypeVar

from jobstatus_grpc.errors import CannotStartError, DataLossError, RetryableError, StoreFullError, StoreUnavailableError
from jobstatus_grpc.job import NO_CHILDREN, Children, add_children, is_report
from jobstatus_grpc.job.limits import TRANSITIONS_KEPT
from jobstatus_grpc.stores.batch import Batch
from jobstatus_grpc.stores.embedded import new_epoch
from jobstatus_grpc.stores.interface import Key
from jobstatus_grpc.stores.sql.rows import (
    CHILDREN_COLUMNS,
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
    checksum,
    children_row,
    from_instant,
    job_row,
    label_changes,
    lasting_checksum,
    report_row_with_checksum,
    request_row,
    transition_row,
    with_checksum,
    write_final,
)
from jobstatus_grpc.stores.sqlite.database import (
    BUSY_MILLISECONDS,
    RESERVE_BYTES,
    SqliteFile,
    as_store_error,
    begin_log,
    describe,
    find_damage,
    is_damage,
    is_fatal,
    is_malformed,
    log_is_empty,
    schema_version,
)
from jobstatus_grpc.stores.sqlite.queries import MAX_ROWS, keys_in, read_children, read_head

logger = logging.getLogger(__name__)

P = ParamSpec("P")

T = TypeVar("T")

CHECKPOINT_BYTES = 4 * 1024 * 1024
"""The size of the write-ahead log at which it is copied into the file: a page that many commits have changed is copied
once. RESERVE_BYTES is enough for the pages that this adds to the file."""

TRUNCATE_WAIT_MILLISECONDS = 100
"""How long to wait for queries before the log is made empty another time: no commit can run during the wait."""

MAX_EPOCHS = 10_000
"""The number of processes whose positions are valid: a day of a server that is restarted every ten seconds."""


class RequestKnownError(Exception):
    """One of a batch's requests is stored: its command was a repeat. Nothing was written."""


class Written(NamedTuple):
    """What a transaction has written."""

    jobs: dict[Key, StoredJob]
    """The jobs that were written, as they are stored now."""
    children: dict[Key, Children]
    """The numbers of children as they are now, of the jobs where they changed, and of new jobs."""


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
        """The file's state when it was opened."""
        file.record_place()
        file.keep_reserve()
        self.epochs = [*self.head.epochs, new_epoch(self.head.sequence + 1)]
        """The last one is this process's, and is written with its first change."""
        self._is_epoch_written = False
        self._last_key = self.head.last_key
        schema = schema_version(self.connection)
        self._log_schema = schema if log_is_empty(file.path) else None
        """Set if the file has all changes, so that the next transaction begins a log; see begin_log."""
        (self._page_bytes,) = self.connection.execute("PRAGMA page_size").fetchone()
        self._copied_frames = 0
        self._has_failed = False
        """Whether a transaction has failed, and may have left pages in the log after those of the last commit."""

    @classmethod
    def open(cls, path: str) -> Writer:
        """Return a writer for the file at `path`, which is created if it does not exist. Raises as `__init__`."""
        file = SqliteFile(path)
        try:
            return cls(file)
        except sqlite3.Error as error:
            file.unlock()
            raise CannotStartError(f"cannot open the store {path}: {describe(error)}") from error
        except BaseException:
            file.unlock()
            raise

    def close(self) -> None:
        """Close the connection. The file stays locked: its readers may still be open."""
        self.connection.close()

    @property
    def wants_checkpoint(self) -> bool:
        """Whether the write-ahead log is large enough for a checkpoint."""
        frames = self.file.frames_in_log()
        if frames < self._copied_frames:
            self._copied_frames = 0  # the log has begun anew
        return bool((frames - self._copied_frames) * self._page_bytes >= CHECKPOINT_BYTES)

    def write(self, batch: Batch, before: Mapping[Key, StoredJob], *, sequence: int, now: datetime) -> Written:
        """Write `batch` in one durable transaction.

        Args:
            batch: what to write.
            before: the jobs as they are stored; a job of the batch that is missing here is new.
            sequence: the number of the last change before this batch.
            now: the store's time.

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
            after = stored._replace(job=job) if stored else StoredJob(last_key, job)
            if stored is not None and is_report(stored.job, job):
                reports.append(report_row_with_checksum(after))
            else:
                row = job_row(after)
                lasting = lasting_checksum(row)
                after = after._replace(lasting=lasting)
                rows.append(with_checksum(row, lasting))
            written[key] = after
        counts = [(int(state), rise) for state, rise in batch.counts.items() if rise]
        # Few statements with many rows: each call into SQLite releases the GIL, and must acquire it again.
        with self.transaction():
            children = self._write_children(batch, [key for key in written if key not in before])
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
        return Written(written, children)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block in a durable transaction. If it raises, nothing is written."""
        if self._has_failed:
            # The start of the next process takes pages after those of the last commit for commits that were lost.
            self._truncate_log()
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            if self._log_schema is not None:
                begin_log(self.connection, self._log_schema)
            yield self.connection
            self.connection.execute("COMMIT")
        except BaseException as error:
            self._has_failed = True
            self._roll_back()
            if isinstance(error, sqlite3.Error) and isinstance(as_store_error(error), StoreFullError):
                self.file.free_reserve()  # for the checkpoint that makes room in the log, and for what removes jobs
            raise
        self._log_schema = None

    def checkpoint(self) -> None:
        """Copy the write-ahead log into the database, as far as readers allow."""
        self._checkpoint("PASSIVE")

    def _checkpoint(self, mode: str) -> None:
        schema = schema_version(self.connection)  # before: afterwards the log may have a newer one
        busy, in_log, self._copied_frames = self.connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        if not busy and in_log == self._copied_frames:
            self._log_schema = schema
            self._has_failed = self._has_failed and mode != "TRUNCATE"

    def _truncate_log(self) -> None:
        """Copy all of the log into the database and make its file empty, unless a query takes too long."""
        self.connection.execute(f"PRAGMA busy_timeout = {TRUNCATE_WAIT_MILLISECONDS}").fetchone()
        try:
            self._checkpoint("TRUNCATE")
        finally:
            self.connection.execute(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS}").fetchone()

    def probe(self) -> None:
        """Write one small row durably.

        Raises:
            StoreFullError: there is too little room for the reserve and a log, and in the file.
            sqlite3.Error: the disk takes no writes.
        """
        self.file.free_reserve()  # what the checkpoint adds to the file takes its place
        self._truncate_log()
        if not self.file.keep_reserve(beside_bytes=CHECKPOINT_BYTES) and self._free_bytes() < RESERVE_BYTES:
            raise StoreFullError
        with self.transaction() as connection:
            connection.execute("UPDATE store SET probes = probes + 1")

    def find_damage(self) -> str:
        """Check the whole file, for minutes if it is large; return the first damage, empty if there is none."""
        return find_damage(self.connection, "integrity_check")

    def _free_bytes(self) -> int:
        (pages,) = self.connection.execute("PRAGMA freelist_count").fetchone()
        return int(pages * self._page_bytes)

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

    def _write_children(self, batch: Batch, new_jobs: Sequence[Key]) -> dict[Key, Children]:
        """Write the numbers of children that the batch changes, and return them and those of new jobs."""
        changes = batch.child_changes()
        if not changes and not new_jobs:
            return {}
        found = read_children(self.connection, {**dict.fromkeys(new_jobs), **changes})
        numbers = dict.fromkeys(new_jobs, NO_CHILDREN) | found
        numbers |= {key: add_children(found.get(key, NO_CHILDREN), change) for key, change in changes.items()}
        self._execute(_write_children, [_checked(children_row(key, numbers[key])) for key in changes if numbers[key]])
        self._execute(_delete_children, [key for key in changes if not numbers[key]])
        return numbers

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
        self._execute(_write_transitions, [_checked(transition_row(key, entry)) for key, entry in batch.transitions])
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
    return _upsert_jobs((*STORED_COLUMNS, "checksum"), count)


@cache
def _write_reports(count: int) -> str:
    return _upsert_jobs(("key", *REPORT_COLUMNS, "checksum"), count)


@cache
def _write_changes(count: int) -> str:
    return _values("changes", ("sequence", "tenant", "id", "revision", "removed", "final", "checksum"), count)


@cache
def _write_requests(count: int) -> str:
    return f"{_values('requests', ('sequence', *REQUEST_COLUMNS), count)} ON CONFLICT (request, job_key) DO NOTHING"


@cache
def _write_transitions(count: int) -> str:
    return _values("transitions", (*TRANSITION_COLUMNS, "checksum"), count)


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
def _write_children(count: int) -> str:
    replace = "ON CONFLICT (tenant, parent_id) DO UPDATE SET numbers = excluded.numbers, checksum = excluded.checksum"
    return f"{_values('children', (*CHILDREN_COLUMNS, 'checksum'), count)} {replace}"


@cache
def _delete_children(count: int) -> str:
    return f"DELETE FROM children WHERE {keys_in(count, 'parent_id')}"


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


def _checked(row: Row) -> Row:
    return (*row, checksum(row))


def _change_rows(batch: Batch, sequence: int) -> list[Row]:
    """Return the rows of the batch's changes, numbered from `sequence` + 1."""
    rows: list[Row] = []
    for number, change in enumerate(batch.changes.values(), start=sequence + 1):
        tenant, job_id, revision, job, ended = change
        final = None if ended is None else write_final(ended)
        rows.append(_checked((number, tenant, job_id, revision, 1 if job is None else 0, final)))
    return rows


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

LONGEST_CHECK_PAUSE_SECONDS = 600.0
"""The longest pause between checks of a damaged file, which read all of it; the first pauses are as between probes."""

MAX_DAMAGED_ROWS = 1000
"""The number of damaged rows that are counted and logged, a line each."""


class Health:
    """Whether the store is writable, broken or closed.

    After a failed write it is probed until a write succeeds. While the file is not where it was opened, writes are
    refused: they would be lost when the process ends. So they are if SQLite finds the file malformed, until all of the
    file has been checked: a write could destroy more. A row with a wrong checksum affects nothing but itself.
    """

    def __init__(
        self,
        path: str,
        probe: Callable[[Callable[[None, BaseException | None], None]], None],
        find_displacement: Callable[[Callable[[str, BaseException | None], None]], None],
        find_damage: Callable[[Callable[[str, BaseException | None], None]], None],
        recovered: Callable[[], None],
        *,
        interval_seconds: float,
    ) -> None:
        """Start as writable.

        Args:
            path: the file's path, for messages.
            probe: writes a small row, and then calls its argument with None and the error, if any.
            find_displacement: calls its argument with what was deleted or replaced, and the error, if any.
            find_damage: checks the whole file, and calls its argument with the first damage, and the error, if any.
            recovered: called when writes succeed after a time in which they could not.
            interval_seconds: the interval between probes.
        """
        self._path = path
        self._probe = probe
        self._find_displacement = find_displacement
        self._find_damage = find_damage
        self._recovered = recovered
        self._interval_seconds = interval_seconds
        self._displacement = ""
        self._damage = ""
        self._damaged_rows: set[tuple[str, str]] = set()
        self.is_checking = False
        """Whether the writer's thread checks the whole file."""
        self._failure: RetryableError | None = None
        self._is_probing = False
        self._timer: asyncio.TimerHandle | None = None
        self._check_timer: asyncio.TimerHandle | None = None
        self._check_pause_seconds = 0.0
        self._refusal = ""
        self._cause: BaseException | None = None
        self.end: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        """The store's end: the error that broke it, or None once it is closed."""
        self._place_timer = self._look_later()

    @property
    def writable(self) -> bool:
        """Whether the last write or probe succeeded, and the store is in its place and neither broken nor closed."""
        return not (self.is_failing or self._refusal or self._displacement or self._damage)

    @property
    def is_failing(self) -> bool:
        """Whether a write has failed, and no probe has succeeded since."""
        return self._failure is not None

    def last_failure(self) -> RetryableError:
        """Return the error of the last write that failed, as a new one: callers raise it."""
        return StoreUnavailableError() if self._failure is None else copy(self._failure)

    @property
    def is_broken(self) -> bool:
        """Whether a sync has failed."""
        return self._cause is not None

    @property
    def damaged_rows(self) -> int:
        """The number of rows that were found damaged, at most MAX_DAMAGED_ROWS."""
        return len(self._damaged_rows)

    def check(self) -> None:
        """Raise StoreUnavailableError if the store is closed or broken."""
        if self._refusal:
            raise StoreUnavailableError(self._refusal)

    def check_writes(self) -> None:
        """Raise StoreUnavailableError if the store is closed, broken or damaged, or its file is not in its place."""
        self.check()
        if self._displacement or self._damage:
            raise StoreUnavailableError(f"writes are refused: {self._displacement or self._damage}")

    def failed(self, error: BaseException, *, is_write: bool) -> BaseException:
        """Record that a read or a write failed with `error`, and return the error to raise."""
        if isinstance(error, DataLossError):
            self.note_damage(error)
            return error
        if isinstance(error, StoreFullError):
            self._begin_probing(error)
            return error
        if not isinstance(error, sqlite3.Error):
            return error
        if is_fatal(error):
            self._break(error)
            return StoreUnavailableError(self._refusal)
        if is_malformed(error):
            self._check_file(error)
            return StoreUnavailableError(f"writes are refused: {self._damage}") if is_write else DataLossError()
        if is_damage(error):
            return DataLossError()
        if not isinstance(error, sqlite3.OperationalError):
            return error  # a bug, not the database's state
        answer = as_store_error(error)
        if is_write:
            self._begin_probing(answer, describe(error))
        return answer

    def note_damage(self, error: DataLossError) -> None:
        """Record a damaged row, and log it if it is the first time that it was found."""
        if is_malformed(error.__cause__):
            assert isinstance(error.__cause__, sqlite3.Error)
            self._check_file(error.__cause__)
        row = error.metadata.get("table", ""), error.metadata.get("row", "") + error.metadata.get("id", "")
        if row in self._damaged_rows or len(self._damaged_rows) >= MAX_DAMAGED_ROWS:
            return
        self._damaged_rows.add(row)
        logger.error(
            "a row of the store %s is damaged (table %s, row %s, job %s): what needs it fails with DATA_LOSS, all else "
            "goes on; to get it back, stop the server and copy a backup back with jobstatus restore",
            self._path,
            error.metadata.get("table", "(unknown)"),
            error.metadata.get("row", "(unknown)"),
            error.metadata.get("id", "(unknown)"),
        )

    def _check_file(self, error: sqlite3.Error) -> None:
        """Refuse writes until the whole file has been checked. An error of the disk may pass; damage stays."""
        if self._damage or self._refusal:
            return
        self._damage = f"the file {self._path} is damaged: {describe(error)}"
        logger.error(
            "a part of the store %s cannot be read: %s; reads go on, writes are refused while the file is checked",
            self._path,
            describe(error),
        )
        self._check_pause_seconds = self._interval_seconds
        self._check()

    def _check(self) -> None:
        self.is_checking = True
        self._find_damage(self._checked)

    def _checked(self, damage: str, error: BaseException | None) -> None:
        self.is_checking = False
        if self._refusal:
            return
        damage = damage or ("" if error is None else str(error))
        if not damage:
            self._damage = ""
            logger.warning("the file of the store %s was checked and is whole: it is writable again", self._path)
            self._recovered()
            return
        if self._check_pause_seconds == self._interval_seconds:
            logger.critical(
                "the store %s is damaged: %s; writes are refused, reads of what is not damaged go on; stop the server "
                "and copy a backup back with jobstatus restore. It is checked again, in case the disk recovers",
                self._path,
                damage,
            )
        self._damage = f"the file {self._path} is damaged: {damage}"
        self._check_timer = asyncio.get_running_loop().call_later(self._check_pause_seconds, self._check)
        self._check_pause_seconds = min(self._check_pause_seconds * 2, LONGEST_CHECK_PAUSE_SECONDS)

    def refuse(self, why: str) -> None:
        """Refuse all calls from now on. The first reason given is the one that callers get."""
        self._refusal = self._refusal or why
        self._place_timer.cancel()
        for timer in (self._timer, self._check_timer):
            if timer is not None:
                timer.cancel()

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

    def _begin_probing(self, error: RetryableError, cause: str = "") -> None:
        if not self.is_failing:
            logger.error(
                "cannot write to the store %s: %s; tried again every %g s, until then only jobs can be deleted",
                self._path,
                cause or error,
                self._interval_seconds,
            )
        self._failure = copy(error)
        if not self._is_probing and not self._refusal:
            self._is_probing = True
            self._timer = asyncio.get_running_loop().call_later(self._interval_seconds, self._probe, self._probed)

    def _probed(self, _: None, error: BaseException | None) -> None:
        self._is_probing = False
        if error is not None:
            self.failed(error, is_write=True)
            if self._failure is not None:
                self._begin_probing(self._failure)  # also after an error that is not of the disk
        elif self.is_failing:
            self._failure = None
            self._recovered()
            logger.warning("the store %s is writable again", self._path)


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
