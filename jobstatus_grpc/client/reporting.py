"""What a worker has to report on its job, and when: the newest wins, nothing is sent too often. No I/O.

The worker's side tells it `progress` and `finish`. Whoever sends asks how long to wait (`due_in_seconds`), sends the
`next_step`, and tells how that went (`succeeded`, `failed`). The sides may be different threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from jobstatus_grpc import errors, limits
from jobstatus_grpc.client.channel import ClientClosedError
from jobstatus_grpc.client.claim import Claim, Step
from jobstatus_grpc.client.outcome import Outcome, clean_text
from jobstatus_grpc.client.retry import Backoff
from jobstatus_grpc.record import Job
from jobstatus_grpc.state import JobState
from jobstatus_grpc.wire import calls
from jobstatus_grpc.wire.calls import UNSET, HasJob, JobUpdate

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
            job = calls.job_in(response)
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
        request = calls.update_request(update)
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
            return Step("UpdateJob", calls.update_request(update))
        except (TypeError, ValueError) as error:
            log.error("job %s ends without its result, which is not JSON: %s", self.claim.id, error)
            return Step("UpdateJob", calls.update_request(replace(update, result=UNSET)))

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
