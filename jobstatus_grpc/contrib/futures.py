"""What executors of `concurrent.futures` run as jobs, process pools included."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from datetime import datetime, timezone
from functools import partial
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from jobstatus_grpc.client import JobStatusClient
from jobstatus_grpc.client.track import DEFAULT_HEARTBEAT_TIMEOUT_SECONDS
from jobstatus_grpc.contrib.task import DEFAULT_END_TIMEOUT_SECONDS, TaskReporter, current_job
from jobstatus_grpc.job import JobState
from jobstatus_grpc.job.ids import new_uuid7

__all__ = ["TrackedExecutor", "current_job"]

P = ParamSpec("P")
R = TypeVar("R")


class TrackedExecutor(Executor):
    """An executor whose calls are jobs: PENDING when submitted, IN_PROGRESS when begun, then their ends.

    A job is a child of the one in which it is submitted. A call may use `current_job()`, in a process pool too.
    """

    def __init__(
        self,
        executor: Executor,
        client: JobStatusClient,
        *,
        parent_id: str = "",
        heartbeat_timeout_seconds: float = DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
        end_timeout_seconds: float = DEFAULT_END_TIMEOUT_SECONDS,
    ) -> None:
        """Wrap `executor`, which the end of the `with` block or `shutdown` shuts down.

        Args:
            executor: runs the calls. Each process of a pool makes a connection of its own.
            client: of the server.
            parent_id: the id of the job that all are part of; "": the job in which a call is submitted, if any.
            heartbeat_timeout_seconds: as of TaskReporter.
            end_timeout_seconds: as of TaskReporter.
        """
        self._executor = executor
        self._parent_id = parent_id
        self._job_ids: WeakKeyDictionary[Future[Any], str] = WeakKeyDictionary()
        self._tasks = TaskReporter(
            client, heartbeat_timeout_seconds=heartbeat_timeout_seconds, end_timeout_seconds=end_timeout_seconds
        )

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """As of Executor; `job_id` returns the id of the job."""
        outer = current_job()
        parent_id = self._parent_id or (outer.id if outer is not None else "")
        job_id, name = new_uuid7(datetime.now(timezone.utc)), _name_of(fn)
        self._tasks.sent(job_id, name, parent_id=parent_id)
        future = self._executor.submit(_run, self._tasks, job_id, name, parent_id, fn, args, kwargs)
        self._job_ids[future] = job_id
        future.add_done_callback(partial(self._on_done, job_id, name))
        return future

    def job_id(self, future: Future[Any]) -> str:
        """Return the id of the job of a future that `submit` returned."""
        return self._job_ids[future]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As of Executor; what is pending is sent in the background."""
        self._executor.shutdown(wait, cancel_futures=cancel_futures)

    def flush(self) -> None:
        """Wait until submitted calls exist as jobs, and those cancelled are done.

        Raises:
            DeadlineExceededError: they are not known to be within ten seconds. They will still be reported.
        """
        self._tasks.flush()

    def _on_done(self, job_id: str, name: str, future: Future[Any]) -> None:
        if future.cancelled():
            self._tasks.ended_elsewhere(job_id, name, JobState.CANCELLED, reason="cancelled before it began")
        elif (error := future.exception()) is not None:
            # Its process was lost, or the call could not be sent to it. If it was run, this is what is known already.
            self._tasks.ended_elsewhere(job_id, name, JobState.FAILED, error)


def _name_of(fn: Callable[..., Any]) -> str:
    while isinstance(fn, partial):
        fn = fn.func
    return getattr(fn, "__qualname__", "") or type(fn).__name__


def _run(
    tasks: TaskReporter, job_id: str, name: str, parent_id: str, fn: Callable[..., R], args: Any, kwargs: Any
) -> R:
    """Run a call, in a thread or a process of the executor."""
    tasks.begin(job_id, name, parent_id=parent_id)
    try:
        result = fn(*args, **kwargs)
    except BaseException as error:
        tasks.end(job_id, error)
        raise
    tasks.end(job_id)
    return result
