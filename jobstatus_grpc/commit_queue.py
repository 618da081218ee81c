"""Group commit: what is asked while a transaction runs is committed together in the next one."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

from jobstatus_grpc.errors import StoreUnavailableError
from jobstatus_grpc.job import Command, Outcome
from jobstatus_grpc.stores.interface import JobStore

Submission: TypeAlias = tuple[Sequence[Command], asyncio.Future[list[Outcome]]]

MAX_GROUP_COMMANDS = 1000
"""A group is as large as what waits, up to this; a single submission may exceed it."""

SLOW_COMMIT_SECONDS = 0.05
"""A commit that takes longer lets another run beside it, where the store can. At once it would make groups small."""

MAX_GATHER_SECONDS = 0.005
QUIET_TURNS = 16
"""So many turns of the event loop without a new submission close a group; a request takes several to arrive."""


class CommitQueue:
    """Stands between the calls and the store, which sees one group at a time, in the order of submission."""

    def __init__(
        self,
        store: JobStore,
        *,
        around_commit: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
        observe_commit: Callable[[int, float], None] | None = None,
    ) -> None:
        """Take the store, what to hold while it commits, and what to tell of a commit: its commands and seconds."""
        self._store = store
        self._around_commit = around_commit
        self._observe_commit = observe_commit
        self._waiting: deque[Submission] = deque()
        self._committers: set[asyncio.Task[None]] = set()
        self._slow_commits = 0
        self._held: set[asyncio.Task[None]] = set()

    def submit(self, commands: Sequence[Command]) -> asyncio.Future[list[Outcome]]:
        """Commit `commands`, in one transaction with whatever else waits.

        Cancelling the wait does not withdraw them.

        Returns:
            What to wait for: one outcome per command, in order, once all of them are durable; or
            StoreFullError, StoreUnavailableError, as `JobStore.commit`.
        """
        done: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        self._waiting.append((commands, done))
        self._begin_if_none_will_soon()
        return done

    async def close(self) -> None:
        """Wait until everything that was submitted is committed."""
        while self._committers or self._held:
            await asyncio.wait(self._committers | self._held)

    @property
    def _quick_committers(self) -> int:
        return len(self._committers) - self._slow_commits

    def _begin_if_none_will_soon(self) -> None:
        if self._waiting and not self._quick_committers and len(self._committers) < self._store.commits_at_once:
            self._committers.add(asyncio.create_task(self._commit_all()))

    async def _commit_all(self) -> None:
        try:
            while self._waiting and self._quick_committers == 1:
                async with self._around_commit():
                    with self._slowness():
                        await self._commit_group()
                await self._gather()
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._committers.discard(task)  # at once: what is submitted from now on needs another

    @contextmanager
    def _slowness(self) -> Iterator[None]:
        """Count the commit that the block makes among the slow ones, once it is."""
        is_slow = False

        def begin_another() -> None:
            nonlocal is_slow
            is_slow = True
            self._slow_commits += 1
            self._begin_if_none_will_soon()

        timer = asyncio.get_running_loop().call_later(SLOW_COMMIT_SECONDS, begin_another)
        try:
            yield
        finally:
            timer.cancel()
            self._slow_commits -= is_slow

    async def _gather(self) -> None:
        """Let what has arrived already join the group: while each commit is quick, groups would stay small and dear."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + MAX_GATHER_SECONDS
        quiet_turns = 0
        while quiet_turns < QUIET_TURNS and loop.time() < ends_at:
            count = len(self._waiting)
            await asyncio.sleep(0)
            quiet_turns = quiet_turns + 1 if len(self._waiting) == count else 0

    async def _commit_group(self) -> None:
        group = [self._waiting.popleft()]
        commands = list(group[0][0])
        while self._waiting and len(commands) + len(self._waiting[0][0]) <= MAX_GROUP_COMMANDS:
            group.append(self._waiting.popleft())
            commands.extend(group[-1][0])
        try:
            outcomes = await self._commit(commands)
        except BaseException as error:
            is_ours = isinstance(error, Exception)
            for _, done in group:
                if not done.done():
                    done.set_exception(error if is_ours else StoreUnavailableError())
            if is_ours:
                return
            raise
        self._answer(group, outcomes)

    def _answer(self, group: Sequence[Submission], outcomes: Sequence[Outcome | asyncio.Future[Outcome]]) -> None:
        is_known = not any(isinstance(outcome, asyncio.Future) for outcome in outcomes)
        start = 0
        for submitted, done in group:
            end = start + len(submitted)
            of_these, start = outcomes[start:end], end
            if is_known:
                _resolve(done, of_these)
            else:
                answer = asyncio.create_task(_answer_later(done, of_these))
                self._held.add(answer)
                answer.add_done_callback(self._held.discard)

    async def _commit(self, commands: Sequence[Command]) -> Sequence[Outcome | asyncio.Future[Outcome]]:
        if self._observe_commit is None:
            return await self._store.commit(commands)
        began_at = time.perf_counter()
        outcomes = await self._store.commit(commands)
        self._observe_commit(len(commands), time.perf_counter() - began_at)
        return outcomes


async def _answer_later(
    done: asyncio.Future[list[Outcome]], outcomes: Sequence[Outcome | asyncio.Future[Outcome]]
) -> None:
    """Wait for jobs that others hold, apart from all who need not."""
    _resolve(done, [await outcome if isinstance(outcome, asyncio.Future) else outcome for outcome in outcomes])


def _resolve(done: asyncio.Future[list[Outcome]], outcomes: Sequence[Any]) -> None:
    if not done.done():
        done.set_result(list(outcomes))
