"""The SQL of a commit, and pieces that other queries share. Rows travel as one array per column, for unnest()."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from typing import Any

from jobstatus_grpc.stores.sql.rows import (
    CONSTANT_COLUMNS,
    COUNT_COLUMNS,
    JOB_COLUMNS,
    LABEL_COLUMNS,
    REPORT_COLUMNS,
    REQUEST_COLUMNS,
    STORED_COLUMNS,
    TOMBSTONE_COLUMNS,
    TRANSITION_COLUMNS,
    Row,
)

NOW = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
"""Microseconds since 1970 by the database's clock, which all processes share."""

JOB = ", ".join(f"j.{name}" for name in STORED_COLUMNS)
"""The columns that `rows.read_job` reads, of `jobstatus.jobs AS j`."""

JOBS = f"""
    SELECT {JOB} FROM unnest($1::text[], $2::text[]) AS w (tenant, id)
    JOIN jobstatus.jobs AS j ON j.tenant = w.tenant AND j.id = w.id
"""
"""The jobs under the keys in arrays $1 and $2."""

_TEXTS = {
    "tenant", "id", "name", "parent_id", "reason", "error", "labels", "creation_request", "requests", "result", "actor",
    "value", "final", "cancel_reason", "payload_hash", "trace_parent",
}  # fmt: skip

_SMALLINTS = {"state", "reports_progress", "cancel_requested", "stalled", "from_state", "to_state"}

_OTHER_TYPES = {
    "progress": "double precision", "first_progress": "double precision",
    "attempt": "integer", "number": "integer", "removed": "boolean", "request": "bytea",
}  # fmt: skip


