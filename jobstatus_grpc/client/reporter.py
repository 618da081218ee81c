"""Updates of many jobs off the caller's path: what `reporter` returns. What to send and when says Gathering."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from types import TracebackType
from typing import Any

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import errors
from jobstatus_grpc.client import requests
from jobstatus_grpc.client.connection import ClientClosedError
from jobstatus_grpc.client.requests import UNSET, JobUpdate, Unset
from jobstatus_grpc.client.retry import Backoff, pause
from jobstatus_grpc.client.sender import AsyncSender, Sender, Step, set_from_any_thread
from jobstatus_grpc.client.track import LONGEST_PAUSE_AT_THE_END_SECONDS, passes
from jobstatus_grpc.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    JobStatusError,
    ResourceExhaustedError,
)
from jobstatus_grpc.job import Job, JobError, JobState, limits
from jobstatus_grpc.wire import status

log = logging.getLogger("jobstatus_grpc.client")

OnJob = Callable[[Job], object]

OnError = Callable[[JobUpdate, JobStatusError], object]

IDS_LOGGED = 5


class Answers:
    """Gathers answers while a lock is held, and tells of them when none is: what it calls may call us."""

    def __init__(self, on_job: OnJob | None, on_error: OnError | None) -> None:
        """Take whom to tell of jobs as they were answered (None: nobody), of updates without effect (None: the log)."""
        self._on_job = on_job
        self._on_error = on_error
        self._lock = threading.Lock()
        self._jobs: list[Job] = []
        self._refusals: list[tuple[JobUpdate, JobStatusError]] = []
        self._dropped = 0

    def accepted(self, result: pb.BatchUpdateJobsResult) -> None:
        """Take an update's answer: its job."""
        if self._on_job is not None:
            with contextlib.suppress(InternalError), self._lock:  # one that makes no sense is nothing to tell
                self._jobs.append(requests.job_in(result))

    def refused(self, update: JobUpdate, error: JobStatusError) -> None:
        """Take an update that has no effect, and why."""
        with self._lock:
            self._refusals.append((update, error))

    def dropped(self, update: JobUpdate, max_pending: int) -> None:
        """Take an update for which there was no room. Without `on_error` the log says once that there are such."""
        error = ResourceExhaustedError(f"{max_pending} updates wait already, which is all that may (max_pending)")
        with self._lock:
            self._dropped += 1
            if self._on_error is not None or self._dropped == 1:
                self._refusals.append((update, error))

    def all_sent(self) -> None:
        """Take note that there is room again."""
        dropped, self._dropped = self._dropped, 0
        if dropped > 1:
            log.error("%d updates were dropped, as too many waited", dropped)

    def tell(self) -> None:
        """Tell of what was taken since the last time; nothing that is raised comes back to the caller."""
        if not self._jobs and not self._refusals:
            return
        with self._lock:
            jobs, self._jobs = self._jobs, []
            refusals, self._refusals = self._refusals, []
        for job in jobs:
            self._call(self._on_job, job)
        if self._on_error is None:
            _log_refusals(refusals)
        else:
            for refusal in refusals:
                self._call(self._on_error, *refusal)

    def _call(self, function: Callable[..., object] | None, *args: object) -> None:
        try:
            if function is not None:
                function(*args)
        except Exception:
            log.exception("what a reporter calls with its answers raised")


def _log_refusals(refusals: list[tuple[JobUpdate, JobStatusError]]) -> None:
    """Log one line for each error: where a whole batch is refused, there are hundreds with the same."""
    ids: defaultdict[str, list[str]] = defaultdict(list)
    for update, error in refusals:
        ids[str(error)].append(update.id)
    for error_text, refused in ids.items():
        some = ", ".join(refused[:IDS_LOGGED]) + (", …" if len(refused) > IDS_LOGGED else "")
        log.error("%d updates have no effect (of %s): %s", len(refused), some, error_text)


MAX_FIELD_HEADER_BYTES = 5
"""The tag of an update in its batch, and its length."""

_REPORTED = ("progress", "reason", "estimated_completion")

