"""The calls of the asyncio client that ask once and are answered once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import datetime
from typing import Any

from jobstatus_grpc.client.aio_connection import AsyncConnection
from jobstatus_grpc.errors import JobExpiredError
from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.record import Job, JobError
from jobstatus_grpc.state import JobState
from jobstatus_grpc.wire import calls, pages
from jobstatus_grpc.wire.calls import UNSET, BatchResults, JobUpdate, Unset
from jobstatus_grpc.wire.pages import JobPage, TransitionPage


class AsyncCalls:
    """What AsyncJobStatusClient can ask of the service."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def create(
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
        """Create a job and return it as stored.

        Args:
            name: for people and filters; need not be unique.
            id: "" lets the service choose one.
            state: PENDING, or IN_PROGRESS, which begins attempt 1.
            reason: why it is in this state, for people.
            has_progress: whether it will report progress.
            progress: in percent, 0 to 100.
            estimated_completion: an aware datetime.
            heartbeat_timeout_seconds: the longest pause between updates while IN_PROGRESS, 1 second to 7 days; after it
                the job is `stalled`. None: never.
            labels: small facts to filter by.
            parent_id: the id of the job that this one is part of.
            result: a small outcome, as JSON could hold it.
            request_id: 1 to 64 characters; with the same one the job is created once. None: a new one for this call.
            timeout_seconds: the call's deadline; None: the client's.

        Raises:
            JobAlreadyExistsError: the id is taken, or was within the last 24 hours.
            InvalidArgumentError: a value is not valid.
        """
        request = calls.create_request(
            id=id, name=name, state=state, reason=reason, has_progress=has_progress, progress=progress,
            estimated_completion=estimated_completion, heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            labels=labels, parent_id=parent_id, result=result, request_id=request_id,
        )  # fmt: skip
        response = await self._connection.call(self._connection.stub.CreateJob, request, timeout_seconds)
        return calls.job_in(response)

    async def get(self, id: str, *, timeout_seconds: float | None = None) -> Job:
        """Return a job as of the latest committed write.

        Raises:
            JobNotFoundError: no job has this id; JobExpiredError where one had within the last 24 hours. Both are
                NotFoundError.
        """
        response = await self._connection.call(self._connection.stub.GetJob, calls.get_request(id), timeout_seconds)
        return calls.job_in(response)

    async def update(
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
        """Report on a job and return it as stored: the worker's one call.

        What is left out is not written; None clears (as do "" and {}), but for `state`. Without anything to write it is
        a heartbeat.

        Args:
            id: which job.
            state: where to move it.
            reason: why it is in this state, for people.
            has_progress: whether it reports progress; the first progress says so by itself.
            progress: in percent, 0 to 100; a lower value within one attempt leaves it where it is.
            estimated_completion: an aware datetime.
            error: what went wrong; for FAILED, RETRYING, ABORTED and CANCELLED.
            heartbeat_timeout_seconds: as in `create`.
            labels: replace all labels.
            result: replaces the whole result.
            attempt: which attempt writes; 0 is not fenced. With state IN_PROGRESS it is a claim, and must be the job's
                attempt plus one; otherwise the job's own.
            expected_revision: above 0, the revision that the job must have.
            request_id: as in `create`.
            allow_missing: create the job first where the id is unknown, with `name`, `parent_id` and `labels`.
            name: for a job that is created.
            parent_id: for a job that is created.
            timeout_seconds: the call's deadline; None: the client's.

        Raises:
            NotFoundError: no job has this id.
            StaleAttemptError: another attempt owns the job; stop working on it.
            IllegalTransitionError: the job cannot move from its state to this one, or is done.
            RevisionMismatchError: the job has another revision than expected.
            InvalidArgumentError: a value is not valid.
        """
        update = JobUpdate(
            id, state=state, reason=reason, has_progress=has_progress, progress=progress, error=error, labels=labels,
            estimated_completion=estimated_completion, heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            result=result, attempt=attempt, expected_revision=expected_revision, request_id=request_id,
            allow_missing=allow_missing, name=name, parent_id=parent_id,
        )  # fmt: skip
        request = calls.update_request(update)
        response = await self._connection.call(self._connection.stub.UpdateJob, request, timeout_seconds)
        return calls.job_in(response)

    async def batch_update(self, updates: Iterable[JobUpdate], *, timeout_seconds: float | None = None) -> BatchResults:
        """Send up to 500 updates in one call; return what became of each, in their order.

        Each is `JobUpdate(id, …)` with the arguments of `update`, and succeeds or fails by itself: its place in the
        list holds the job, without its `result`, or the error that `update` would have raised. Updates of one job take
        effect in their order.

        Raises:
            InvalidArgumentError: there are more than 500 updates.
        """
        request = calls.batch_request(updates)
        response = await self._connection.call(self._connection.stub.BatchUpdateJobs, request, timeout_seconds)
        return calls.batch_results(response, len(request.updates))

    async def cancel(
        self, id: str, *, reason: str = "", request_id: str | None = None, timeout_seconds: float | None = None
    ) -> Job:
        """Ask for a job's end and return it as stored.

        PENDING and RETRYING become CANCELLED at once. IN_PROGRESS gets `cancel_requested`; the worker decides. A done
        job stays as it is.

        Raises:
            NotFoundError: no job has this id.
        """
        request = calls.cancel_request(id, reason, request_id)
        response = await self._connection.call(self._connection.stub.CancelJob, request, timeout_seconds)
        return calls.job_in(response)

    async def delete(self, id: str, *, expected_revision: int = 0, timeout_seconds: float | None = None) -> None:
        """Delete a done job and its history. Its id stays taken for 24 hours.

        Args:
            id: which job.
            expected_revision: above 0, the revision that the job must have.
            timeout_seconds: the call's deadline; None: the client's.

        Raises:
            JobNotDoneError: the job is not done.
            NotFoundError: no job has this id.
            RevisionMismatchError: the job has another revision than expected.
        """
        tries = self._connection.tries(timeout_seconds)
        request = calls.delete_request(id, expected_revision)
        try:
            await self._connection.call_within(tries, self._connection.stub.DeleteJob, request)
        except JobExpiredError:
            if not tries.may_have_taken_effect:
                raise

    async def list(
        self,
        filter: JobFilter | None = None,
        *,
        page_size: int = 0,
        page_token: str = "",
        timeout_seconds: float | None = None,
    ) -> JobPage:
        """Return a page of the jobs that match, the newest created first.

        Pages are stable while jobs are added. Only an empty `next_page_token` means that there are no more.

        Args:
            filter: which jobs; None: all.
            page_size: how many at most; 0 means 50, above 1,000 means 1,000.
            page_token: the `next_page_token` of the page before, of the same filter; "": the first page.
            timeout_seconds: the call's deadline; None: the client's.

        Raises:
            InvalidTokenError: page_token is none, or is one of another filter.
            InvalidArgumentError: a value is not valid.
        """
        request = pages.list_request(filter, page_size, page_token)
        response = await self._connection.call(self._connection.stub.ListJobs, request, timeout_seconds)
        return pages.jobs_in(response)

    async def list_all(
        self, filter: JobFilter | None = None, *, page_size: int = 0, timeout_seconds: float | None = None
    ) -> AsyncIterator[Job]:
        """Iterate over all jobs that match, the newest created first, page after page as they are needed.

        Args:
            filter: which jobs; None: all.
            page_size: how many to ask for in one call; 0: as many as the service allows, which is 1,000.
            timeout_seconds: the deadline of each call; None: the client's.

        Raises:
            InvalidArgumentError: a value is not valid.
        """
        token = ""
        while True:
            page = await self.list(
                filter,
                page_size=page_size or pages.LARGEST_PAGE,
                page_token=token,
                timeout_seconds=timeout_seconds,
            )
            for job in page.jobs:
                yield job
            token = page.next_page_token
            if not token:
                return

    async def history(
        self, id: str, *, page_size: int = 0, page_token: str = "", timeout_seconds: float | None = None
    ) -> TransitionPage:
        """Return a page of who did what to a job and when, the oldest first; a job keeps its newest 1,000 transitions.

        Args:
            id: which job.
            page_size: how many at most; 0 means 50, above 1,000 means 1,000.
            page_token: the `next_page_token` of the page before; "": the first page.
            timeout_seconds: the call's deadline; None: the client's.

        Raises:
            NotFoundError: no job has this id.
            InvalidTokenError: page_token is none, or is one of another job.
        """
        request = pages.history_request(id, page_size, page_token)
        response = await self._connection.call(self._connection.stub.ListJobTransitions, request, timeout_seconds)
        return pages.transitions_in(response)
