"""Group commit: commands that are submitted during a commit share the next one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import TypeAlias

from jobstatus_grpc.errors import StoreUnavailableError
from jobstatus_grpc.job import Command, Outcome
from jobstatus_grpc.stores.interface import CommitResult, JobStore

log = logging.getLogger("jobstatus_grpc.commit_queue")

Submission: TypeAlias = tuple[asyncio.Future[list[Outcome]], Sequence[Command]]

MAX_GROUP_COMMANDS = 1000
"""The number of commands in a group, unless a single submission has more. It bounds how long one transaction takes."""

SLOW_COMMIT_SECONDS = 0.05
"""The duration from which a commit allows the next one to run concurrently, if the store supports that. Starting it
earlier would make groups small."""

MAX_GATHER_SECONDS = 0.005
"""How long a group is held open at most for more submissions."""

QUIET_TURNS = 16
"""A group is closed after this number of event loop turns without a new submission; a request takes several turns.

Row `update`: without it, 16 callers and more get half as many updates over grpcio.
"""

LONE_COMMITS = 3
"""After this number of commits of a single submission each, the next group is not held open: there is one caller.

Row `update`: without it, an update by one caller takes 6 % longer; with 1, 16 callers get 6 % fewer over grpcio.
"""


class CommitQueue:
    """Passes commands to the store in groups, in the order of their submission."""

    def __init__(
        self,
        store: JobStore,
        *,
        around_commit: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
        observe_commit: Callable[[int, float], None] | None = None,
    ) -> None:
        """Create a queue for `store`.

        Args:
            store: where to commit.
            around_commit: returns a context manager that is entered for each commit.
            observe_commit: called after each successful commit with its number of commands and its seconds.
        """
        self._store = store
        self._around_commit = around_commit
        self._observe_commit = observe_commit
        self._pending: OrderedDict[asyncio.Future[list[Outcome]], Sequence[Command]] = OrderedDict()
        self._committers: set[asyncio.Task[None]] = set()
        self._slow_commits = 0
        self._lone_commits = 0
        """The number of the last groups in a row that were a single submission."""
        self._deferred: set[asyncio.Task[None]] = set()

    async def submit(self, commands: Sequence[Command]) -> list[Outcome]:
        """Commit `commands`, all in one transaction, which may include other submissions.

        A cancelled caller withdraws its commands, unless their commit has begun: callers that leave must not fill the
        queue while a commit takes long.

        Returns:
            One outcome per command, in order, once all of them are durable.

        Raises:
            StoreFullError, StoreUnavailableError: as of `JobStore.commit`.
        """
        done: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        self._pending[done] = commands
        self._start_committer_if_needed()
        try:
            return await done
        except asyncio.CancelledError:
            self._pending.pop(done, None)
            raise

    async def close(self) -> None:
        """Wait until all submitted commands are committed."""
        while self._committers or self._deferred:
            await asyncio.wait(self._committers | self._deferred)

    @property
    def _quick_committers(self) -> int:
        return len(self._committers) - self._slow_commits

    def _start_committer_if_needed(self) -> None:
        if self._pending and not self._quick_committers and len(self._committers) < self._store.commits_at_once:
            self._committers.add(asyncio.create_task(self._commit_groups()))

    async def _commit_groups(self) -> None:
        try:
            while self._pending and self._quick_committers == 1:
                async with self._around_commit():
                    with self._counted_if_slow():
                        await self._commit_group()
                if self._lone_commits < LONE_COMMITS:
                    await self._gather()
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._committers.discard(task)  # not in a done callback: a submission before that would start no committer

    @contextmanager
    def _counted_if_slow(self) -> Iterator[None]:
        """Count the commit in the block as a slow one once it has taken SLOW_COMMIT_SECONDS."""
        is_slow = False

        def become_slow() -> None:
            nonlocal is_slow
            is_slow = True
            self._slow_commits += 1
            self._start_committer_if_needed()

        timer = asyncio.get_running_loop().call_later(SLOW_COMMIT_SECONDS, become_slow)
        try:
            yield
        finally:
            timer.cancel()
            self._slow_commits -= is_slow

    async def _gather(self) -> None:
        """Hold the next group open for requests that have already arrived: after a quick commit it would be small."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + MAX_GATHER_SECONDS
        quiet_turns = 0
        while quiet_turns < QUIET_TURNS and loop.time() < ends_at:
            count = len(self._pending)
            await asyncio.sleep(0)
            quiet_turns = quiet_turns + 1 if len(self._pending) == count else 0

    async def _commit_group(self) -> None:
        group = self._next_group()
        if not group:  # all callers have left since
            return
        self._lone_commits = self._lone_commits + 1 if len(group) == 1 else 0
        commands = [command for _, submitted in group for command in submitted]
        began_at = time.perf_counter()
        try:
            result = await self._commit(commands)
        except BaseException as error:
            is_of_store = isinstance(error, Exception)
            for done, _ in group:
                if not done.done():
                    done.set_exception(error if is_of_store else StoreUnavailableError())
            if is_of_store:
                return
            raise
        self._resolve_group(group, result)
        if self._observe_commit is not None:
            try:
                self._observe_commit(len(commands), time.perf_counter() - began_at)
            except Exception:
                log.exception("a commit cannot be counted; the commit itself is not affected")

    async def _commit(self, commands: Sequence[Command]) -> CommitResult:
        return await self._store.commit(commands)

    def _next_group(self) -> list[Submission]:
        """Take the first submission, and those after it until the group is full."""
        group: list[Submission] = []
        count = 0
        for done, commands in self._pending.items():
            count += len(commands)
            if group and count > MAX_GROUP_COMMANDS:
                break
            group.append((done, commands))
        for done, _ in group:
            del self._pending[done]
        return group

    def _resolve_group(self, group: Sequence[Submission], result: CommitResult) -> None:
        start = 0
        for done, commands in group:
            end = start + len(commands)
            outcomes = list(result.outcomes[start:end])
            deferred = {index - start: result.deferred[index] for index in result.deferred if start <= index < end}
            if deferred:
                task = asyncio.create_task(_resolve_later(done, outcomes, deferred))
                self._deferred.add(task)
                task.add_done_callback(self._deferred.discard)
            else:
                _resolve(done, outcomes)
            start = end


async def _resolve_later(
    done: asyncio.Future[list[Outcome]], outcomes: list[Outcome], deferred: Mapping[int, asyncio.Future[Outcome]]
) -> None:
    for index, outcome in deferred.items():
        outcomes[index] = await outcome
    _resolve(done, outcomes)


def _resolve(done: asyncio.Future[list[Outcome]], outcomes: list[Outcome]) -> None:
    if not done.done():
        done.set_result(outcomes)
