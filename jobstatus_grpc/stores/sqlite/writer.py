"""The one connection that writes the SQLite store's file. Everything here runs in one thread, its own."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache
from itertools import chain

from jobstatus_grpc.job import is_report
from jobstatus_grpc.job.limits import TRANSITIONS_KEPT
from jobstatus_grpc.stores.batch import Batch
from jobstatus_grpc.stores.interface import Key
from jobstatus_grpc.stores.sql.rows import (
    CONSTANT_COLUMNS,
    COUNT_COLUMNS,
    LABEL_COLUMNS,
    REPORT_COLUMNS,
    STORED_COLUMNS,
    TOMBSTONE_COLUMNS,
    TRANSITION_COLUMNS,
    Row,
    StoredJob,
    from_instant,
    job_row,
    label_changes,
    report_row,
    store_job,
    transition_row,
)
from jobstatus_grpc.stores.sqlite.database import SqliteFile
from jobstatus_grpc.stores.sqlite.queries import MAX_ROWS, keys_in, read_head

CHECKPOINT_ROWS = 4000
"""How many job rows are written between checkpoints: enough for each page to be copied once for many commits."""

CHECKPOINT_TEXT = 16 * 1024 * 1024
"""How many characters of results are: they make the write-ahead log grow beyond what the rows tell."""

Statement = Callable[[int], str]


def _values(table: str, columns: Sequence[str], count: int) -> str:
    row = f"({', '.join('?' * len(columns))})"
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES {', '.join([row] * count)}"


# Going by the key that the cache knows saves a search in the index of tenants and ids.
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
    return _values("changes", ("sequence", "tenant", "id", "revision", "removed"), count)


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
    # With IN, SQLite would go through all jobs that have the label.
    row = f"({', '.join(LABEL_COLUMNS)}) = ({', '.join('?' * len(LABEL_COLUMNS))})"
    return f"DELETE FROM labels WHERE {' OR '.join([row] * count)}"


@cache
def _delete_jobs(count: int) -> str:
    return f"DELETE FROM jobs WHERE {keys_in(count)}"


@cache
def _delete_transitions(count: int) -> str:
    return f"DELETE FROM transitions WHERE {keys_in(count)}"


def _change_rows(batch: Batch, sequence: int) -> list[Row]:
    """Return the rows of what `batch` changed, numbered from `sequence` + 1."""
    return [
        (number, change.tenant, change.id, change.revision, 1 if change.job is None else 0)
        for number, change in enumerate(batch.changes.values(), start=sequence + 1)
    ]


_TRIM_TRANSITIONS = f"""
    DELETE FROM transitions WHERE tenant = :tenant AND id = :id AND revision <= (
        SELECT revision FROM transitions WHERE tenant = :tenant AND id = :id
        ORDER BY revision DESC LIMIT 1 OFFSET {TRANSITIONS_KEPT}
    )
"""


class Writer:
    """Writes batches, each in one durable transaction. Raises sqlite3.Error; what raises has written nothing."""

    def __init__(self, file: SqliteFile) -> None:
        """Open the file for writing.

        Raises:
            CannotStartError: it cannot be used.
        """
        self.file = file
        self.connection = file.connect_writer()
        self.head = read_head(self.connection)
        """Where the file stood when it was opened."""
        self._last_key = self.head.last_key
        self._rows_since_checkpoint = 0
        self._text_since_checkpoint = 0

    @classmethod
    def open(cls, path: str) -> Writer:
        """Return a writer of the file at `path`, which is created if need be. Raises as `__init__`."""
        file = SqliteFile(path)
        try:
            return cls(file)
        except BaseException:
            file.unlock()
            raise

    def close(self) -> None:
        """Close the connection, and let other processes open the file."""
        self.connection.close()
        self.file.unlock()

    @property
    def wants_checkpoint(self) -> bool:
        """Whether the write-ahead log has grown enough."""
        return self._rows_since_checkpoint >= CHECKPOINT_ROWS or self._text_since_checkpoint >= CHECKPOINT_TEXT

    def write(
        self, batch: Batch, before: Mapping[Key, StoredJob], *, sequence: int, now: datetime
    ) -> dict[Key, StoredJob]:
        """Write what `batch` changed; its changes are numbered from `sequence` + 1.

        Args:
            before: the jobs as they are in the file; those that are missing are new.

        Returns:
            The jobs as they are in the file now.
        """
        last_key = self._last_key
        written: dict[Key, StoredJob] = {}
        rows: list[Row] = []
        reports: list[Row] = []
        for key, job in batch.jobs.items():
            stored = before.get(key)
            if stored is None:
                last_key += 1
            written[key] = next_stored = store_job(stored.key if stored else last_key, job, stored)
            if stored is not None and is_report(stored.job, job):
                reports.append(report_row(next_stored))
            else:
                rows.append(job_row(next_stored))
        counts = [(int(state), rise) for state, rise in batch.counts.items() if rise]
        # Few calls: after every call into SQLite this thread has to compete for the interpreter again.
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            if batch.removed:
                self._remove(batch, now)
            # In the order of keys, neighbours share pages.
            self._execute(_write_reports, sorted(reports))
            self._execute(_write_jobs, sorted(rows))
            old_labels, new_labels = label_changes(before, written, batch.removed)
            self._execute(_delete_labels, old_labels)
            self._execute(_write_labels, new_labels)
            self._execute(_write_counts, counts)
            self._execute(_write_changes, _change_rows(batch, sequence))
            if batch.transitions:
                self._write_history(batch)
            self.connection.execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise
        self._last_key = last_key
        self._rows_since_checkpoint += len(written)
        self._text_since_checkpoint += sum(len(row[-1]) for row in rows if row[-1])
        return written

    def checkpoint(self) -> None:
        """Copy the write-ahead log into the database, as far as readers allow."""
        self._rows_since_checkpoint = self._text_since_checkpoint = 0
        self.connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def probe(self) -> None:
        """Write something small, durably: it raises while the disk is full."""
        self.checkpoint()  # may make room within the log
        self.connection.execute("UPDATE store SET probes = probes + 1")

    def _execute(self, statement: Statement, rows: Sequence[Row]) -> None:
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

    def _write_history(self, batch: Batch) -> None:
        self._execute(_write_transitions, [transition_row(key, entry) for key, entry in batch.transitions])
        # A job has at most as many entries as revisions.
        for tenant, job_id in {key for key, entry in batch.transitions if entry.revision > TRANSITIONS_KEPT}:
            self.connection.execute(_TRIM_TRANSITIONS, {"tenant": tenant, "id": job_id})

    def _roll_back(self) -> None:
        if self.connection.in_transaction:
            with suppress(sqlite3.Error):  # the error that led here says more
                self.connection.execute("ROLLBACK")
