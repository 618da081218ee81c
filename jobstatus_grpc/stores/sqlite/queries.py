"""The SQLite store's reads, as functions of a connection: jobs by key, history, changes, and the pages of lists."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from itertools import chain, islice
from typing import Any, NamedTuple

from jobstatus_grpc.errors import DataLossError, StoreChangedError
from jobstatus_grpc.job import (
    NO_CHILDREN,
    PROGRESS,
    Children,
    Command,
    Job,
    JobFilter,
    Tombstone,
    Transition,
    require_job,
    with_children,
)
from jobstatus_grpc.job.limits import MAX_RESPONSE_BYTES
from jobstatus_grpc.stores.embedded import TOO_OLD, Epoch
from jobstatus_grpc.stores.interface import MAX_BATCH_CHANGES, Change, Key, Page, RequestKey
from jobstatus_grpc.stores.sql.criteria import (
    Criterion,
    Dialect,
    choose,
    counts_of,
    criteria_of,
    parameters_of,
    residuals_of,
)
from jobstatus_grpc.stores.sql.rows import (
    REQUEST_COLUMNS,
    STORED_COLUMNS,
    TOMBSTONE_COLUMNS,
    TRANSITION_COLUMNS,
    Row,
    StoredJob,
    checksum,
    is_sound,
    lasting_checksum,
    read_children_text,
    read_final,
    read_job,
    read_tombstone,
    read_transition,
    request_keys,
)
from jobstatus_grpc.stores.sqlite.database import is_damage

MAX_ROWS = 100
"""The number of rows in one statement. Each number up to this has its own statement, which is prepared once."""


def _checksum(table: str, is_unchecked: str) -> str:
    """Return the expression for the checksum of a row of `table`; NULL only if an earlier version has written it."""
    return f"ifnull({table}.checksum, CASE WHEN NOT ({is_unchecked}) THEN -1 END)"


_JOB_CHECKSUM = _checksum("jobs", "jobs.key <= (SELECT unchecked_key FROM store)")

_COLUMNS = f"{', '.join(STORED_COLUMNS)}, {_JOB_CHECKSUM}"

_TRANSITIONS = f"""
    SELECT {", ".join(TRANSITION_COLUMNS)}, {_checksum("transitions", "(SELECT unchecked_key FROM store) > 0")}
    FROM transitions
    WHERE tenant = ? AND id = ? AND revision > ? ORDER BY revision LIMIT ?
"""

# The last of a number of changes, and whether there are so many.
_LAST_OF_CHANGES = """
    SELECT max(sequence), count(*) FROM (
        SELECT sequence FROM changes WHERE sequence > ? AND sequence <= ? ORDER BY sequence LIMIT ?
    )
"""

# The newest change of each job. One that a later change has replaced has no job here: the later one returns it.
_CHANGES = f"""
    SELECT c.sequence, c.tenant, c.id, c.revision, c.removed, c.final,
        {_checksum("c", "c.sequence <= (SELECT unchecked_sequence FROM store)")}, newest.removals,
        newest.removals AND EXISTS (SELECT 1 FROM jobs AS n WHERE n.tenant = c.tenant AND n.id = c.id),
        {", ".join(f"jobs.{name}" for name in STORED_COLUMNS)}, {_JOB_CHECKSUM}
    FROM (
        SELECT max(sequence) AS sequence, sum(removed) AS removals FROM changes
        WHERE sequence > ? AND sequence <= ? GROUP BY tenant, id
    ) AS newest
    JOIN changes AS c ON c.sequence = newest.sequence
    LEFT JOIN jobs ON jobs.tenant = c.tenant AND jobs.id = c.id AND jobs.revision = c.revision AND NOT c.removed
    ORDER BY c.sequence
