"""The number of jobs that a tenant may have: refuses the creation of more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TypeAlias, TypeGuard

from jobstatus_grpc.errors import JobExpiredError, JobNotFoundError, TooManyJobsError
from jobstatus_grpc.job import Command, Create, Job, Outcome, Update
from jobstatus_grpc.stores.interface import JobStore, Key

Commit: TypeAlias = Callable[[Sequence[Command]], Awaitable[list[Outcome]]]
"""Commits commands, and returns one outcome for each."""

COUNT_AGAIN_SECONDS = 5.0
"""Age from which a tenant's jobs are counted again. In between, creations are added, and removals are not known."""

COUNT_FULL_AGAIN_SECONDS = 1.0
"""The same for a tenant without room, so that a deletion makes room soon."""

MAX_COUNTS = 10_000
"""Tenants whose count is remembered."""


NEVER = float("-inf")


class _Count:
    """The jobs of a tenant: those that were counted, and the places that were taken since that count began."""

    def __init__(self) -> None:
        self.jobs = 0
        self.taken = 0
        """Places taken since the newest count began."""
        self.begun = self.finished = 0
        """The numbers of the newest count, and of the newest one that has succeeded."""
        self.counted_at = NEVER
        self.counting = asyncio.Lock()

    def take(self) -> _Place:
        self.jobs += 1
        self.taken += 1
        return self, self.begun

    def give_back(self, taken_in: int) -> None:
        """Give back a place that was taken when the count of this number was the newest."""
        self.jobs -= taken_in >= self.finished
        self.taken -= taken_in == self.begun


_Place: TypeAlias = "tuple[_Count, int]"

_Rooms: TypeAlias = "Mapping[Key, _Place | TooManyJobsError]"

_Limited: TypeAlias = "Sequence[Create | Update]"


class JobQuota:
    """Refuses new jobs of a tenant that has as many as it may. Belongs to one event loop.

    The count is the store's, up to COUNT_AGAIN_SECONDS old, plus what was created here since. So a tenant may get more
    jobs than its limit by those that are being created while it is counted, and that other processes create until then.
    A creation that is refused or fails counts no more; one whose caller has left counts until the next count.
    """

    def __init__(
        self,
        store: JobStore,
        max_jobs: Callable[[str], int | None],
        *,
        refuse: Callable[[str, int], TooManyJobsError],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_jobs` returns a tenant's limit, None: any number. `refuse` counts a refusal, and returns its error."""
        self._store = store
        self._max_jobs = max_jobs
        self._refuse = refuse
        self._now = clock
        self._counts: dict[str, _Count] = {}
        self._countings: set[asyncio.Task[None]] = set()

    def submit(self, commands: Sequence[Command], commit: Commit) -> Awaitable[list[Outcome]]:
        """Commit `commands`, without those that would create a job for which the tenant has no room.

        Returns:
            One outcome per command, in order: that of `commit`, or TooManyJobsError. Not the latter if the job exists:
            the command is an update or a repetition, or `commit` refuses it.

        Raises:
            StoreUnavailableError: the jobs cannot be counted; or an error of `commit`.
        """
        limited = [each for each in commands if _may_create(each) and self._max_jobs(each.tenant) is not None]
        return self._submit(commands, limited, commit) if limited else commit(commands)

    async def _submit(self, commands: Sequence[Command], limited: _Limited, commit: Commit) -> list[Outcome]:
        rooms = await self._rooms_for(limited)
        refusals = [_refusal(rooms.get(_key(each))) if _may_create(each) else None for each in commands]
        admitted = [each for each, refusal in zip(commands, refusals, strict=True) if refusal is None]
        try:
            committed = iter(await commit(admitted) if admitted else ())
        except Exception:
            _give_back(rooms, rooms)
            raise
        outcomes: list[Outcome] = [next(committed) if refusal is None else refusal for refusal in refusals]
        created = {(each.tenant, each.id) for each in outcomes if isinstance(each, Job) and each.revision == 1}
        _give_back(rooms, rooms.keys() - created)
        return outcomes

    async def _rooms_for(self, commands: _Limited) -> _Rooms:
        """Take a place for each job that may be created; those that need none have no entry."""
        # Before a place is taken: most such updates, and a creation that is sent again, are of jobs that exist.
        keys = {_key(each) for each in commands if isinstance(each, Update) or each.request}
        found = dict(zip(keys, await asyncio.gather(*(self._exists(*key) for key in keys)), strict=True))
        rooms: dict[Key, _Place | TooManyJobsError] = {}
        try:
            for key in dict.fromkeys(map(_key, commands)):
                if not found.get(key) and (room := await self._room_for(*key, is_missing=key in found)) is not None:
                    rooms[key] = room
        except BaseException:
            _give_back(rooms, rooms)
            raise
        return rooms

    async def _room_for(self, tenant: str, job_id: str, *, is_missing: bool) -> _Place | TooManyJobsError | None:
        limit = self._max_jobs(tenant)
        if limit is None:
            return None
        if len(self._counts) > MAX_COUNTS:
            self._counts.clear()
        count = self._counts.setdefault(tenant, _Count())
        if count.jobs >= limit or count.counted_at == NEVER:
            await self._count_if_older(count, tenant, limit, COUNT_FULL_AGAIN_SECONDS)
        elif self._now() - count.counted_at >= COUNT_AGAIN_SECONDS and not count.counting.locked():
            # Nothing waits for it: with a million jobs it takes a fifth of a second.
            counting = asyncio.create_task(self._count_if_older(count, tenant, limit, COUNT_AGAIN_SECONDS))
            self._countings.add(counting)
            counting.add_done_callback(self._counted)
        if count.jobs < limit:
            return count.take()
        if not is_missing and await self._exists(tenant, job_id):
            return None
        return self._refuse(tenant, limit)

    async def _count_if_older(self, count: _Count, tenant: str, limit: int, seconds: float) -> None:
        async with count.counting:
            if self._now() - count.counted_at >= seconds:
                count.begun += 1
                count.taken = 0
                count.jobs = await self._store.count(tenant, at_most=limit) + count.taken
                count.finished = count.begun
                count.counted_at = self._now()

    def _counted(self, counting: asyncio.Task[None]) -> None:
        self._countings.discard(counting)
        if not counting.cancelled():
            counting.exception()  # the old count stays in use, and the next creation starts another

    async def _exists(self, tenant: str, job_id: str) -> bool:
        try:
            await self._store.get(tenant, job_id)
        except JobExpiredError:
            return True  # refused with a better reason
        except JobNotFoundError:
            return False
        return True


def _may_create(command: Command) -> TypeGuard[Create | Update]:
    return isinstance(command, Create) or (isinstance(command, Update) and command.allow_missing)


def _key(command: Command) -> Key:
    return command.tenant, command.id


def _refusal(room: _Place | TooManyJobsError | None) -> TooManyJobsError | None:
    return room if isinstance(room, TooManyJobsError) else None


def _give_back(rooms: _Rooms, keys: Iterable[Key]) -> None:
    for key in keys:
        room = rooms[key]
        if not isinstance(room, TooManyJobsError):
            count, taken_in = room
            count.give_back(taken_in)
