"""Commits to the PostgreSQL store: many commands in one transaction, those on locked jobs each in one of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta

import asyncpg

from jobstatus_grpc.errors import RetryableError, StoreUnavailableError
from jobstatus_grpc.job import Command, Outcome
from jobstatus_grpc.stores.interface import Clock, CommitResult, Key
from jobstatus_grpc.stores.postgres.database import CALL_SECONDS, Database
from jobstatus_grpc.stores.postgres.feed import INCARNATION
from jobstatus_grpc.stores.postgres.transaction import Heard, HeldError, Written, run
from jobstatus_grpc.stores.sql.rows import JobCache, from_instant

LONGEST_LOCK_SECONDS = 30.0

WAITING_AT_ONCE = 4
"""So many connections may wait for locks: the others are for those who need not wait."""

ANSWER_SECONDS = 2.8

RESOLVE_SECONDS = 0.3
"""At least so long, and until ANSWER_SECONDS are over, a commit whose end was not heard is asked for."""

RESOLVE_AGAIN_SECONDS = 0.1


# A crash may have undone the transaction and given its number to another, but not at the same microsecond.
_STATUS = f"""
    SELECT {INCARNATION}, pg_xact_status($1::text::xid8),
        EXISTS (SELECT FROM jobstatus.changes WHERE xid = $1::text::xid8 AND changed_at = $2)
"""

# A commit that was cut short has not waited for the standbys; this one's does, for all before it.
_CONFIRM = "SELECT pg_logical_emit_message(true, 'jobstatus', '')"


class Commits:
    """Runs transactions. For one event loop."""

    def __init__(
        self,
        database: Database,
        *,
        clock: Clock | None,
        retention: timedelta,
        heard: Heard,
        known: JobCache,
        incarnation: Callable[[], str],
        written: Callable[[Sequence[Command], Written], None],
    ) -> None:
        """Take the collaborators.

        Args:
            database: where.
            clock: tells the time; None: the database's does.
            retention: how long a job is kept once it is done.
            heard: when workers were heard as far as this process alone knows.
            known: saves the decoding of rows.
            incarnation: which server's log the feed was read from last.
            written: called with the commands and what became of them, once it is durable.
        """
        self._database = database
        self._clock = clock
        self._retention = retention
        self._heard = heard
        self._known = known
        self._incarnation = incarnation
        self._written = written
        self._waiters = asyncio.Semaphore(WAITING_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    async def commit(self, commands: Sequence[Command]) -> CommitResult:
        """See JobStore. Commands on jobs that another transaction has locked are deferred."""
        outcomes: list[Outcome] = [StoreUnavailableError()] * len(commands)
        deferred: dict[int, asyncio.Future[Outcome]] = {}
        free = list(range(len(commands)))
        held: set[Key] = set()
        while free:
            try:
                written = await self._transact([commands[index] for index in free], waits=False)
            except HeldError as error:
                held |= error.keys
                free = [index for index in free if _key(commands[index]) not in held]
                continue
            held |= written.held
            judged = [index for index in free if _key(commands[index]) not in held]
            for index, outcome in zip(judged, written.batch.outcomes, strict=True):
                outcomes[index] = outcome
            break
        for key in held:
            deferred |= self._wait_for(key, commands)
        return CommitResult(outcomes, deferred)

    async def close(self) -> None:
        """Give up what still waits for locks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _wait_for(self, key: Key, commands: Sequence[Command]) -> dict[int, asyncio.Future[Outcome]]:
        """Commit the commands on a job that another transaction holds in a task; return their outcomes by index."""
        loop = asyncio.get_running_loop()
        deferred: dict[int, asyncio.Future[Outcome]] = {
            index: loop.create_future() for index, command in enumerate(commands) if _key(command) == key
        }
        task = asyncio.ensure_future(self._commit_alone([commands[index] for index in deferred], [*deferred.values()]))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return deferred

    async def _commit_alone(self, commands: Sequence[Command], futures: Sequence[asyncio.Future[Outcome]]) -> None:
        outcomes: Sequence[Outcome] = [StoreUnavailableError("another transaction holds the job")] * len(commands)
        try:
            async with self._waiters:
                outcomes = (await self._transact_until_free(commands)).batch.outcomes
        except RetryableError as error:
            outcomes = [error] * len(commands)
        finally:
            for future, outcome in zip(futures, outcomes, strict=True):
                if not future.done():
                    future.set_result(outcome)

    async def _transact_until_free(self, commands: Sequence[Command]) -> Written:
        while True:
            try:
                written = await asyncio.wait_for(self._transact(commands, waits=True), LONGEST_LOCK_SECONDS)
            except HeldError:  # created by another just now; it can be locked next time
                continue
            except asyncio.TimeoutError:
                raise StoreUnavailableError("another transaction holds the job") from None
            if not written.held:
                return written

    async def _transact(self, commands: Sequence[Command], *, waits: bool) -> Written:
        written: Written | None = None
        incarnation = self._incarnation()
        answer_at = asyncio.get_running_loop().time() + ANSWER_SECONDS
        try:
            async with self._database.connection(seconds=LONGEST_LOCK_SECONDS if waits else CALL_SECONDS) as connection:
                transaction = connection.transaction()
                await transaction.start()
                try:
                    written = await run(
                        connection,
                        commands,
                        waits=waits,
                        now=None if self._clock is None else self._clock(),
                        retention=self._retention,
                        heard=self._heard,
                        known=self._known,
                    )
                except BaseException:
                    written = None
                    await self._roll_back(transaction)
                    raise
                await transaction.commit()
        except StoreUnavailableError as error:
            # Only a connection that was lost while it committed leaves the outcome open.
            if written is None or not isinstance(error.__cause__, (OSError, asyncpg.PostgresConnectionError)):
                raise
            if not await self._was_committed(written, incarnation, answer_at):
                raise
        self._written([command for command in commands if _key(command) not in written.held], written)
        return written

    async def _roll_back(self, transaction: asyncpg.transaction.Transaction) -> None:
        # Where the connection is gone, so is the transaction.
        with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            await transaction.rollback()

    async def _was_committed(self, written: Written, incarnation: str, answer_at: float) -> bool:
        """Ask what became of a transaction whose end was not heard; only the server that ran it knows."""
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


def _key(command: Command) -> Key:
    return (command.tenant, command.id)
