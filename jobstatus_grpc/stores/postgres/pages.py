"""Pages of lists: each is read from one index of the PostgreSQL store, in the order of creation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jobstatus_grpc.job import JobFilter
from jobstatus_grpc.job.limits import MAX_RESPONSE_BYTES
from jobstatus_grpc.stores.interface import Page
from jobstatus_grpc.stores.paging import write_cursor
from jobstatus_grpc.stores.sql.criteria import Criterion, choose, counts_of, criteria_of, parameters_of
from jobstatus_grpc.stores.sql.rows import JOB_COLUMNS, read_job

if TYPE_CHECKING:
    from jobstatus_grpc.stores.postgres.database import Connection

_ORDER = "ORDER BY created_at DESC, key DESC"

_NUMBERS = {"since", "until", "until_key", "limit", "examined", "skipped", "counted"}

# A name has at most 64 characters of four bytes.
_AFTER_ALL_NAMES = "\U0010ffff" * 65


async def read_page(connection: Connection, tenant: str, job_filter: JobFilter, *, limit: int, cursor: str) -> Page:
    """Return a page; see JobStore. It is also cut short where its jobs have more text than a response may.

    Raises:
        InvalidTokenError: `cursor` is none.
    """
    parameters = parameters_of(tenant, job_filter, limit=limit, cursor=cursor)
    if isinstance(parameters["prefix_end"], bytes):
        parameters["prefix_end"] = _AFTER_ALL_NAMES
    if not job_filter.possible_states:
        return Page((), (), "")
    criteria = criteria_of(job_filter)
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        counting = counts_of(criteria)
        chosen = choose(criteria, (await _fetch(connection, counting, parameters))[0] if counting else ())
        residuals = tuple(each.residual for each in criteria if each is not chosen)
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


@lru_cache(maxsize=1024)
def _numbered(query: str) -> tuple[str, tuple[str, ...]]:
    """Return a query of the criteria's words as PostgreSQL has it, and the names of its parameters in their order."""
    names: dict[str, int] = {}

    def number(found: re.Match[str]) -> str:
        name = found[1] + found[2]
        place = names.setdefault(name, len(names) + 1)
        kind = "smallint" if found[1] in ("state", "stalled") else "bigint" if found[1] in _NUMBERS else "text"
        return f"${place}::{kind}"

    query = re.sub(r" INDEXED BY \w+", "", query)
    query = re.sub(r"\b(FROM|JOIN) (jobs|labels)\b", r"\1 jobstatus.\2 AS \2", query)
    # One look into the index for each job: as a join, without statistics, it may become a look at all labels.
    query = re.sub(r"EXISTS \(([^()]*)\)", r"EXISTS (\1 OFFSET 0)", query)
    return re.sub(r"(?<!:):([a-z_]+)(\d*)\b", number, query), tuple(names)


@lru_cache(maxsize=1024)
def _places(criterion: Criterion, limit: str) -> str:
    """Return the query of a criterion's newest jobs, at most `limit` of each arm.

    Each arm is put in order by itself, which its index does: without statistics all would be sorted together.
    """
    arms = " UNION ALL ".join(f"({select} {_ORDER} LIMIT {limit})" for select in criterion.selects_of_arms())
    return f"SELECT * FROM ({arms}) AS arms {_ORDER}"


@lru_cache(maxsize=1024)
def _matching(criterion: Criterion, residuals: tuple[str, ...]) -> str:
    columns = ", ".join(f"jobs.{name}" for name in JOB_COLUMNS)
    limit = ":examined" if residuals else ":limit"
    condition = f"WHERE {' AND '.join(residuals)}" if residuals else ""
    return f"""
        SELECT place.created_at, place.key, {columns} FROM ({_places(criterion, limit)} LIMIT {limit}) AS place
        JOIN jobs ON jobs.key = place.key {condition}
        ORDER BY place.created_at DESC, place.key DESC LIMIT :limit
    """


@lru_cache(maxsize=1024)
def _last_examined(criterion: Criterion) -> str:
    return f"SELECT created_at, key FROM ({_places(criterion, ':examined')} LIMIT 1 OFFSET :skipped) AS place"
