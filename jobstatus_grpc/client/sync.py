"""The client without asyncio: as the asyncio client, which documents its methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

from jobstatus_grpc.client.aio import AsyncJobStatusClient
from jobstatus_grpc.client.answers import Answers
from jobstatus_grpc.client.channel import DEFAULT_TIMEOUT_SECONDS, ClientClosedError, endpoint
from jobstatus_grpc.client.claim import Claim
from jobstatus_grpc.client.gathering import Gathering
from jobstatus_grpc.client.jobs_watching import JobsWatching
from jobstatus_grpc.client.reporter import DEFAULT_FLUSH_INTERVAL_SECONDS, DEFAULT_MAX_PENDING, Reporter
from jobstatus_grpc.client.reporting import (
    DEFAULT_FINISH_TIMEOUT_SECONDS,
    DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
    Reporting,
)
from jobstatus_grpc.client.sync_calls import Calls, documented_by
from jobstatus_grpc.client.sync_connection import Connection
from jobstatus_grpc.client.track import TrackedJob
from jobstatus_grpc.client.watch import JobsWatch, Watch
from jobstatus_grpc.client.watching import WAIT_UPDATE_INTERVAL_SECONDS, Watching
from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.record import Job
from jobstatus_grpc.wire.calls import JobUpdate


@documented_by(AsyncJobStatusClient)
class JobStatusClient(Calls):
    """A client of the job status service; a context manager. May be shared by threads.

    It connects with its first call. Every call raises `jobstatus_grpc.JobStatusError` and nothing else where it fails.
    A call has a deadline; within it, UNAVAILABLE and TOO_MANY_REQUESTS are tried again. That is safe: a write carries a
    request_id, by which the service knows it again.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> None:
        where = endpoint(address, token=token, ca_file=ca_file, cert_file=cert_file, key_file=key_file)
        super().__init__(Connection(where, timeout_seconds))

    def __enter__(self) -> JobStatusClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def watch(
        self,
        id: str,
        *,
        heartbeat_interval_seconds: float | None = None,
        min_update_interval_seconds: float | None = None,
        give_up_seconds: float | None = None,
    ) -> Watch:
        watching = Watching(
            id,
            heartbeat_interval_seconds=heartbeat_interval_seconds,
            min_update_interval_seconds=min_update_interval_seconds,
            give_up_seconds=give_up_seconds,
        )
        return self._connection.watch(watching)

    def watch_jobs(
        self,
        filter: JobFilter | None = None,
        *,
        resume_token: str = "",
        heartbeat_interval_seconds: float | None = None,
        min_update_interval_seconds: float | None = None,
        give_up_seconds: float | None = None,
    ) -> JobsWatch:
        watching = JobsWatching(
            filter,
            resume_token=resume_token,
            heartbeat_interval_seconds=heartbeat_interval_seconds,
            min_update_interval_seconds=min_update_interval_seconds,
            give_up_seconds=give_up_seconds,
        )
        return self._connection.watch_jobs(watching)

    def wait(self, id: str, timeout: float | None = None) -> Job:
        interval = WAIT_UPDATE_INTERVAL_SECONDS
        watching = Watching(id, min_update_interval_seconds=interval, timeout_seconds=timeout)
        with self._connection.watch(watching) as jobs:
            for job in jobs:
                if job.done:
                    return job
        raise ClientClosedError

    def track(
        self,
        name: str = "",
        *,
        id: str | None = None,
        labels: Mapping[str, str] | None = None,
        parent_id: str = "",
        heartbeat_timeout_seconds: float | None = DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
        finish_timeout_seconds: float = DEFAULT_FINISH_TIMEOUT_SECONDS,
        strict: bool = False,
    ) -> TrackedJob:
        claim = Claim(
            name=name,
            id=id,
            labels=labels,
            parent_id=parent_id,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        )
        reporting = Reporting(
            claim,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            finish_timeout_seconds=finish_timeout_seconds,
            call_timeout_seconds=self._connection.timeout_seconds,
            strict=strict,
        )
        return TrackedJob(reporting, self._connection.report)

    def reporter(
        self,
        *,
        on_error: Callable[[JobUpdate, JobStatusError], object] | None = None,
        on_job: Callable[[Job], object] | None = None,
        flush_interval_seconds: float = DEFAULT_FLUSH_INTERVAL_SECONDS,
        max_pending: int = DEFAULT_MAX_PENDING,
        finish_timeout_seconds: float = DEFAULT_FINISH_TIMEOUT_SECONDS,
    ) -> Reporter:
        gathering = Gathering(
            Answers(on_job, on_error),
            flush_interval_seconds=flush_interval_seconds,
            max_pending=max_pending,
            finish_timeout_seconds=finish_timeout_seconds,
            call_timeout_seconds=self._connection.timeout_seconds,
        )
        return Reporter(gathering, self._connection.report)
