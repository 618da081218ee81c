"""A block of work as a job: `track` returns a tracked job, TrackState decides what it sends, a sender sends it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pickle import PicklingError
from types import TracebackType
from typing import Any

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.client import requests, values
from jobstatus_grpc.client.connection import AsyncConnection, Connection
from jobstatus_grpc.client.fork import renew_in_children
from jobstatus_grpc.client.requests import UNSET, HasJob, JobUpdate
from jobstatus_grpc.client.retry import (
    LAST_TRY_SECONDS,
    LONGEST_FINAL_PAUSE_SECONDS,
    Backoff,
    ClientClosedError,
    Pace,
    is_transient,
    pause,
)
from jobstatus_grpc.client.sender import AsyncFinishing, AsyncSender, Call, Finishing, Sender
from jobstatus_grpc.client.watch import WAIT_UPDATE_INTERVAL_SECONDS, AsyncWatch, JobWatchState, Watch
from jobstatus_grpc.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    IllegalTransitionError,
    InternalError,
    InvalidFieldError,
    JobNotFoundError,
    JobStatusError,
    NotFoundError,
    StoreFullError,
    TooManyRequestsError,
    UnavailableError,
)
from jobstatus_grpc.job import Job, JobError, JobState, limits, validation
from jobstatus_grpc.job.ids import new_uuid7
from jobstatus_grpc.job.limits import CANCELLED_CODE, UNKNOWN_CODE
from jobstatus_grpc.job.validation import Violations, clean_text

log = logging.getLogger("jobstatus_grpc.client")

OnReportError = Callable[[str, Exception], object]

DEFAULT_HEARTBEAT_TIMEOUT_SECONDS = 30.0
"""With three heartbeats in it, a restart of the server does not make the job stalled."""

DEFAULT_FINISH_TIMEOUT_SECONDS = 10.0
"""Outlasts a restart of the server."""

START_SECONDS = 2.0
"""Limit of the time that the beginning of a block waits for its claim, unless it is strict."""

HEARTBEATS_PER_TIMEOUT = 3
"""Two reports may be lost or late before the job is stalled."""

SHORTEST_PAUSE_SECONDS = 0.25
"""Between reports of progress: four a second look continuous to people."""

SMALLEST_STEP_PERCENT = 1.0
"""Of progress that is reported before the next heartbeat: a move that a progress bar shows."""

LONGEST_RETRY_PAUSE_SECONDS = 10.0
"""Limit of the pauses while reports fail; also a third of the heartbeat timeout."""

NO_HEARTBEAT_SECONDS = 1e6
"""Instead of the time between heartbeats, where none are sent: eleven days."""

MAX_FINAL_ERRORS = 5
"""Server errors over an outcome before its result counts as their cause: some seconds of finish_timeout_seconds."""

ABANDON_AFTER_SECONDS = 0.5
"""Time after finish_timeout_seconds in which a call ends by its own deadline, before it is abandoned."""

WATCH_AGAIN_SECONDS = 1.0
"""Pause of `wait_cancelled` after a watch that ended with an error."""


@dataclass(slots=True)
class _Block:
    """The block of a job, or one that has ended: its end may run in another context, or after that of an outer one."""

    target: str
    job_id: str
    outer: _Block | None
    is_over: bool = False


_enclosing: ContextVar[_Block | None] = ContextVar("jobstatus_enclosing_job", default=None)
"""The block that was entered last in this thread or task."""


def _enclosing_block() -> _Block | None:
    block = _enclosing.get()
    while block is not None and block.is_over:
        block = block.outer
    return block


def enclosing_job(target: str) -> str:
    """Return the id of the job on this server whose block runs here; "" outside of such a block."""
    block = _enclosing_block()
    return block.job_id if block is not None and block.target == target else ""


class Tracked:
    """A job as its worker sees it. Any thread may use it, except the waits of an AsyncTrackedJob; only waits block."""

    def __init__(self, state: TrackState) -> None:
        self._state = state
        self._saw_cancel = False
        self._outcome: BlockOutcome | None = None
        self._watches: set[AsyncWatch | Watch] = set()
        self._own_block: _Block | None = None
        self.result: Mapping[str, Any] | None = None
        """A small result, as JSON could hold it; reported with the outcome, whichever that is.

        Values of numpy, Decimal, datetime, Path, UUID and Enum are converted. A key whose value cannot be sent is left
        out and logged, for example an integer beyond 2^53, which JSON's numbers would round.
        """

    @property
    def id(self) -> str:
        """The job's id; set from the beginning, also while no server can be reached."""
        return self._state.claim.id

    @property
    def job(self) -> Job | None:
        """The job as of the last answer, or as `wait_cancelled` saw it; None before the first."""
        return self._state.job

    @property
    def attempt(self) -> int:
        """The attempt that this worker holds; 0 before the claim is answered."""
        return self._state.claim.attempt

    @property
    def cancelled(self) -> bool:
        """Whether the job's end was requested: as of the last report, at most a third of heartbeat_timeout ago.

        Once a worker has read True here, the end of the block means CANCELLED, also where it raises, unless it calls
        `succeed` or `fail`. A worker that never reads it succeeds or fails as usual.
        """
        self._saw_cancel = self._saw_cancel or self._state.cancel_requested
        return self._saw_cancel

    @property
    def lost(self) -> bool:
        """Whether the job is no longer this worker's: another attempt owns it, it is done, or it does not exist.

        Nothing more is reported then; stop working on it.
        """
        return self._state.lost

    @property
    def error(self) -> Exception | None:
        """The error of the last report, or the one that ended reporting; None: the last report succeeded."""
        return self._state.error

    @property
    def finish_timeout_seconds(self) -> float:
        """How long the end of the block waits at most for the outcome to be reported; may be set until then.

        0 abandons the outcome, also while a call is in flight.
        """
        return self._state.finish_timeout_seconds

    @finish_timeout_seconds.setter
    def finish_timeout_seconds(self, seconds: float) -> None:
        self._state.finish_timeout_seconds = values.seconds(seconds, "finish_timeout_seconds")

    def progress(self, percent: float | None = None, reason: str = "") -> None:
        """Set the progress and what the work is at. It costs next to nothing: call it as often as you like.

        The newest values are reported: at most every 250 ms, if they moved by 1 % or the reason is new; otherwise with
        the next heartbeat or the outcome.

        Args:
            percent: 0 to 100; None: unchanged. The service ignores a lower value within one attempt.
            reason: for people; "": unchanged.

        It never raises: what is no number or text is left out and logged.
        """
        self._state.progress(percent, reason)

    def restart_progress(self) -> None:
        """Clear the progress, so that a lower one counts: the work begins another phase."""
        self._state.restart_progress()

    def succeed(self) -> None:
        """Let the end of the block mean SUCCEEDED, also where `cancelled` was read; not where it raises."""
        self._outcome = SUCCESS

    def fail(self, message: str, *, reason: str = "", code: int = UNKNOWN_CODE) -> None:
        """Let the end of the block mean FAILED.

        Args:
            message: what went wrong, for people.
            reason: the same for machines, such as OUT_OF_MEMORY.
            code: a google.rpc.Code.
        """
        violations: Violations = []
        self._outcome = BlockOutcome(JobState.FAILED, make_error(message, reason, code, violations))
        self._state.leave_out(violations)

    def retry(self, error: BaseException | str = "", *, reason: str = "") -> None:
        """Let the end of the block mean RETRYING, also where it raises: this attempt failed, and another will follow.

        The next attempt claims the job: `track(id=…)`. If the job's end is requested, no attempt may follow, and the
        end of the block means CANCELLED. `track(retries=…)` does this by itself for blocks that raise.

        Args:
            error: what went wrong: an exception, or a text for people; "": what the block raises, if it does.
            reason: why it is in this state, for people; "": unchanged.
        """
        violations: Violations = []
        if isinstance(error, BaseException):
            described: JobError | None = _error_of(error, UNKNOWN_CODE)
        else:
            message = values.text_of(error, "error", violations)
            described = make_error(message) if message else None
        text = values.text_of(reason, "reason", violations)
        self._outcome = BlockOutcome(JobState.CANCELLED, described, text, retries=limits.MAX_INT32)
        self._state.leave_out(violations)

    def abort(self, reason: str = "") -> None:
        """Let the end of the block mean CANCELLED if a cancel is known to be requested then, otherwise ABORTED."""
        violations: Violations = []
        text = values.text_of(reason, "reason", violations)
        error = make_error(text, code=CANCELLED_CODE) if text else None
        self._outcome = BlockOutcome(JobState.ABORTED, error, text)
        self._state.leave_out(violations)

    def _enter_block(self, target: str) -> None:
        """Let jobs that are tracked in the block be children of this one."""
        self._own_block = _Block(target, self.id, _enclosing_block())
        _enclosing.set(self._own_block)

    def _leave_block(self) -> None:
        if self._own_block is not None:
            self._own_block.is_over = True
            _enclosing.set(_enclosing_block())

    def _is_started(self) -> bool:
        """Return whether the block may begin: the job is claimed, or cannot be now or at all."""
        state = self._state
        return state.is_open or state.is_over or (state.error is not None and not state.strict)

    def _start_seconds(self) -> float:
        return self._state.call_timeout_seconds if self._state.strict else START_SECONDS

    def _raise_if_strict(self, *, is_beginning: bool = False) -> None:
        state = self._state
        if state.strict and state.error is not None:
            raise state.error
        if state.strict and is_beginning and not state.is_open:
            raise DeadlineExceededError(f"job {self.id} could not be claimed in time")

    def _finish(self, exception: BaseException | None) -> None:
        cancel_requested = self._state.cancel_requested
        outcome = self._outcome
        if outcome is None or (outcome is SUCCESS and exception is not None):
            outcome = outcome_of(exception, cancel_requested=cancel_requested, saw_cancel=self._saw_cancel)
            if outcome.state is JobState.FAILED:
                outcome = replace(outcome, retries=self._state.retries)
        elif outcome.retries and outcome.error is None and exception is not None:
            outcome = replace(outcome, error=_error_of(exception, UNKNOWN_CODE))
        elif outcome.state is JobState.ABORTED and cancel_requested:
            outcome = replace(outcome, state=JobState.CANCELLED)
        self._outcome = outcome
        self._state.finish(outcome, self.result)
        self._end_watches_if_settled()

    def _abandon_after_seconds(self) -> float | None:
        seconds = self.finish_timeout_seconds + ABANDON_AFTER_SECONDS
        return seconds if seconds <= threading.TIMEOUT_MAX else None

    def _watch_state(self, deadline: float | None) -> JobWatchState:
        """Return a watch for `wait_cancelled`. It does not warn: the reports fail too while no server is reached."""
        return JobWatchState(
            self.id,
            min_update_interval_seconds=WAIT_UPDATE_INTERVAL_SECONDS,
            timeout_seconds=_left_until(deadline),
            warns=False,
        )

    def _end_watches_if_settled(self) -> None:
        if self._state.is_settled():
            for watch in list(self._watches):
                watch.abandon(UnavailableError("the tracked job needs no watch any more"))


