"""The tasks of a framework as jobs: what the hooks of all frameworks call, in senders and in workers."""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import re
import threading
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec

from jobstatus_grpc.client import UNSET, JobStatusClient, JobUpdate, TrackedJob
from jobstatus_grpc.client.fork import renew_in_children
from jobstatus_grpc.client.track import (
    DEFAULT_FINISH_TIMEOUT_SECONDS,
    DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
    clean_reason,
    outcome_of,
)
from jobstatus_grpc.errors import FailedPreconditionError, JobStatusError
from jobstatus_grpc.job import JobState, limits
from jobstatus_grpc.job.validation import clean_text

log = logging.getLogger("jobstatus_grpc.contrib")

DEFAULT_END_TIMEOUT_SECONDS = 2.0
"""How long the end of a task waits for the answer to its outcome: as long as its beginning at most."""

DEFAULT_NAME = "task"
"""Of the job of a task without a name: a job without one is not created."""

FLUSH_INTERVAL_SECONDS = 0.005
"""The job of a task exists a few milliseconds after the task is sent, and tasks sent in a loop share calls."""

_OTHER_CHARACTERS = re.compile(r"[^A-Za-z0-9._:-]")

_DIGEST_CHARACTERS = 16
"""64 bits: ids of one framework that differ stay different."""

_current: ContextVar[TrackedJob | None] = ContextVar("jobstatus_grpc.contrib.current", default=None)

_in_processes: dict[str, TaskReporter] = {}
"""Reporters that were pickled into this process, by the key of the one they were made of."""

P = ParamSpec("P")


def current_job() -> TrackedJob | None:
    """Return the job of the task that runs here, for its `progress`, `cancelled` and `result`; None outside of one."""
    return _current.get()


def job_id_of(task_id: str) -> str:
    """Return the id of a task's job: the task's own, if a job can have it.

    Otherwise other characters are replaced, what is too long is cut, and a digest of the task's id is appended.
    """
    clean = _OTHER_CHARACTERS.sub("-", task_id)
    if clean == task_id and 0 < len(task_id) <= limits.MAX_ID_BYTES:
        return task_id
    digest = hashlib.sha256(task_id.encode(errors="surrogatepass")).hexdigest()[:_DIGEST_CHARACTERS]
    return f"{clean[: limits.MAX_ID_BYTES - _DIGEST_CHARACTERS - 1]}:{digest}"


def percent_of(current: object, total: object) -> float | None:
    """Return `current` of `total` in percent; None if they are no numbers, or the total is not above 0."""
    try:
        return 100 * float(current) / float(total) if float(total) > 0 else None  # type: ignore[arg-type]
    except Exception:
        return None


