"""Reads the pages of lists from the PostgreSQL store: each through one index, in the order of creation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jobstatus_grpc.job import JobFilter
from jobstatus_grpc.job.limits import MAX_RESPONSE_BYTES
from jobstatus_grpc.stores.interface import Page
from jobstatus_grpc.stores.paging import write_cursor
from jobstatus_grpc.stores.sql.criteria import (
    Criterion,
    Dialect,
    choose,
    counts_of,
    criteria_of,
    parameters_of,
    residuals_of,
)
from jobstatus_grpc.stores.sql.rows import JOB_COLUMNS, read_job

if TYPE_CHECKING:
    from jobstatus_grpc.stores.postgres.database import Connection

DIALECT = Dialect(
    jobs="jobstatus.jobs AS jobs",
    labels="jobstatus.labels AS labels",
    parameter=lambda name, sql_type: f"{{{name}}}::{sql_type}",  # see _numbered
    end_of_texts="\U0010ffff" * 65,  # names have at most 64 characters of four bytes
    # As a join, without statistics, the planner may read all labels instead of looking up those of each job.
    subquery_end=" OFFSET 0",
)

_ORDER = "ORDER BY created_at DESC, key DESC"


async def read_page(connection: Connection, tenant: str, job_filter: JobFilter, *, limit: int, cursor: str) -> Page:
    """Return a page; see JobStore. It is cut short as well where its jobs have more text than a response may have.

    Raises:
        InvalidTokenError: `cursor` is not a cursor.
    """
    parameters = parameters_of(tenant, job_filter, DIALECT, limit=limit, cursor=cursor)
    if not job_filter.possible_states:
        return Page((), (), "")
    criteria = criteria_of(job_filter, DIALECT)
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        counting = counts_of(criteria)
        counts = (await _fetch(connection, counting, parameters))[0] if counting else ()
        chosen = choose(criteria, counts, DIALECT)
        residuals = residuals_of(criteria, chosen)
        rows = await _fetch(connection, _matching(chosen, residuals), parameters)
        end = ""
        if residuals and len(rows) <= limit:
            last = await _fetch(connection, _last_examined(chosen), parameters)
            end = write_cursor((last[0][0], last[0][1])) if last else ""
    return _page(rows, limit, end)


def _page(rows: Sequence[Any], limit: int, end: str) -> Page:
    jobs, cursors = [], []
    size = 0
    for created_at, key, *columns in rows[:limit]:
        jobs.append(read_job((key, *columns)).job)
        cursors.append(write_cursor((created_at, key)))
        size += sum(len(value) for value in columns if isinstance(value, str))
        if size >= MAX_RESPONSE_BYTES:
            break
    return Page(jobs, cursors, cursors[-1] if len(jobs) < len(rows) else end)


async def _fetch(connection: Connection, query: str, parameters: Mapping[str, Any]) -> Sequence[Any]:
    text, names = _numbered(query)
    rows: Sequence[Any] = await connection.fetch(text, *(parameters[name] for name in names))
    return rows


class _Numbers(dict[str, str]):
    def __missing__(self, name: str) -> str:
        self[name] = f"${len(self) + 1}"
        return self[name]


@lru_cache(maxsize=1024)
def _numbered(query: str) -> tuple[str, tuple[str, ...]]:
    """Return `query` with `$1` and so on in place of `{name}`, and the names in that order."""
    numbers = _Numbers()
    return query.format_map(numbers), tuple(numbers)


_LIMIT, _EXAMINED, _SKIPPED = (DIALECT.parameter(name, "bigint") for name in ("limit", "examined", "skipped"))


@lru_cache(maxsize=1024)
def _places(criterion: Criterion, limit: str) -> str:
    """Return the query for the newest jobs of a criterion, at most `limit` of each arm.

    Each arm is ordered by its index: without statistics the planner would sort all of them together.
    """
    arms = " UNION ALL ".join(f"({select} {_ORDER} LIMIT {limit})" for select in criterion.selects_of_arms())
    return f"SELECT * FROM ({arms}) AS arms {_ORDER}"


@lru_cache(maxsize=1024)
def _matching(criterion: Criterion, residuals: tuple[str, ...]) -> str:
    columns = ", ".join(f"jobs.{name}" for name in JOB_COLUMNS)
    limit = _EXAMINED if residuals else _LIMIT
    condition = f"WHERE {' AND '.join(residuals)}" if residuals else ""
    return f"""
        SELECT place.created_at, place.key, {columns} FROM ({_places(criterion, limit)} LIMIT {limit}) AS place
        JOIN {DIALECT.jobs} ON jobs.key = place.key {condition}
        ORDER BY place.created_at DESC, place.key DESC LIMIT {_LIMIT}
    """


@lru_cache(maxsize=1024)
def _last_examined(criterion: Criterion) -> str:
    return f"SELECT created_at, key FROM ({_places(criterion, _EXAMINED)} LIMIT 1 OFFSET {_SKIPPED}) AS place"
