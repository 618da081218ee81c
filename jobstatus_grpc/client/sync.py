"""The client without asyncio: as the asyncio client, which documents its methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, TypeVar

from jobstatus_grpc.client import requests
from jobstatus_grpc.client.aio import AsyncCalls, AsyncJobStatusClient
from jobstatus_grpc.client.connection import DEFAULT_TIMEOUT_SECONDS, ClientClosedError, Connection, endpoint
from jobstatus_grpc.client.reporter import (
    DEFAULT_FLUSH_INTERVAL_SECONDS,
    DEFAULT_MAX_PENDING,
    Answers,
    Gathering,
    Reporter,
)
from jobstatus_grpc.client.requests import UNSET, BatchResults, JobPage, JobUpdate, TransitionPage, Unset
from jobstatus_grpc.client.track import (
    DEFAULT_FINISH_TIMEOUT_SECONDS,
    DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
    Claim,
    OnReportError,
    Reporting,
    TrackedJob,
)
from jobstatus_grpc.client.watch import WAIT_UPDATE_INTERVAL_SECONDS, JobsWatch, JobsWatching, Watch, Watching
from jobstatus_grpc.errors import JobExpiredError, JobStatusError
from jobstatus_grpc.job import Job, JobError, JobFilter, JobState

T = TypeVar("T", bound=type)


def documented_by(model: type) -> Callable[[T], T]:
    """Give the methods of a class the documentation of the model's methods of the same name."""

    def document(cls: T) -> T:
        for name, member in vars(cls).items():
            if callable(member) and not member.__doc__:
                member.__doc__ = getattr(model, name, member).__doc__
        return cls

    return document


@documented_by(AsyncCalls)
class Calls:
    """What JobStatusClient can ask of the service."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

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
        request = requests.create_request(
            id=id, name=name, state=state, reason=reason, has_progress=has_progress, progress=progress,
            estimated_completion=estimated_completion, heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            labels=labels, parent_id=parent_id, result=result, request_id=request_id,
        )  # fmt: skip
        response = self._connection.call(self._connection.stub.CreateJob, request, timeout_seconds)
        return requests.job_in(response)

    def get(self, id: str, *, timeout_seconds: float | None = None) -> Job:
        response = self._connection.call(self._connection.stub.GetJob, requests.get_request(id), timeout_seconds)
        return requests.job_in(response)

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
        request = requests.update_request(update)
        response = self._connection.call(self._connection.stub.UpdateJob, request, timeout_seconds)
        return requests.job_in(response)

    def batch_update(self, updates: Iterable[JobUpdate], *, timeout_seconds: float | None = None) -> BatchResults:
        request = requests.batch_request(updates)
        response = self._connection.call(self._connection.stub.BatchUpdateJobs, request, timeout_seconds)
        return requests.batch_results(response, len(request.updates))

    def cancel(
        self, id: str, *, reason: str = "", request_id: str | None = None, timeout_seconds: float | None = None
    ) -> Job:
        request = requests.cancel_request(id, reason, request_id)
        response = self._connection.call(self._connection.stub.CancelJob, request, timeout_seconds)
        return requests.job_in(response)

    def delete(self, id: str, *, expected_revision: int = 0, timeout_seconds: float | None = None) -> None:
        tries = self._connection.tries(timeout_seconds)
        request = requests.delete_request(id, expected_revision)
        try:
            self._connection.call_within(tries, self._connection.stub.DeleteJob, request)
        except JobExpiredError:
            if not tries.may_have_taken_effect:
                raise

    def list(
        self,
        filter: JobFilter | None = None,
        *,
        page_size: int = 0,
        page_token: str = "",
        timeout_seconds: float | None = None,
    ) -> JobPage:
        request = requests.list_request(filter, page_size, page_token)
        response = self._connection.call(self._connection.stub.ListJobs, request, timeout_seconds)
        return requests.jobs_in(response)

    def list_all(
        self, filter: JobFilter | None = None, *, page_size: int = 0, timeout_seconds: float | None = None
    ) -> Iterator[Job]:
        token = ""
        while True:
            page = self.list(
                filter,
                page_size=page_size or requests.LARGEST_PAGE,
                page_token=token,
                timeout_seconds=timeout_seconds,
            )
            yield from page.jobs
            token = page.next_page_token
            if not token:
                return

    def history(
        self, id: str, *, page_size: int = 0, page_token: str = "", timeout_seconds: float | None = None
    ) -> TransitionPage:
        request = requests.history_request(id, page_size, page_token)
        response = self._connection.call(self._connection.stub.ListJobTransitions, request, timeout_seconds)
        return requests.transitions_in(response)


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
        on_report_error: OnReportError | None = None,
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
            on_report_error=on_report_error,
        )
        return TrackedJob(reporting, self._connection)

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
