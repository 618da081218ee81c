"""Commits to the PostgreSQL store: many commands in one transaction, those on locked jobs each in one of their own.

The queue calls `Commits.commit`. A transaction locks the jobs, applies the commands to them by the rules of
`job.apply`, and writes the result; then caches, counts, stall clocks and the feed are brought up to date.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

import asyncpg

from jobstatus_grpc.errors import RetryableError, StoreUnavailableError
from jobstatus_grpc.job import (
    Command,
    Create,
    Found,
    Job,
    Outcome,
    RequestId,
    Stall,
    Tombstone,
    Update,
    has_heartbeats,
    is_report,
)
from jobstatus_grpc.job.limits import TRANSITIONS_KEPT
from jobstatus_grpc.stores.batch import Batch, apply_all
from jobstatus_grpc.stores.interface import Clock, CommitResult, Key, RequestKey, Silence
from jobstatus_grpc.stores.postgres import statements
from jobstatus_grpc.stores.postgres.database import CALL_SECONDS, Connection, Database
from jobstatus_grpc.stores.postgres.feed import INCARNATION, PostgresFeed
from jobstatus_grpc.stores.postgres.maintenance import Maintenance
from jobstatus_grpc.stores.postgres.notifier import Notifier
from jobstatus_grpc.stores.sql.rows import (
    JobCache,
    Row,
    StoredJob,
    from_instant,
    job_row,
    label_changes,
    read_tombstone,
    report_row,
    request_keys,
    request_row,
    to_instant,
    transition_row,
    write_final,
)

LONGEST_LOCK_SECONDS = 30.0
"""How long commands wait for a job that another transaction has locked, in seconds."""

WAITING_AT_ONCE = 4
"""Connections that may wait for locked jobs: the rest of the pool stays free for commands that need not wait."""

ANSWER_SECONDS = 2.8
"""Until when the outcome of a commit whose connection was lost is asked for, in seconds from the commit's start.

Callers have their answer within 3 s.
"""

RESOLVE_SECONDS = 0.3
"""Minimum time to keep asking for that outcome, in seconds, however long the commit took before."""

RESOLVE_AGAIN_SECONDS = 0.1
"""Pause between two such questions, in seconds."""

# After a crash another transaction may have the same id, but not have written at the same microsecond.
_STATUS = f"""
    SELECT {INCARNATION}, pg_xact_status($1::text::xid8),
        EXISTS (SELECT FROM jobstatus.changes WHERE xid = $1::text::xid8 AND changed_at = $2)
"""

# A commit whose connection was lost has not waited for the standbys. This one does, for itself and all before it.
_CONFIRM = "SELECT pg_logical_emit_message(true, 'jobstatus', '')"

_TRIM_TRANSITIONS = f"""
    DELETE FROM jobstatus.transitions WHERE tenant = $1 AND id = $2 AND revision <= (
        SELECT revision FROM jobstatus.transitions WHERE tenant = $1 AND id = $2
        ORDER BY revision DESC OFFSET {TRANSITIONS_KEPT} LIMIT 1
    )
"""


class _InsertConflictError(Exception):
    """Another transaction has just inserted some of the new jobs; this one must be rolled back."""

    def __init__(self, keys: set[Key]) -> None:
        super().__init__()
        self.keys = keys


class _RequestKnownError(Exception):
    """One of the batch's requests is stored: its command was a repeat. The transaction must be rolled back."""


class _Loaded(NamedTuple):
    """What is stored under the keys of a transaction."""

    now: datetime
    jobs: dict[Key, StoredJob]
    tombstones: dict[Key, Tombstone]
    locked: set[Key]
    """Jobs that another transaction has locked: they are in none of the others."""


class _Written(NamedTuple):
    """What a transaction did."""

    batch: Batch
    now: datetime
    locked: set[Key]
    """Jobs that another transaction had locked: their commands were not applied."""
    xid: str | None
    """The transaction's id; None: it wrote nothing."""
    stored: Collection[StoredJob]
    """The jobs that were written, as they are now."""


