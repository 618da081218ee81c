"""Group reads: what the SQLite store's cache lacks, and is asked for while a read runs, is read as one group next."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TypeAlias

from jobstatus_grpc.errors import StoreUnavailableError
from jobstatus_grpc.job import Found, Tombstone
from jobstatus_grpc.stores.interface import Clock, Key
from jobstatus_grpc.stores.sql.rows import JobCache, StoredJob
from jobstatus_grpc.stores.sqlite.health import Condition
from jobstatus_grpc.stores.sqlite.queries import read_found
from jobstatus_grpc.stores.sqlite.threads import Readers, resolve

Group: TypeAlias = Mapping[Key, Sequence[asyncio.Future[Found]]]

MAX_GROUP_KEYS = 500
"""A group is as large as what waits, up to this."""

GATHER_TURNS = 32
"""So many turns of the event loop more come to a group, where some have come already: a request takes several."""

MAX_WAIT_SECONDS = 0.02
"""So long a read is waited for; then, for it is on a slow disk or behind a long query, the next begins beside it."""


class Lookup:
    """Stands between the store and its readers: handing one job to a thread would cost more than reading it.

    For one event loop.
    """

    def __init__(self, readers: Readers, cache: JobCache, condition: Condition, clock: Clock) -> None:
        """Begin with nobody waiting."""
        self._readers = readers
        self._cache = cache
        self._condition = condition
        self._clock = clock
        self._waiting: dict[Key, list[asyncio.Future[Found]]] = {}
        self._ticket: object | None = None
        """Of the read whose end is waited for."""
        self._timer: asyncio.TimerHandle | None = None
        """Ends that wait, once there is somebody who waits."""

    def find(self, key: Key) -> asyncio.Future[Found]:
        """Read the job under `key`, as of now or later. Cancelling the wait neither stops nor delays any other.

        Returns:
            What to wait for: what is found; or StoreUnavailableError.
        """
        waiter: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        # A read that runs for the same job is not joined: it may have begun before the latest commit.
        self._waiting.setdefault(key, []).append(waiter)
        if self._ticket is None:
            self._begin()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(MAX_WAIT_SECONDS, self._begin)
        return waiter

    def _begin(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._waiting:
            self._ticket = None
            return
        group = {key: self._waiting.pop(key) for key in list(islice(self._waiting, MAX_GROUP_KEYS))}
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(MAX_WAIT_SECONDS, self._begin)
        self._ticket = ticket = self._cache.expect(group)
        end = partial(self._end, group, ticket)
        try:
            self._condition.check()
        except StoreUnavailableError as error:
            end(None, error)
        else:
            self._readers.submit(partial(read_found, keys=list(group), now=self._clock()), end)

    def _end(
        self,
        group: Group,
        ticket: object,
        found: tuple[Mapping[Key, StoredJob], Mapping[Key, Tombstone]] | None,
        error: BaseException | None,
    ) -> None:
        jobs, tombstones = found or ({}, {})
        self._cache.fill(ticket, group, jobs)
        if error is not None:
            error = self._condition.judge(error, is_write=False)
        for key, waiters in group.items():
            for waiter in waiters:
                resolve(waiter, jobs[key].job if key in jobs else tombstones.get(key), error)
        self._gather(ticket, GATHER_TURNS)

    def _gather(self, ticket: object, turns: int) -> None:
        """Begin the next read, or if somebody waits for one, so many turns later: groups of a few are dear."""
        if self._ticket is not ticket:
            return  # others did not want to wait so long
        if turns and self._waiting:
            asyncio.get_running_loop().call_soon(self._gather, ticket, turns - 1)
        else:
            self._begin()