def columns_of(rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    """Return rows as columns."""
    return list(zip(*rows, strict=True))


def _type_of(column: str) -> str:
    if column in _TEXTS:
        return "text"
    if column in _SMALLINTS:
        return "smallint"
    return _OTHER_TYPES.get(column, "bigint")


def _load(*, waits: bool) -> str:
    """Return the query that locks and reads the jobs under the keys in arrays $1 and $2.

    It locks in the order of the keys, so that two transactions cannot deadlock. A row has tenant, id, the time, whether
    there is a job, its tombstone's revision and removed_at; then key and JOB_COLUMNS, or nulls if the job is locked by
    another transaction. With `waits` it waits for that transaction instead.
    """
    skip = "" if waits else "SKIP LOCKED"
    return f"""
        SELECT w.tenant, w.id, {NOW},
            EXISTS (SELECT 1 FROM jobstatus.jobs AS x WHERE x.tenant = w.tenant AND x.id = w.id),
            t.revision, t.removed_at, {", ".join(f"locked.{name}" for name in STORED_COLUMNS)}
        FROM unnest($1::text[], $2::text[]) AS w (tenant, id)
        LEFT JOIN (
            SELECT j.* FROM unnest($1::text[], $2::text[]) AS v (tenant, id)
            JOIN jobstatus.jobs AS j ON j.tenant = v.tenant AND j.id = v.id
            ORDER BY j.tenant, j.id FOR UPDATE OF j {skip}
        ) AS locked ON locked.tenant = w.tenant AND locked.id = w.id
        LEFT JOIN jobstatus.tombstones AS t ON t.tenant = w.tenant AND t.id = w.id
    """


LOAD_UNLOCKED, LOAD_WAITING = _load(waits=False), _load(waits=True)

READ_REQUESTS = f"""
    SELECT {", ".join(f"r.{name}" for name in REQUEST_COLUMNS)}
    FROM unnest($1::bytea[], $2::bigint[]) AS w (request, job_key)
    JOIN jobstatus.requests AS r ON r.request = w.request AND r.job_key = w.job_key
"""

READ_CHILDREN = """
    SELECT c.tenant, c.parent_id, c.state, sum(c.total)::bigint
    FROM unnest($1::text[], $2::text[]) AS w (tenant, id)
    JOIN jobstatus.children AS c ON c.tenant = w.tenant AND c.parent_id = w.id
    GROUP BY c.tenant, c.parent_id, c.state
"""

_INSERTED = ", ".join(JOB_COLUMNS)

# Keys are given in the order of the arrays, which is that of creation. Rows are inserted in the order of ids, so that
# two transactions cannot deadlock.
INSERT_JOBS = f"""
    INSERT INTO jobstatus.jobs (key, {_INSERTED}) SELECT key, {_INSERTED} FROM (
        SELECT nextval('jobstatus.jobs_key_seq') AS key, {_INSERTED} FROM unnest(
            {", ".join(f"${number}::{_type_of(name)}[]" for number, name in enumerate(JOB_COLUMNS, 1))}
        ) WITH ORDINALITY AS n ({_INSERTED}, place) ORDER BY place
    ) AS numbered ORDER BY tenant, id
    ON CONFLICT (tenant, id) DO NOTHING RETURNING tenant, id, key
"""


def _unnest(columns: Sequence[str], numbers: count[int]) -> str:
    arrays = ", ".join(f"${next(numbers)}::{_type_of(name)}[]" for name in columns)
    return f"unnest({arrays}) AS n ({', '.join(columns)})"


def _insert(table: str, columns: Sequence[str], numbers: count[int], then: str = "") -> str:
    names = ", ".join(columns)
    return f"INSERT INTO jobstatus.{table} ({names}) SELECT {names} FROM {_unnest(columns, numbers)} {then}"


def _update(columns: Sequence[str], numbers: count[int]) -> str:
    changed = ", ".join(f"{name} = n.{name}" for name in columns if name not in CONSTANT_COLUMNS)
    return f"UPDATE jobstatus.jobs AS j SET {changed} FROM {_unnest(('key', *columns), numbers)} WHERE j.key = n.key"


def _old_labels(numbers: count[int]) -> str:
    return f"""
        DELETE FROM jobstatus.labels AS l USING {_unnest(("job_key", "name", "value"), numbers)}
        WHERE l.job_key = n.job_key AND l.name = n.name AND l.value = n.value
    """


def _tombstones(numbers: count[int]) -> str:
    replace = "ON CONFLICT (tenant, id) DO UPDATE SET revision = excluded.revision, removed_at = excluded.removed_at"
    return _insert("tombstones", TOMBSTONE_COLUMNS, numbers, replace)


def _delete(table: str, numbers: count[int]) -> str:
    key = "t.tenant = n.tenant AND t.id = n.id"
    return f"DELETE FROM jobstatus.{table} AS t USING {_unnest(('tenant', 'id'), numbers)} WHERE {key}"


_PARTS: dict[str, Callable[[count[int]], str]] = {
    "reports": lambda numbers: _update(REPORT_COLUMNS, numbers),
    "jobs": lambda numbers: _update(JOB_COLUMNS, numbers),
    "removed": lambda numbers: _delete("jobs", numbers),
    "removed_histories": lambda numbers: _delete("transitions", numbers),
    "old_labels": _old_labels,
    "new_labels": lambda numbers: _insert("labels", LABEL_COLUMNS, numbers),
    "tombstones": _tombstones,
    "changes": lambda numbers: _insert(
        "changes", ("number", "tenant", "id", "revision", "removed", "changed_at", "final"), numbers
    ),
    "transitions": lambda numbers: _insert("transitions", TRANSITION_COLUMNS, numbers),
    "counts": lambda numbers: _insert("counts", COUNT_COLUMNS, numbers),
    "children": lambda numbers: _insert("children", ("tenant", "parent_id", "state", "total"), numbers),
    "requests": lambda numbers: _insert(
        "requests",
        (*REQUEST_COLUMNS, "remembered_at"),
        numbers,
        "ON CONFLICT (request, job_key) DO NOTHING RETURNING 1",
    ),
}

PARTS = tuple(_PARTS)
"""Names of the lists of rows that a commit may write, in the order of their parameters."""


@cache
def write(parts: tuple[str, ...]) -> str:
    """Return one statement that writes these parts, their columns as arrays in this order.

    It returns the transaction's id, and how many of the requests were not stored before.
    """
    numbers = count(1)
    steps = ", ".join(f"{part} AS ({_PARTS[part](numbers)})" for part in parts)
    new_requests = "(SELECT count(*) FROM requests)" if "requests" in parts else "0"
    return f"WITH {steps} SELECT pg_current_xact_id()::text, {new_requests}"