class Commits:
    """Runs the store's transactions, and passes on what they did. For one event loop.

    `clock` is the time (None: the database's); `retention` is how long a job is kept once it is done.
    """

    def __init__(
        self,
        database: Database,
        *,
        clock: Clock | None,
        retention: timedelta,
        cache: JobCache,
        feed: PostgresFeed,
        notifier: Notifier,
        maintenance: Maintenance,
    ) -> None:
        self._database = database
        self._clock = clock
        self._retention = retention
        self._cache = cache
        self._feed = feed
        self._notifier = notifier
        self._maintenance = maintenance
        self._lock_slots = asyncio.Semaphore(WAITING_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    async def commit(self, commands: Sequence[Command]) -> CommitResult:
        """See JobStore. Commands on jobs that another transaction has locked are deferred."""
        outcomes: list[Outcome] = [StoreUnavailableError()] * len(commands)
        deferred: dict[int, asyncio.Future[Outcome]] = {}
        free = list(range(len(commands)))
        locked: set[Key] = set()
        while free:
            try:
                written = await self._transact([commands[index] for index in free], waits=False)
            except _InsertConflictError as error:
                locked |= error.keys
                free = [index for index in free if _key(commands[index]) not in locked]
                continue
            locked |= written.locked
            applied = [index for index in free if _key(commands[index]) not in locked]
            for index, outcome in zip(applied, written.batch.outcomes, strict=True):
                outcomes[index] = outcome
            break
        for key in locked:
            deferred |= self._defer(key, commands)
        return CommitResult(outcomes, deferred)

    async def try_write(self, connection: Connection) -> None:
        """Create a job as a commit does, and take it back."""
        transaction = connection.transaction()
        await transaction.start()
        try:
            probe = f"probe-{uuid.uuid4()}"
            create = Create(id=probe, tenant="", labels={"probe": ""}, request=RequestId(probe, ""))
            await self._apply(connection, [create], waits=False, looks_up=False)
        finally:
            await _roll_back(transaction)

    async def close(self) -> None:
        """Give up the commands that wait for locked jobs: their outcome is StoreUnavailableError."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _defer(self, key: Key, commands: Sequence[Command]) -> dict[int, asyncio.Future[Outcome]]:
        """Commit the commands on one locked job in a task of their own, and return their outcomes by index.

        A Stall is not among them: its worker's reports wait for the same lock.
        """
        loop = asyncio.get_running_loop()
        deferred: dict[int, asyncio.Future[Outcome]] = {
            index: loop.create_future()
            for index, command in enumerate(commands)
            if _key(command) == key and not isinstance(command, Stall)
        }
        if not deferred:
            return deferred
        task = asyncio.ensure_future(
            self._commit_locked([commands[index] for index in deferred], list(deferred.values()))
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return deferred

    async def _commit_locked(self, commands: Sequence[Command], futures: Sequence[asyncio.Future[Outcome]]) -> None:
        outcomes: Sequence[Outcome] = [StoreUnavailableError("another transaction has locked the job")] * len(commands)
        try:
            async with self._lock_slots:
                outcomes = (await self._transact_until_unlocked(commands)).batch.outcomes
        except RetryableError as error:
            outcomes = [error] * len(commands)
        finally:
            for future, outcome in zip(futures, outcomes, strict=True):
                if not future.done():
                    future.set_result(outcome)

    async def _transact_until_unlocked(self, commands: Sequence[Command]) -> _Written:
        while True:
            try:
                written = await asyncio.wait_for(self._transact(commands, waits=True), LONGEST_LOCK_SECONDS)
            except _InsertConflictError:  # the job exists now, so that the next turn can wait for its lock
                continue
            except asyncio.TimeoutError:
                raise StoreUnavailableError("another transaction has locked the job") from None
            if not written.locked:
                return written

    async def _transact(self, commands: Sequence[Command], *, waits: bool) -> _Written:
        """Apply `commands` in one transaction, and once it is durable, publish what it did.

        Most requests are new: they are looked up only if it turns out that one of them is stored.

        Raises:
            _InsertConflictError: nothing was written; without the commands on these keys it may succeed.
            StoreUnavailableError, StoreFullError: see JobStore.commit.
        """
        self._database.check_writes()
        try:
            return await self._try(commands, waits=waits, looks_up=False)
        except _RequestKnownError:
            return await self._try(commands, waits=waits, looks_up=True)

    async def _try(self, commands: Sequence[Command], *, waits: bool, looks_up: bool) -> _Written:
        written: _Written | None = None
        incarnation = self._feed.incarnation
        answer_at = asyncio.get_running_loop().time() + ANSWER_SECONDS
        try:
            async with self._database.connection(seconds=LONGEST_LOCK_SECONDS if waits else CALL_SECONDS) as connection:
                transaction = connection.transaction()
                await transaction.start()
                try:
                    written = await self._apply(connection, commands, waits=waits, looks_up=looks_up)
                except BaseException:
                    await _roll_back(transaction)
                    raise
                await self._database.commit(connection, transaction)
        except StoreUnavailableError as error:
            # Only a COMMIT that was not answered leaves the outcome open.
            if written is None or _is_answer(error.__cause__):
                raise
            if not await self._was_committed(written, incarnation, answer_at):
                raise
        self._publish([command for command in commands if _key(command) not in written.locked], written)
        return written

    async def _was_committed(self, written: _Written, incarnation: str, answer_at: float) -> bool:
        """Ask for the outcome of a transaction whose connection was lost, which only the server that ran it has."""
        if written.xid is None:
            return True  # there was nothing to write
        deadline = max(answer_at, asyncio.get_running_loop().time() + RESOLVE_SECONDS)
        while asyncio.get_running_loop().time() < deadline:
            with contextlib.suppress(RetryableError, asyncpg.PostgresError):
                async with self._database.connection() as connection:
                    row = await connection.fetchrow(_STATUS, written.xid, from_instant(written.now))
                    if row[0] != incarnation:
                        return False
                    if row[1] != "in progress":
                        if row[2]:
                            await connection.execute(_CONFIRM)
                        return bool(row[2])
            await asyncio.sleep(RESOLVE_AGAIN_SECONDS)
        return False

    def _publish(self, commands: Sequence[Command], written: _Written) -> None:
        """Pass on what a transaction did with the commands that it applied, now that it is durable."""
        batch = written.batch
        for stored in written.stored:
            self._cache.put((stored.job.tenant, stored.job.id), stored)
        self._maintenance.counts.update(batch.counts)
        unchanged = [
            key
            for command, outcome in zip(commands, batch.outcomes, strict=True)
            if isinstance(command, (Update, Create))
            and isinstance(outcome, Job)
            and has_heartbeats(outcome)
            and (key := _key(command)) not in batch.jobs
        ]
        if unchanged:
            self._maintenance.record_heartbeats(unchanged, from_instant(written.now))
        self._maintenance.stalls_committed([_key(command) for command in commands if isinstance(command, Stall)])
        if batch.changes:
            self._notifier.notify()
        batch.log()

    async def _apply(
        self, connection: Connection, commands: Sequence[Command], *, waits: bool, looks_up: bool
    ) -> _Written:
        """Apply `commands` and write the result in the connection's transaction, which the caller commits.

        With `waits`, wait for jobs that other transactions have locked; else leave out the commands on them. With
        `looks_up`, look up in any case which of the requests are stored.
        """
        loaded = await self._load(connection, sorted({_key(command) for command in commands}), waits=waits)
        applied = [command for command in commands if _key(command) not in loaded.locked]
        silence_of = await self._silence(connection, applied, loaded)
        found: dict[Key, Found] = {key: stored.job for key, stored in loaded.jobs.items()}
        found.update(loaded.tombstones)
        apply_loaded = partial(apply_all, applied, now=loaded.now, retention=self._retention, silence_of=silence_of)
        batch = None if looks_up else apply_loaded(dict(found))
        if batch is None or batch.is_unsure:
            batch = apply_loaded(found, known=await _read_requests(connection, applied, loaded.jobs))
        if batch.is_empty:
            return _Written(batch, loaded.now, loaded.locked, None, ())
        xid, stored = await _write(connection, batch, loaded)
        return _Written(batch, loaded.now, loaded.locked, xid, stored)

    async def _load(self, connection: Connection, keys: Sequence[Key], *, waits: bool) -> _Loaded:
        query = statements.LOAD_WAITING if waits else statements.LOAD_UNLOCKED
        now = None if self._clock is None else self._clock()
        rows = await connection.fetch(query, *statements.columns_of(keys))
        now = now or to_instant(rows[0][2])
        loaded = _Loaded(now, {}, {}, set())
        for tenant, job_id, _, exists, tombstone_revision, removed_at, *columns in rows:
            key = (tenant, job_id)
            if columns[0] is not None:
                loaded.jobs[key] = self._cache.read(columns)
            elif exists:
                loaded.locked.add(key)
            elif removed_at is not None:
                tombstone = read_tombstone(key, tombstone_revision, removed_at, now)
                if tombstone is not None:
                    loaded.tombstones[key] = tombstone
        return loaded

    async def _silence(
        self, connection: Connection, commands: Sequence[Command], loaded: _Loaded
    ) -> Callable[[Key], Silence]:
        """Return the function from a job to the silence of its worker, which only Stall commands need."""
        keys = [_key(command) for command in commands if isinstance(command, Stall)]
        heartbeats = await self._maintenance.heartbeats(connection, keys)

        def silence_of(key: Key) -> Silence:
            heartbeat_at = heartbeats.get(key)
            changed_at = loaded.jobs[key].job.last_heartbeat_at if key in loaded.jobs else None
            signs = (None if changed_at is None else from_instant(changed_at), heartbeat_at)
            duration = self._maintenance.silence(key, signs)
            return Silence(duration, None if heartbeat_at is None else to_instant(heartbeat_at))

        return silence_of


async def _write(connection: Connection, batch: Batch, loaded: _Loaded) -> tuple[str, Collection[StoredJob]]:
    """Write what a batch changed, and return the transaction's id and the jobs as stored.

    Raises:
        _RequestKnownError: one of the batch's requests is stored.
    """
    now = from_instant(loaded.now)
    written = await _insert(connection, batch, loaded)
    parts: dict[str, list[Row]] = {part: [] for part in statements.PARTS}
    for key, stored in loaded.jobs.items():
        job = batch.jobs.get(key)
        if job is not None:
            written[key] = after = StoredJob(stored.key, job)
            part, row = ("reports", report_row(after)) if is_report(stored.job, job) else ("jobs", job_row(after))
            parts[part].append(row)
    old_labels, parts["new_labels"] = label_changes(loaded.jobs, written, batch.removed)
    parts["old_labels"] = [(job_key, name, value) for _, name, value, _, job_key in old_labels]
    parts["changes"] = [
        (
            number,
            change.tenant,
            change.id,
            change.revision,
            change.job is None,
            now,
            None if change.final is None else write_final(change.final),
        )
        for number, change in enumerate(batch.changes.values(), start=1)
    ]
    parts["transitions"] = [transition_row(key, entry) for key, entry in batch.transitions]
    parts["tombstones"] = [(*key, tombstone.revision, now) for key, tombstone in batch.removed.items()]
    parts["removed"] = parts["removed_histories"] = list(batch.removed)
    parts["counts"] = [(int(state), rise) for state, rise in batch.counts.items() if rise]
    parts["children"] = [
        (*key, int(state), rise) for key, change in batch.child_changes().items() for state, rise in change.items()
    ]
    for (tenant, job_id, request_id), payload_hash in batch.requests.items():
        stored = written.get((tenant, job_id)) or loaded.jobs[tenant, job_id]
        parts["requests"].append((*request_row(stored.key, request_id, payload_hash), now))
    names = tuple(name for name in statements.PARTS if parts[name])
    columns = [column for name in names for column in statements.columns_of(parts[name])]
    xid: str
    xid, new_requests = await connection.fetchrow(statements.write(names), *columns)
    if new_requests < len(parts["requests"]):
        raise _RequestKnownError
    for tenant, job_id in {key for key, entry in batch.transitions if entry.revision > TRANSITIONS_KEPT}:
        await connection.execute(_TRIM_TRANSITIONS, tenant, job_id)
    return xid, written.values()


async def _read_requests(
    connection: Connection, commands: Sequence[Command], jobs: dict[Key, StoredJob]
) -> dict[RequestKey, str]:
    """Return those of the commands' requests that are stored, with the hashes of their payloads.

    Not in the statement that locks the jobs: it sees the other tables as they were before it waited for the locks.
    """
    keys = request_keys(commands, jobs)
    if not keys:
        return {}
    rows = await connection.fetch(statements.READ_REQUESTS, *statements.columns_of(list(keys)))
    return {keys[request, job_key]: payload_hash for request, job_key, payload_hash in rows}


async def _insert(connection: Connection, batch: Batch, loaded: _Loaded) -> dict[Key, StoredJob]:
    """Insert the jobs that are new, and return them with the keys of their rows."""
    new = {key: job for key, job in batch.jobs.items() if key not in loaded.jobs}
    if not new:
        return {}
    rows = [job_row(StoredJob(0, job))[1:] for job in new.values()]
    inserted: Any = await connection.fetch(statements.INSERT_JOBS, *statements.columns_of(rows))
    keys = {(tenant, job_id): key for tenant, job_id, key in inserted}
    if len(keys) < len(new):
        raise _InsertConflictError(set(new) - set(keys))
    return {key: StoredJob(keys[key], job) for key, job in new.items()}


def _is_answer(error: BaseException | None) -> bool:
    """Whether an error is the server's answer to a statement: neither the end of the session nor the driver's."""
    is_end = isinstance(error, (asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError))
    return isinstance(error, asyncpg.PostgresError) and not is_end


async def _roll_back(transaction: asyncpg.transaction.Transaction) -> None:
    # If the connection is lost, of which the driver makes any error, the server has rolled back.
    with contextlib.suppress(Exception):
        await transaction.rollback()


def _key(command: Command) -> Key:
    return (command.tenant, command.id)
