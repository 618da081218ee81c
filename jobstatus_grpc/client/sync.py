"""The client without asyncio: as the asyncio client, which documents its methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, TypeVar

from jobstatus_grpc.client.aio import AsyncJobStatusClient
from jobstatus_grpc.client.channel import DEFAULT_TIMEOUT_SECONDS, ClientClosedError, endpoint
from jobstatus_grpc.client.claim import Claim
from jobstatus_grpc.client.reporting import (
    DEFAULT_FINISH_TIMEOUT_SECONDS,
    DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
    Reporting,
)
from jobstatus_grpc.client.sync_connection import Connection
from jobstatus_grpc.client.track import TrackedJob
from jobstatus_grpc.client.watch import Watch
from jobstatus_grpc.client.watching import WAIT_UPDATE_INTERVAL_SECONDS, Watching
from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.record import Job, JobError
from jobstatus_grpc.state import JobState
from jobstatus_grpc.wire import calls
from jobstatus_grpc.wire.calls import UNSET, JobUpdate, Unset

T = TypeVar("T", bound=type)


def documented_by(model: type) -> Callable[[T], T]:
    """Give the methods of a class the documentation of the model's methods of the same name."""

    def document(cls: T) -> T:
        for name, member in vars(cls).items():
            if callable(member) and not member.__doc__:
                member.__doc__ = getattr(model, name, member).__doc__
        return cls

    return document


@documented_by(AsyncJobStatusClient)
class JobStatusClient:
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
        self._connection = Connection(where, timeout_seconds)

    def __enter__(self) -> JobStatusClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def create(
        self,
        name: str = "",
        *,
        id: str = "",
        state: JobState = JobState.PENDING,
        reason: str = "",
        has_progress: bool = False,
        progress: float | None = None,
        estimated_completion: datetime | None = None,
        heartbeat_timeout_seconds: float | None = None,
        labels: Mapping[str, str] | None = None,
        parent_id: str = "",
        result: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Job:
        request = calls.create_request(
            id=id, name=name, state=state, reason=reason, has_progress=has_progress, progress=progress,
            estimated_completion=estimated_completion, heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            labels=labels, parent_id=parent_id, result=result, request_id=request_id,
        )  # fmt: skip
        response = self._connection.call(self._connection.stub.CreateJob, request, timeout_seconds)
        return calls.job_in(response)

    def get(self, id: str, *, timeout_seconds: float | None = None) -> Job:
        response = self._connection.call(self._connection.stub.GetJob, calls.get_request(id), timeout_seconds)
        return calls.job_in(response)

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
        timeout_seconds: float | None = None,
    ) -> Job:
        update = JobUpdate(
            id, state=state, reason=reason, has_progress=has_progress, progress=progress, error=error, labels=labels,
            estimated_completion=estimated_completion, heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            result=result, attempt=attempt, expected_revision=expected_revision, request_id=request_id,
            allow_missing=allow_missing, name=name, parent_id=parent_id,
        )  # fmt: skip
        request = calls.update_request(update)
        response = self._connection.call(self._connection.stub.UpdateJob, request, timeout_seconds)
        return calls.job_in(response)

    def batch_update(
        self, updates: Iterable[JobUpdate], *, timeout_seconds: float | None = None
    ) -> list[Job | JobStatusError]:
        request = calls.batch_request(updates)
        response = self._connection.call(self._connection.stub.BatchUpdateJobs, request, timeout_seconds)
        return calls.batch_results(response, len(request.updates))

    def cancel(
        self, id: str, *, reason: str = "", request_id: str | None = None, timeout_seconds: float | None = None
    ) -> Job:
        request = calls.cancel_request(id, reason, request_id)
        response = self._connection.call(self._connection.stub.CancelJob, request, timeout_seconds)
        return calls.job_in(response)

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