class AsyncTrackedJob(Tracked):
    """A block of work as a job: an async context manager, for one block.

    Reports are sent by a task: a block that blocks the event loop delays them. A block whose end is cancelled, as anyio
    does in a cancelled scope, is left at once, and its outcome is sent in the background, for at most
    finish_timeout_seconds.
    """

    def __init__(self, state: TrackState, connection: AsyncConnection, finishing: AsyncFinishing) -> None:
        super().__init__(state)
        self._connection = connection
        self._changed = asyncio.Event()
        self._sender = AsyncSender(state, connection.send_once, finishing, self._on_answer)
        self._was_entered = False

    async def __aenter__(self) -> AsyncTrackedJob:
        if self._was_entered:
            raise RuntimeError("a tracked job is for one block of work")
        self._was_entered = True
        self._sender.start()
        try:
            await self._wait_for(self._is_started, self._start_seconds())
            self._raise_if_strict(is_beginning=True)
        except JobStatusError:
            self._state.abandon()
            self._notify()
            await self._sender.stop()
            raise
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        self._enter_block(self._connection.target)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave_block()
        self._finish(error)
        self._notify()
        await self._sender.finish(self._abandon_after_seconds())
        if error is None:
            self._raise_if_strict()

    async def wait_claimed(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the service has answered that the job is this worker's.

        Returns:
            True: `attempt` is set. False: it is not after `timeout_seconds` (None: no limit), the job cannot be claimed
            (see `error`), or the block has ended.
        """
        await self._wait_for(lambda: self.attempt > 0 or self._state.is_settled(), timeout_seconds)
        return self.attempt > 0

    async def wait_cancelled(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the job's end is requested, or the job is no longer this worker's; known at once, by a watch.

        As with `cancelled`, the end of the block means CANCELLED after that, unless it calls `succeed` or `fail`.

        Returns:
            True: `cancelled` or `lost` is true. False: neither is after `timeout_seconds` (None: no limit), or at the
            end of the block.
        """
        deadline = _deadline_after(timeout_seconds)
        await self.wait_claimed(timeout_seconds)
        while not self._state.is_settled() and _left_until(deadline) != 0:
            watching = self._watch_state(deadline)
            watch = self._connection.watch(watching)
            self._watches.add(watch)
            try:
                async with watch:
                    async for job in watch:
                        self._state.observe(job, watching.begun_at)
                        if self._state.is_settled():
                            break
            except JobStatusError:
                pass
            finally:
                self._watches.discard(watch)
            await self._wait_for(self._state.is_settled, _watch_again_seconds(deadline))
        return self.cancelled or self.lost

    async def _wait_for(self, condition: Callable[[], bool], timeout_seconds: float | None) -> None:
        deadline = _deadline_after(timeout_seconds)
        while not condition() and _left_until(deadline) != 0:
            await pause(_left_until(deadline), unless=self._changed)

    def _on_answer(self) -> None:
        self._notify()
        self._end_watches_if_settled()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class TrackedJob(Tracked):
    """A block of work as a job: a context manager, for one block. Reports are sent by a thread."""

    def __init__(self, state: TrackState, connection: Connection, finishing: Finishing) -> None:
        super().__init__(state)
        self._connection = connection
        self._changed = threading.Condition()
        name = f"jobstatus-track-{self.id}"
        self._sender = Sender(state, connection.send_once, finishing, self._on_answer, name=name)
        self._is_inherited = False
        renew_in_children(self, TrackedJob._after_fork)

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.attempt:
            raise PicklingError("a tracked job can be pickled once it is claimed; see wait_claimed")
        state = self._state
        timeouts = state.finish_timeout_seconds, state.call_timeout_seconds
        return TrackedJob._of_parent, (self._connection, self.id, self.attempt, *timeouts)

    @staticmethod
    def _of_parent(connection: Connection, id: str, attempt: int, *timeouts: float) -> TrackedJob:
        claim = Claim(name="", id=id, labels=None, parent_id="", heartbeat_timeout_seconds=None)
        claim.attempt = attempt
        state = TrackState(
            claim,
            heartbeat_timeout_seconds=None,
            finish_timeout_seconds=timeouts[0],
            call_timeout_seconds=timeouts[1],
        )
        state.is_open = True
        job = TrackedJob(state, connection, Finishing())
        job._sender.send_in_child()
        job._is_inherited = True
        return job

    def _after_fork(self) -> None:
        # Only progress is reported from now on: heartbeats and the outcome are the parent's.
        self._changed = threading.Condition()
        self._is_inherited = self._sender.after_fork() or self._is_inherited

    def __enter__(self) -> TrackedJob:
        if self._is_inherited:
            self._enter_block(self._connection.target)
            return self
        self._sender.start()
        try:
            self._wait_for(self._is_started, self._start_seconds())
            self._raise_if_strict(is_beginning=True)
        except JobStatusError:
            self._state.abandon()
            self._notify()
            self._sender.finish()
            raise
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        self._enter_block(self._connection.target)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave_block()
        if self._is_inherited:
            self._sender.finish_in_child()
            return
        self._finish(error)
        self._notify()
        self._sender.finish(self._abandon_after_seconds())
        if error is None:
            self._raise_if_strict()

    def wait_claimed(self, timeout_seconds: float | None = None) -> bool:
        self._wait_for(lambda: self.attempt > 0 or self._state.is_settled(), timeout_seconds)
        return self.attempt > 0

    wait_claimed.__doc__ = AsyncTrackedJob.wait_claimed.__doc__

    def wait_cancelled(self, timeout_seconds: float | None = None) -> bool:
        deadline = _deadline_after(timeout_seconds)
        self.wait_claimed(timeout_seconds)
        while not self._state.is_settled() and _left_until(deadline) != 0:
            watching = self._watch_state(deadline)
            watch = self._connection.watch(watching)
            self._watches.add(watch)
            try:
                # The sender's thread may have ended the watches just before `add`.
                with watch:
                    if not self._state.is_settled():
                        for job in watch:
                            self._state.observe(job, watching.begun_at)
                            if self._state.is_settled():
                                break
            except JobStatusError:
                pass
            finally:
                self._watches.discard(watch)
            self._wait_for(self._state.is_settled, _watch_again_seconds(deadline))
        return self.cancelled or self.lost

    wait_cancelled.__doc__ = AsyncTrackedJob.wait_cancelled.__doc__

    def _wait_for(self, condition: Callable[[], bool], timeout_seconds: float | None) -> None:
        with self._changed:
            self._changed.wait_for(condition, timeout_seconds)

    def _on_answer(self) -> None:
        self._notify()
        self._end_watches_if_settled()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _deadline_after(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds


def _left_until(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)


def _watch_again_seconds(deadline: float | None) -> float:
    left = _left_until(deadline)
    return WATCH_AGAIN_SECONDS if left is None else min(left, WATCH_AGAIN_SECONDS)


class TrackState:
    """Decides what is sent about one tracked job and when: first its claim, then reports, then its outcome.

    Attributes may be read by any thread.
    """

    def __init__(
        self,
        claim: Claim,
        *,
        heartbeat_timeout_seconds: float | None,
        finish_timeout_seconds: float,
        call_timeout_seconds: float,
        strict: bool = False,
        retries: int = 0,
        on_report_error: OnReportError | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin, with the arguments of the clients' `track`, and the deadline of the client's calls."""
        self._now = clock
        self.claim = claim
        self.job: Job | None = None
        self.is_open = False
        """The job is claimed."""
        self.is_over = False
        """Nothing more will be sent."""
        self.cancel_requested = False
        self.lost = False
        self.error: Exception | None = None
        """The error of the last call, or the one that ended reporting; None: the last call succeeded."""
        self.strict = strict
        self.retries = retries
        self.finish_timeout_seconds = finish_timeout_seconds
        self.call_timeout_seconds = min(call_timeout_seconds, finish_timeout_seconds)
        self.wake: Callable[[], None] = lambda: None
        heartbeat_timeout_seconds = heartbeat_timeout_seconds or DEFAULT_HEARTBEAT_TIMEOUT_SECONDS
        self._heartbeat_seconds = heartbeat_timeout_seconds / HEARTBEATS_PER_TIMEOUT
        self._on_report_error = on_report_error
        self._problems: list[tuple[str, Exception]] = []
        self._lock = threading.Lock()
        self._is_inherited = False
        self._backoff = Backoff(min(self._heartbeat_seconds, LONGEST_RETRY_PAUSE_SECONDS))
        self._pace = Pace()
        self._not_before = 0.0
        self._reported_at = self._changes_sent_at = float("-inf")
        self._call_begun_at = self._job_known_at = float("-inf")
        self._sent: dict[str, Any] = {}
        self._pending: dict[str, Any] = {}
        self._is_restarting = False
        """The next report clears the progress. One update cannot clear it and set a lower one."""
        self._is_report_wanted = False
        """A report is worth a call before the next heartbeat."""
        self._outcome: BlockOutcome | None = None
        self._result: Mapping[str, Any] | None = None
        self._left_out: dict[str, FieldViolation] = {}
        """By field, so that a value that is wrong in each of a thousand calls is logged once."""
        self._refusal: JobStatusError | None = None
        """What a strict block raises at its end, although its outcome was reported: its result was not."""
        self._final_call: Call | None = None
        self._final_errors = 0
        self._finish_at = float("inf")
        if claim.error is not None:
            self._stop(claim.error)
        elif claim.left_out:
            if strict:
                self._stop(InvalidFieldError(violations=claim.left_out))
            else:
                self.leave_out(claim.left_out)

    def after_fork(self) -> None:
        """As of Calls. The child sends no heartbeats: they would hide the death of the parent."""
        self._lock = threading.Lock()
        self._is_inherited = True
        self._heartbeat_seconds = NO_HEARTBEAT_SECONDS
        self._pending, self._is_report_wanted = {}, False
        self._not_before = 0.0

    def has_pending(self) -> bool:
        """As of Calls."""
        return not self.is_over and self._is_report_wanted

    def progress(self, percent: float | None, reason: str | None) -> None:
        """Take progress to report; values outside of 0 to 100 are clamped, and NaN is ignored."""
        violations: Violations = []
        number = _number(percent, violations)
        text = reason if type(reason) is str else values.text_of("" if reason is None else reason, "reason", violations)
        self.leave_out(violations)
        with self._lock:
            if number is not None and not math.isnan(number):
                self._pending["progress"] = min(max(number, 0.0), 100.0)
            if text:
                self._pending["reason"] = text
            if self._is_report_wanted or not self._is_worth_a_call():
                return
            self._is_report_wanted = True
        self.wake()

    def restart_progress(self) -> None:
        """Take that the progress is to be cleared before the next one is reported."""
        with self._lock:
            self._pending.pop("progress", None)
            self._is_restarting = self._is_report_wanted = True
        self.wake()

    def _is_worth_a_call(self) -> bool:
        if self._is_inherited:
            return bool(self._pending)
        percent, sent = self._pending.get("progress"), self._sent.get("progress")
        if percent is not None and (sent is None or abs(percent - sent) >= SMALLEST_STEP_PERCENT):
            return True
        return "reason" in self._pending and self._pending["reason"] != self._sent.get("reason")

    def observe(self, job: Job, begun_at: float) -> None:
        """Take the job as a watch returned it, from a stream that was opened at `begun_at`.

        If the job looks lost, a report is sent at once, and its answer decides.
        """
        with self._lock:
            self._set_job(job, begun_at)
            if not job.done and job.attempt <= self.claim.attempt:
                return
            self._is_report_wanted = True
        self.wake()

    def is_settled(self) -> bool:
        """Return whether a cancel was requested, nothing more will be sent, or the block has ended."""
        return self.cancel_requested or self.is_over or self._outcome is not None

    def finish(self, outcome: BlockOutcome, result: Mapping[str, Any] | None) -> None:
        """Take the end of the block: from now on only `outcome` is sent, for at most `finish_timeout_seconds`."""
        violations: Violations = []
        # Here and without the lock, because it calls methods of the caller's types.
        plain = None if result is None else values.plain_result(result, violations)
        with self._lock:
            self._outcome = outcome
            self._result = plain or (None if violations else plain)
            self._leave_out(violations)
            if isinstance(self.error, ClientClosedError):
                self._note_lost_outcome(self.error)
            self._finish_at = self._now() + self.finish_timeout_seconds
            self._backoff = Backoff(LONGEST_FINAL_PAUSE_SECONDS)
            # A call before the time that a limited server asked for is refused, and has to wait longer than before.
            if not isinstance(self.error, TooManyRequestsError):
                self._not_before = 0.0
        self.wake()

    def abandon(self) -> None:
        """Send nothing more."""
        with self._lock:
            self.is_over = True
        self.wake()

    def due_in_seconds(self) -> float | None:
        """As of Calls; gives up once finish_timeout_seconds are over."""
        with self._lock:
            now = self._now()
            if not self.is_over and now >= self._finish_at:
                self._give_up()
            due_in_seconds = None if self.is_over else max(self._due_at() - now, 0.0)
        self._call_on_report_error()
        return due_in_seconds

    def _due_at(self) -> float:
        if not self.is_open or self._outcome is not None:
            due_at = self._not_before
        else:
            due_at = self._reported_at + self._heartbeat_seconds
            if self._is_report_wanted:
                due_at = min(due_at, self._changes_sent_at + SHORTEST_PAUSE_SECONDS + self._pace.seconds)
            due_at = max(due_at, self._not_before)
        last_try_at = self._finish_at - LAST_TRY_SECONDS
        return min(due_at, self._finish_at if self._call_begun_at >= last_try_at else last_try_at)

    def next_call(self) -> tuple[Call, float]:
        """As of Calls."""
        with self._lock:
            now = self._call_begun_at = self._now()
            timeout = min(self.call_timeout_seconds, max(self._finish_at - now, 0.0))
            if not self.is_open:
                return self.claim.call, timeout
            if self._outcome is not None:
                self._final_call = self._final_call or self._make_final_call(self._outcome)
                return self._final_call, timeout
            if self._is_restarting:
                changes, self._is_restarting, self._is_report_wanted = {"progress": None}, False, bool(self._pending)
            else:
                changes, self._pending, self._is_report_wanted = self._pending, {}, False
            if changes:
                self._sent.update(changes)
                self._changes_sent_at = now
            return self._make_report(changes), timeout

    def _make_report(self, changes: Mapping[str, Any]) -> Call:
        """Return a report of `changes`; without any it is a heartbeat."""
        update = JobUpdate(
            self.claim.id,
            attempt=self.claim.attempt,
            progress=changes.get("progress", UNSET),
            reason=clean_reason(changes["reason"]) if "reason" in changes else UNSET,
        )
        request = requests.update_request(update)
        # Twice has the same effect as once, so the service need not store its id.
        request.request_id = ""
        return Call("UpdateJob", request, changes)

    def _make_final_call(self, outcome: BlockOutcome) -> Call:
        reason = outcome.reason or self._pending.get("reason")
        update = JobUpdate(
            self.claim.id,
            attempt=self.claim.attempt,
            state=self._end_state(outcome),
            error=UNSET if outcome.error is None else outcome.error,
            progress=self._pending.get("progress", UNSET),
            reason=UNSET if reason is None else clean_reason(reason),
            result=UNSET if self._result is None else self._result,
        )
        request, violations = requests.sendable_update(update)
        self._leave_out(violations)
        return Call("UpdateJob", request)

    def _end_state(self, outcome: BlockOutcome) -> JobState:
        """Return the state of an outcome: RETRYING if another attempt is to follow and may."""
        is_retried = max(self.claim.attempt, 1) <= outcome.retries and not self.cancel_requested
        return JobState.RETRYING if is_retried else outcome.state

    def leave_out(self, violations: Violations) -> None:
        """Log what cannot be sent, each field once. The rest is sent without it."""
        if violations:
            with self._lock:
                self._leave_out(violations)
            self.wake()  # the sender calls on_report_error

    def _leave_out(self, violations: Violations) -> None:
        for violation in violations:
            if violation.field not in self._left_out:
                self._left_out[violation.field] = violation
                error = InvalidFieldError(violations=[violation])
                self._note_problem(logging.ERROR, "a value cannot be sent and is left out", error)
        if violations and self.strict:
            self._refusal = InvalidFieldError(violations=self._left_out.values())

    def succeeded(self, call: Call, response: HasJob | None) -> None:
        """As of Calls."""
        try:
            job = requests.job_in(response)
        except InternalError as error:
            self.failed(call, error)
            return
        with self._lock:
            if self.error is not None and not isinstance(self.error, TooManyRequestsError):
                log.info("job %s: reports succeed again", self.claim.id)
            self._pace.speed_up()
            self.error = None
            self._set_job(job, self._call_begun_at)
            self._backoff.reset()
            self._not_before = 0.0
            if not self.is_open:
                self.claim.answered(job)
                self.is_open = self.claim.attempt > 0
                self._reported_at = self._now()
            elif call is self._final_call:
                self.is_over = True
                self.error = self._refusal
            else:
                self._reported_at = self._call_begun_at

    def _set_job(self, job: Job, begun_at: float) -> None:
        # A watch and an answer may overtake each other. But what was asked for once the other was known is newer, also
        # with a lower revision: the store was set back to an earlier state.
        known = self.job
        is_newer = known is None or (job.created_at, job.revision) >= (known.created_at, known.revision)
        if is_newer or begun_at > self._job_known_at:
            self.job, self._job_known_at = job, self._now()
            self.cancel_requested = job.cancel_requested or job.state is JobState.CANCELLED

    def failed(self, call: Call, error: Exception) -> None:
        """As of Calls."""
        with self._lock:
            if self.is_over:
                return
            self._failed(call, error)
        self._call_on_report_error()

    def _failed(self, call: Call, error: Exception) -> None:
        is_final = call is self._final_call
        if is_final and self._is_refused_retry(error):
            self.cancel_requested = True
            self._final_call = None
        elif is_final and self._result is not None and self._is_the_results_fault(error):
            self._send_without_result(error)
        elif is_transient(error):
            self._put_back(call)
            self._not_before = self._now() + self._backoff.pause_seconds(error)
            if isinstance(error, TooManyRequestsError):
                if self._pace.slow_down(self._now()):
                    self._note_problem(logging.WARNING, "reports are sent more slowly", error)
            elif self.error is None or isinstance(self.error, TooManyRequestsError):
                self._note_problem(logging.WARNING, "cannot be reported, retrying", error)
            self.error = error
        elif not self.is_open and self.claim.is_saved_from(error):
            log.info("job %s does not exist; it will be created", self.claim.id)
        elif not self.is_open or is_final or _is_loss(error) or isinstance(error, ClientClosedError):
            self._stop(error)
        else:
            if self.error is None:
                self._note_problem(logging.ERROR, "a report was refused and dropped", error)
            self.error = error
            self._reported_at = self._now()

    def _is_refused_retry(self, error: Exception) -> bool:
        """Return whether RETRYING is refused because of a cancel that is not known here."""
        assert self._outcome is not None
        state = self._end_state(self._outcome)
        is_ours = isinstance(error, IllegalTransitionError) and error.metadata.get("from") == "JOB_STATE_IN_PROGRESS"
        return is_ours and state is JobState.RETRYING

    def _is_the_results_fault(self, error: Exception) -> bool:
        """Return whether the outcome may be accepted without the result: proxies refuse large bodies as UNKNOWN."""
        if not is_transient(error):
            return not _is_loss(error) and not isinstance(error, ClientClosedError)
        if isinstance(error, (DeadlineExceededError, UnavailableError, TooManyRequestsError, StoreFullError)):
            return False
        self._final_errors += 1
        return self._final_errors >= MAX_FINAL_ERRORS

    def _send_without_result(self, error: Exception) -> None:
        self._note_problem(logging.ERROR, "the result was refused; the outcome is reported without it", error)
        self._result = self._final_call = None
        if self.strict and isinstance(error, JobStatusError):
            self._refusal = error

    def put_back(self, call: Call) -> None:
        """As of Calls."""
        with self._lock:
            self._put_back(call)

    def _put_back(self, call: Call) -> None:
        if call.changes == {"progress": None}:
            self._is_restarting = True
        else:
            self._pending = {**call.changes, **self._pending}
        self._is_report_wanted = self._is_report_wanted or bool(call.changes)

    def crashed(self, error: Exception) -> None:
        """As of Calls."""
        with self._lock:
            self._stop(InternalError(f"the client failed: {error!r}"))
        self._call_on_report_error()

    def _stop(self, error: Exception) -> None:
        self.error = error
        self.is_over = True
        self.lost = _is_loss(error)
        metadata = getattr(error, "metadata", {})
        self.cancel_requested = self.cancel_requested or metadata.get("from") == "JOB_STATE_CANCELLED"
        if self._outcome is not None and not self.lost:
            self._note_lost_outcome(error)
        elif isinstance(error, ClientClosedError):  # the program's own doing, most often at its end
            log.debug("job %s is no longer reported: %s", self.claim.id, error)
        else:
            self._note_problem(logging.WARNING if self.lost else logging.ERROR, "no longer reported", error)

    def _give_up(self) -> None:
        self.is_over = True
        self.error = self.error or DeadlineExceededError()
        self._note_lost_outcome(self.error)

    def _note_lost_outcome(self, error: Exception) -> None:
        outcome = self._end_state(self._outcome).name if self._outcome else ""
        self._note_problem(logging.ERROR, f"the outcome {outcome} could not be reported", error)

    def _note_problem(self, level: int, problem: str, error: Exception) -> None:
        text = f"job {self.claim.id}: {problem}: {error}"
        if self._on_report_error is None:
            log.log(level, "%s", text)
        else:
            self._problems.append((text, error))

    def _call_on_report_error(self) -> None:
        """Call `on_report_error` without the lock: it may use the tracked job."""
        while self._problems and self._on_report_error is not None:
            try:
                self._on_report_error(*self._problems.pop(0))
            except Exception:
                log.exception("job %s: on_report_error raised", self.claim.id)


def _number(percent: Any, violations: Violations) -> float | None:
    try:
        return None if percent is None else float(percent)
    except Exception:
        violations.append(FieldViolation("progress", f"must be a number, is {values.describe(percent)}"))
        return None


def _is_loss(error: Exception) -> bool:
    """Return whether the job is no longer this worker's: another attempt owns it, it is done, or it does not exist."""
    return isinstance(error, (FailedPreconditionError, NotFoundError))


class Claim:
    """The calls that create or claim a worker's job. Each may be repeated: its request stays the same.

    `id` is set from the beginning; `attempt` is 0 until the job is claimed. The name is cleaned; labels and a parent_id
    that cannot be sent, or that the service would refuse together with the job, are left out.
    """

    def __init__(
        self,
        *,
        name: str,
        id: str | None,
        labels: Mapping[str, str] | None,
        parent_id: str,
        heartbeat_timeout_seconds: float | None,
        trace_parent: str = "",
    ) -> None:
        """Begin, with the arguments of the clients' `track`."""
        self.attempt = 0
        self.left_out: Violations = []
        self.error: InvalidFieldError | None = None
        """Why no job can be claimed: `id` is none."""
        self._attempt_claimed = 1
        template = pb.JobStatus(name=clean_text(values.text_of(name, "name", self.left_out), limits.MAX_NAME_BYTES))
        values.set_field(template, "parent_id", parent_id, self.left_out)
        values.set_field(template, "trace_parent", trace_parent, self.left_out)
        if labels is not None:
            values.set_labels(template, labels, self.left_out)
        values.leave_out_what_is_refused(template, self.left_out)
        self._name, self._parent_id, self._labels = template.name, template.parent_id, dict(template.labels)
        self._trace_parent = template.trace_parent or UNSET
        self._heartbeat_timeout_seconds = UNSET if heartbeat_timeout_seconds is None else heartbeat_timeout_seconds
        if id is None or id == "":
            self.id = new_uuid7(datetime.now(timezone.utc))
            self.call = self._make_creation()
            """The call to make now."""
            return
        violations: Violations = []
        values.set_field(pb.GetJobRequest(), "id", id, violations)
        self.id = values.describe(id) if violations else id
        if not violations:
            validation.check_id(id, "id", violations)
        if violations:
            self.error = InvalidFieldError(violations=violations)
            self.call = Call("GetJob", pb.GetJobRequest())
        else:
            self.call = self._make_read()

    def answered(self, job: Job) -> None:
        """Take the answer to `call`."""
        if self.call.method == "GetJob":
            self.call = self._make_claim(job.attempt + 1)
        else:
            # Not the job's: the answer to a repeated call is the job as it is now, which another may have claimed.
            self.attempt = self._attempt_claimed

    def is_saved_from(self, error: Exception) -> bool:
        """Return whether there is another way after `error`: a job that does not exist is created if it has a name."""
        if isinstance(error, JobNotFoundError) and self.call.method == "GetJob" and self._name:
            self.call = self._make_claim(1)
            return True
        return False

    def _make_creation(self) -> Call:
        request = requests.create_request(
            None,
            id=self.id,
            name=self._name,
            state=JobState.IN_PROGRESS,
            labels=self._labels,
            parent_id=self._parent_id,
            heartbeat_timeout_seconds=self._heartbeat_timeout_seconds,
            trace_parent=self._trace_parent,
        )
        return Call("CreateJob", request)

    def _make_read(self) -> Call:
        return Call("GetJob", pb.GetJobRequest(id=self.id))

    def _make_claim(self, attempt: int) -> Call:
        self._attempt_claimed = attempt
        update = JobUpdate(
            self.id,
            state=JobState.IN_PROGRESS,
            attempt=attempt,
            heartbeat_timeout_seconds=self._heartbeat_timeout_seconds,
            allow_missing=bool(self._name),
            name=self._name,
            parent_id=self._parent_id,
            trace_parent=self._trace_parent,
        )
        request = requests.update_request(update)
        # Labels outside of the mask are for a job that is created; one that exists keeps its own.
        request.job.labels.update(self._labels)
        return Call("UpdateJob", request)


@dataclass(frozen=True, slots=True)
class BlockOutcome:
    """The end of a block as the end of its job."""

    state: JobState
    error: JobError | None = None
    reason: str = ""
    """Empty: the job keeps the one it has."""
    retries: int = 0
    """The end of attempts up to this one is RETRYING instead, unless the job's end is requested."""


SUCCESS = BlockOutcome(JobState.SUCCEEDED)


def outcome_of(exception: BaseException | None, *, cancel_requested: bool, saw_cancel: bool) -> BlockOutcome:
    """Return the outcome of a block that did not set one.

    Args:
        exception: what it raised.
        cancel_requested: whether the job's end was requested.
        saw_cancel: whether the block read that: then its end, with or without an exception, is the answer to it.
    """
    if isinstance(exception, SystemExit) and not exception.code:
        exception = None
    if exception is None:
        return BlockOutcome(JobState.CANCELLED) if saw_cancel else SUCCESS
    # KeyboardInterrupt, asyncio.CancelledError and GeneratorExit stop a block from outside. They are no Exception.
    was_stopped = isinstance(exception, concurrent.futures.CancelledError) or not isinstance(
        exception, (Exception, SystemExit)
    )
    error = _error_of(exception, CANCELLED_CODE if was_stopped else UNKNOWN_CODE)
    if saw_cancel or (was_stopped and cancel_requested):
        return BlockOutcome(JobState.CANCELLED, error)
    return BlockOutcome(JobState.ABORTED if was_stopped else JobState.FAILED, error)


def _error_of(exception: BaseException, code: int) -> JobError:
    """Return an exception as a job's error: its text, and its class's name as the reason."""
    kind = type(exception).__name__
    if isinstance(exception, SystemExit):
        return make_error(f"exit code {values.text_of(exception.code, 'exit code', [])}", kind, code)
    return make_error(values.text_of(exception, "error", []) or kind, kind, code)


def make_error(
    message: object, reason: object = "", code: object = UNKNOWN_CODE, violations: Violations | None = None
) -> JobError:
    """Return an error that the service accepts, for any values; add a violation for one without a text."""
    found: Violations = [] if violations is None else violations
    return JobError(
        values.code_of(code),
        clean_text(values.text_of(message, "error.message", found), limits.MAX_ERROR_MESSAGE_BYTES, multiline=True),
        clean_text(values.text_of(reason, "error.reason", found), limits.MAX_ERROR_REASON_BYTES),
    )


def clean_reason(reason: str) -> str:
    """Return a reason that the service accepts, for any text."""
    return clean_text(reason, limits.MAX_REASON_BYTES, multiline=True)