"""

_CHANGE_VALUES = 6
"""The number of columns of a change before its checksum."""

MAX_SORTED_CHANGES = 30_000
"""The number of changes of which a statement finds the newest of each job, in about 20 ms: it sorts them, in memory."""


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


def read_newest_sequence(connection: sqlite3.Connection) -> int:
    """Return the number of the newest change in the file; 0 without one."""
    (sequence,) = connection.execute("SELECT coalesce(max(sequence), 0) FROM changes").fetchone()
    return int(sequence)


@cache
def keys_in(count: int, id_column: str = "id") -> str:
    """Return the condition that a row has one of `count` tenants and ids."""
    if count == 1:
        return f"(tenant, {id_column}) = (?, ?)"  # takes a fifth less time
    # Without the outer SELECT, SQLite would scan the whole table.
    return f"(tenant, {id_column}) IN (SELECT * FROM (VALUES {', '.join(['(?, ?)'] * count)}))"


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


_ID = STORED_COLUMNS.index("id")


def damaged(table: str, row: object, job_id: str = "") -> DataLossError:
    """Return the error of a damaged row; `row` is its key in the table, and its job's id is left out if not known."""
    return DataLossError(**({"id": job_id} if job_id else {}), table=table, row=f"{row}")


def _unreadable(table: str, row: object, job_id: str, cause: sqlite3.DatabaseError) -> DataLossError:
    """Return the error of a row that SQLite cannot read."""
    error = damaged(table, row, job_id)
    error.__cause__ = cause
    return error


def read_checked(row: Row) -> StoredJob:
    """Return the job in a row of STORED_COLUMNS and `checksum`.

    Raises:
        DataLossError: the row is not what was written.
    """
    lasting = lasting_checksum(row)
    if not is_sound(row, lasting):
        raise damaged("jobs", row[0])
    try:
        return read_job(row, lasting)
    except Exception as error:  # a row without a checksum may hold anything
        raise damaged("jobs", row[0]) from error


def read_jobs(connection: sqlite3.Connection, keys: Iterable[Key]) -> dict[Key, StoredJob | DataLossError]:
    """Return the jobs that exist, or the error of a job that is damaged."""
    found: dict[Key, StoredJob | DataLossError] = {}
    remaining = iter(keys)
    while chunk := list(islice(remaining, MAX_ROWS)):
        try:
            found |= _read_together(connection, chunk)
        except (DataLossError, sqlite3.DatabaseError) as error:
            if isinstance(error, sqlite3.Error) and not is_damage(error):
                raise
            for key in chunk:  # again, each alone: the damage is of one of them, or was an error of the disk
                found |= _read_alone(connection, key)
    return found


def _read_together(connection: sqlite3.Connection, keys: Sequence[Key]) -> dict[Key, StoredJob]:
    rows = connection.execute(_select_jobs(len(keys)), list(chain.from_iterable(keys))).fetchall()
    found = {(stored.job.tenant, stored.job.id): stored for stored in map(read_checked, rows)}
    if not found.keys() <= set(keys):
        raise damaged("jobs", "found under another id")
    children = read_children(connection, found)
    return found | {key: found[key]._replace(children=numbers) for key, numbers in children.items()}


def _read_alone(connection: sqlite3.Connection, key: Key) -> dict[Key, StoredJob | DataLossError]:
    try:
        return {**_read_together(connection, [key])}
    except DataLossError as error:
        error.metadata["id"] = key[1]
        return {key: error}
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return {key: _unreadable("jobs", "not readable", key[1], error)}


@cache
def _select_children(count: int) -> str:
    # As a BLOB: text that is not UTF-8 would fail the whole statement.
    columns = "tenant, parent_id, CAST(numbers AS BLOB), checksum"
    return f"SELECT {columns} FROM children WHERE {keys_in(count, 'parent_id')}"


_COUNT_CHILDREN = """
    SELECT state, count(*),
        sum(CASE WHEN state > 3 THEN 100000000
            ELSE CAST(min(max(coalesce(progress, 0), 0), 100) * 1000000 AS INTEGER) END)
    FROM jobs INDEXED BY jobs_by_parent WHERE tenant = ? AND parent_id = ? AND parent_id <> '' GROUP BY state
"""


