"""Updates of many jobs in the background: `reporter` returns a reporter, ReporterState decides what it sends."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.client import requests, values
from jobstatus_grpc.client.fork import renew_in_children
from jobstatus_grpc.client.requests import UNSET, JobUpdate
from jobstatus_grpc.client.retry import (
    LONGEST_FINAL_PAUSE_SECONDS,
    Backoff,
    ClientClosedError,
    Pace,
    is_transient,
    pause,
)
from jobstatus_grpc.client.sender import AsyncFinishing, AsyncSender, Call, Finishing, Sender, set_from_any_thread
from jobstatus_grpc.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    InvalidFieldError,
    JobStatusError,
    ResourceExhaustedError,
    RetryableError,
    TooManyRequestsError,
    UnavailableError,
)
from jobstatus_grpc.job import Job, limits
from jobstatus_grpc.wire import status

log = logging.getLogger("jobstatus_grpc.client")

OnJob = Callable[[Job], object]

OnError = Callable[[JobUpdate, JobStatusError], object]

DEFAULT_FLUSH_INTERVAL_SECONDS = 0.05
"""At most 20 calls a second per reporter, and no delay that people see."""

DEFAULT_MAX_PENDING = 10_000
"""Updates: 20 full batches, some megabytes."""

IDLE_SECONDS = 3600.0
"""How long the sender sleeps with an empty queue; `wake` ends that."""

MAX_BATCH_ERRORS = 2
"""Server errors in a row, such as INTERNAL, before a batch counts as their cause and is halved."""

MAX_SERVER_ERRORS = 10
"""The same before a single update counts as their cause and is refused."""

MAX_IDS_LOGGED = 5
"""Ids in one log line: enough to find the jobs, short enough to read."""

P = ParamSpec("P")
S = TypeVar("S")


def _takes_arguments_of(
    make: Callable[P, JobUpdate],
) -> Callable[[Callable[[S, JobUpdate], None]], Callable[Concatenate[S, P], None]]:
    """Give a method that takes an update the arguments of `make` instead, so that they are spelt out once."""

    def decorate(method: Callable[[S, JobUpdate], None]) -> Callable[Concatenate[S, P], None]:
        @functools.wraps(method)
        def take(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
            method(self, make(*args, **kwargs))

        itself = next(iter(inspect.signature(method).parameters.values()))
        parameters = inspect.signature(make).parameters.values()
        take.__signature__ = inspect.Signature([itself, *parameters], return_annotation="None")  # type: ignore[attr-defined]
        return take

    return decorate


class _Reporter:
    """What both reporters share. May be used by any thread; only `flush` blocks."""

    def __init__(self, state: ReporterState) -> None:
        self._state = state
        self._was_entered = False

    @_takes_arguments_of(JobUpdate)
    def update(self, update: JobUpdate) -> None:
        """Report on a job, soon; returns at once. The arguments are those of the clients' `update`.

        Updates of one job take effect in their order. A pending update with nothing but progress, reason and
        estimated_completion is merged with the next such of the same job and attempt: the newest values are sent.

        Nothing is raised: an update that has no effect, for any reason, is passed to `on_error` or logged.
        """
        self._state.update(update)

    def _enter(self) -> None:
        if self._was_entered:
            raise RuntimeError("a reporter is for one block of work")
        self._was_entered = True

    def _check_entered(self) -> None:
        if not self._was_entered:
            raise RuntimeError("a reporter sends within its block only: enter it first")

    def _end_flush(self, flush: object, timeout_seconds: float | None, *, is_done: bool) -> None:
        left = self._state.forget(flush)
        if not is_done and timeout_seconds is not None:
            raise DeadlineExceededError(f"after {timeout_seconds:g} s {left} updates are not answered")


class AsyncReporter(_Reporter):
    """Sends updates of many jobs in batches: an async context manager, for one block.

    They are sent by a task: a block that blocks the event loop delays them. A block whose end is cancelled, as anyio
    does in a cancelled scope, is left at once, and what is pending is sent in the background, for at most
    finish_timeout_seconds.
    """

    def __init__(
        self, state: ReporterState, send: Callable[[Call, float], Awaitable[Any]], finishing: AsyncFinishing
    ) -> None:
        super().__init__(state)
        self._sender = AsyncSender(state, send, finishing)

    async def __aenter__(self) -> AsyncReporter:
        self._enter()
        self._sender.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state.finish()
        await self._sender.finish()

    async def flush(self, timeout_seconds: float | None = None) -> None:
        """Send pending updates at once, and wait until every update given before is answered.

        Args:
            timeout_seconds: None: no limit, also while no server can be reached.

        Raises:
            DeadlineExceededError: some are not answered in time. They will still be sent.
        """
        self._check_entered()
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        flush = self._state.flush(lambda: set_from_any_thread(done, loop))
        try:
            await pause(timeout_seconds, unless=done)
        except BaseException:
            self._state.forget(flush)
            raise
        self._end_flush(flush, timeout_seconds, is_done=done.is_set())


class Reporter(_Reporter):
    """Sends updates of many jobs in batches: a context manager, for one block. They are sent by a thread."""

    def __init__(self, state: ReporterState, send: Callable[[Call, float], Any], finishing: Finishing) -> None:
        super().__init__(state)
        self._sender = Sender(state, send, finishing, name="jobstatus-reporter")
        self._is_inherited = False
        renew_in_children(self, Reporter._after_fork)

    def _after_fork(self) -> None:
        # The child's updates are sent from now on, and not those of the parent.
        self._is_inherited = self._sender.after_fork() or self._is_inherited

    def __enter__(self) -> Reporter:
        self._enter()
        self._sender.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_inherited:
            self._sender.finish_in_child()
            return
        self._state.finish()
        self._sender.finish()

    def flush(self, timeout_seconds: float | None = None) -> None:
        self._check_entered()
        done = threading.Event()
        flush = self._state.flush(done.set)
        try:
            done.wait(timeout_seconds)
        except BaseException:
            self._state.forget(flush)
            raise
        self._end_flush(flush, timeout_seconds, is_done=done.is_set())

    flush.__doc__ = AsyncReporter.flush.__doc__


class ReporterState:
    """The pending updates and the batch in flight: one at a time, so that updates of one job keep their order."""

    def __init__(
        self,
        callbacks: Callbacks,
        *,
        flush_interval_seconds: float,
        max_pending: int,
        finish_timeout_seconds: float,
        call_timeout_seconds: float,
        trace_parent: Callable[[], str] = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin, with the arguments of the clients' `reporter`, and the deadline of the client's calls.

        `trace_parent` returns the trace to which a job belongs that is updated now; empty: none.
        """
        self._trace_parent = trace_parent
        self._now = clock
        self._callbacks = callbacks
        self.wake: Callable[[], None] = lambda: None
        self._flush_interval_seconds = flush_interval_seconds
        self._finish_timeout_seconds = finish_timeout_seconds
        self._call_timeout_seconds = min(call_timeout_seconds, finish_timeout_seconds)
        self._lock = threading.Lock()
        self._queue = UpdateQueue(callbacks, max_pending)
        self._batch: list[PendingUpdate] = []
        self._call: Call | None = None
        """The batch, or its beginning, as a call. It stays as it is, request_ids included, until it is answered."""
        self._max_updates = limits.MAX_BATCH_UPDATES
        """Of one call. Halved by a refusal of a whole call, down to one, and doubled by each success: the update that
        causes it is found by few calls, and a proxy that allows small bodies only gets such."""
        self._server_errors = 0
        self._flushes: dict[object, tuple[int, Callable[[], None]]] = {}
        self._backoff = Backoff()
        self._pace = Pace()
        self._not_before = 0.0
        self._finish_at: float | None = None
        self._is_over = False
        self._error: JobStatusError | None = None

    def after_fork(self) -> None:
        """As of Calls."""
        self._lock = threading.Lock()
        self._callbacks.after_fork()
        self._queue.clear()
        self._set_batch([])
        self._flushes.clear()
        self._not_before = 0.0

    def has_pending(self) -> bool:
        """As of Calls."""
        return not self._is_over and bool(self._batch or len(self._queue))

    def update(self, update: JobUpdate) -> None:
        """Queue an update, or refuse it."""
        # Without the lock, because it calls methods of the caller's types.
        request = self._request(update)
        with self._lock:
            count = len(self._queue)
            if self._finish_at is not None or self._is_over:
                closed = UnavailableError("the reporter is closed; give it updates within its block")
                self._callbacks.refused(update, self._error or closed)
            elif request is not None:
                self._queue.add(update, request, self._now())
            is_due_sooner = len(self._queue) > count and len(self._queue) in (1, limits.MAX_BATCH_UPDATES)
        self._callbacks.call()
        if is_due_sooner:
            self.wake()

    def _request(self, update: JobUpdate) -> pb.UpdateJobRequest | None:
        """Return the request for `update`; None: it cannot be sent, and is refused."""
        try:
            request = requests.update_request(update)
        except InvalidFieldError as error:
            self._callbacks.refused(update, error)
            return None
        requests.set_trace_parent(request, self._trace_parent())
        return request

    def flush(self, done: Callable[[], None]) -> object:
        """Send pending updates at once; call `done`, in any thread, when all are answered. Return what to `forget`."""
        flush = object()
        with self._lock:
            self._flushes[flush] = (self._queue.newest_number, done)
            self._end_flushes()
        self.wake()
        return flush

    def forget(self, flush: object) -> int:
        """Forget a flush; return the number of updates that are not answered."""
        with self._lock:
            self._flushes.pop(flush, None)
            return len(self._batch) + len(self._queue)

    def finish(self) -> None:
        """Refuse further updates, and send pending ones for at most finish_timeout_seconds."""
        with self._lock:
            self._finish_at = self._now() + self._finish_timeout_seconds
            self._backoff = Backoff(LONGEST_FINAL_PAUSE_SECONDS)
            self._not_before = 0.0
        self.wake()

    def due_in_seconds(self) -> float | None:
        """As of Calls; ends all once finish_timeout_seconds are over."""
        with self._lock:
            now = self._now()
            if self._finish_at is not None:
                if not self._batch and not self._queue:
                    self._is_over = True
                elif now >= self._finish_at:
                    self._end(self._error or DeadlineExceededError())
            due_in_seconds = None if self._is_over else max(self._due_at(now) - now, 0.0)
        self._callbacks.call()
        return due_in_seconds

    def _due_at(self, now: float) -> float:
        due_at = self._not_before
        if not self._batch:
            oldest = self._queue.oldest
            if oldest is None:
                return now + IDLE_SECONDS
            is_urgent = self._finish_at is not None or self._flushes
            if not is_urgent and len(self._queue) < limits.MAX_BATCH_UPDATES:
                due_at = max(due_at, oldest.queued_at + self._flush_interval_seconds)
        return due_at if self._finish_at is None else min(due_at, self._finish_at)

    def next_call(self) -> tuple[Call, float]:
        """As of Calls."""
        with self._lock:
            if self._call is None:
                self._set_batch(self._queue.take_batch())
            assert self._call is not None
            left = self._call_timeout_seconds if self._finish_at is None else self._finish_at - self._now()
            return self._call, min(self._call_timeout_seconds, max(left, 0.0))

    def succeeded(self, call: Call, response: pb.BatchUpdateJobsResponse | None) -> None:
        """As of Calls; updates with a transient error stay in the batch."""
        count = _count(call)
        try:
            results = requests.results_in(response, count)
        except InternalError as error:
            self.failed(call, error)
            return
        with self._lock:
            transient: JobStatusError | None = None
            left: list[PendingUpdate] = []
            for pending, result in zip(self._batch[:count], results, strict=True):
                refusal = status.from_job_error(result.error) if result.HasField("error") else None
                if refusal is None:
                    self._callbacks.accepted(result)
                elif isinstance(refusal, RetryableError):
                    transient = refusal
                    left.append(pending)
                else:
                    self._callbacks.refused(pending.update, refusal)
            self._max_updates = min(self._max_updates * 2, limits.MAX_BATCH_UPDATES)
            self._set_batch(left + self._batch[count:])
            self._note(transient)
            self._end_flushes()
        self._callbacks.call()

    def failed(self, call: Call, error: Exception) -> None:
        """As of Calls."""
        cause = error if isinstance(error, JobStatusError) else InternalError(f"the call failed: {error!r}")
        with self._lock:
            count = _count(call)
            if isinstance(error, ClientClosedError):
                self._end(cause)
            elif not _may_be_the_batchs_fault(cause):
                self._server_errors = 0
                if is_transient(error):
                    self._note(cause)
                else:
                    self._refuse(self._batch, cause)
                    self._set_batch([])
            elif self._is_worth_a_retry(cause, count):
                self._note(cause)
            elif count > 1:
                self._max_updates = count // 2
                self._set_batch(self._batch)
                if self._max_updates > 1:  # no second try of each half: only of the update that is found
                    self._server_errors = MAX_BATCH_ERRORS
            else:
                self._refuse(self._batch[:1], cause)
                self._set_batch(self._batch[1:])
            self._end_flushes()
        self._callbacks.call()

    def crashed(self, error: Exception) -> None:
        """As of Calls."""
        with self._lock:
            self._end(InternalError(f"the client failed: {error!r}"))
        self._callbacks.call()

    def put_back(self, call: Call) -> None:
        """As of Calls: it stays the next one."""

    def _is_worth_a_retry(self, error: JobStatusError, count: int) -> bool:
        """Count an error that may be the fault of a call of `count` updates; return whether to send it as it is."""
        self._server_errors += 1
        if not is_transient(error) or _is_too_large(error):
            return False
        # RESOURCE_EXHAUSTED without "too large" may be a proxy's quota: over a single update it is an outage.
        is_outage = count == 1 and isinstance(error, ResourceExhaustedError)
        return is_outage or self._server_errors < (MAX_SERVER_ERRORS if count == 1 else MAX_BATCH_ERRORS)

    def _set_batch(self, batch: list[PendingUpdate]) -> None:
        self._batch = batch
        self._server_errors = 0
        updates = [pending.request for pending in batch[: self._max_updates]]
        self._call = Call("BatchUpdateJobs", pb.BatchUpdateJobsRequest(updates=updates)) if batch else None

    def _note(self, error: JobStatusError | None) -> None:
        """Take the transient error of a call, None: it succeeded; log the first of a row and the end of one."""
        now, was_logged = self._now(), self._error is not None and not isinstance(self._error, TooManyRequestsError)
        self._error = error
        if error is None:
            if was_logged:
                log.warning("updates are sent again")
            self._backoff.reset()
            self._pace.speed_up()
            self._not_before = 0.0 if self._finish_at is not None else now + self._pace.seconds
            return
        if isinstance(error, TooManyRequestsError):
            if self._pace.slow_down(now):
                log.warning("updates are sent more slowly: %s", error)
        elif not was_logged:
            log.warning("updates cannot be sent, retrying: %s", error)
        self._not_before = now + self._backoff.pause_seconds(error)

    def _end(self, error: JobStatusError) -> None:
        """Send nothing more; updates that are not answered are refused with `error`."""
        self._is_over = True
        self._error = error
        self._refuse([*self._batch, *self._queue.clear()], error)
        self._set_batch([])
        self._end_flushes()

    def _refuse(self, updates: Iterable[PendingUpdate], error: JobStatusError) -> None:
        for pending in updates:
            self._callbacks.refused(pending.update, error)

    def _end_flushes(self) -> None:
        oldest = self._batch[0] if self._batch else self._queue.oldest
        for flush, (number, done) in list(self._flushes.items()):
            if oldest is None or oldest.number > number:
                del self._flushes[flush]
                done()


