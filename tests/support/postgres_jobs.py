"""Many jobs for a PostgreSQL database, inserted by SQL: one in ten is done, one in 200 stalled."""

from __future__ import annotations

from typing import Any

_JOBS = """
    INSERT INTO jobstatus.jobs (
        tenant, id, name, state, attempt, revision, reports_progress, cancel_requested, stalled, created_at, updated_at,
        parent_id, reason, last_heartbeat_at, labels, finished_at, expires_at, heartbeat_timeout
    )
    SELECT 'default', n::text, CASE n % 4 WHEN 0 THEN g ELSE '' END,
        CASE WHEN is_stalled THEN 2 WHEN n % 10 > 0 THEN 1 WHEN n % 100 = 0 THEN 4 ELSE 5 END,
        is_stalled::integer, 1, 0, 0, is_stalled::integer, at, at,
        CASE n % 4 WHEN 2 THEN g ELSE '' END, '', at, CASE n % 4 WHEN 1 THEN format('{"team":"%s"}', g) END,
        CASE WHEN n % 10 = 0 THEN at END, CASE WHEN n % 10 = 0 THEN at + 604800000000 END,
        CASE WHEN is_stalled THEN 1000000 END
    FROM (
        SELECT n, (n % 400)::text AS g, n % 200 = 1 AS is_stalled, 1772366400000000 + (n - $1::bigint / 2) * 1000 AS at
        FROM generate_series(0, $1::bigint - 1) AS n
    ) AS numbers
"""
_LABELS = """
    INSERT INTO jobstatus.labels (tenant, name, value, created_at, job_key)
    SELECT tenant, 'team', (id::bigint % 400)::text, created_at, key FROM jobstatus.jobs WHERE labels IS NOT NULL
"""
_CHANGES = """
    INSERT INTO jobstatus.changes (number, tenant, id, revision, removed, changed_at)
    SELECT key, tenant, id, 1, false, created_at FROM jobstatus.jobs
"""


async def fill(connection: Any, count: int) -> None:
    """Insert jobs 0, 1, … into an empty store, a millisecond apart; half of them before 2026-03-01, noon."""
    await connection.execute(_JOBS, count)
    await connection.execute(_LABELS)
    await connection.execute(_CHANGES)
