"""Pages of lists: each is read from one index of the SQLite store, in the order of creation."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.limits import MAX_RESPONSE_BYTES
from jobstatus_grpc.record import Job
from jobstatus_grpc.stores.criteria import Criterion, choose, counts_of, criteria_of, parameters_of
from jobstatus_grpc.stores.interface import Page
from jobstatus_grpc.stores.rows import JOB_COLUMNS, read_job

CHUNK_ROWS = 100

_ORDER = "ORDER BY created_at DESC, key DESC"


def read_page(connection: sqlite3.Connection, tenant: str, job_filter: JobFilter, *, limit: int, cursor: str) -> Page:
    """Return a page; see JobStore. It is also cut short where its jobs have more text than a response may.

    Raises:
        InvalidTokenError: `cursor` is none.
    """
    parameters = parameters_of(tenant, job_filter, limit=limit, cursor=cursor)
    if not job_filter.possible_states:
        return Page((), (), "")
    connection.execute("BEGIN")  # what follows sees the file as it is now
    try:
        cursors, end = _read_cursors(connection, criteria_of(job_filter), parameters, limit)
        jobs = _read_jobs(connection, [int(place.partition(".")[2]) for place in cursors[:limit]])
    finally:
        if connection.in_transaction:  # some errors end it
            connection.execute("ROLLBACK")
    count = len(jobs)
    return Page(jobs, cursors[:count], cursors[count - 1] if count < len(cursors) else end)


def _read_cursors(
    connection: sqlite3.Connection, criteria: Sequence[Criterion], parameters: Mapping[str, Any], limit: int
) -> tuple[list[str], str]:
    """Return the cursors of the first jobs that match, one more than `limit`; and what was examined last, if not all.

    Each is one step: after every row this thread would have to compete for the interpreter again.
    """
    counting = counts_of(criteria)
    chosen = choose(criteria, connection.execute(counting, parameters).fetchone() if counting else ())
    residuals = tuple(criterion.residual for criterion in criteria if criterion is not chosen)
    (text,) = connection.execute(_matching(chosen, residuals), parameters).fetchone()
    cursors = text.split(" ") if text else []
    if not residuals or len(cursors) > limit:
        return cursors, ""
    last = connection.execute(_last_examined(chosen), parameters).fetchone()
    return cursors, last[0] if last else ""


# The texts of queries: each shape of a filter has one, which is prepared once.


@lru_cache(maxsize=1024)
def _places(criterion: Criterion) -> str:
    """Return the query of a criterion's jobs. Its arms are each in order: SQLite merges them and sorts nothing."""
    return f"{criterion.selects()} {_ORDER}"


@lru_cache(maxsize=1024)
def _matching(criterion: Criterion, residuals: tuple[str, ...]) -> str:
    """Return the query of all cursors of a page, in their order: nested loops and group_concat keep it."""
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
def _select_jobs(count: int) -> str:
    return f"SELECT {', '.join(('key', *JOB_COLUMNS))} FROM jobs WHERE key IN ({', '.join('?' * count)})"


def _read_jobs(connection: sqlite3.Connection, keys: Sequence[int]) -> list[Job]:
    """Return the jobs under `keys`, in their order; the first of them, where they are large."""
    jobs: list[Job] = []
    size = 0
    for start in range(0, len(keys), CHUNK_ROWS):
        chunk = keys[start : start + CHUNK_ROWS]
        rows = {row[0]: row for row in connection.execute(_select_jobs(len(chunk)), chunk).fetchall()}
        jobs.extend(read_job(rows[key]).job for key in chunk)
        size += sum(len(value) for row in rows.values() for value in row if isinstance(value, str))
        if size >= MAX_RESPONSE_BYTES:
            break
    return jobs
