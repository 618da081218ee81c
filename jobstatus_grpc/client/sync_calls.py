"""The calls of the sync client that ask once and are answered once: as the asyncio client's, which documents them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, TypeVar

from jobstatus_grpc.client.aio_calls import AsyncCalls
from jobstatus_grpc.client.sync_connection import Connection
from jobstatus_grpc.errors import JobExpiredError
from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.record import Job, JobError
from jobstatus_grpc.state import JobState
from jobstatus_grpc.wire import calls, pages
from jobstatus_grpc.wire.calls import UNSET, BatchResults, JobUpdate, Unset
from jobstatus_grpc.wire.pages import JobPage, TransitionPage

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

    def batch_update(self, updates: Iterable[JobUpdate], *, timeout_seconds: float | None = None) -> BatchResults:
        request = calls.batch_request(updates)
        response = self._connection.call(self._connection.stub.BatchUpdateJobs, request, timeout_seconds)
        return calls.batch_results(response, len(request.updates))

    def cancel(
        self, id: str, *, reason: str = "", request_id: str | None = None, timeout_seconds: float | None = None
    ) -> Job:
        request = calls.cancel_request(id, reason, request_id)
        response = self._connection.call(self._connection.stub.CancelJob, request, timeout_seconds)
        return calls.job_in(response)

    def delete(self, id: str, *, expected_revision: int = 0, timeout_seconds: float | None = None) -> None:
        tries = self._connection.tries(timeout_seconds)
        request = calls.delete_request(id, expected_revision)
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
        request = pages.list_request(filter, page_size, page_token)
        response = self._connection.call(self._connection.stub.ListJobs, request, timeout_seconds)
        return pages.jobs_in(response)

    def list_all(
        self, filter: JobFilter | None = None, *, page_size: int = 0, timeout_seconds: float | None = None
    ) -> Iterator[Job]:
        token = ""
        while True:
            page = self.list(
                filter,
                page_size=page_size or pages.LARGEST_PAGE,
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
        request = pages.history_request(id, page_size, page_token)
        response = self._connection.call(self._connection.stub.ListJobTransitions, request, timeout_seconds)
        return pages.transitions_in(response)