def _count(call: Call) -> int:
    assert isinstance(call.request, pb.BatchUpdateJobsRequest)
    return len(call.request.updates)


def _may_be_the_batchs_fault(error: JobStatusError) -> bool:
    """Return whether a smaller call, or one without a certain update, may succeed where this one failed."""
    if isinstance(error, ResourceExhaustedError):
        return not error.reason  # with one it is the service's own, about its load
    # A proxy's HTTP 413 is UNKNOWN, and what it does to a body that it does not like may be INTERNAL.
    return isinstance(error, (InvalidArgumentError, InternalError)) or type(error) is JobStatusError


def _is_too_large(error: JobStatusError) -> bool:
    """Return whether gRPC or a proxy refused a message because of its size; only the text says that."""
    return "larger than max" in error.message or "status: 413" in error.message


@dataclass(slots=True)
class PendingUpdate:
    """An update in the queue, and its request, which is made once: request_id included."""

    number: int
    """Rises with each."""
    update: JobUpdate
    request: pb.UpdateJobRequest
    queued_at: float

    def merge(self, update: JobUpdate, request: pb.UpdateJobRequest) -> None:
        """Take the fields that a newer report has."""
        changes = {name: value for name in _REPORT_FIELDS if (value := getattr(update, name)) is not UNSET}
        self.update = replace(self.update, **changes)
        for path in request.update_mask.paths:
            self.request.job.ClearField(path)  # type: ignore[arg-type]
            if path not in self.request.update_mask.paths:
                self.request.update_mask.paths.append(path)
        self.request.job.MergeFrom(request.job)


