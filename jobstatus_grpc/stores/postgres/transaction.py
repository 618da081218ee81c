"""One transaction of the PostgreSQL store: it locks jobs, lets the rules judge commands, and writes what comes back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from jobstatus_grpc.job import Command, Create, Found, Job, Stall, Tombstone, Update, is_report
from jobstatus_grpc.job.limits import TRANSITIONS_KEPT
from jobstatus_grpc.stores.batch import Batch, apply_all
from jobstatus_grpc.stores.interface import Key
from jobstatus_grpc.stores.postgres import statements
from jobstatus_grpc.stores.sql.rows import (
    JobCache,
    Row,
    StoredJob,
    from_instant,
    job_row,
    label_changes,
    read_tombstone,
    report_row,
    store_job,
    to_instant,
    transition_row,
)

if TYPE_CHECKING:
    from jobstatus_grpc.stores.postgres.database import Connection

_HEARD = """
    SELECT h.tenant, h.id, h.heard_at FROM unnest($1::text[], $2::text[]) AS w (tenant, id)
    JOIN jobstatus.heard AS h ON h.tenant = w.tenant AND h.id = w.id
"""

_TRIM_TRANSITIONS = f"""
    DELETE FROM jobstatus.transitions WHERE tenant = $1 AND id = $2 AND revision <= (
        SELECT revision FROM jobstatus.transitions WHERE tenant = $1 AND id = $2
        ORDER BY revision DESC OFFSET {TRANSITIONS_KEPT} LIMIT 1
    )
"""

Heard = Callable[[Key], int]
"""When a job's worker was last heard in ways that are not in its row, in microseconds since 1970."""


class HeldError(Exception):
    """Another transaction has just created some of the jobs; nothing was written."""

    def __init__(self, keys: set[Key]) -> None:
        super().__init__()
        self.keys = keys


class Loaded(NamedTuple):
    """What is stored under some keys."""

    now: datetime
    jobs: dict[Key, StoredJob]
    tombstones: dict[Key, Tombstone]
    heard_at: dict[Key, int]
    held: set[Key]
    """Locked by another transaction: nothing is known of them."""


class Written(NamedTuple):
    """What a transaction did."""

    batch: Batch
    now: datetime
    held: set[Key]
    """Their commands have not been judged."""
    xid: str | None
    """None: nothing was written."""
    stored: Collection[StoredJob]
    """The jobs that were written, as they are now."""


async def run(
    connection: Connection,
    commands: Sequence[Command],
    *,
    waits: bool,
    now: datetime | None,
    retention: timedelta,
    heard: Heard,
    known: JobCache,
) -> Written:
    """Judge `commands` and write what they change, within the connection's transaction, which the caller commits.

    Args:
        connection: in a transaction.
        commands: in order.
        waits: wait for jobs that others have locked; else leave out their commands.
        now: the time; None: the database's.
        retention: how long a job is kept once it is done.
        heard: when workers were heard as far as this process alone knows.
        known: saves the decoding of rows.

    Raises:
        HeldError: the transaction must be rolled back; the same without those keys may go through.
    """
    keys = sorted({(command.tenant, command.id) for command in commands})
    loaded = await _load(connection, keys, known, waits=waits, now=now)
    judged = [command for command in commands if (command.tenant, command.id) not in loaded.held]
    silent_for = await _silence(connection, judged, loaded, heard)
    found: dict[Key, Found] = {key: stored.job for key, stored in loaded.jobs.items()}
    found.update(loaded.tombstones)
    batch = apply_all(judged, found, now=loaded.now, retention=retention, silent_for=silent_for)
    if batch.is_empty:
        return Written(batch, loaded.now, loaded.held, None, ())
    xid, stored = await _write(connection, judged, batch, loaded)
    return Written(batch, loaded.now, loaded.held, xid, stored)


