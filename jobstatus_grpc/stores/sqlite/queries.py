"""The SQLite store's reads, as functions of a connection: jobs by key, history, changes, and the pages of lists."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from itertools import chain, islice
from typing import Any, NamedTuple

from jobstatus_grpc.errors import StoreChangedError
from jobstatus_grpc.job import Command, Job, JobFilter, Tombstone, Transition, require_job
from jobstatus_grpc.job.limits import MAX_RESPONSE_BYTES
from jobstatus_grpc.stores.embedded import TOO_OLD, Epoch
from jobstatus_grpc.stores.interface import MAX_BATCH_CHANGES, Change, Key, Page, RequestKey
from jobstatus_grpc.stores.sql.criteria import Criterion, Dialect, choose, counts_of, criteria_of, parameters_of
from jobstatus_grpc.stores.sql.rows import (
    REQUEST_COLUMNS,
    STORED_COLUMNS,
    TOMBSTONE_COLUMNS,
    TRANSITION_COLUMNS,
    StoredJob,
    read_final,
    read_job,
    read_tombstone,
    read_transition,
    request_keys,
)

MAX_ROWS = 100
"""The number of rows in one statement. Each number up to this has its own statement, which is prepared once."""

_COLUMNS = ", ".join(STORED_COLUMNS)

_TRANSITIONS = f"""
    SELECT {", ".join(TRANSITION_COLUMNS)} FROM transitions
    WHERE tenant = ? AND id = ? AND revision > ? ORDER BY revision LIMIT ?
"""

# A change that a later one has replaced has no job here: the later one returns it.
_CHANGES = f"""
    SELECT c.sequence, c.tenant, c.id, c.revision, c.removed, c.final,
        c.removed AND EXISTS (SELECT 1 FROM jobs AS n WHERE n.tenant = c.tenant AND n.id = c.id),
        {", ".join(f"j.{name}" for name in STORED_COLUMNS)}
    FROM changes AS c
    LEFT JOIN jobs AS j ON j.tenant = c.tenant AND j.id = c.id AND j.revision = c.revision AND NOT c.removed
    WHERE c.sequence > ? AND c.sequence <= ? ORDER BY c.sequence LIMIT {MAX_BATCH_CHANGES}
"""


class Head(NamedTuple):
    """The state of a file when it is opened."""

    sequence: int
    forgotten_sequence: int
    last_key: int
    """Of all jobs, also of those that were removed."""
    epochs: Sequence[Epoch]
    """The epochs that made changes, in order."""
    counts: Mapping[int, int]
    """The number of jobs in each state that ever had one, and of stalled ones; see Batch.counts."""


def read_head(connection: sqlite3.Connection) -> Head:
    """Return the highest numbers in use, the epochs, and the counts of jobs."""
    query = """
        SELECT max(forgotten_sequence, coalesce((SELECT max(sequence) FROM changes), 0)),
            forgotten_sequence, max(last_key, coalesce((SELECT max(key) FROM jobs), 0))
        FROM store
    """
    counts = connection.execute("SELECT state, jobs FROM counts").fetchall()
    epochs = connection.execute("SELECT first_sequence, name FROM epochs ORDER BY first_sequence").fetchall()
    row = connection.execute(query).fetchone()
    return Head._make((*row, list(map(Epoch._make, epochs)), dict(counts)))


@cache
def keys_in(count: int) -> str:
    """Return the condition that a row has one of `count` tenants and ids."""
    if count == 1:
        return "(tenant, id) = (?, ?)"  # takes a fifth less time
    # Without the outer SELECT, SQLite would scan the whole table.
    return f"(tenant, id) IN (SELECT * FROM (VALUES {', '.join(['(?, ?)'] * count)}))"


@cache
def _select_jobs(count: int) -> str:
    return f"SELECT {_COLUMNS} FROM jobs WHERE {keys_in(count)}"


@cache
def _select_tombstones(count: int) -> str:
    return f"SELECT {', '.join(TOMBSTONE_COLUMNS)} FROM tombstones WHERE {keys_in(count)}"


@cache
def _select_requests(count: int) -> str:
    values = f"(request, job_key) IN (SELECT * FROM (VALUES {', '.join(['(?, ?)'] * count)}))"
    return f"SELECT {', '.join(REQUEST_COLUMNS)} FROM requests WHERE {values}"


def read_jobs(connection: sqlite3.Connection, keys: Iterable[Key]) -> dict[Key, StoredJob]:
    """Return the jobs that exist."""
    found: dict[Key, StoredJob] = {}
    remaining = iter(keys)
    while chunk := list(islice(remaining, MAX_ROWS)):
        for row in connection.execute(_select_jobs(len(chunk)), list(chain.from_iterable(chunk))).fetchall():
            stored = read_job(row)
            found[stored.job.tenant, stored.job.id] = stored
    return found


def read_tombstones(connection: sqlite3.Connection, keys: Iterable[Key], now: datetime) -> dict[Key, Tombstone]:
    """Return the tombstones that exist and are not too old at `now`."""
    found: dict[Key, Tombstone] = {}
    remaining = iter(keys)
    while chunk := list(islice(remaining, MAX_ROWS)):
        rows = connection.execute(_select_tombstones(len(chunk)), list(chain.from_iterable(chunk))).fetchall()
        for tenant, job_id, revision, removed_at in rows:
            tombstone = read_tombstone((tenant, job_id), revision, removed_at, now)
            if tombstone is not None:
                found[tenant, job_id] = tombstone
    return found


def read_requests(
    connection: sqlite3.Connection, commands: Iterable[Command], stored: Mapping[Key, StoredJob]
) -> dict[RequestKey, str]:
    """Return those of the commands' requests that the stored jobs remember, with the hashes of their payloads."""
    keys = request_keys(commands, stored)
    known: dict[RequestKey, str] = {}
    remaining = iter(keys)
    while chunk := list(islice(remaining, MAX_ROWS)):
        rows = connection.execute(_select_requests(len(chunk)), list(chain.from_iterable(chunk))).fetchall()
        known.update({keys[request, job_key]: payload_hash for request, job_key, payload_hash in rows})
    return known


