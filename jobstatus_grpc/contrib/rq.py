"""RQ's jobs as jobs here: `job_class(client)` makes the class of jobs of a queue and of its workers."""

from __future__ import annotations

import sys
from typing import Any

from jobstatus_grpc.client import JobStatusClient
from jobstatus_grpc.client.track import DEFAULT_HEARTBEAT_TIMEOUT_SECONDS
from jobstatus_grpc.contrib.task import DEFAULT_END_TIMEOUT_SECONDS, TaskReporter, current_job, job_id_of, percent_of
from jobstatus_grpc.job import JobState

try:
    import rq.job
    from rq.job import JobStatus, Retry
except ImportError as error:
    raise ImportError("jobstatus_grpc.contrib.rq needs RQ: pip install 'jobstatus-grpc[rq]'") from error

__all__ = ["current_job", "job_class", "job_id_of"]

_WAITING = (JobStatus.QUEUED, JobStatus.SCHEDULED, JobStatus.DEFERRED)

_STOPPED = (JobStatus.STOPPED, JobStatus.CANCELED)


def job_class(
    client: JobStatusClient,
    *,
    heartbeat_timeout_seconds: float = DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
    end_timeout_seconds: float = DEFAULT_END_TIMEOUT_SECONDS,
) -> type[rq.job.Job]:
    """Return a class of RQ jobs that are reported: for `Queue(job_class=…)` and `rq worker --job-class …`.

    They are PENDING when enqueued, then IN_PROGRESS, RETRYING if RQ will run them again, and done. `job.meta` with
    `current` and `total` is the progress, when it is saved. The job of a work horse that was killed is stalled until
    RQ says what becomes of it.

    Args:
        client: of the server.
        heartbeat_timeout_seconds: as of TaskReporter.
        end_timeout_seconds: as of TaskReporter. A work horse ends with its task, so that an outcome is lost that is not
            answered in this time.
    """
    tasks = TaskReporter(
        client, heartbeat_timeout_seconds=heartbeat_timeout_seconds, end_timeout_seconds=end_timeout_seconds
    )

    class JobStatusJob(rq.job.Job):
        _is_reported = False
        """It was run in this process, which reports its end."""

        _has_returned = False
        """Its function has. RQ then calls its callback and stores its result; either may fail."""

        def perform(self) -> Any:
            self._is_reported = True
            tasks.begin(self.id, self.func_name or "")
            try:
                result = super().perform()
            except BaseException as error:
                tasks.end(self.id, error, is_retried=bool(self.retries_left))
                raise
            self._has_returned = True
            return result

        def cleanup(self, ttl: int | None = None, pipeline: Any = None, remove_from_queue: bool = True) -> None:
            if self._has_returned:  # RQ calls this last for a job that succeeded
                tasks.end(self.id)
            super().cleanup(ttl, pipeline, remove_from_queue)

        def save_meta(self) -> None:
            job = tasks.running(self.id)
            if job is not None:
                meta = self.meta
                job.progress(percent_of(meta.get("current"), meta.get("total")), str(meta.get("status", "")))
            super().save_meta()  # type: ignore[no-untyped-call]

        def set_status(self, status: JobStatus, pipeline: Any = None) -> None:
            super().set_status(status, pipeline)
            if self._is_reported:
                if self._has_returned and status is not JobStatus.FINISHED:
                    self._end_without_success(status)
                return
            name = self.func_name or ""
            if status in _WAITING:
                tasks.sent(self.id, name)
            elif status in _STOPPED:
                tasks.ended_elsewhere(self.id, name, JobState.CANCELLED, reason=f"{status.value} by RQ")
            elif status is JobStatus.FAILED:
                lost = ChildProcessError("the process of the job was lost")
                tasks.ended_elsewhere(self.id, name, JobState.FAILED, lost)

        def delete(self, pipeline: Any = None, remove_from_queue: bool = True, delete_dependents: bool = False) -> None:
            # Not the status that this object has, which is that of its last refresh.
            if not self._is_reported and self.get_status() in _WAITING:
                tasks.ended_elsewhere(self.id, self.func_name or "", JobState.CANCELLED, reason="deleted from RQ")
            super().delete(pipeline, remove_from_queue, delete_dependents)

        def _end_without_success(self, status: JobStatus) -> None:
            """Report the end of a run whose function has returned, but not to succeed, or to be repeated."""
            error = sys.exc_info()[1]  # of the callback, or of storing the result
            is_retry = isinstance(self._result, Retry)
            if status in _WAITING:
                tasks.end(self.id, error, is_retried=is_retry or error is not None)
            else:
                tasks.end(self.id, error or RuntimeError("it returned Retry, but has no retries left"))

        @staticmethod
        def flush() -> None:
            """Wait until the jobs that this process has enqueued are known to the service, for at most ten seconds."""
            tasks.flush()

    return JobStatusJob