_NOT_REPORTED = ("state", "has_progress", "error", "heartbeat_timeout_seconds", "labels", "result")


@dataclass(slots=True)
class Waiting:
    """An update that waits, and its request, which is made once: request_id included."""

    number: int
    """Rises with each."""
    update: JobUpdate
    request: pb.UpdateJobRequest
    since: float


class UpdateQueue:
    """At most `max_pending` updates. What it cannot take is told to `answers`."""

    def __init__(self, answers: Answers, max_pending: int) -> None:
        self.newest_number = 0
        self._answers = answers
        self._max_pending = max_pending
        self._queue: OrderedDict[int, Waiting] = OrderedDict()
        self._reports: OrderedDict[int, Waiting] = OrderedDict()
        """Those in the queue that may be dropped."""
        self._open_reports: dict[str, Waiting] = {}
        """By job, where its newest update in the queue is a report: the next can be put into it."""

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def oldest(self) -> Waiting | None:
        """The next to be sent."""
        return next(iter(self._queue.values()), None)

    def add(self, update: JobUpdate, now: float) -> None:
        """Take an update. Where there is no room, the oldest report is dropped, and without any, `update`."""
        is_report = _is_report(update)
        report = self._open_reports.get(update.id) if is_report else None
        if report is not None and report.update.attempt == update.attempt:
            changes = {name: value for name in _REPORTED if (value := getattr(update, name)) is not UNSET}
            merged = replace(report.update, **changes)
            if (request := self._request(merged, update)) is not None:
                report.update, report.request = merged, request
            return
        request = self._request(update, update)
        if request is None or not self._has_room(update):
            return
        self.newest_number += 1
        waiting = Waiting(self.newest_number, update, request, now)
        self._queue[waiting.number] = waiting
        self._open_reports.pop(update.id, None)
        if is_report:
            self._reports[waiting.number] = self._open_reports[update.id] = waiting

    def take_batch(self) -> list[Waiting]:
        """Return the oldest, as many as fit into one call."""
        batch: list[Waiting] = []
        size = 0
        while len(batch) < limits.MAX_BATCH_UPDATES and (waiting := self.oldest) is not None:
            size += waiting.request.ByteSize() + MAX_FIELD_HEADER_BYTES
            if size > limits.MAX_REQUEST_BYTES:
                break
            self._remove(waiting)
            batch.append(waiting)
        if not self._queue:
            self._answers.all_sent()
        return batch

    def clear(self) -> list[Waiting]:
        """Return all, and forget them."""
        everything = list(self._queue.values())
        self._queue.clear()
        self._reports.clear()
        self._open_reports.clear()
        return everything

    def _request(self, update: JobUpdate, given: JobUpdate) -> pb.UpdateJobRequest | None:
        """Return the request for `update`, in which what was `given` is; None: there can be none."""
        try:
            request = requests.update_request(update)
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            self._answers.refused(given, InvalidArgumentError(f"the update cannot be sent: {error}"))
            return None
        if request.ByteSize() + MAX_FIELD_HEADER_BYTES > limits.MAX_REQUEST_BYTES:
            what = f"the update must be smaller than {limits.MAX_REQUEST_BYTES} bytes; put a large result behind a URL"
            self._answers.refused(given, InvalidArgumentError(what))
            return None
        return request

    def _has_room(self, update: JobUpdate) -> bool:
        if len(self._queue) < self._max_pending:
            return True
        report = next(iter(self._reports.values()), None)
        self._answers.dropped(update if report is None else report.update, self._max_pending)
        if report is not None:
            self._remove(report)
        return report is not None

    def _remove(self, waiting: Waiting) -> None:
        del self._queue[waiting.number]
        self._reports.pop(waiting.number, None)
        if self._open_reports.get(waiting.update.id) is waiting:
            del self._open_reports[waiting.update.id]


def _is_report(update: JobUpdate) -> bool:
    """Tell whether an update only reports: of two of them by one attempt the newer is enough."""
    return (
        all(getattr(update, name) is UNSET for name in _NOT_REPORTED)
        and not update.expected_revision
        and update.request_id is None
        and not update.allow_missing
    )


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