def read_found(
    connection: sqlite3.Connection, keys: Sequence[Key], now: datetime
) -> tuple[dict[Key, StoredJob], dict[Key, Tombstone]]:
    """Return the jobs that exist, and the tombstones of the others."""
    jobs = read_jobs(connection, keys)
    missing = [key for key in keys if key not in jobs]
    return jobs, read_tombstones(connection, missing, now) if missing else {}


def count_jobs(connection: sqlite3.Connection, tenant: str, at_most: int) -> int:
    """Return the number of the tenant's jobs; counting ends at `at_most`. It reads an index only."""
    query = "SELECT count(*) FROM (SELECT 1 FROM jobs WHERE tenant = ? LIMIT ?)"
    (count,) = connection.execute(query, (tenant, at_most)).fetchone()
    return int(count)


def read_transitions(
    connection: sqlite3.Connection, key: Key, now: datetime, after_revision: int, limit: int
) -> list[Transition]:
    """Return a page of the history of the job under `key`.

    Raises:
        JobNotFoundError, JobExpiredError: see JobStore.get.
    """
    rows = connection.execute(_TRANSITIONS, (*key, after_revision, limit)).fetchall()
    if not rows:
        jobs, tombstones = read_found(connection, [key], now)
        if key not in jobs:
            require_job(tombstones.get(key), key[1])
    return [read_transition(row) for row in rows]


def read_changes(connection: sqlite3.Connection, after: int, last: int) -> tuple[int, list[Change], set[Key]]:
    """Return the changes with numbers above `after` and up to `last`, or as many as fit in a batch.

    Returns:
        The number up to which the changes are complete, the changes, and the jobs whose newest change follows later.

    Raises:
        StoreChangedError: some of the changes have been dropped, or the id of a removed job names a new one since: it
            can be used after a day only, so that `after` is that old.
    """
    rows = connection.execute(_CHANGES, (after, last)).fetchall()
    if after < connection.execute("SELECT forgotten_sequence FROM store").fetchone()[0]:
        raise StoreChangedError(TOO_OLD)
    changes: dict[Key, Change] = {}
    superseded = {(tenant, job_id) for _, tenant, job_id, *_ in rows}
    for _, tenant, job_id, revision, removed, final, is_used_anew, *columns in rows:
        earlier = changes.get((tenant, job_id))
        if is_used_anew or (removed and earlier is not None and earlier.job is None):
            raise StoreChangedError(TOO_OLD)
        if removed or columns[0] is not None:
            job = None if removed else read_job(columns).job
            changes.pop((tenant, job_id), None)
            changes[tenant, job_id] = Change(tenant, job_id, revision, job, read_final(final))
    superseded.difference_update(changes)
    return (rows[-1][0] if len(rows) == MAX_BATCH_CHANGES else last), list(changes.values()), superseded


