"""Updates of many jobs off the caller's path: what `reporter` returns. What to send and when says Gathering."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any

from jobstatus_grpc.client.claim import Step
from jobstatus_grpc.client.gathering import Gathering
from jobstatus_grpc.client.retry import pause
from jobstatus_grpc.client.sender import AsyncSender, Sender, set_from_any_thread
from jobstatus_grpc.errors import DeadlineExceededError
from jobstatus_grpc.record import JobError
from jobstatus_grpc.state import JobState
from jobstatus_grpc.wire.calls import UNSET, JobUpdate, Unset

DEFAULT_FLUSH_INTERVAL_SECONDS = 0.05
DEFAULT_MAX_PENDING = 10_000


class Gatherer:
    """Takes updates. May be used by any thread; nothing blocks."""

    def __init__(self, gathering: Gathering) -> None:
        self._gathering = gathering
        self._was_entered = False

    def update(
        self,
        id: str,
        *,
        state: JobState | Unset = UNSET,
        reason: str | Unset | None = UNSET,
        has_progress: bool | Unset | None = UNSET,
        progress: float | Unset | None = UNSET,
        estimated_completion: datetime | Unset | None = UNSET,
        error: JobError | Unset | None = UNSET,
        heartbeat_timeout_seconds: float | Unset | None = UNSET,
        labels: Mapping[str, str] | Unset | None = UNSET,
        result: Mapping[str, Any] | Unset | None = UNSET,
        attempt: int = 0,
        expected_revision: int = 0,
        request_id: str | None = None,
        allow_missing: bool = False,
        name: str = "",
        parent_id: str = "",
    ) -> None:
        """Report on a job, soon; returns at once. The arguments are those of the clients' `update`.

        Updates of one job take effect in their order. Of those that wait, what says nothing but progress, reason and
        estimated_completion is put together with the next such of the same job and attempt: the newest is sent.

        An update that has no effect, whyever, is told to `on_error` or logged; nothing is raised.
        """
        self._gathering.update(
            JobUpdate(
                id, state=state, reason=reason, has_progress=has_progress, progress=progress, error=error,
                labels=labels, estimated_completion=estimated_completion,
                heartbeat_timeout_seconds=heartbeat_timeout_seconds, result=result, attempt=attempt,
                expected_revision=expected_revision, request_id=request_id, allow_missing=allow_missing, name=name,
                parent_id=parent_id,
            )
        )  # fmt: skip

    def _enter(self) -> None:
        if self._was_entered:
            raise RuntimeError("a reporter is for one block of work")
        self._was_entered = True

    def _check_entered(self) -> None:
        if not self._was_entered:
            raise RuntimeError("a reporter sends within its block only: enter it first")

    def _end_flush(self, flush: object, timeout_seconds: float | None, *, is_done: bool) -> None:
        left = self._gathering.forget(flush)
        if not is_done and timeout_seconds is not None:
            raise DeadlineExceededError(f"after {timeout_seconds:g} s {left} updates are not answered")


class AsyncReporter(Gatherer):
    """Sends updates of many jobs in batches: an async context manager, for one block.

    They are sent by a task of its own: a block that holds up the event loop holds them up too.
    """

    def __init__(self, gathering: Gathering, send: Callable[[Step, float], Awaitable[Any]]) -> None:
        super().__init__(gathering)
        self._sender = AsyncSender(gathering, send)

    async def flush(self, timeout_seconds: float | None = None) -> None:
        """Send what waits, and wait until every update given before is answered.

        Args:
            timeout_seconds: None: for ever, also while no server can be reached.

        Raises:
            DeadlineExceededError: some are not answered in time. They are still to be sent.
        """
        self._check_entered()
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        flush = self._gathering.flush(lambda: set_from_any_thread(done, loop))
        try:
            await pause(timeout_seconds, unless=done)
        except BaseException:
            self._gathering.forget(flush)
            raise
        self._end_flush(flush, timeout_seconds, is_done=done.is_set())

    async def __aenter__(self) -> AsyncReporter:
        self._enter()
        self._sender.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gathering.finish()
        await self._sender.finish()


class Reporter(Gatherer):
    """Sends updates of many jobs in batches: a context manager, for one block. They are sent by a thread of its own."""

    def __init__(self, gathering: Gathering, send: Callable[[Step, float], Any]) -> None:
        super().__init__(gathering)
        self._sender = Sender(gathering, send, name="jobstatus-reporter")

    def flush(self, timeout_seconds: float | None = None) -> None:
        self._check_entered()
        done = threading.Event()
        flush = self._gathering.flush(done.set)
        try:
            done.wait(timeout_seconds)
        except BaseException:
            self._gathering.forget(flush)
            raise
        self._end_flush(flush, timeout_seconds, is_done=done.is_set())

    flush.__doc__ = AsyncReporter.flush.__doc__

    def __enter__(self) -> Reporter:
        self._enter()
        self._sender.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gathering.finish()
        self._sender.finish()