class UpdateQueue:
    """At most `max_pending` updates. Those that it cannot take go to `callbacks`."""

    def __init__(self, callbacks: Callbacks, max_pending: int) -> None:
        self.newest_number = 0
        self._callbacks = callbacks
        self._max_pending = max_pending
        self._queue: OrderedDict[int, PendingUpdate] = OrderedDict()
        self._reports: OrderedDict[int, PendingUpdate] = OrderedDict()
        """The reports in the queue, which may be dropped."""
        self._open_reports: dict[str, PendingUpdate] = {}
        """By job, if its newest update in the queue is a report: the next report is merged into it."""

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def oldest(self) -> PendingUpdate | None:
        """The next to be sent."""
        return next(iter(self._queue.values()), None)

    def add(self, update: JobUpdate, request: pb.UpdateJobRequest, now: float) -> None:
        """Add an update. If the queue is full, the oldest report is dropped, and without any, `update`."""
        is_report = _is_report(update, request)
        report = self._open_reports.get(request.job.id) if is_report else None
        if report is not None and report.request.attempt == request.attempt:
            report.merge(update, request)
            return
        if not self._has_room(update):
            return
        self.newest_number += 1
        pending = PendingUpdate(self.newest_number, update, request, now)
        self._queue[pending.number] = pending
        self._open_reports.pop(request.job.id, None)
        if is_report:
            self._reports[pending.number] = self._open_reports[request.job.id] = pending

    def take_batch(self) -> list[PendingUpdate]:
        """Remove and return the oldest updates, as many as fit into one call."""
        batch: list[PendingUpdate] = []
        room = requests.BatchRoom()
        while (pending := self.oldest) is not None and room.take(pending.request):
            self._remove(pending)
            batch.append(pending)
        if not self._queue:
            self._callbacks.drained()
        return batch

    def clear(self) -> list[PendingUpdate]:
        """Remove and return all updates."""
        everything = list(self._queue.values())
        self._queue.clear()
        self._reports.clear()
        self._open_reports.clear()
        return everything

    def _has_room(self, update: JobUpdate) -> bool:
        if len(self._queue) < self._max_pending:
            return True
        report = next(iter(self._reports.values()), None)
        self._callbacks.dropped(update if report is None else report.update, self._max_pending)
        if report is not None:
            self._remove(report)
        return report is not None

    def _remove(self, pending: PendingUpdate) -> None:
        del self._queue[pending.number]
        self._reports.pop(pending.number, None)
        job_id = pending.request.job.id
        if self._open_reports.get(job_id) is pending:
            del self._open_reports[job_id]


