"""RQ's jobs as jobs here: `job_class(client)` makes the class of jobs of a queue and of its workers."""

from __future__ import annotations

from typing import Any

from jobstatus_grpc.client import JobStatusClient
from jobstatus_grpc.client.track import DEFAULT_HEARTBEAT_TIMEOUT_SECONDS
from jobstatus_grpc.contrib.task import DEFAULT_END_TIMEOUT_SECONDS, TaskReporter, current_job, job_id_of, percent_of
from jobstatus_grpc.job import JobState

try:
    import rq.job
    from rq.job import JobStatus
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
        """It was run in this process, which has reported its end."""

        def perform(self) -> Any:
            self._is_reported = True
            tasks.begin(self.id, self.func_name or "")
            try:
                result = super().perform()
            except BaseException as error:
                tasks.end(self.id, error, is_retried=self.should_retry)
                raise
            tasks.end(self.id)
            return result

        def save_meta(self) -> None:
            job = tasks.running(self.id)
            if job is not None:
                meta = self.meta
                job.progress(percent_of(meta.get("current"), meta.get("total")), str(meta.get("status", "")))
            super().save_meta()  # type: ignore[no-untyped-call]

        def set_status(self, status: JobStatus, pipeline: Any = None) -> None:
            super().set_status(status, pipeline)
            if self._is_reported:
                return
            name = self.func_name or ""
            if status in _WAITING:
                tasks.sent(self.id, name)
            elif status in _STOPPED:
                tasks.ended_elsewhere(self.id, name, JobState.CANCELLED, reason=f"{status.value} by RQ")
            elif status is JobStatus.FAILED:
                lost = ChildProcessError("the process of the job was lost")
                tasks.ended_elsewhere(self.id, name, JobState.FAILED, lost)

        @staticmethod
        def flush() -> None:
            """Wait until the jobs that this process has enqueued are known to the service, for at most ten seconds."""
            tasks.flush()

    return JobStatusJob
