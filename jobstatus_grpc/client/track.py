"""A block of work as a job: what `track` returns. What to send and when says Reporting."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

from jobstatus_grpc import errors
from jobstatus_grpc.client import requests
from jobstatus_grpc.client.connection import AsyncConnection, ClientClosedError, Connection
from jobstatus_grpc.client.requests import UNSET, HasJob, JobUpdate
from jobstatus_grpc.client.retry import Backoff, pause
from jobstatus_grpc.client.sender import AsyncSender, Sender, Step
from jobstatus_grpc.client.watch import AsyncWatch, Watch, Watching
from jobstatus_grpc.errors import DeadlineExceededError, JobNotFoundError, JobStatusError, UnavailableError
from jobstatus_grpc.job import Job, JobError, JobState, limits
from jobstatus_grpc.job.ids import new_job_id

CANCELLED_CODE = 1

UNKNOWN_CODE = 2
"""Of google.rpc.Code."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")

_CONTROL_BUT_WHITESPACE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a job."""

    state: JobState
    error: JobError | None = None
    reason: str = ""
    """Empty: the job keeps the one it has."""


SUCCESS = Outcome(JobState.SUCCEEDED)


def outcome_of(exception: BaseException | None, *, cancel_requested: bool, was_told: bool) -> Outcome:
    """Return what a block that says nothing about its outcome means by how it ended.

    Args:
        exception: what it raised.
        cancel_requested: whether somebody asked for the job's end.
        was_told: whether the block looked and knew: then its end, however it came, is the answer to that.
    """
    if isinstance(exception, SystemExit) and not exception.code:
        exception = None
    if exception is None:
        return Outcome(JobState.CANCELLED) if was_told else SUCCESS
    # What is no Exception stops a block from outside: KeyboardInterrupt, asyncio.CancelledError, GeneratorExit.
    was_stopped = isinstance(exception, concurrent.futures.CancelledError) or not isinstance(
        exception, (Exception, SystemExit)
    )
    error = error_of(exception, CANCELLED_CODE if was_stopped else UNKNOWN_CODE)
    if was_told or (was_stopped and cancel_requested):
        return Outcome(JobState.CANCELLED, error)
    return Outcome(JobState.ABORTED if was_stopped else JobState.FAILED, error)


def error_of(exception: BaseException, code: int) -> JobError:
    """Return an exception as a job's error: its text, and its class's name as the reason."""
    kind = type(exception).__name__
    if isinstance(exception, SystemExit):
        return make_error(f"exit code {exception.code}", kind, code)
    try:
        message = str(exception)
    except Exception:
        message = ""
    return make_error(message or kind, kind, code)


def make_error(message: str, reason: str = "", code: int = UNKNOWN_CODE) -> JobError:
    """Return an error that the service accepts, whatever the texts hold."""
    return JobError(
        code if 1 <= code <= limits.MAX_ERROR_CODE else UNKNOWN_CODE,
        clean_text(message, limits.MAX_ERROR_MESSAGE_BYTES, multiline=True),
        clean_text(reason, limits.MAX_ERROR_REASON_BYTES),
    )


def clean_text(text: str, max_bytes: int, *, multiline: bool = False) -> str:
    """Return `text` without what the service refuses: control characters, lone surrogates, and all beyond its limit."""
    plain = (_CONTROL_BUT_WHITESPACE if multiline else _CONTROL).sub(" ", str(text))
    return plain.encode("utf-8", "replace")[:max_bytes].decode("utf-8", "ignore")


class Claim:
    """The calls that make a job this worker's. Each may be repeated: its request stays the same, request_id included.

    `id` is known from the beginning; `attempt` is 0 until the job is claimed.
    """

    def __init__(
        self,
        *,
        name: str,
        id: str | None,
        labels: Mapping[str, str] | None,
        parent_id: str,
        heartbeat_timeout_seconds: float | None,
    ) -> None:
        """Take the arguments of the clients' `track`."""
        self.id = id or new_job_id(datetime.now(timezone.utc))
        self.attempt = 0
        self._claimed = 1
        self._name = name
        self._labels = labels
        self._parent_id = parent_id
        self._heartbeat_timeout_seconds = heartbeat_timeout_seconds
        self._step = Step("GetJob", requests.get_request(self.id)) if id else self._creation()

    @property
    def step(self) -> Step:
        """The call to make now."""
        return self._step

    def answered(self, job: Job) -> None:
        """Take the answer to the step."""
        if self._step.method == "GetJob":
            self._step = self._claim(job.attempt + 1)
        else:
            # Not the job's: a step sent twice is answered with the job as it is now, which another may have claimed.
            self.attempt = self._claimed

    def is_saved_from(self, error: Exception) -> bool:
        """Tell whether there is another way after `error`: a job that is not there can be created if it has a name."""
        if isinstance(error, JobNotFoundError) and self._step.method == "GetJob" and self._name:
            self._step = self._claim(1)
            return True
        return False

    def _creation(self) -> Step:
        request = requests.create_request(
            id=self.id,
            name=self._name,
            state=JobState.IN_PROGRESS,
            labels=self._labels,
            parent_id=self._parent_id,
            heartbeat_timeout_seconds=self._heartbeat_timeout_seconds,
        )
        return Step("CreateJob", request)

    def _claim(self, attempt: int) -> Step:
        self._claimed = attempt
        timeout = self._heartbeat_timeout_seconds
        update = JobUpdate(
            self.id,
            state=JobState.IN_PROGRESS,
            attempt=attempt,
            heartbeat_timeout_seconds=UNSET if timeout is None else timeout,
            allow_missing=bool(self._name),
            name=self._name,
            parent_id=self._parent_id,
        )
        request = requests.update_request(update)
        # Outside the mask labels are for a job that is created; one that is there keeps its own.
        request.job.labels.update(self._labels or {})
        return Step("UpdateJob", request)