_REPORT_FIELDS = ("progress", "reason", "estimated_completion", "trace_parent")

_PARTS_OF_A_REPORT = {"job", "update_mask", "attempt", "request_id"}


def _is_report(update: JobUpdate, request: pb.UpdateJobRequest) -> bool:
    """Return whether an update only reports: of two of them by one attempt, the newer is enough."""
    return (
        not update.request_id
        and set(_REPORT_FIELDS).issuperset(request.update_mask.paths)
        # By what the request has, so that an update with a field added later is never merged.
        and _PARTS_OF_A_REPORT.issuperset(field.name for field, _ in request.ListFields())
    )


class Callbacks:
    """Collects answers while a lock is held, and calls `on_job` and `on_error` without it: they may call `update`."""

    def __init__(self, on_job: OnJob | None, on_error: OnError | None) -> None:
        self._on_job = on_job
        self._on_error = on_error
        self._lock = threading.Lock()
        self._jobs: list[Job] = []
        self._refusals: list[tuple[JobUpdate, JobStatusError]] = []
        self._dropped = 0

    def after_fork(self) -> None:
        """Begin anew in a forked child."""
        self._lock = threading.Lock()
        self._jobs, self._refusals = [], []

    def accepted(self, result: pb.BatchUpdateJobsResult) -> None:
        """Take the answer to an update: its job."""
        if self._on_job is not None:
            with contextlib.suppress(InternalError), self._lock:  # a job that is not valid is left out
                self._jobs.append(requests.job_in(result))

    def refused(self, update: JobUpdate, error: JobStatusError) -> None:
        """Take an update that has no effect, and the reason."""
        with self._lock:
            self._refusals.append((update, error))

    def dropped(self, update: JobUpdate, max_pending: int) -> None:
        """Take an update that the queue had no room for. Without `on_error` only the first is logged by itself."""
        error = ResourceExhaustedError(f"the queue is full: {max_pending} updates are pending (max_pending)")
        with self._lock:
            self._dropped += 1
            if self._on_error is not None or self._dropped == 1:
                self._refusals.append((update, error))

    def drained(self) -> None:
        """Log how many updates were dropped since the queue was empty."""
        dropped, self._dropped = self._dropped, 0
        if dropped > 1:
            log.error("%d updates were dropped while the queue was full (max_pending)", dropped)

    def call(self) -> None:
        """Call the functions with everything taken since the last time; their exceptions are logged."""
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
            log.exception("on_job or on_error of a reporter raised")


def _log_refusals(refusals: list[tuple[JobUpdate, JobStatusError]]) -> None:
    """Log one line for each error: if a whole batch is refused, there are hundreds with the same."""
    ids: defaultdict[str, list[str]] = defaultdict(list)
    for update, error in refusals:
        ids[str(error)].append(values.printable(update.id))
    for error_text, refused in ids.items():
        some = ", ".join(refused[:MAX_IDS_LOGGED]) + (", …" if len(refused) > MAX_IDS_LOGGED else "")
        if len(refused) == 1:
            log.error("1 update has no effect (job %s): %s", some, error_text)
        else:
            log.error("%d updates have no effect (jobs %s): %s", len(refused), some, error_text)
