"""The place of a relay in a PostgreSQL database: relays of one name, on any machines, of which one delivers at a time.

The one that delivers has an advisory lock, which PostgreSQL releases when its session ends. Three things keep another
relay from delivering beside it for longer than LEASE_SECONDS: a relay without an answer of the database for that time
stops; PostgreSQL ends a session without a statement, or one whose machine is gone, only later; and each relay that gets
the lock takes a new epoch, without which nothing is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from datetime import datetime
from typing import Any

import asyncpg

from jobstatus_grpc.errors import CannotStartError, StoreUnreachableError
from jobstatus_grpc.relay.place import BEGINNING, Delivered, PlaceLostError
from jobstatus_grpc.stores.postgres.connect import TRANSIENT_ERRORS, Connector, read_address

LEASE_SECONDS = 10.0
"""Time without an answer of the database after which a relay stops: before PostgreSQL gives its lock to another one,
which takes 11 s where its machine is gone (keepalives, see connect.py), and SESSION_SECONDS where it is suspended."""

SESSION_SECONDS = 15
"""Time without a statement after which PostgreSQL ends the session, in a transaction and outside of one. The lease is
counted from before a statement that was answered, so that it is always over by then."""

BEAT_SECONDS = 2.0
"""Interval at which a relay asks whether it still has the place."""

ANSWER_SECONDS = 5.0
"""Longest time for a statement."""

ASK_SECONDS = 1.0
"""Interval at which a relay without the lock asks for it."""

_ERRORS = (OSError, asyncio.TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)

_PREPARE_LOCK = 0x4A6F6253_0004
"""Key of the advisory lock with which one relay at a time creates the tables."""

_SCHEMA = """
    CREATE SCHEMA IF NOT EXISTS jobstatus_relay;
    CREATE TABLE IF NOT EXISTS jobstatus_relay.places (
        name text PRIMARY KEY,
        kind text NOT NULL,
        token text NOT NULL,
        horizon timestamptz NOT NULL,
        epoch bigint NOT NULL
    );
    CREATE TABLE IF NOT EXISTS jobstatus_relay.delivered (
        name text NOT NULL REFERENCES jobstatus_relay.places ON DELETE CASCADE,
        job text NOT NULL,
        event text NOT NULL,
        at timestamptz NOT NULL,
        is_end boolean NOT NULL,
        PRIMARY KEY (name, job)
    );
    CREATE INDEX IF NOT EXISTS delivered_ends ON jobstatus_relay.delivered (name, at) WHERE is_end;
"""

_TAKE = """
    INSERT INTO jobstatus_relay.places VALUES ($1, $2, '', $3, 1)
    ON CONFLICT (name) DO UPDATE SET epoch = places.epoch + 1 RETURNING kind, token, horizon, epoch
"""

_DELIVER = """
    INSERT INTO jobstatus_relay.delivered
    SELECT $1, * FROM unnest($2::text[], $3::text[], $4::timestamptz[], $5::boolean[])
    ON CONFLICT (name, job) DO UPDATE SET event = excluded.event, at = excluded.at, is_end = excluded.is_end