log = logging.getLogger("jobstatus_grpc.client")

OnReportError = Callable[[str, Exception], object]

DEFAULT_HEARTBEAT_TIMEOUT_SECONDS = 30.0

DEFAULT_FINISH_TIMEOUT_SECONDS = 10.0

SHORTEST_PAUSE_SECONDS = 0.25

SMALLEST_STEP_PERCENT = 1.0

LONGEST_PAUSE_AT_THE_END_SECONDS = 1.0


class Reporting:
    """The reports on one tracked job. Attributes may be read by any thread."""

    def __init__(
        self,
        claim: Claim,
        *,
        heartbeat_timeout_seconds: float | None,
        finish_timeout_seconds: float,
        call_timeout_seconds: float,
        strict: bool = False,
        on_report_error: OnReportError | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = clock
        self._on_report_error = on_report_error
        self._problems: list[tuple[str, Exception]] = []
        self.claim = claim
        self.job: Job | None = None
        self.is_open = False
        """The job is claimed."""
        self.is_over = False
        """Nothing more will be sent."""
        self.cancel_requested = False
        self.lost = False
        self.error: Exception | None = None
        """Why nothing more will be sent, or else what the last try met; None: it went well."""
        self.strict = strict
        self.call_timeout_seconds = min(call_timeout_seconds, finish_timeout_seconds)
        self.wake: Callable[[], None] = lambda: None
        """Called where the sender may wait for less than it was told."""
        self._heartbeat_seconds = (heartbeat_timeout_seconds or DEFAULT_HEARTBEAT_TIMEOUT_SECONDS) / 3
        self.finish_timeout_seconds = finish_timeout_seconds
        self._lock = threading.Lock()
        self._backoff = Backoff(min(self._heartbeat_seconds, 10.0))
        self._not_before = 0.0
        self._reported_at = self._changes_sent_at = float("-inf")
        self._sent: dict[str, Any] = {}
        self._pending: dict[str, Any] = {}
        self._is_pressing = False
        self._outcome: Outcome | None = None
        self._result: Mapping[str, Any] | None = None
        self._final: Step | None = None
        self._finish_at = float("inf")

    def progress(self, percent: float | None, reason: str) -> None:
        """Take note of progress; NaN and what lies outside of 0 to 100 are put right."""
        with self._lock:
            if percent is not None and percent == percent:
                self._pending["progress"] = min(max(float(percent), 0.0), 100.0)
            if reason:
                self._pending["reason"] = reason
            if self._is_pressing or not self._is_worth_a_call():
                return
            self._is_pressing = True
        self.wake()

    def observe(self, job: Job) -> None:
        """Take the job as a watch delivered it; if it looks lost, a report is sent at once, whose answer decides."""
        with self._lock:
            self._take(job)
            if not job.done and job.attempt <= self.claim.attempt:
                return
            self._is_pressing = True
        self.wake()

    def is_settled(self) -> bool:
        """Whether a cancel was requested, the job is lost, or the block has ended."""
        return self.cancel_requested or self.is_over or self._outcome is not None

    def finish(self, outcome: Outcome, result: Mapping[str, Any] | None) -> None:
        """Take note of the end: it is all that is reported from now on, for as long as finishing may take."""
        with self._lock:
            self._outcome = outcome
            self._result = result
            self._finish_at = self._now() + self.finish_timeout_seconds
            self._backoff = Backoff(LONGEST_PAUSE_AT_THE_END_SECONDS)
            self._not_before = 0.0
        self.wake()

    def _is_worth_a_call(self) -> bool:
        """Tell whether what is pending should not wait for the next heartbeat."""
        percent, sent = self._pending.get("progress"), self._sent.get("progress")
        if percent is not None and (sent is None or abs(percent - sent) >= SMALLEST_STEP_PERCENT):
            return True
        return "reason" in self._pending and self._pending["reason"] != self._sent.get("reason")

    def due_in_seconds(self) -> float | None:
        """Return how long to wait for the next step, 0: it is due; None: there is none."""
        with self._lock:
            now = self._now()
            if not self.is_over and now >= self._finish_at:
                self._give_up()
            due_in_seconds = None if self.is_over else max(self._due_at() - now, 0.0)
        self._tell_problems()
        return due_in_seconds

    def _due_at(self) -> float:
        if not self.is_open or self._outcome is not None:
            due_at = self._not_before
        else:
            due_at = self._reported_at + self._heartbeat_seconds
            if self._is_pressing:
                due_at = min(due_at, self._changes_sent_at + SHORTEST_PAUSE_SECONDS)
            due_at = max(due_at, self._not_before)
        return min(due_at, self._finish_at)

    def next_step(self) -> tuple[Step, float]:
        """Return what to send now, and the deadline for that in seconds."""
        with self._lock:
            now = self._now()
            timeout = min(self.call_timeout_seconds, max(self._finish_at - now, 0.0))
            if not self.is_open:
                return self.claim.step, timeout
            if self._outcome is not None:
                self._final = self._final or self._final_step(self._outcome)
                return self._final, timeout
            changes, self._pending, self._is_pressing = self._pending, {}, False
            if changes:
                self._sent.update(changes)
                self._changes_sent_at = now
            return self._step(changes, begun_at=now), timeout

    def succeeded(self, step: Step, response: HasJob | None) -> None:
        """Take the answer to a step."""
        try:
            job = requests.job_in(response)
        except errors.InternalError as error:
            self.failed(step, error)
            return
        with self._lock:
            if self.error is not None:
                log.info("job %s is being reported again", self.claim.id)
            self.error = None
            self._take(job)
            self._backoff.reset()
            self._not_before = 0.0
            if not self.is_open:
                self.claim.answered(job)
                self.is_open = self.claim.attempt > 0
                self._reported_at = self._now()
            elif step is self._final:
                self.is_over = True
            else:
                self._reported_at = step.begun_at

    def put_back(self, step: Step) -> None:
        """Take back a step whose outcome is not known."""
        with self._lock:
            self._put_back(step)

    def failed(self, step: Step, error: Exception) -> None:
        """Take note that a step failed, and of what follows from that."""
        with self._lock:
            if self.is_over:
                return
            self._failed(step, error)
        self._tell_problems()

    def _failed(self, step: Step, error: Exception) -> None:
        if passes(error):
            self._put_back(step)
            self._not_before = self._now() + self._backoff.pause_seconds(error)
            if self.error is None:
                self._note_problem(
                    logging.WARNING, f"job {self.claim.id} cannot be reported at the moment: {error}", error
                )
            self.error = error
        elif not self.is_open and self.claim.is_saved_from(error):
            log.info("job %s is not there; it will be created", self.claim.id)
        elif step is self._final and self._result is not None and not (_is_end(error) or self.strict):
            self._note_problem(
                logging.ERROR, f"job {self.claim.id} ends without its result, which was refused: {error}", error
            )
            self._result = self._final = None
        elif not self.is_open or step is self._final or _is_end(error) or isinstance(error, ClientClosedError):
            self._stop(error)
        else:
            if self.error is None:
                self._note_problem(logging.ERROR, f"a report on job {self.claim.id} was refused: {error}", error)
            self.error = error
            self._reported_at = self._now()

    def abandon(self) -> None:
        """Send nothing more."""
        with self._lock:
            self.is_over = True
        self.wake()

    def _put_back(self, step: Step) -> None:
        self._pending = {**step.changes, **self._pending}
        self._is_pressing = self._is_pressing or bool(step.changes)

    def _step(self, changes: Mapping[str, Any], begun_at: float) -> Step:
        """Return a report of `changes`; without any it is a heartbeat."""
        update = JobUpdate(
            self.claim.id,
            attempt=self.claim.attempt,
            progress=changes.get("progress", UNSET),
            reason=clean_reason(changes["reason"]) if "reason" in changes else UNSET,
        )
        request = requests.update_request(update)
        request.request_id = ""  # twice or once is the same: no need for the service to remember it
        return Step("UpdateJob", request, changes, begun_at)

    def _final_step(self, outcome: Outcome) -> Step:
        reason = outcome.reason or self._pending.get("reason")
        update = JobUpdate(
            self.claim.id,
            attempt=self.claim.attempt,
            state=outcome.state,
            error=UNSET if outcome.error is None else outcome.error,
            progress=self._pending.get("progress", UNSET),
            reason=UNSET if reason is None else clean_reason(reason),
            result=UNSET if self._result is None else self._result,
        )
        try:
            return Step("UpdateJob", requests.update_request(update))
        except (TypeError, ValueError) as error:
            problem = f"job {self.claim.id} ends without its result, which is not JSON: {error}"
            self._note_problem(logging.ERROR, problem, error)
            return Step("UpdateJob", requests.update_request(replace(update, result=UNSET)))

    def _stop(self, error: Exception) -> None:
        self.error = error
        self.is_over = True
        self.lost = _is_end(error)
        metadata = getattr(error, "metadata", {})
        self.cancel_requested = self.cancel_requested or metadata.get("from") == "JOB_STATE_CANCELLED"
        problem = f"job {self.claim.id} is not reported any more: {error}"
        if isinstance(error, ClientClosedError):  # the program's own doing, most often at its end
            log.debug(problem)
        else:
            self._note_problem(logging.WARNING if self.lost else logging.ERROR, problem, error)

    def _give_up(self) -> None:
        self.is_over = True
        self.error = self.error or errors.DeadlineExceededError()
        outcome = self._outcome.state.name if self._outcome else ""
        problem = f"job {self.claim.id} is {outcome}, but that could not be reported: {self.error}"
        self._note_problem(logging.ERROR, problem, self.error)

    def _take(self, job: Job) -> None:
        if self.job is None or (job.created_at, job.revision) >= (self.job.created_at, self.job.revision):
            self.job = job
            self.cancel_requested = job.cancel_requested or job.state is JobState.CANCELLED

    def _note_problem(self, level: int, problem: str, error: Exception) -> None:
        if self._on_report_error is None:
            log.log(level, "%s", problem)
        else:
            self._problems.append((problem, error))

    def _tell_problems(self) -> None:
        """Call `on_report_error`, without the lock: it may call `progress`."""
        while self._problems and self._on_report_error is not None:
            try:
                self._on_report_error(*self._problems.pop(0))
            except Exception:
                log.exception("on_report_error raised")


def clean_reason(reason: str) -> str:
    """Return a reason that the service accepts."""
    return clean_text(reason, limits.MAX_REASON_BYTES, multiline=True)


def passes(error: Exception) -> bool:
    """Tell whether trying again may help."""
    if isinstance(error, ClientClosedError):
        return False
    passing = (errors.RetryableError, errors.DeadlineExceededError, errors.InternalError)
    return isinstance(error, passing) or type(error) is errors.JobStatusError


def _is_end(error: Exception) -> bool:
    """Tell whether the job is not this worker's any more: another attempt owns it, it is done, or it is gone."""
    return isinstance(error, (errors.FailedPreconditionError, errors.NotFoundError))


START_SECONDS = 2.0
"""How long the beginning of a block waits to know its job, unless it is strict."""


WATCH_AGAIN_SECONDS = 1.0
"""Pause before `wait_cancelled` watches again, after a watch that ended with an error."""

CANCEL_WATCH_UPDATE_INTERVAL_SECONDS = 60.0
"""Progress is of no interest to `wait_cancelled`; other changes are delivered at once."""

ABANDON_AFTER_SECONDS = 0.5
"""Time for a call to end by its own deadline, which is the end of finish_timeout_seconds, before it is abandoned."""


class Tracked:
    """What a block of work knows of its job, and says about it. May be used by any thread; only the waits block."""

    def __init__(self, reporting: Reporting) -> None:
        self._reporting = reporting
        self._watches: set[AsyncWatch | Watch] = set()
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

    @property
    def finish_timeout_seconds(self) -> float:
        """How long the end of the block waits at most for the outcome to be reported; may be set until then.

        0 abandons the outcome, also while a call is under way.
        """
        return self._reporting.finish_timeout_seconds

    @finish_timeout_seconds.setter
    def finish_timeout_seconds(self, seconds: float) -> None:
        self._reporting.finish_timeout_seconds = seconds

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
        self._close_watches()

    def _close_watches(self) -> None:
        for watch in list(self._watches):
            watch.abandon(UnavailableError("the tracked job needs no watch any more"))

    def _cancel_watching(self, deadline: float | None) -> Watching:
        return Watching(
            self.id,
            min_update_interval_seconds=CANCEL_WATCH_UPDATE_INTERVAL_SECONDS,
            timeout_seconds=_left_until(deadline),
            warns=False,
        )

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


def _deadline_after(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds


def _left_until(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)


class AsyncTrackedJob(Tracked):
    """A block of work as a job: an async context manager, for one block.

    Reports are sent by a task of its own: a block that holds up the event loop holds them up too.
    """

    def __init__(self, reporting: Reporting, connection: AsyncConnection) -> None:
        super().__init__(reporting)
        self._connection = connection
        self._changed = asyncio.Event()
        self._sender = AsyncSender(reporting, connection.report, self._answered)
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
        self._notify()
        await self._sender.finish(self.finish_timeout_seconds + ABANDON_AFTER_SECONDS)
        if error is None:
            self._raise_if_strict()

    async def wait_claimed(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the service has answered that the job is this worker's.

        Returns:
            True: `attempt` is known. False: it is not after `timeout_seconds` (None: no limit), the job cannot be
            claimed (see `error`), or the block has ended.
        """
        await self._wait_for(lambda: self.attempt > 0 or self._reporting.is_settled(), timeout_seconds)
        return self.attempt > 0

    async def wait_cancelled(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the job's end is requested, or the job is no longer this worker's; learnt at once, by a watch.

        As with `cancelled`, the end of the block means CANCELLED after that, unless it calls `succeed` or `fail`.

        Returns:
            True: `cancelled` or `lost` is true. False: neither is after `timeout_seconds` (None: no limit), or when
            the block ended.
        """
        deadline = _deadline_after(timeout_seconds)
        await self.wait_claimed(timeout_seconds)
        while not self._reporting.is_settled() and _left_until(deadline) != 0:
            watch = self._connection.watch(self._cancel_watching(deadline))
            self._watches.add(watch)
            try:
                async with watch:
                    async for job in watch:
                        self._reporting.observe(job)
                        if self._reporting.is_settled():
                            break
            except JobStatusError:
                pass
            finally:
                self._watches.discard(watch)
            pause_seconds = min(WATCH_AGAIN_SECONDS, _left_until(deadline) or WATCH_AGAIN_SECONDS)
            await self._wait_for(self._reporting.is_settled, pause_seconds)
        return self.cancelled or self.lost

    async def _wait_for(self, condition: Callable[[], bool], timeout_seconds: float | None) -> None:
        deadline = _deadline_after(timeout_seconds)
        while not condition() and _left_until(deadline) != 0:
            await pause(_left_until(deadline), unless=self._changed)

    def _answered(self) -> None:
        self._notify()
        if self._reporting.is_settled():
            self._close_watches()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class TrackedJob(Tracked):
    """A block of work as a job: a context manager, for one block. Reports are sent by a thread of its own."""

    def __init__(self, reporting: Reporting, connection: Connection) -> None:
        super().__init__(reporting)
        self._connection = connection
        self._changed = threading.Condition()
        self._sender = Sender(reporting, connection.report, self._answered, name=f"jobstatus-track-{self.id}")

    def __enter__(self) -> TrackedJob:
        self._sender.start()
        try:
            self._wait_for(self._is_started, self._start_seconds())
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
        self._notify()
        self._sender.finish(self.finish_timeout_seconds + ABANDON_AFTER_SECONDS)
        if error is None:
            self._raise_if_strict()

    def wait_claimed(self, timeout_seconds: float | None = None) -> bool:
        self._wait_for(lambda: self.attempt > 0 or self._reporting.is_settled(), timeout_seconds)
        return self.attempt > 0

    wait_claimed.__doc__ = AsyncTrackedJob.wait_claimed.__doc__

    def wait_cancelled(self, timeout_seconds: float | None = None) -> bool:
        deadline = _deadline_after(timeout_seconds)
        self.wait_claimed(timeout_seconds)
        while not self._reporting.is_settled() and _left_until(deadline) != 0:
            watch = self._connection.watch(self._cancel_watching(deadline))
            self._watches.add(watch)
            try:
                with watch:
                    # Between the check and `add`, another thread may have settled it without closing this watch.
                    if not self._reporting.is_settled():
                        for job in watch:
                            self._reporting.observe(job)
                            if self._reporting.is_settled():
                                break
            except JobStatusError:
                pass
            finally:
                self._watches.discard(watch)
            pause_seconds = min(WATCH_AGAIN_SECONDS, _left_until(deadline) or WATCH_AGAIN_SECONDS)
            self._wait_for(self._reporting.is_settled, pause_seconds)
        return self.cancelled or self.lost

    wait_cancelled.__doc__ = AsyncTrackedJob.wait_cancelled.__doc__

    def _wait_for(self, condition: Callable[[], bool], timeout_seconds: float | None) -> None:
        with self._changed:
            self._changed.wait_for(condition, timeout_seconds)

    def _answered(self) -> None:
        self._notify()
        if self._reporting.is_settled():
            self._close_watches()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
