"""A block of work as a job: what `track` returns. What to send and when says Reporting."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

from jobstatus_grpc import errors
from jobstatus_grpc.client import requests
from jobstatus_grpc.client.connection import ClientClosedError
from jobstatus_grpc.client.requests import UNSET, HasJob, JobUpdate
from jobstatus_grpc.client.retry import Backoff, pause
from jobstatus_grpc.client.sender import AsyncSender, Sender, Step
from jobstatus_grpc.errors import DeadlineExceededError, JobNotFoundError, JobStatusError
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the claim, the arguments of the clients' `track`, and the deadline of the client's calls."""
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
        """Why nothing more will be sent, or else what the last try met; None: it went well."""
        self.strict = strict
        self.call_timeout_seconds = min(call_timeout_seconds, finish_timeout_seconds)
        self.wake: Callable[[], None] = lambda: None
        """Called where the sender may wait for less than it was told."""
        self._heartbeat_seconds = (heartbeat_timeout_seconds or DEFAULT_HEARTBEAT_TIMEOUT_SECONDS) / 3
        self._finish_timeout_seconds = finish_timeout_seconds
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

    def finish(self, outcome: Outcome, result: Mapping[str, Any] | None) -> None:
        """Take note of the end: it is all that is reported from now on, for as long as finishing may take."""
        with self._lock:
            self._outcome = outcome
            self._result = result
            self._finish_at = self._now() + self._finish_timeout_seconds
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
            if self.is_over:
                return None
            if not self.is_open or self._outcome is not None:
                due_at = self._not_before
            else:
                due_at = self._reported_at + self._heartbeat_seconds
                if self._is_pressing:
                    due_at = min(due_at, self._changes_sent_at + SHORTEST_PAUSE_SECONDS)
                due_at = max(due_at, self._not_before)
            return max(min(due_at, self._finish_at) - now, 0.0)

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
            self.job = job
            self.cancel_requested = job.cancel_requested or job.state is JobState.CANCELLED
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
            if passes(error):
                self._put_back(step)
                self._not_before = self._now() + self._backoff.pause_seconds(error)
                if self.error is None:
                    log.warning("job %s cannot be reported at the moment: %s", self.claim.id, error)
                self.error = error
            elif not self.is_open and self.claim.is_saved_from(error):
                log.info("job %s is not there; it will be created", self.claim.id)
            elif step is self._final and self._result is not None and not (_is_end(error) or self.strict):
                log.error("job %s ends without its result, which was refused: %s", self.claim.id, error)
                self._result = self._final = None
            elif not self.is_open or step is self._final or _is_end(error) or isinstance(error, ClientClosedError):
                self._stop(error)
            else:
                if self.error is None:
                    log.error("a report on job %s was refused: %s", self.claim.id, error)
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
            log.error("job %s ends without its result, which is not JSON: %s", self.claim.id, error)
            return Step("UpdateJob", requests.update_request(replace(update, result=UNSET)))

    def _stop(self, error: Exception) -> None:
        self.error = error
        self.is_over = True
        self.lost = _is_end(error)
        metadata = getattr(error, "metadata", {})
        self.cancel_requested = self.cancel_requested or metadata.get("from") == "JOB_STATE_CANCELLED"
        level = logging.WARNING if self.lost else logging.ERROR
        if isinstance(error, ClientClosedError):  # the program's own doing, most often at its end
            level = logging.DEBUG
        log.log(level, "job %s is not reported any more: %s", self.claim.id, error)

    def _give_up(self) -> None:
        self.is_over = True
        self.error = self.error or errors.DeadlineExceededError()
        outcome = self._outcome.state.name if self._outcome else ""
        log.error("job %s is %s, but that could not be reported: %s", self.claim.id, outcome, self.error)


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