DIALECT = Dialect(
    jobs="jobs",
    labels="labels",
    parameter=lambda name, sql_type: f":{name}",
    end_of_texts=b"",  # SQLite orders blobs after all texts
    index_hint=" INDEXED BY {}",
)

_ORDER = "ORDER BY created_at DESC, key DESC"


def read_page(connection: sqlite3.Connection, tenant: str, job_filter: JobFilter, *, limit: int, cursor: str) -> Page:
    """Return a page; see JobStore. It is cut short as well where its jobs have more text than a response may have.

    Raises:
        InvalidTokenError: `cursor` is not a cursor.
    """
    parameters = parameters_of(tenant, job_filter, DIALECT, limit=limit, cursor=cursor)
    if not job_filter.possible_states:
        return Page((), (), "")
    connection.execute("BEGIN")  # all queries of the page see the same state of the file
    try:
        cursors, end = _read_cursors(connection, criteria_of(job_filter, DIALECT), parameters, limit)
        jobs = _read_jobs(connection, [int(place.partition(".")[2]) for place in cursors[:limit]])
    finally:
        if connection.in_transaction:  # some errors roll back by themselves
            connection.execute("ROLLBACK")
    count = len(jobs)
    return Page(jobs, cursors[:count], cursors[count - 1] if count < len(cursors) else end)


def _read_cursors(
    connection: sqlite3.Connection, criteria: Sequence[Criterion], parameters: Mapping[str, Any], limit: int
) -> tuple[list[str], str]:
    """Return the cursors of the first jobs that match, at most one more than `limit`.

    Each query returns one row: sqlite3 releases the GIL for each row, and must acquire it again.

    Returns:
        The cursors, and the cursor of the last job that was examined; empty if all were.
    """
    counting = counts_of(criteria)
    counts = connection.execute(counting, parameters).fetchone() if counting else ()
    chosen = choose(criteria, counts, DIALECT)
    residuals = tuple(criterion.residual for criterion in criteria if criterion is not chosen)
    (text,) = connection.execute(_matching(chosen, residuals), parameters).fetchone()
    cursors = text.split(" ") if text else []
    if not residuals or len(cursors) > limit:
        return cursors, ""
    last = connection.execute(_last_examined(chosen), parameters).fetchone()
    return cursors, last[0] if last else ""


@lru_cache(maxsize=1024)
def _places(criterion: Criterion) -> str:
    """Return the query for a criterion's jobs. Each arm is ordered by its index: SQLite merges them without sorting."""
    return f"{criterion.selects()} {_ORDER}"


@lru_cache(maxsize=1024)
def _matching(criterion: Criterion, residuals: tuple[str, ...]) -> str:
    """Return the query for a page's cursors as one text. Nested loops and group_concat keep the order."""
    places = f"{_places(criterion)} LIMIT :limit"
    if residuals:
        places = f"""
            SELECT place.created_at, place.key FROM ({_places(criterion)} LIMIT :examined) AS place
            CROSS JOIN jobs ON jobs.key = place.key WHERE {" AND ".join(residuals)} LIMIT :limit
        """
    return f"SELECT group_concat(created_at || '.' || key, ' ') FROM ({places})"


@lru_cache(maxsize=1024)
def _last_examined(criterion: Criterion) -> str:
    return f"SELECT created_at || '.' || key FROM ({_places(criterion)} LIMIT 1 OFFSET :skipped)"


@cache
def _select_by_key(count: int) -> str:
    return f"SELECT {_COLUMNS} FROM jobs WHERE key IN ({', '.join('?' * count)})"


def _read_jobs(connection: sqlite3.Connection, keys: Sequence[int]) -> list[Job]:
    """Return the jobs with these row keys, in their order; only the first ones if they are larger than a response."""
    jobs: list[Job] = []
    size = 0
    for start in range(0, len(keys), MAX_ROWS):
        chunk = keys[start : start + MAX_ROWS]
        rows = {row[0]: row for row in connection.execute(_select_by_key(len(chunk)), chunk).fetchall()}
        jobs.extend(read_job(rows[key]).job for key in chunk)
        size += sum(len(value) for row in rows.values() for value in row if isinstance(value, str))
        if size >= MAX_RESPONSE_BYTES:
            break
    return jobs
