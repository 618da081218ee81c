"""The asyncio client. The sync one has the same methods, and takes their documentation from here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any

from jobstatus_grpc.client import requests
from jobstatus_grpc.client.connection import DEFAULT_TIMEOUT_SECONDS, AsyncConnection, ClientClosedError, endpoint
from jobstatus_grpc.client.reporter import (
    DEFAULT_FLUSH_INTERVAL_SECONDS,
    DEFAULT_MAX_PENDING,
    Answers,
    AsyncReporter,
    Gathering,
)
from jobstatus_grpc.client.requests import UNSET, BatchResults, JobPage, JobUpdate, TransitionPage, Unset
from jobstatus_grpc.client.track import (
    DEFAULT_FINISH_TIMEOUT_SECONDS,
    DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
    AsyncTrackedJob,
    Claim,
    OnReportError,
    Reporting,
)
from jobstatus_grpc.client.watch import WAIT_UPDATE_INTERVAL_SECONDS, AsyncJobsWatch, AsyncWatch, JobsWatching, Watching
from jobstatus_grpc.errors import JobExpiredError, JobStatusError
from jobstatus_grpc.job import Job, JobError, JobFilter, JobState


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
        request = requests.create_request(
            id=id, name=name, state=state, reason=reason, has_progress=has_progress, progress=progress,
            estimated_completion=estimated_completion, heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            labels=labels, parent_id=parent_id, result=result, request_id=request_id,
        )  # fmt: skip
        response = await self._connection.call(self._connection.stub.CreateJob, request, timeout_seconds)
        return requests.job_in(response)

    async def get(self, id: str, *, timeout_seconds: float | None = None) -> Job:
        """Return a job as of the latest committed write.

        Raises:
            JobNotFoundError: no job has this id; JobExpiredError where one had within the last 24 hours. Both are
                NotFoundError.
        """
        response = await self._connection.call(self._connection.stub.GetJob, requests.get_request(id), timeout_seconds)
        return requests.job_in(response)

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
        request = requests.update_request(update)
        response = await self._connection.call(self._connection.stub.UpdateJob, request, timeout_seconds)
        return requests.job_in(response)

    async def batch_update(self, updates: Iterable[JobUpdate], *, timeout_seconds: float | None = None) -> BatchResults:
        """Send up to 500 updates in one call; return what became of each, in their order.

        Each is `JobUpdate(id, …)` with the arguments of `update`, and succeeds or fails by itself: its place in the
        list holds the job, without its `result`, or the error that `update` would have raised. Updates of one job take
        effect in their order.

        Raises:
            InvalidArgumentError: there are more than 500 updates.
        """
        request = requests.batch_request(updates)
        response = await self._connection.call(self._connection.stub.BatchUpdateJobs, request, timeout_seconds)
        return requests.batch_results(response, len(request.updates))

    async def cancel(
        self, id: str, *, reason: str = "", request_id: str | None = None, timeout_seconds: float | None = None
    ) -> Job:
        """Ask for a job's end and return it as stored.

        PENDING and RETRYING become CANCELLED at once. IN_PROGRESS gets `cancel_requested`; the worker decides. A done
        job stays as it is.

        Raises:
            NotFoundError: no job has this id.
        """
        request = requests.cancel_request(id, reason, request_id)
        response = await self._connection.call(self._connection.stub.CancelJob, request, timeout_seconds)
        return requests.job_in(response)

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
        request = requests.delete_request(id, expected_revision)
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
        request = requests.list_request(filter, page_size, page_token)
        response = await self._connection.call(self._connection.stub.ListJobs, request, timeout_seconds)
        return requests.jobs_in(response)

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
                page_size=page_size or requests.LARGEST_PAGE,
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
        request = requests.history_request(id, page_size, page_token)
        response = await self._connection.call(self._connection.stub.ListJobTransitions, request, timeout_seconds)
        return requests.transitions_in(response)


class AsyncJobStatusClient(AsyncCalls):
    """A client of the job status service for asyncio; an async context manager.

    It connects with its first call, belongs to the event loop of that call, and may be shared by all its tasks. Every
    call raises `jobstatus_grpc.JobStatusError` and nothing else where it fails. A call has a deadline; within it,
    UNAVAILABLE and TOO_MANY_REQUESTS are tried again. That is safe: a write carries a request_id, by which the service
    knows it again.
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
        """Take where the server is, and who calls.

        Args:
            address: `host:port`, `dns:///host:port` or `unix:/path`.
            token: sent with each call, as a bearer token. Without TLS everybody on the way can read it.
            ca_file: use TLS, and trust the CAs in this PEM file.
            cert_file: use TLS, and show this certificate (PEM); without ca_file public CAs are trusted.
            key_file: its private key (PEM).
            timeout_seconds: the deadline of each call that names none.

        Raises:
            ValueError: the arguments do not fit together.
            OSError: a file cannot be read.
        """
        where = endpoint(address, token=token, ca_file=ca_file, cert_file=cert_file, key_file=key_file)
        super().__init__(AsyncConnection(where, timeout_seconds))

    async def __aenter__(self) -> AsyncJobStatusClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Calls and watches that are still open end with UnavailableError, and so do later ones.

        May be called more than once.
        """
        await self._connection.close()

    def watch(
        self,
        id: str,
        *,
        heartbeat_interval_seconds: float | None = None,
        min_update_interval_seconds: float | None = None,
        give_up_seconds: float | None = None,
    ) -> AsyncWatch:
        """Follow a job to its end: iterate over its newest states, the first as it is now, the last done.

        States in between may be skipped, the newest always arrives. Cut connections, restarts and silent servers are
        survived: the watch calls again, with growing pauses up to 10 seconds, and goes on where it was. Leaving the
        loop early, or closing what this returns, ends the stream at once.

        Args:
            id: which job.
            heartbeat_interval_seconds: how soon a quiet server must show that it lives, at least 1; three times that
                without a word and the watch calls again. None: 30, or a third of give_up_seconds if that is less.
            min_update_interval_seconds: the shortest time between states that differ in progress, reason and estimates
                only. None: 0.1.
            give_up_seconds: raise UnavailableError where nothing was heard from a server for so long. None: try for
                ever.

        Raises:
            NotFoundError: no job has this id.
            JobStatusError: an error that does not pass by itself.
        """
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
    ) -> AsyncJobsWatch:
        """Follow all jobs that match, for as long as you like: iterate over what happens to them.

        Each is a `JobChange(type, id, revision, job)`. SNAPSHOT for each job that is there, then one SYNCED, then
        UPDATED with the newest state after changes, and REMOVED for a job that matches no longer (with the job) or is
        deleted or expired (job is None). States in between may be skipped, the newest always arrives, and none twice.

        The same ends are survived as by `watch`, and what was missed is told then, with another SYNCED. RESET means:
        forget all jobs, snapshots of those that are there follow. It comes where the service does not remember what
        was missed, and where a watch without resume_token is cut before its first SYNCED, since jobs may have vanished
        in between.

        The iterator has a `resume_token`, with which another watch goes on where this one stopped. It remembers the id
        and the revision of each job that matches, and nothing else of it.

        Args:
            filter: which jobs; None: all.
            resume_token: of an earlier watch or a `list` with the same filter: begin with what changed since, and no
                snapshots; jobs that do not match are REMOVED then, known or not. "": begin with snapshots.
            heartbeat_interval_seconds: as in `watch`.
            min_update_interval_seconds: as in `watch`, for each job.
            give_up_seconds: as in `watch`.

        Raises:
            InvalidTokenError: resume_token is none, or is one of another filter.
            JobStatusError: an error that does not pass by itself.
        """
        watching = JobsWatching(
            filter,
            resume_token=resume_token,
            heartbeat_interval_seconds=heartbeat_interval_seconds,
            min_update_interval_seconds=min_update_interval_seconds,
            give_up_seconds=give_up_seconds,
        )
        return self._connection.watch_jobs(watching)

    async def wait(self, id: str, timeout: float | None = None) -> Job:
        """Wait for a job's end and return the done job.

        Args:
            id: which job.
            timeout: in seconds; None: for ever, also while no server can be reached.

        Raises:
            DeadlineExceededError: the job was not known to be done in time.
            NotFoundError: no job has this id.
        """
        interval = WAIT_UPDATE_INTERVAL_SECONDS
        async with self._connection.watch(
            Watching(id, min_update_interval_seconds=interval, timeout_seconds=timeout)
        ) as jobs:
            async for job in jobs:
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
    ) -> AsyncTrackedJob:
        """Report a block of work as a job: a context manager for workers.

        Entering it creates a job IN_PROGRESS, or with `id` claims one that is there. While the block runs, heartbeats
        say that the worker lives. Its end reports SUCCEEDED, or FAILED where it raises; what it raises goes on.

        Reporting never breaks the work: while the service cannot be reached the block runs all the same, the newest is
        reported once it can, and what could not be reported in the end is logged.

        Args:
            name: for people and filters.
            id: claim the job with this id, as its next attempt; with a name too, create it where it is unknown.
                None: create a job.
            labels: small facts to filter by, for a job that is created.
            parent_id: the id of the job that this one is part of, for a job that is created.
            heartbeat_timeout_seconds: after so long without a word the job is `stalled`; 1 second to 7 days. None:
                never, or with `id` as the job has it.
            finish_timeout_seconds: how long the end of the block may be held up until the outcome is reported.
            strict: raise at the beginning of the block where the job cannot be created or claimed, and at its end where
                the outcome cannot be reported.
            on_report_error: is called with a sentence and the error when reports begin to fail, are refused, or end;
                from where they are sent, so keep it short. None: these are logged.
        """
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
        return AsyncTrackedJob(reporting, self._connection)

    def reporter(
        self,
        *,
        on_error: Callable[[JobUpdate, JobStatusError], object] | None = None,
        on_job: Callable[[Job], object] | None = None,
        flush_interval_seconds: float = DEFAULT_FLUSH_INTERVAL_SECONDS,
        max_pending: int = DEFAULT_MAX_PENDING,
        finish_timeout_seconds: float = DEFAULT_FINISH_TIMEOUT_SECONDS,
    ) -> AsyncReporter:
        """Report on many jobs, off the caller's path: a context manager for workers.

        Its `update` returns at once; what it is given is sent in batches of up to 500, in its order, and again while
        the service cannot be reached, without taking effect twice. Reporting never breaks the work: nothing is raised.
        Leaving the block sends what is left. `track` is for one job, and does more: it claims it, and says that the
        worker lives.

        Keep the two functions short: they are called where the batches are sent, and hold those up; for an update that
        cannot even wait, on_error is called where it is given. Both may give further updates.

        Args:
            on_error: is given each update that has no effect, and why: the service refused it, it could not be sent
                until the end, or there was no room for it. None: such are logged.
            on_job: is given each job as it was answered, without its `result`; look at its `cancel_requested`.
            flush_interval_seconds: how long the first update waits for others to share its call.
            max_pending: how many updates may wait. Beyond that the oldest that says nothing but progress, reason and
                estimated_completion is dropped; without any such, the newest update is. `update` never waits.
            finish_timeout_seconds: how long the end of the block may be held up until all is answered.
        """
        gathering = Gathering(
            Answers(on_job, on_error),
            flush_interval_seconds=flush_interval_seconds,
            max_pending=max_pending,
            finish_timeout_seconds=finish_timeout_seconds,
            call_timeout_seconds=self._connection.timeout_seconds,
        )
        return AsyncReporter(gathering, self._connection.report)