"""


async def open_shared_place(url: str, name: str, kind: str, *, waiting: Callable[[], None]) -> SharedPlace:
    """Return the place of that name once no other relay has it.

    Args:
        url: of the database, in which the tables are created if they are missing.
        name: of the relays that share the place.
        kind: what is delivered, such as `end`: a place is good for one.
        waiting: called if another relay has it.

    Raises:
        StoreUnreachableError: the database cannot be reached.
        CannotStartError: it cannot be used; the message says why.
        PlaceLostError: the session was lost while it waited.
    """
    address = read_address(url)
    where = f"the state on postgresql {address.name}"
    try:
        connection = await Connector(address).connect(command_timeout=ANSWER_SECONDS)
    except (ValueError, *_ERRORS) as error:
        # A wrong password may be right in a moment: roles are changed, and databases fail over.
        kind_of_error = StoreUnreachableError if isinstance(error, TRANSIENT_ERRORS) else CannotStartError
        raise kind_of_error(f"{where} cannot be reached: {_text(error)}") from None
    try:
        return await _take(connection, name, kind, waiting)
    except BaseException as error:
        connection.terminate()
        if isinstance(error, asyncpg.SyntaxOrAccessError):
            raise CannotStartError(f"{where} cannot be used: {error}") from None
        if isinstance(error, _ERRORS):
            raise PlaceLostError(f"{where} was lost: {_text(error)}") from None
        raise


async def _take(connection: asyncpg.Connection[Any], name: str, kind: str, waiting: Callable[[], None]) -> SharedPlace:
    # In a transaction too, for which connect.py sets 5 s so that no jobs stay locked: a relay that is stopped in one
    # has its lease for longer, and locks only rows of its own. A lease below 5 s would end at each slow answer.
    for timeout in ("idle_session_timeout", "idle_in_transaction_session_timeout"):
        await connection.execute(f"SET {timeout} = '{SESSION_SECONDS}s'")
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _PREPARE_LOCK)
        if await connection.fetchval("SELECT to_regclass('jobstatus_relay.delivered')") is None:
            await connection.execute(_SCHEMA)
    found = await connection.fetchval("SELECT kind FROM jobstatus_relay.places WHERE name = $1", name)
    _check_kind(name, found or kind, kind)
    key = int.from_bytes(hashlib.sha256(f"relay {name}".encode()).digest()[:8], "big", signed=True)
    is_first = True
    while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", key):
        if is_first:
            waiting()
        is_first = False
        await asyncio.sleep(ASK_SECONDS)
    asked_at = _now()
    row = await connection.fetchrow(_TAKE, name, kind, BEGINNING)
    assert row is not None
    found, token, horizon, epoch = row
    _check_kind(name, found, kind)  # another relay may have begun while this one waited
    return SharedPlace(connection, name, token, horizon, epoch=epoch, held_until=asked_at + LEASE_SECONDS)


def _check_kind(name: str, found: str, kind: str) -> None:
    if found != kind:
        raise CannotStartError(f"the relay {name} is one with --on {found}; give this one another --relay-name")


class SharedPlace:
    """A place that this relay has until it closes it or loses the session. For one event loop."""

    def __init__(
        self,
        connection: asyncpg.Connection[Any],
        name: str,
        token: str,
        horizon: datetime,
        *,
        epoch: int,
        held_until: float,
    ) -> None:
        """Take a session that has the lock, and the time of `_now` until which it has it without another answer."""
        self.token = token
        self.horizon = horizon
        self._connection = connection
        self._name = name
        self._epoch = epoch
        self._turn = asyncio.Lock()
        self._is_over = asyncio.Event()
        self._end_timer: asyncio.TimerHandle | None = None
        self._extend(held_until)
        connection.add_termination_listener(lambda _: self._is_over.set())

    def _extend(self, held_until: float) -> None:
        if self._end_timer is not None:
            self._end_timer.cancel()
        self._held_until = held_until
        # Ends the statements that wait for an answer, too.
        left_seconds = held_until - _now()
        self._end_timer = asyncio.get_running_loop().call_later(left_seconds, self._connection.terminate)

    async def close(self) -> None:
        if self._end_timer is not None:
            self._end_timer.cancel()
        self._connection.terminate()

    def check(self) -> None:
        # A process that was suspended may deliver before the timer gets its turn. Where its machine was suspended, the
        # timer is late: the loop's clock stood still.
        if self._is_over.is_set() or _now() > self._held_until:
            raise self._lost("its session ended, or did not answer in time")

    async def hold(self) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._is_over.wait(), BEAT_SECONDS)
            self.check()
            async with self._session():
                pass

    async def last_event(self, job_id: str) -> str | None:
        text = "SELECT event FROM jobstatus_relay.delivered WHERE name = $1 AND job = $2"
        async with self._session() as connection:
            found: str | None = await connection.fetchval(text, self._name, job_id)
        return found

    async def save(self, delivered: Iterable[Delivered], token: str, horizon: datetime) -> None:
        # Of several events of one job the last counts; a statement can write a row once.
        newest = {each.job_id: each for each in delivered}.values()
        columns = [[each[number] for each in newest] for number in range(len(Delivered._fields))]
        async with self._session() as connection:
            await connection.execute(_DELIVER, self._name, *columns)
            if (token, horizon) != (self.token, self.horizon):
                text = "UPDATE jobstatus_relay.places SET token = $2, horizon = $3 WHERE name = $1"
                await connection.execute(text, self._name, token, horizon)
                text = "DELETE FROM jobstatus_relay.delivered WHERE name = $1 AND is_end AND at < $2"
                await connection.execute(text, self._name, horizon)
        self.token, self.horizon = token, horizon

    async def forget(self, job_id: str) -> None:
        text = "DELETE FROM jobstatus_relay.delivered WHERE name = $1 AND job = $2"
        async with self._session() as connection:
            await connection.execute(text, self._name, job_id)

    async def forget_open_jobs(self, *, unless: Collection[str]) -> None:
        text = "DELETE FROM jobstatus_relay.delivered WHERE name = $1 AND NOT is_end AND job <> ALL($2::text[])"
        async with self._session() as connection:
            await connection.execute(text, self._name, list(unless))

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[asyncpg.Connection[Any]]:
        """Make the block one durable transaction of the relay that has the newest epoch."""
        async with self._turn:
            asked_at = _now()
            try:
                async with self._connection.transaction():
                    # The lock of the row orders this transaction before the one with which another relay takes over.
                    text = "SELECT epoch FROM jobstatus_relay.places WHERE name = $1 FOR NO KEY UPDATE"
                    if await self._connection.fetchval(text, self._name) != self._epoch:
                        raise self._lost("another relay has it; is there a pooler that does not keep sessions?")
                    yield self._connection
            except _ERRORS as error:
                self._connection.terminate()
                raise self._lost(_text(error)) from None
            self._extend(asked_at + LEASE_SECONDS)

    def _lost(self, why: str) -> PlaceLostError:
        return PlaceLostError(f"the state of the relay {self._name} was lost: {why}")


def _now() -> float:
    """Return the seconds of a clock that goes on while the machine is suspended, where there is one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _text(error: BaseException) -> str:
    return "it does not answer in time" if isinstance(error, asyncio.TimeoutError) else str(error)