async def _load(
    connection: Connection, keys: Sequence[Key], known: JobCache, *, waits: bool, now: datetime | None
) -> Loaded:
    query = statements.LOAD_WAITING if waits else statements.LOAD_FREE
    rows = await connection.fetch(query, *statements.columns_of(keys))
    now = now or to_instant(rows[0][2])
    loaded = Loaded(now, {}, {}, {}, set())
    for tenant, job_id, _, exists, tombstone_revision, removed_at, heard_at, *columns in rows:
        key = (tenant, job_id)
        if columns[0] is not None:
            loaded.jobs[key] = known.read(columns)
            loaded.heard_at[key] = heard_at
        elif exists:
            loaded.held.add(key)
        elif removed_at is not None:
            tombstone = read_tombstone(key, tombstone_revision, removed_at, now)
            if tombstone is not None:
                loaded.tombstones[key] = tombstone
    return loaded


async def _silence(
    connection: Connection, commands: Sequence[Command], loaded: Loaded, heard: Heard
) -> Callable[[Key], timedelta]:
    """Return what tells how long a worker was silent; only the judgement of silence asks."""
    keys = [(command.tenant, command.id) for command in commands if isinstance(command, Stall)]
    told: dict[Key, int] = {}
    if keys:
        rows = await connection.fetch(_HEARD, *statements.columns_of(keys))
        told = {(tenant, job_id): heard_at for tenant, job_id, heard_at in rows}
    now = from_instant(loaded.now)

    def silent_for(key: Key) -> timedelta:
        heard_at = max(loaded.heard_at.get(key, now), told.get(key, 0), heard(key))
        return timedelta(microseconds=max(now - heard_at, 0))

    return silent_for


async def _write(
    connection: Connection, commands: Sequence[Command], batch: Batch, loaded: Loaded
) -> tuple[str, Collection[StoredJob]]:
    now = from_instant(loaded.now)
    heard = {
        (command.tenant, command.id)
        for command, outcome in zip(commands, batch.outcomes, strict=True)
        if isinstance(command, (Update, Create)) and isinstance(outcome, Job)
    }
    heard_at = {key: now if key in heard else loaded.heard_at.get(key, now) for key in batch.jobs}
    written = await _insert(connection, batch, loaded, heard_at)
    parts: dict[str, list[Row]] = {part: [] for part in statements.PARTS}
    for key, stored in loaded.jobs.items():
        job = batch.jobs.get(key)
        if job is not None:
            written[key] = after = store_job(stored.key, job, stored)
            part, row = ("reports", report_row(after)) if is_report(stored.job, job) else ("jobs", job_row(after))
            parts[part].append((*row, heard_at[key]))
    old_labels, parts["new_labels"] = label_changes(loaded.jobs, written, batch.removed)
    parts["old_labels"] = [(job_key, name, value) for _, name, value, _, job_key in old_labels]
    parts["changes"] = [
        (number, change.tenant, change.id, change.revision, change.job is None, now)
        for number, change in enumerate(batch.changes.values(), start=1)
    ]
    parts["transitions"] = [transition_row(key, entry) for key, entry in batch.transitions]
    parts["tombstones"] = [(*key, tombstone.revision, now) for key, tombstone in batch.removed.items()]
    parts["removed"] = parts["removed_histories"] = list(batch.removed)
    parts["counts"] = [(int(state), rise) for state, rise in batch.counts.items() if rise]
    names = tuple(name for name in statements.PARTS if parts[name])
    columns = [column for name in names for column in statements.columns_of(parts[name])]
    xid: str = await connection.fetchval(statements.write(names), *columns)
    for tenant, job_id in {key for key, entry in batch.transitions if entry.revision > TRANSITIONS_KEPT}:
        await connection.execute(_TRIM_TRANSITIONS, tenant, job_id)
    return xid, written.values()


async def _insert(
    connection: Connection, batch: Batch, loaded: Loaded, heard_at: Mapping[Key, int]
) -> dict[Key, StoredJob]:
    """Insert the jobs that are new, and return them with their keys."""
    new = {key: job for key, job in batch.jobs.items() if key not in loaded.jobs}
    if not new:
        return {}
    rows = [(*job_row(store_job(0, job, None))[1:], heard_at[key]) for key, job in new.items()]
    inserted: Any = await connection.fetch(statements.INSERT_JOBS, *statements.columns_of(rows))
    keys = {(tenant, job_id): key for tenant, job_id, key in inserted}
    if len(keys) < len(new):
        raise HeldError(set(new) - set(keys))
    return {key: store_job(keys[key], job, None) for key, job in new.items()}
