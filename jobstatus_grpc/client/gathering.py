"""What a worker with many jobs has to report, gathered into batches, and when each is due. No I/O.

The worker's side gives it each `update`, wants to `flush`, and says `finish`. Whoever sends asks how long to wait
(`due_in_seconds`), sends the `next_step`, and tells how that went. The sides may be different threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import errors, limits
from jobstatus_grpc.client.answers import Answers
from jobstatus_grpc.client.channel import ClientClosedError
from jobstatus_grpc.client.claim import Step
from jobstatus_grpc.client.reporting import LONGEST_PAUSE_AT_THE_END_SECONDS, passes
from jobstatus_grpc.client.retry import Backoff
from jobstatus_grpc.client.update_queue import UpdateQueue, Waiting
from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.wire import status
from jobstatus_grpc.wire.calls import JobUpdate

log = logging.getLogger("jobstatus_grpc.client")

IDLE_SECONDS = 3600.0
BROKEN_TRIES = 10
"""So often a batch may meet an error of the server's before it counts as the batch's fault."""


class Gathering:
    """The updates that wait, and the batch under way: one at a time, so that updates of one job keep their order."""

    def __init__(
        self,
        answers: Answers,
        *,
        flush_interval_seconds: float,
        max_pending: int,
        finish_timeout_seconds: float,
        call_timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take who is told of answers, the arguments of the clients' `reporter`, and the deadline of their calls."""
        self._now = clock
        self._answers = answers
        self.wake: Callable[[], None] = lambda: None
        """Called where the sender may wait for less than it was told."""
        self._flush_interval_seconds = flush_interval_seconds
        self._finish_timeout_seconds = finish_timeout_seconds
        self._call_timeout_seconds = min(call_timeout_seconds, finish_timeout_seconds)
        self._lock = threading.Lock()
        self._queue = UpdateQueue(answers, max_pending)
        self._batch: list[Waiting] = []
        self._step: Step | None = None
        """The batch as a call. It stays as it is, request_ids included, until it is answered."""
        self._broken_tries = 0
        self._flushes: dict[object, tuple[int, Callable[[], None]]] = {}
        self._backoff = Backoff()
        self._not_before = 0.0
        self._finish_at: float | None = None
        self._is_over = False
        self._error: JobStatusError | None = None

    def update(self, update: JobUpdate) -> None:
        """Take an update: it is sent, or told as one without effect."""
        with self._lock:
            count = len(self._queue)
            if self._finish_at is not None or self._is_over:
                closed = errors.UnavailableError("the reporter is closed; give it updates within its block")
                self._answers.refused(update, self._error or closed)
            else:
                self._queue.add(update, self._now())
            is_due_sooner = len(self._queue) > count and len(self._queue) in (1, limits.MAX_BATCH_UPDATES)
        self._answers.tell()
        if is_due_sooner:
            self.wake()

    def flush(self, done: Callable[[], None]) -> object:
        """Send what waits at once; call `done`, in any thread, when all of it is answered. Return what to `forget`."""
        flush = object()
        with self._lock:
            self._flushes[flush] = (self._queue.newest_number, done)
            self._end_flushes()
        self.wake()
        return flush

    def forget(self, flush: object) -> int:
        """Forget who waited for a flush; return how many updates are not answered."""
        with self._lock:
            self._flushes.pop(flush, None)
            return len(self._batch) + len(self._queue)

    def finish(self) -> None:
        """Take no more updates, and send what waits for as long as finishing may take."""
        with self._lock:
            self._finish_at = self._now() + self._finish_timeout_seconds
            self._backoff = Backoff(LONGEST_PAUSE_AT_THE_END_SECONDS)
            self._not_before = 0.0
        self.wake()

    def due_in_seconds(self) -> float | None:
        """Return how long to wait for the next step, 0: it is due; None: there is none."""
        with self._lock:
            now = self._now()
            if self._finish_at is not None:
                if not self._batch and not self._queue:
                    self._is_over = True
                elif now >= self._finish_at:
                    self._end(self._error or errors.DeadlineExceededError())
            due_in_seconds = None if self._is_over else self._due_in_seconds(now)
        self._answers.tell()
        return due_in_seconds

    def next_step(self) -> tuple[Step, float]:
        """Return what to send now, and the deadline for that in seconds."""
        with self._lock:
            if self._step is None:
                self._set_batch(self._queue.take_batch())
            assert self._step is not None
            left = self._call_timeout_seconds if self._finish_at is None else self._finish_at - self._now()
            return self._step, min(self._call_timeout_seconds, max(left, 0.0))

    def succeeded(self, step: Step, response: pb.BatchUpdateJobsResponse | None) -> None:
        """Take the answers to a batch; what the service could not take now stays in it."""
        if response is None or len(response.results) != len(self._batch):
            self.failed(step, errors.InternalError("the server's reply does not answer each update of the batch"))
            return
        with self._lock:
            passing: JobStatusError | None = None
            left: list[Waiting] = []
            for waiting, result in zip(self._batch, response.results, strict=True):
                error = status.from_job_error(result.error) if result.HasField("error") else None
                if error is None:
                    self._answers.accepted(result)
                elif isinstance(error, errors.RetryableError):
                    passing = error
                    left.append(waiting)
                else:
                    self._answers.refused(waiting.update, error)
            self._set_batch(left)
            self._note(passing)
            self._end_flushes()
        self._answers.tell()

    def failed(self, step: Step, error: Exception) -> None:
        """Take note that the call of a batch failed, and of what follows from that."""
        cause = error if isinstance(error, JobStatusError) else errors.InternalError(f"the call failed: {error!r}")
        with self._lock:
            if isinstance(error, ClientClosedError):
                self._end(cause)
            elif passes(error) and not self._is_broken(cause):
                self._note(cause)
            else:
                self._refuse(self._batch, cause)
                self._set_batch([])
            self._end_flushes()
        self._answers.tell()

    def put_back(self, step: Step) -> None:
        """Take back a step whose outcome is not known: it is the next one still."""

    def _due_in_seconds(self, now: float) -> float:
        due_at = self._not_before
        if not self._batch:
            oldest = self._queue.oldest
            if oldest is None:
                return IDLE_SECONDS
            is_urgent = self._finish_at is not None or self._flushes
            if not is_urgent and len(self._queue) < limits.MAX_BATCH_UPDATES:
                due_at = max(due_at, oldest.since + self._flush_interval_seconds)
        if self._finish_at is not None:
            due_at = min(due_at, self._finish_at)
        return max(due_at - now, 0.0)

    def _set_batch(self, batch: list[Waiting]) -> None:
        self._batch = batch
        self._broken_tries = 0
        requests = [waiting.request for waiting in batch]
        self._step = Step("BatchUpdateJobs", pb.BatchUpdateJobsRequest(updates=requests)) if batch else None

    def _is_broken(self, error: JobStatusError) -> bool:
        """Tell whether the batch itself seems to be what the server, or a proxy before it, fails over."""
        is_away = isinstance(error, (errors.RetryableError, errors.DeadlineExceededError))
        self._broken_tries = 0 if is_away else self._broken_tries + 1
        return self._broken_tries >= BROKEN_TRIES

    def _note(self, error: JobStatusError | None) -> None:
        """Take note of what the last try met, that passes; None: nothing."""
        if error is not None:
            if self._error is None:
                log.warning("updates cannot be sent at the moment: %s", error)
            self._not_before = self._now() + self._backoff.pause_seconds(error)
        else:
            if self._error is not None:
                log.warning("updates are being sent again")
            self._backoff.reset()
            self._not_before = 0.0
        self._error = error

    def _end(self, error: JobStatusError) -> None:
        """Send nothing more: what is not answered has no effect, as far as is known."""
        self._is_over = True
        self._error = error
        self._refuse([*self._batch, *self._queue.clear()], error)
        self._set_batch([])
        self._end_flushes()

    def _refuse(self, refused: Iterable[Waiting], error: JobStatusError) -> None:
        for waiting in refused:
            self._answers.refused(waiting.update, error)

    def _end_flushes(self) -> None:
        oldest = self._batch[0] if self._batch else self._queue.oldest
        for flush, (number, done) in list(self._flushes.items()):
            if oldest is None or oldest.number > number:
                del self._flushes[flush]
                done()