def _never_raises(
    method: Callable[Concatenate[TaskReporter, P], None],
) -> Callable[Concatenate[TaskReporter, P], None]:
    """Log what a method raises: reporting never breaks the task."""

    @functools.wraps(method)
    def call(self: TaskReporter, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception:
            log.exception("a task is not reported")

    return call


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """A task that runs in this process."""

    job: TrackedJob
    name: str
    parent_id: str
    outer: TrackedJob | None
    """The current job before, of a task that runs this one within itself."""


class TaskReporter:
    """Reports tasks as jobs. Its methods may be called in any thread, and in forked children.

    A task that is only sent, or whose end is known to another process than the one that runs it, is reported in the
    background. A task that runs in this process is a `track` block between `begin` and `end`. While no server can be
    reached, the ends of tasks are kept in memory, up to 10,000, and sent in the background too.
    """

    def __init__(
        self,
        client: JobStatusClient,
        *,
        heartbeat_timeout_seconds: float = DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
        end_timeout_seconds: float = DEFAULT_END_TIMEOUT_SECONDS,
    ) -> None:
        """Report to the server of `client`, which stays open as long as tasks are sent or run.

        Args:
            client: of the server.
            heartbeat_timeout_seconds: a job is stalled after this time without a heartbeat of its task's process; 1
                second to 7 days.
            end_timeout_seconds: how long the end of a task waits at most for the answer to its outcome, unless the last
                report failed: then the outcome is sent in the background at once.
        """
        self._client = client
        self._heartbeat_timeout_seconds = heartbeat_timeout_seconds
        self._end_timeout_seconds = end_timeout_seconds
        self._running: dict[str, _Running] = {}
        self._background = client.reporter(on_error=_log_refusal, flush_interval_seconds=FLUSH_INTERVAL_SECONDS)
        self._starting = threading.Lock()
        self._is_started = False
        self._key = uuid.uuid4().hex
        renew_in_children(self, TaskReporter._after_fork)

    def __reduce__(self) -> tuple[Any, ...]:
        timeouts = self._heartbeat_timeout_seconds, self._end_timeout_seconds
        return TaskReporter._in_process, (self._key, self._client, *timeouts)

    @staticmethod
    def _in_process(key: str, client: JobStatusClient, *timeouts: float) -> TaskReporter:
        """Return the reporter of this process for one that was pickled: all copies share a connection."""
        if key not in _in_processes:
            reporter = TaskReporter(client, heartbeat_timeout_seconds=timeouts[0], end_timeout_seconds=timeouts[1])
            _in_processes.setdefault(key, reporter)
        return _in_processes[key]

    def _after_fork(self) -> None:
        self._starting = threading.Lock()
        self._running = {}

    @_never_raises
    def sent(self, task_id: str, name: str, *, parent_id: str = "") -> None:
        """Report a task that waits for a worker: PENDING, unless a worker was quicker."""
        self._report(task_id, name, parent_id, state=JobState.PENDING)

    @_never_raises
    def begin(self, task_id: str, name: str, *, parent_id: str = "") -> None:
        """Claim the job of a task that begins to run here as its next attempt, and send heartbeats until `end`."""
        self.end(task_id, is_retried=True)  # of a task that runs its next attempt within itself
        job = self._client.track(
            name or DEFAULT_NAME,
            id=job_id_of(task_id),
            parent_id=job_id_of(parent_id) if parent_id else None,
            heartbeat_timeout_seconds=self._heartbeat_timeout_seconds,
            on_report_error=_log_problem,
        )
        self._running[task_id] = _Running(job=job, name=name, parent_id=parent_id, outer=_current.get())
        _current.set(job)
        job.__enter__()

    def running(self, task_id: str) -> TrackedJob | None:
        """Return the job of a task that runs in this process."""
        running = self._running.get(task_id)
        return None if running is None else running.job

    @_never_raises
    def end(self, task_id: str, exception: BaseException | None = None, *, is_retried: bool = False) -> None:
        """Report the end of a task that ran here: SUCCEEDED, by its exception, or RETRYING if it will run again."""
        running = self._left(task_id)
        if running is None:
            return
        job = running.job
        if is_retried:
            job.retry(exception or "")
        leave(job, exception, self._end_timeout_seconds)
        if _is_unreported(job):
            outcome = job._outcome
            assert outcome is not None  # of a block that has ended
            self._report(
                task_id,
                running.name,
                running.parent_id,
                state=JobState.RETRYING if is_retried else outcome.state,
                error=UNSET if outcome.error is None else outcome.error,
                reason=outcome.reason or UNSET,
                attempt=job.attempt,
            )

    @_never_raises
    def abandon(self, task_id: str) -> None:
        """Send no more heartbeats of a task that ran here, nor its outcome: another process does."""
        running = self._left(task_id)
        if running is not None:
            running.job.finish_timeout_seconds = 0
            running.job.__exit__(None, None, None)

    def _left(self, task_id: str) -> _Running | None:
        running = self._running.pop(task_id, None)
        if running is not None:
            _current.set(running.outer)
        return running

    @_never_raises
    def ended_elsewhere(
        self, task_id: str, name: str, state: JobState, error: BaseException | None = None, *, reason: str = ""
    ) -> None:
        """Report the end of a task that does not run here: its process was lost, or it never ran."""
        if task_id not in self._running:
            described = None if error is None else outcome_of(error, cancel_requested=False, saw_cancel=False).error
            self._report(task_id, name, state=state, error=described or UNSET, reason=clean_reason(reason) or UNSET)

    def _report(self, task_id: str, name: str, parent_id: str = "", **changes: Any) -> None:
        self.update(
            task_id,
            allow_missing=True,
            name=clean_text(name or DEFAULT_NAME, limits.MAX_NAME_BYTES),
            parent_id=job_id_of(parent_id) if parent_id else "",
            **changes,
        )

    def update(self, task_id: str, **changes: Any) -> None:
        """Send an update of a task's job in the background; the arguments are those of the client's `update`."""
        with self._starting:
            if not self._is_started:
                self._background.__enter__()
                atexit.register(self.close)
                self._is_started = True
        self._background.update(job_id_of(task_id), **changes)

    def flush(self) -> None:
        """Wait until what was reported in the background is answered.

        Raises:
            DeadlineExceededError: it is not within ten seconds.
        """
        if self._is_started:
            self._background.flush(DEFAULT_FINISH_TIMEOUT_SECONDS)

    def close(self) -> None:
        """Send what is pending in the background, for at most ten seconds. Done at the end of the process too."""
        if self._is_started:
            self._background.__exit__(None, None, None)


def leave(job: TrackedJob, exception: BaseException | None, timeout_seconds: float) -> None:
    """End the block of a job; do not wait for the answer to its outcome if the last report failed."""
    job.finish_timeout_seconds = 0 if _is_unreported(job) else timeout_seconds
    job.__exit__(type(exception) if exception else None, exception, None)


def _is_unreported(job: TrackedJob) -> bool:
    """Return whether the last report failed, and a later one may not."""
    return job.error is not None and not job.lost


def _log_problem(text: str, error: Exception) -> None:
    log.warning("%s; the task is not affected", text)


def _log_refusal(update: JobUpdate, error: JobStatusError) -> None:
    # Another process has reported something newer: a worker was quicker than the sender, or the job is done.
    level = logging.DEBUG if isinstance(error, FailedPreconditionError) else logging.WARNING
    log.log(level, "job %s: a report has no effect: %s", update.id, error)