def read_children(connection: sqlite3.Connection, keys: Iterable[Key]) -> dict[Key, Children]:
    """Return the numbers of the children of these jobs, which need not exist; nothing of a job without any.

    If a row is damaged, the children are counted.
    """
    found: dict[Key, Children] = {}
    remaining = iter(keys)
    while chunk := list(islice(remaining, MAX_ROWS)):
        rows = connection.execute(_select_children(len(chunk)), list(chain.from_iterable(chunk))).fetchall()
        for tenant, parent_id, content, stored_checksum in rows:
            key = (tenant, parent_id)
            try:
                text = content.decode()
                found[key] = read_children_text(text)
                is_damaged = stored_checksum is not None and stored_checksum != checksum((*key, text))
            except Exception:  # whatever damage makes of it
                is_damaged = True
            if is_damaged:
                found[key] = _count_children(connection, key)
    return found


def _count_children(connection: sqlite3.Connection, key: Key) -> Children:
    rows = connection.execute(_COUNT_CHILDREN, key).fetchall()
    numbers = {PROGRESS: sum(progress for _, _, progress in rows)} | {state: number for state, number, _ in rows}
    return {state: number for state, number in numbers.items() if number}


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
) -> tuple[dict[Key, StoredJob | DataLossError], dict[Key, Tombstone]]:
    """Return the jobs that exist, and the tombstones of the others; see `read_jobs`."""
    jobs = read_jobs(connection, keys)
    missing = [key for key in keys if key not in jobs]
    if not missing:
        return jobs, {}
    try:
        return jobs, read_tombstones(connection, missing, now)
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return jobs | {key: _unreadable("tombstones", "not readable", key[1], error) for key in missing}, {}


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
        JobNotFoundError, JobExpiredError, DataLossError: see JobStore.get.
    """
    rows = connection.execute(_TRANSITIONS, (*key, after_revision, limit)).fetchall()
    if not rows:
        jobs, tombstones = read_found(connection, [key], now)
        if key not in jobs:
            require_job(tombstones.get(key), key[1])
    for row in rows:
        if row[-1] is not None and checksum(row[:-1]) != row[-1]:
            raise damaged("transitions", row[2], key[1])
    return [read_transition(row[:-1]) for row in rows]


class ChangeRows(NamedTuple):
    """The changes that `read_changes` found."""

    sequence: int
    """The number up to which they are complete."""
    changes: list[Change]
    superseded: set[Key]
    """The jobs whose newest change follows later."""
    damaged: list[DataLossError]
    """Of the jobs that are left out because they are damaged."""


def read_changes(connection: sqlite3.Connection, after: int, last: int) -> ChangeRows:
    """Return the changes with numbers above `after` and up to `last`, or as many as fit in a batch.

    Raises:
        StoreChangedError: some of the changes have been dropped, or the id of a removed job names a new one since: it
            can be used after a day only, so that `after` is that old.
        DataLossError: the row of a change is damaged.
    """
    found = _read_newest(connection, after, last, MAX_BATCH_CHANGES)
    if found.sequence < last and len(found.changes) < MAX_BATCH_CHANGES // 2:
        # Most are replaced by later ones, as where few jobs change often.
        found = _read_newest(connection, after, last, MAX_SORTED_CHANGES)
    if after < connection.execute("SELECT forgotten_sequence FROM store").fetchone()[0]:
        raise StoreChangedError(TOO_OLD)
    return found


def _read_newest(connection: sqlite3.Connection, after: int, last: int, max_rows: int) -> ChangeRows:
    end, count = connection.execute(_LAST_OF_CHANGES, (after, last, max_rows)).fetchone()
    found = ChangeRows(end if count == max_rows else last, [], set(), [])
    for row in connection.execute(_CHANGES, (after, end)).fetchall():
        values, (stored_checksum, removals, is_used_anew, *columns) = row[:_CHANGE_VALUES], row[_CHANGE_VALUES:]
        sequence, tenant, job_id, revision, removed, final = values
        if stored_checksum is not None and checksum(values) != stored_checksum:
            raise damaged("changes", sequence)
        if is_used_anew or removals > 1:
            raise StoreChangedError(TOO_OLD)
        if not removed and columns[0] is None:
            found.superseded.add((tenant, job_id))
            continue
        try:
            job = None if removed else read_checked(tuple(columns)).job
        except DataLossError as error:
            error.metadata["id"] = job_id
            found.damaged.append(error)
        else:
            found.changes.append(Change(tenant, job_id, revision, job, read_final(final)))
        if len(found.changes) == MAX_BATCH_CHANGES:
            return found._replace(sequence=sequence)
    return found


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
        found = _read_places(connection, tenant, cursors[:limit])
        children = read_children(connection, [(tenant, job.id) for job in found.values() if isinstance(job, Job)])
    finally:
        if connection.in_transaction:  # some errors roll back by themselves
            connection.execute("ROLLBACK")
    jobs = {
        cursor: with_children(job, children.get((tenant, job.id), NO_CHILDREN))
        for cursor, job in found.items()
        if isinstance(job, Job)
    }
    errors = tuple(job for job in found.values() if isinstance(job, DataLossError))
    next_cursor = cursors[len(found) - 1] if len(found) < len(cursors) else end
    return Page(list(jobs.values()), list(jobs), next_cursor, errors)


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
    residuals = residuals_of(criteria, chosen)
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


def _read_places(connection: sqlite3.Connection, tenant: str, cursors: Sequence[str]) -> dict[str, Job | DataLossError]:
    """Return the job, or its error, at each of the cursors; only the first ones if they are larger than a response."""
    found: dict[str, Job | DataLossError] = {}
    size = 0
    for start in range(0, len(cursors), MAX_ROWS):
        chunk = {cursor: _key_of(cursor) for cursor in cursors[start : start + MAX_ROWS]}
        rows = _read_rows(connection, list(chunk.values()))
        found |= {cursor: _job_in(connection, tenant, rows.get(key), key) for cursor, key in chunk.items()}
        texts = (value for row in rows.values() if isinstance(row, tuple) for value in row if isinstance(value, str))
        size += sum(map(len, texts))
        if size >= MAX_RESPONSE_BYTES:
            break
    return found


def _key_of(cursor: str) -> int:
    digits = cursor.partition(".")[2]
    if not digits.isdigit():
        raise damaged("jobs", f"in an index: {cursor}")
    return int(digits)


def _read_rows(connection: sqlite3.Connection, keys: Sequence[int]) -> dict[int, Row | DataLossError]:
    """Return the rows by their keys, or the error of a row that SQLite cannot read."""
    try:
        return {row[0]: row for row in connection.execute(_select_by_key(len(keys)), keys).fetchall()}
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        if len(keys) == 1:
            return {keys[0]: _unreadable("jobs", keys[0], "", error)}
        found: dict[int, Row | DataLossError] = {}
        for key in keys:
            found |= _read_rows(connection, [key])
        return found


def _job_in(
    connection: sqlite3.Connection, tenant: str, row: Row | DataLossError | None, key: int
) -> Job | DataLossError:
    if row is None:
        return damaged("jobs", key)
    if isinstance(row, DataLossError):
        return row
    try:
        return read_checked(row).job
    except DataLossError as error:
        # The id may be what is damaged: an index says whether it is.
        query = "SELECT key FROM jobs WHERE tenant = ? AND id = ?"
        if connection.execute(query, (tenant, row[_ID])).fetchone() == (key,):
            error.metadata["id"] = f"{row[_ID]}"
        return error
