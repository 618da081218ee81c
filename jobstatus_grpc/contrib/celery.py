"""Celery's tasks as jobs: `JobStatusReporter(app, client)`, in the module of the app: for senders and workers.

The id of a task is the id of its job. Each signal is reported by the process that Celery sends it in: the sender's, the
worker's main process, or a process of its pool.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from jobstatus_grpc.client import JobStatusClient, TrackedJob
from jobstatus_grpc.client.track import DEFAULT_HEARTBEAT_TIMEOUT_SECONDS
from jobstatus_grpc.contrib.group import GroupReporter
from jobstatus_grpc.contrib.task import DEFAULT_END_TIMEOUT_SECONDS, TaskReporter, current_job, job_id_of, percent_of
from jobstatus_grpc.job import JobState

try:
    import celery
    from celery import signals, states
    from celery.exceptions import Ignore, Retry
except ImportError as error:
    raise ImportError("jobstatus_grpc.contrib.celery needs Celery: pip install 'jobstatus-grpc[celery]'") from error

__all__ = ["JobStatusReporter", "current_job", "job_id_of"]

_TEXT_KEYS = ("reason", "status", "message", "description")
"""Keys of the meta of `update_state` whose text tells what the task is at, the first that is there."""


class JobStatusReporter:
    """Reports all tasks of an app as jobs: sent PENDING, run IN_PROGRESS, RETRYING, and their ends.

    `self.update_state(meta={"current": 3, "total": 10})` of a task is its progress. The job of a task whose process was
    lost is stalled until Celery says what becomes of the task. The members of a group are children of a job with the
    group's id, those of a chord children of its body's job.
    """

    def __init__(
        self,
        app: celery.Celery,
        client: JobStatusClient,
        *,
        heartbeat_timeout_seconds: float = DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
        end_timeout_seconds: float = DEFAULT_END_TIMEOUT_SECONDS,
        revoke_on_cancel: bool = False,
    ) -> None:
        """Connect to the signals of Celery.

        Args:
            app: whose tasks.
            client: of the server. Nothing is sent before the first task, so that a pool may fork.
            heartbeat_timeout_seconds: as of TaskReporter.
            end_timeout_seconds: as of TaskReporter.
            revoke_on_cancel: revoke a task when the end of its job is requested, and terminate its process if it runs.
                Each task that runs then holds a watch. Without it, a task may read `current_job().cancelled`.
        """
        self._app = app
        self._tasks = TaskReporter(
            client, heartbeat_timeout_seconds=heartbeat_timeout_seconds, end_timeout_seconds=end_timeout_seconds
        )
        self._groups = GroupReporter(client, self._tasks)
        self._revokes = revoke_on_cancel
        self._retry_errors: dict[str, BaseException | None] = {}
        """By task, while it calls `retry`."""
        self._sent_again: set[str] = set()
        """Tasks that run here and have sent their next attempt, by `retry` or `replace`, which ended this one."""
        for signal, receiver in (
            (signals.before_task_publish, self._on_publish),
            (signals.task_received, self._on_received),
            (signals.task_prerun, self._on_prerun),
            (signals.task_postrun, self._on_postrun),
            (signals.task_failure, self._on_failure),
            (signals.task_revoked, self._on_revoked),
            (signals.task_rejected, self._on_rejected),
            (signals.task_unknown, self._on_unknown),
            (signals.worker_process_shutdown, self._on_process_shutdown),
        ):
            # Not weakly: the reporter need not be kept in a variable.
            signal.connect(receiver, weak=False)
        app.GroupResult = _reporting_class(app.GroupResult, self._groups.sized)

    def flush(self) -> None:
        """Wait until the tasks that this process has sent exist as jobs, or are reported otherwise.

        Raises:
            DeadlineExceededError: they are not known to be within ten seconds. They will still be reported.
        """
        self._tasks.flush()

    def _on_publish(self, headers: Mapping[str, Any] | None = None, body: Any = None, **_: Any) -> None:
        task_id = (headers or {}).get("id")
        if not headers or not task_id:  # a message of protocol 1 has its id elsewhere
            return
        if task_id in self._sent_again:  # a replacement
            return
        if headers.get("retries"):
            # Here and not at the end of this attempt: the next one may begin before that.
            if task_id in self._retry_errors:
                self._sent_again.add(task_id)
            self._tasks.end(task_id, self._retry_errors.get(task_id), is_retried=True)
            return
        embedded = body[2] if isinstance(body, (tuple, list)) and len(body) == 3 else {}
        group_id, chord = headers.get("group") or "", embedded.get("chord")
        if _group_of(group_id, chord):
            self._groups.sent(group_id)
        self._sent(task_id, headers["task"], group_id, chord)

    def _on_received(self, request: Any = None, **_: Any) -> None:
        if not request.request_dict.get("retries"):
            self._sent(request.id, request.name, request.request_dict.get("group"), request.chord)

    def _sent(self, task_id: str, name: str, group_id: str | None, chord: Any) -> None:
        body_id = _body_of(chord)
        if body_id:
            self._tasks.sent(body_id, chord.get("task") or "")
        self._tasks.sent(task_id, name, parent_id=body_id or group_id or "")

    def _on_prerun(self, task_id: str = "", task: Any = None, **_: Any) -> None:
        if task.app is not self._app:
            return
        request = task.request
        self._tasks.begin(task_id, task.name, parent_id=_parent_of(request))
        if "update_state" not in vars(task):
            task.update_state, task.retry = self._reporting(task), self._noting_error(task)
            task.on_replace = self._replacing(task)
        job = self._tasks.running(task_id)
        if self._revokes and job is not None and not request.is_eager:
            revoke = functools.partial(self._app.control.revoke, task_id, terminate=True)
            threading.Thread(target=_on_cancel, args=(job, revoke), name="jobstatus-revoke", daemon=True).start()

    def _on_postrun(self, task_id: str = "", task: Any = None, retval: Any = None, state: Any = None, **_: Any) -> None:
        exception: BaseException | None = None
        is_retried = state in (states.RETRY, states.REJECTED) and getattr(retval, "requeue", True)
        if task_id in self._sent_again:
            self._sent_again.discard(task_id)
            if state in (states.RETRY, states.IGNORED):
                return  # in the pool `threads` the next attempt may run here by now
        if state is None:
            # SystemExit ends the process: the main process reports what becomes of the task.
            exception = sys.exc_info()[1]
            if exception is None or isinstance(exception, SystemExit):
                self._tasks.abandon(task_id)
                return
        elif state == states.IGNORED:
            job = self._tasks.running(task_id)
            if job is not None:
                job.abort(str(retval) or "ignored")
        elif state != states.SUCCESS and isinstance(retval, BaseException):
            exception = (retval.exc or retval) if isinstance(retval, Retry) else retval
        self._tasks.end(task_id, exception, is_retried=is_retried)
        if not is_retried:
            self._member_ended(task.request)

    def _on_failure(self, sender: Any = None, task_id: str = "", exception: Any = None, **_: Any) -> None:
        if self._tasks.running(task_id) is None:
            # Its process was lost, or killed after its time limit. Celery does not tell its group here.
            self._tasks.ended_elsewhere(task_id, sender.name, JobState.FAILED, exception)
            self._groups.member_ended(task_id)

    def _on_revoked(self, request: Any = None, expired: bool = False, **_: Any) -> None:
        state, reason = (JobState.ABORTED, "expired") if expired else (JobState.CANCELLED, "revoked")
        name = getattr(request, "name", None) or request.task
        self._tasks.ended_elsewhere(request.id, name, state, reason=reason)
        self._member_ended(request)

    def _on_rejected(self, message: Any = None, exc: Any = None, **_: Any) -> None:
        headers = getattr(message, "headers", None) or {}
        if headers.get("id"):
            self._tasks.ended_elsewhere(headers["id"], headers.get("task", ""), JobState.FAILED, exc)

    def _on_unknown(self, id: str = "", name: str = "", exc: Any = None, **_: Any) -> None:
        self._tasks.ended_elsewhere(id, name, JobState.FAILED, exc)

    def _reporting(self, task: Any) -> Callable[..., Any]:
        """Return `update_state` of a task, which also reports progress.

        Celery has no signal for it, and one object for all runs of a task in a process.
        """
        update_state = task.update_state

        @functools.wraps(update_state)
        def reporting(task_id: str | None = None, state: Any = None, meta: Any = None, **kwargs: Any) -> Any:
            job = self._tasks.running(task_id or task.request.id)
            if job is not None and isinstance(meta, Mapping):
                with contextlib.suppress(Exception):
                    text = next((str(meta[key]) for key in _TEXT_KEYS if meta.get(key)), "")
                    job.progress(percent_of(meta.get("current"), meta.get("total")), text)
            return update_state(task_id, state, meta, **kwargs)

        return reporting

    def _noting_error(self, task: Any) -> Callable[..., Any]:
        """Return `retry` of a task, which also notes the error for the signal that the next attempt is sent."""
        retry = task.retry

        @functools.wraps(retry)
        def noting_error(args: Any = None, kwargs: Any = None, exc: Any = None, *others: Any, **options: Any) -> Any:
            task_id = task.request.id
            self._retry_errors[task_id] = exc if isinstance(exc, BaseException) else sys.exc_info()[1]
            try:
                return retry(args, kwargs, exc, *others, **options)
            finally:
                del self._retry_errors[task_id]

        return noting_error

    def _replacing(self, task: Any) -> Callable[..., Any]:
        """Return `on_replace` of a task, which also ends this attempt: the next one is the replacement, with its id."""
        on_replace = task.on_replace

        @functools.wraps(on_replace)
        def replacing(signature: Any) -> Any:
            request = task.request
            if request.is_eager:
                return on_replace(signature)
            # Before the replacement is sent, because it may begin before this run has ended.
            self._sent_again.add(request.id)
            self._tasks.end(request.id, is_retried=True)
            try:
                return on_replace(signature)
            except Ignore:
                raise
            except BaseException:  # it could not be sent: this run goes on
                self._sent_again.discard(request.id)
                self._tasks.begin(request.id, task.name, parent_id=_parent_of(request))
                raise

        return replacing

    def _member_ended(self, request: Any) -> None:
        group_id = _group_of(getattr(request, "group", None), getattr(request, "chord", None))
        if group_id and not getattr(request, "is_eager", False):
            self._groups.member_ended(group_id)

    def _on_process_shutdown(self, **_: Any) -> None:
        # A process of the pool ends without the functions of atexit.
        self._groups.close()
        self._tasks.close()


def _parent_of(request: Any) -> str:
    # A task that is applied eagerly runs within another program, which sends no group.
    return "" if request.is_eager else _body_of(request.chord) or request.group or ""


def _body_of(chord: Any) -> str:
    """Return the id of the body of a chord, a signature; "": there is none."""
    options = chord.get("options") if isinstance(chord, Mapping) else None
    return (options or {}).get("task_id") or ""


def _group_of(group_id: str | None, chord: Any) -> str:
    """Return the id of a member's group; "" in a chord, whose members are those of its body."""
    return "" if _body_of(chord) else group_id or ""


def _on_cancel(job: TrackedJob, revoke: Callable[[], object]) -> None:
    if job.wait_cancelled() and job.cancelled:
        revoke()


def _reporting_class(base: Any, sized: Callable[[str, int], None]) -> Any:
    """Return the class of an app's group results, which also reports how many members a group has once all are sent."""

    class GroupResult(base):  # type: ignore[misc]
        def __init__(
            self, id: Any = None, results: Any = None, *args: Any, ready_barrier: Any = None, **kwargs: Any
        ) -> None:
            super().__init__(id, results, *args, ready_barrier=ready_barrier, **kwargs)
            if ready_barrier is not None:
                sized(id, len(self.results))

    return GroupResult
