"""A block of work as a job: what `track` returns. What to send and when says Reporting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

from jobstatus_grpc.client.claim import Step
from jobstatus_grpc.client.outcome import (
    CANCELLED_CODE,
    SUCCESS,
    UNKNOWN_CODE,
    Outcome,
    make_error,
    outcome_of,
)
from jobstatus_grpc.client.reporting import Reporting
from jobstatus_grpc.client.retry import pause
from jobstatus_grpc.client.sender import AsyncSender, Sender
from jobstatus_grpc.errors import DeadlineExceededError, JobStatusError
from jobstatus_grpc.record import Job
from jobstatus_grpc.state import JobState

START_SECONDS = 2.0
"""How long the beginning of a block waits to know its job, unless it is strict."""


class Tracked:
    """What a block of work knows of its job, and says about it. All of it may be used by any thread; nothing blocks."""

    def __init__(self, reporting: Reporting) -> None:
        self._reporting = reporting
        self._was_told = False
        self._outcome: Outcome | None = None
        self.result: Mapping[str, Any] | None = None
        """A small outcome, as JSON could hold it; reported with the end, however that comes."""

    @property
    def id(self) -> str:
        """The job's id; known from the beginning, also while no server can be reached."""
        return self._reporting.claim.id

    @property
    def job(self) -> Job | None:
        """The job as of the last answer; None before the first."""
        return self._reporting.job

    @property
    def attempt(self) -> int:
        """The attempt that this worker holds; 0 until it is known."""
        return self._reporting.claim.attempt

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked for the job's end; learnt with each report, at least every third of heartbeat_timeout.

        Once a worker has seen True here, the end of the block, by whichever way, means CANCELLED, unless it calls
        `succeed` or `fail`. A worker that never looks succeeds or fails as usual.
        """
        self._was_told = self._was_told or self._reporting.cancel_requested
        return self._was_told

    @property
    def lost(self) -> bool:
        """Whether the job is no longer this worker's: another attempt owns it, it was ended, or it is gone.

        Nothing more is reported then; stop working on it.
        """
        return self._reporting.lost

    @property
    def error(self) -> Exception | None:
        """Why the job cannot be reported at the moment, or, once `lost` or refused, any more; None: all is well."""
        return self._reporting.error

    def progress(self, percent: float | None = None, reason: str = "") -> None:
        """Say how far the work is, and what it is at; costs next to nothing, call it as often as you like.

        Reported is the newest: at most every 250 ms, at once if it moved by 1 % or has a new reason, else with the next
        heartbeat or the end.

        Args:
            percent: 0 to 100; None: unchanged. A lower value within one attempt is ignored by the service.
            reason: for people; "": unchanged.
        """
        self._reporting.progress(percent, reason)

    def succeed(self) -> None:
        """Let the block's end mean SUCCEEDED, also where `cancelled` was seen; not where it raises."""
        self._outcome = SUCCESS

    def fail(self, message: str, *, reason: str = "", code: int = UNKNOWN_CODE) -> None:
        """Let the block's end mean FAILED.

        Args:
            message: what went wrong, for people.
            reason: the same for machines, such as OUT_OF_MEMORY.
            code: a google.rpc.Code.
        """
        self._outcome = Outcome(JobState.FAILED, make_error(message, reason, code))

    def abort(self, reason: str = "") -> None:
        """Let the block's end mean CANCELLED where that is known to have been asked for then, else ABORTED."""
        self._outcome = Outcome(JobState.ABORTED, make_error(reason, code=CANCELLED_CODE) if reason else None, reason)

    def _finish(self, exception: BaseException | None) -> None:
        cancel_requested = self._reporting.cancel_requested
        outcome = self._outcome
        if outcome is None or (outcome is SUCCESS and exception is not None):
            outcome = outcome_of(exception, cancel_requested=cancel_requested, was_told=self._was_told)
        elif outcome.state is JobState.ABORTED and cancel_requested:
            outcome = replace(outcome, state=JobState.CANCELLED)
        self._reporting.finish(outcome, self.result)

    def _start_seconds(self) -> float:
        return self._reporting.call_timeout_seconds if self._reporting.strict else START_SECONDS

    def _is_started(self) -> bool:
        """Tell whether the block may begin: the job is claimed, cannot be, or not now."""
        reporting = self._reporting
        return reporting.is_open or reporting.is_over or (reporting.error is not None and not reporting.strict)

    def _raise_if_strict(self, *, is_beginning: bool = False) -> None:
        reporting = self._reporting
        if reporting.strict and reporting.error is not None:
            raise reporting.error
        if reporting.strict and is_beginning and not reporting.is_open:
            raise DeadlineExceededError(f"job {self.id} could not be claimed in time")


class AsyncTrackedJob(Tracked):
    """A block of work as a job: an async context manager, for one block.

    Reports are sent by a task of its own: a block that holds up the event loop holds them up too.
    """

    def __init__(self, reporting: Reporting, send: Callable[[Step, float], Awaitable[Any]]) -> None:
        super().__init__(reporting)
        self._started = asyncio.Event()
        self._sender = AsyncSender(reporting, send, self._answered)
        self._was_entered = False

    async def __aenter__(self) -> AsyncTrackedJob:
        if self._was_entered:
            raise RuntimeError("a tracked job is for one block of work")
        self._was_entered = True
        self._sender.start()
        try:
            await pause(self._start_seconds(), unless=self._started)
            self._raise_if_strict(is_beginning=True)
        except JobStatusError:
            self._reporting.abandon()
            await self._sender.stop()
            raise
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish(error)
        await self._sender.finish()
        if error is None:
            self._raise_if_strict()

    def _answered(self) -> None:
        if self._is_started():
            self._started.set()


class TrackedJob(Tracked):
    """A block of work as a job: a context manager, for one block. Reports are sent by a thread of its own."""

    def __init__(self, reporting: Reporting, send: Callable[[Step, float], Any]) -> None:
        super().__init__(reporting)
        self._started = threading.Event()
        self._sender = Sender(reporting, send, self._answered, name=f"jobstatus-track-{self.id}")

    def __enter__(self) -> TrackedJob:
        self._sender.start()
        try:
            self._started.wait(self._start_seconds())
            self._raise_if_strict(is_beginning=True)
        except JobStatusError:
            self._reporting.abandon()
            self._sender.finish()
            raise
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish(error)
        self._sender.finish()
        if error is None:
            self._raise_if_strict()

    def _answered(self) -> None:
        if self._is_started():
            self._started.set()
