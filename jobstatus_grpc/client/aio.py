"""The asyncio client. sync.py is generated from this file: run `make sync` after a change."""

from __future__ import annotations

import operator
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, TypeVar

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Identity
from jobstatus_grpc.client import requests, values
from jobstatus_grpc.client.connection import DEFAULT_TIMEOUT_SECONDS, AsyncConnection, open_tracing
from jobstatus_grpc.client.endpoint import Tls
from jobstatus_grpc.client.environment import find_server
from jobstatus_grpc.client.reporter import (
    DEFAULT_FLUSH_INTERVAL_SECONDS,
    DEFAULT_MAX_PENDING,
    AsyncReporter,
    Callbacks,
    ReporterState,
)
from jobstatus_grpc.client.requests import UNSET, BatchResults, JobPage, JobUpdate, TransitionPage, Unset
from jobstatus_grpc.client.retry import ClientClosedError
from jobstatus_grpc.client.sender import AsyncFinishing
from jobstatus_grpc.client.token import Token
from jobstatus_grpc.client.track import (
    DEFAULT_FINISH_TIMEOUT_SECONDS,
    DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
    AsyncTrackedJob,
    Claim,
    OnReportError,
    TrackState,
    enclosing_job,
)
from jobstatus_grpc.client.watch import (
    WAIT_UPDATE_INTERVAL_SECONDS,
    AsyncJobsWatch,
    AsyncWatch,
    JobsWatchState,
    JobWatchState,
)
from jobstatus_grpc.errors import JobExpiredError, JobStatusError
from jobstatus_grpc.job import Job, JobError, JobFilter, JobState

T = TypeVar("T")


class AsyncJobStatusClient:
    """A client of the job status service for asyncio; an async context manager.

    It connects with its first call. Tasks may share it, and so may event loops: each has its own connection.

    A call that fails raises `jobstatus_grpc.JobStatusError` and nothing else; InvalidFieldError names the argument that
    is wrong. It has a deadline; within it, UNAVAILABLE and TOO_MANY_REQUESTS are retried. That is safe: a write carries
    a request_id, so that it takes effect once.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: Token | None = None,
        tenant: str | None = None,
        tls: Tls | bool | None = None,
        insecure: bool = False,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        tracing: bool = False,
    ) -> None:
        """Make a client of the server at `address`.

        Args:
            address: `host:port`, `grpcs://host:port` (TLS), `dns:///host:port` or `unix:/path`. None:
                JOBSTATUS_ADDRESS, or 127.0.0.1:50051; then JOBSTATUS_TOKEN, JOBSTATUS_TOKEN_FILE or
                JOBSTATUS_TOKEN_COMMAND, JOBSTATUS_TENANT, JOBSTATUS_CA, JOBSTATUS_CERT, JOBSTATUS_KEY,
                JOBSTATUS_SERVER_NAME and JOBSTATUS_INSECURE stand for arguments left out. Profiles are of the command
                line only.
            token: sent with each call, as a bearer token. A Path: the token in this file, which is read again when it
                changes. A TokenCommand: what it prints, run again once a minute while calls are made. If a new token
                cannot be had, that is logged, and the one before stays in use.
            tenant: the tenant in which to make the calls, for the role admin. None: the caller's own.
            tls: True: use TLS and trust public CAs; a Tls: a CA of your own, a client certificate. None: TLS if the
                address begins with grpcs://.
            insecure: allow to send the token to another machine without TLS.
            timeout_seconds: the default deadline of a call.
            tracing: make OpenTelemetry spans of calls, with the program's provider, and send their context; needs the
                extra `otel`. Jobs that are created or updated in a sampled trace get it as their `trace_parent`.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument is not valid, or they do not fit together; or the token's command failed.
            OSError: a file cannot be read.
            ModuleNotFoundError: `tracing` without OpenTelemetry installed.
        """
        values.check_timeout(timeout_seconds, "timeout_seconds")
        server = find_server(address, token=token, tenant=tenant, tls=tls, insecure=insecure)
        self._connection = AsyncConnection(server.endpoint, timeout_seconds, open_tracing() if tracing else None)
        self._job_id = server.job_id
        self._finishing = AsyncFinishing()

    async def __aenter__(self) -> AsyncJobStatusClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def create(
        self,
        name: str = "",
        *,
        id: str = "",
        state: JobState | str = JobState.PENDING,
        reason: str = "",
        reports_progress: bool = False,
        progress: float | None = None,
        estimated_completion: datetime | None = None,
        heartbeat_timeout_seconds: float | None = None,
        labels: Mapping[str, str] | None = None,
        parent_id: str = "",
        result: Mapping[str, Any] | None = None,
        trace_parent: str | None = None,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Job:
        """Create a job and return it as stored.

        Args:
            name: for people and filters; need not be unique.
            id: "": the service chooses one.
            state: PENDING, or IN_PROGRESS, which begins attempt 1. A state may also be given by its name, in any case.
            reason: why it is in this state, for people.
            reports_progress: whether it will report progress.
            progress: in percent, 0 to 100.
            estimated_completion: an aware datetime.
            heartbeat_timeout_seconds: the longest pause between updates while IN_PROGRESS, 1 second to 7 days; after it
                the job is `stalled`. None: never.
            labels: to filter by.
            parent_id: the id of the job that this one is part of.
            result: a small result, as JSON could hold it. Values of numpy, Decimal, datetime, Path, UUID and Enum are
                converted; a number that a double would round is refused.
            trace_parent: the trace that the job belongs to, a W3C traceparent. None: with `tracing`, the active trace.
            request_id: 1 to 64 characters; with the same one the job is created once. None: a new one for this call.
            timeout_seconds: the call's deadline; None: the client's.

        Raises:
            JobAlreadyExistsError: the id is taken, or was within the last 24 hours.
            InvalidArgumentError: a value is not valid.
        """
        request = requests.create_request(
            request_id, id=id, name=name, state=state, reason=reason, reports_progress=reports_progress,
            progress=progress, estimated_completion=estimated_completion,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds, labels=labels, parent_id=parent_id, result=result,
            trace_parent=trace_parent or self._connection.trace_parent,
        )  # fmt: skip
        response = await self._connection.call("CreateJob", request, timeout_seconds)
        return requests.job_in(response)

    async def get(self, id: str, *, timeout_seconds: float | None = None) -> Job:
        """Return a job as of the latest committed write.

        Raises:
            JobNotFoundError: no job has this id; JobExpiredError if one had within the last 24 hours. Both are
                NotFoundError.
        """
        request = requests.request_of(pb.GetJobRequest, id=id)
        response = await self._connection.call("GetJob", request, timeout_seconds)
        return requests.job_in(response)

    async def update(
        self,
        id: str,
        *,
        state: JobState | str | Unset = UNSET,
        reason: str | Unset | None = UNSET,
        reports_progress: bool | Unset | None = UNSET,
        progress: float | Unset | None = UNSET,
        estimated_completion: datetime | Unset | None = UNSET,
        error: JobError | str | Unset | None = UNSET,
        heartbeat_timeout_seconds: float | Unset | None = UNSET,
        labels: Mapping[str, str] | Unset | None = UNSET,
        result: Mapping[str, Any] | Unset | None = UNSET,
        trace_parent: str | Unset | None = UNSET,
        attempt: int = 0,
        expected_revision: int = 0,
        request_id: str | None = None,
        allow_missing: bool = False,
        name: str = "",
        parent_id: str = "",
        timeout_seconds: float | None = None,
    ) -> Job:
        """Report on a job and return it as stored: the one call of a worker.

        An argument left out is not written; None clears the field (as do "" and {}), except `state`. Without anything
        to write it is a heartbeat. With a state that ends the job or its attempt, reason and error are cleaned: control
        characters and escape sequences are removed, and what is too long is cut, so that the end is not refused.

        Args:
            id: which job.
            state: where to move it; a JobState or its name.
            reason: why it is in this state, for people.
            reports_progress: whether it reports progress; the first progress sets it.
            progress: in percent, 0 to 100; a lower value within one attempt leaves it where it is.
            estimated_completion: an aware datetime.
            error: what went wrong; for FAILED, RETRYING, ABORTED and CANCELLED. A string is the message of an error
                with the code UNKNOWN.
            heartbeat_timeout_seconds: as in `create`.
            labels: replace all labels.
            result: replaces the whole result.
            trace_parent: the trace that the job belongs to from now on, a W3C traceparent. Left out: with `tracing`,
                the active trace.
            attempt: the attempt that writes; 0: any. With state IN_PROGRESS it is a claim, and must be the job's
                attempt plus one; otherwise the job's attempt.
            expected_revision: above 0, the revision that the job must have.
            request_id: as in `create`.
            allow_missing: create the job first if it does not exist, with `name`, `parent_id` and `labels`.
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
            id, state=state, reason=reason, reports_progress=reports_progress, progress=progress, error=error,
            labels=labels, result=result, trace_parent=trace_parent, estimated_completion=estimated_completion,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds, attempt=attempt, expected_revision=expected_revision,
            request_id=request_id, allow_missing=allow_missing, name=name, parent_id=parent_id,
        )  # fmt: skip
        request = requests.update_request(update)
        requests.set_trace_parent(request, self._connection.trace_parent)
        response = await self._connection.call("UpdateJob", request, timeout_seconds)
        return requests.job_in(response)

    async def batch_update(self, updates: Iterable[JobUpdate], *, timeout_seconds: float | None = None) -> BatchResults:
        """Send any number of updates and return their results, in their order.

        A call takes up to 500 updates and 1 MB; more updates are sent in several calls, one after the other.

        Each is `JobUpdate(id, …)` with the arguments of `update`, and succeeds or fails by itself: its place in the
        list holds the job, without its `result`, or the error that `update` would have raised. Updates of one job take
        effect in their order. If a call fails after others have succeeded, its error is the result of all updates from
        there on.

        Args:
            updates: what to send.
            timeout_seconds: the deadline of each call; None: the client's.

        Raises:
            JobStatusError: the first call failed.
        """
        batch = requests.Batch(updates, self._connection.trace_parent)
        for request in batch.requests:
            try:
                batch.answered(request, await self._connection.call("BatchUpdateJobs", request, timeout_seconds))
            except JobStatusError as error:
                batch.failed(error)
                break
        return batch.results

    async def cancel(
        self,
        id: str,
        *,
        reason: str = "",
        force: bool = False,
        cascade: bool = False,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
    ) -> Job:
        """Request a job's end and return it as stored.

        PENDING and RETRYING become CANCELLED at once. IN_PROGRESS gets `cancel_requested` and `cancel_reason`; the
        worker decides. With `force`, a job that is stalled becomes CANCELLED: its worker cannot decide. A done job
        stays as it is.

        With `cascade`, the same is done to the job's children, to their children, and so on, in many transactions: if
        the call fails, call again.

        Raises:
            NotFoundError: no job has this id.
        """
        request = requests.cancel_request(id, reason, force, cascade, request_id)
        response = await self._connection.call("CancelJob", request, timeout_seconds)
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
        budget = self._connection.retry_budget(timeout_seconds)
        request = requests.request_of(pb.DeleteJobRequest, id=id, expected_revision=expected_revision)
        try:
            await self._connection.call("DeleteJob", request, budget=budget)
        except JobExpiredError:
            # A try before this one may have deleted it.
            if not budget.may_have_taken_effect:
                raise

    async def list(
        self,
        filter: JobFilter | None = None,
        *,
        page_size: int = 0,
        page_token: str = "",
        timeout_seconds: float | None = None,
    ) -> JobPage:
        """Return a page of the jobs that match, newest created first.

        Pages are stable while jobs are added. Only an empty `next_page_token` means that there are no more.

        Args:
            filter: which jobs; None: all.
            page_size: the largest number of entries; 0 means 50, above 1,000 means 1,000.
            page_token: the `next_page_token` of the page before, of the same filter; "": the first page.
            timeout_seconds: the call's deadline; None: the client's.

        Raises:
            InvalidTokenError: page_token is not valid, or belongs to another filter.
            InvalidArgumentError: a value is not valid.
        """
        request = requests.list_request(filter, page_size, page_token)
        response = await self._connection.call("ListJobs", request, timeout_seconds)
        return requests.jobs_in(response)

    async def list_all(
        self, filter: JobFilter | None = None, *, page_size: int = 0, timeout_seconds: float | None = None
    ) -> AsyncIterator[Job]:
        """Iterate over all jobs that match, newest created first; pages are read as they are needed.

        Args:
            filter: which jobs; None: all.
            page_size: the number of jobs to read in one call; 0: as many as the service allows, which is 1,000.
            timeout_seconds: the deadline of each call; None: the client's.

        Raises:
            InvalidArgumentError: a value is not valid.
            DataLossError: after all other jobs: some are left out because what is stored of them is damaged.
        """
        token = ""
        unreachable: list[str] = []
        while True:
            page = await self.list(
                filter,
                page_size=page_size or requests.LARGEST_PAGE,
                page_token=token,
                timeout_seconds=timeout_seconds,
            )
            for job in page.jobs:
                yield job
            unreachable += page.unreachable
            token = page.next_page_token
            if not token:
                break
        if unreachable:
            raise requests.left_out(unreachable)

    async def history(
        self, id: str, *, page_size: int = 0, page_token: str = "", timeout_seconds: float | None = None
    ) -> TransitionPage:
        """Return a page of a job's transitions, oldest first; a job keeps its newest 1,000.

        Args:
            id: which job.
            page_size: the largest number of entries; 0 means 50, above 1,000 means 1,000.
            page_token: the `next_page_token` of the page before; "": the first page.
            timeout_seconds: the call's deadline; None: the client's.

        Raises:
            NotFoundError: no job has this id.
            InvalidTokenError: page_token is not valid, or belongs to another job.
        """
        request = requests.request_of(pb.ListJobTransitionsRequest, id=id, page_size=page_size, page_token=page_token)
        response = await self._connection.call("ListJobTransitions", request, timeout_seconds)
        return requests.transitions_in(response)

    def watch(
        self,
        id: str,
        *,
        heartbeat_interval_seconds: float | None = None,
        min_update_interval_seconds: float | None = None,
        give_up_seconds: float | None = None,
    ) -> AsyncWatch:
        """Follow a job to its end: iterate over its states, the first as it is now, the last done.

        States in between may be skipped; the newest is always returned. The watch survives cut connections, restarts
        and silent servers: it calls again, with growing pauses up to 10 seconds, and resumes where it was. So it does
        for up to a minute if a proxy refuses the call after the service has answered. Leaving the loop early, or
        closing the iterator, ends the stream at once.

        Args:
            id: which job.
            heartbeat_interval_seconds: the interval of the server's heartbeats while nothing changes, at least 1; after
                three times that without a message, the watch calls again. None: 30, or a third of give_up_seconds if
                that is less.
            min_update_interval_seconds: the shortest time between states that differ in progress, reason and estimates
                only. None: 0.1.
            give_up_seconds: raise UnavailableError after this time without progress, which is news, or a message of a
                stream that was open for a second. None: never.

        Raises:
            NotFoundError: no job has this id.
            JobStatusError: an error that is not transient.
        """
        state = JobWatchState(
            id,
            heartbeat_interval_seconds=heartbeat_interval_seconds,
            min_update_interval_seconds=min_update_interval_seconds,
            give_up_seconds=values.seconds_or_none(give_up_seconds, "give_up_seconds"),
        )
        return self._connection.watch(state)

    def watch_jobs(
        self,
        filter: JobFilter | None = None,
        *,
        resume_token: str = "",
        heartbeat_interval_seconds: float | None = None,
        min_update_interval_seconds: float | None = None,
        give_up_seconds: float | None = None,
    ) -> AsyncJobsWatch:
        """Follow all jobs that match: iterate over their changes, without an end.

        Each is a `JobChange(type, id, revision, job)`: SNAPSHOT for each job that exists, then one SYNCED, then UPDATED
        with the newest state after changes, and REMOVED for a job that no longer matches (with the job) or was deleted
        or has expired (job is None). States in between may be skipped; the newest is always returned, and none twice.

        The watch survives interruptions as `watch` does, and returns the missed changes and another SYNCED after them.
        RESET means: discard all jobs, snapshots of those that exist follow. It is returned if the service no longer has
        the missed changes, or if far more jobs have changed than match; and if a watch is cut before SYNCED: without
        resume_token, since jobs may have been removed in between, and with one if it is cut twice. After two cuts the
        jobs are listed in pages.

        The iterator has a `resume_token`, with which another watch resumes where this one stopped. It keeps the id and
        the version of each job that matches.

        Args:
            filter: which jobs; None: all.
            resume_token: of an earlier watch or a `list` with the same filter: begin with the changes since, without
                snapshots; jobs that may have matched are REMOVED then, whether or not they were returned before. "":
                begin with snapshots.
            heartbeat_interval_seconds: as in `watch`.
            min_update_interval_seconds: as in `watch`, for each job.
            give_up_seconds: as in `watch`.

        Raises:
            InvalidTokenError: resume_token is not valid, or belongs to another filter.
            JobStatusError: an error that is not transient.
        """
        state = JobsWatchState(
            filter,
            resume_token=resume_token,
            heartbeat_interval_seconds=heartbeat_interval_seconds,
            min_update_interval_seconds=min_update_interval_seconds,
            give_up_seconds=values.seconds_or_none(give_up_seconds, "give_up_seconds"),
        )
        return self._connection.watch_jobs(state)

    async def wait(self, id: str, timeout: float | None = None) -> Job:
        """Wait for a job's end and return the done job.

        Args:
            id: which job.
            timeout: in seconds; None: no limit, also while no server can be reached.

        Raises:
            DeadlineExceededError: the job is not known to be done in time.
            NotFoundError: no job has this id.
        """
        timeout_seconds = values.seconds_or_none(timeout, "timeout")
        interval = WAIT_UPDATE_INTERVAL_SECONDS
        state = JobWatchState(id, min_update_interval_seconds=interval, timeout_seconds=timeout_seconds)
        async with self._connection.watch(state) as jobs:
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
        parent_id: str | None = None,
        trace_parent: str | None = None,
        heartbeat_timeout_seconds: float | None = DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
        finish_timeout_seconds: float = DEFAULT_FINISH_TIMEOUT_SECONDS,
        strict: bool = False,
        retries: int = 0,
        on_report_error: OnReportError | None = None,
    ) -> AsyncTrackedJob:
        """Report a block of work as a job: a context manager for workers.

        Entering it creates a job IN_PROGRESS, or with `id` claims one that exists. While the block runs, heartbeats are
        sent. Its end reports SUCCEEDED, or FAILED if it raises; the exception is propagated.

        Reporting never breaks the work: while the service cannot be reached, the block runs and its newest state is
        reported later. An outcome that could not be reported is logged.

        Args:
            name: for people and filters; control characters are removed, and what is too long is cut.
            id: claim the job with this id, as its next attempt; with a name too, create it if it does not exist.
                None: create a job.
            labels: to filter by, for a job that is created.
            parent_id: the id of the job that this one is part of, for a job that is created. None: the job on this
                server in whose block this is called, in the same thread or task, or in a task that was made there; else
                the job that `jobstatus run` made for this program (JOBSTATUS_JOB_ID), if any. "": no job.
            trace_parent: the trace that the job belongs to, a W3C traceparent. None: with `tracing`, the active trace.
            heartbeat_timeout_seconds: the job is `stalled` after this time without a report; 1 second to 7 days. None:
                never, or with `id` as the job has it.
            finish_timeout_seconds: how long the end of the block waits at most for the outcome to be reported.
            strict: raise at the beginning of the block if the job cannot be created or claimed, and at its end if the
                outcome or a part of it cannot be reported.
            retries: how often the block will be run again, with the job's `id`, after it raised: the end of such an
                attempt means RETRYING, and only that of the last one FAILED.
            on_report_error: called with a sentence and the error when reports begin to fail, are refused, or end, and
                when a value cannot be sent and is left out. It is called where reports are sent, and delays them. None:
                log a warning or an error.
        """
        if parent_id is None:
            outer = enclosing_job(self._connection.target) or self._job_id
            parent_id = outer if outer != id else ""
        heartbeat_timeout_seconds = values.seconds_or_none(heartbeat_timeout_seconds, "heartbeat_timeout_seconds")
        claim = Claim(
            name=name,
            id=id,
            labels=labels,
            parent_id=parent_id,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            trace_parent=trace_parent or self._connection.trace_parent,
        )
        state = TrackState(
            claim,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            finish_timeout_seconds=values.seconds(finish_timeout_seconds, "finish_timeout_seconds"),
            call_timeout_seconds=self._connection.timeout_seconds,
            strict=strict,
            retries=values.integer(retries, "retries"),
            on_report_error=on_report_error,
        )
        return AsyncTrackedJob(state, self._connection, self._finishing)

    async def track_iter(
        self, items: Iterable[T], name: str = "", *, total: float | None = None, **track: Any
    ) -> AsyncIterator[T]:
        """Iterate over `items` as a tracked job, with the share that is done as progress.

        The job begins with the first item and ends with the last: SUCCEEDED, or FAILED if `items` raises. A loop that
        is left earlier, by `break` or an exception of its own, which the iterator cannot see, means ABORTED; use
        `track` where that matters.

        Args:
            items: what to iterate over.
            name: as in `track`.
            total: the number of items. None: as `items` tells it; without, the number of items done is the reason.
            track: other arguments of `track`.
        """
        total = operator.length_hint(items) if total is None else total
        async with self.track(name, **track) as job:
            done = 0
            try:
                for item in items:
                    yield item
                    done += 1
                    if total:
                        job.progress(100 * done / total)
                    else:
                        job.progress(reason=f"{done} done")
            except GeneratorExit:
                job.abort(f"left after {done} items")
                raise

    def reporter(
        self,
        *,
        on_error: Callable[[JobUpdate, JobStatusError], object] | None = None,
        on_job: Callable[[Job], object] | None = None,
        flush_interval_seconds: float = DEFAULT_FLUSH_INTERVAL_SECONDS,
        max_pending: int = DEFAULT_MAX_PENDING,
        finish_timeout_seconds: float = DEFAULT_FINISH_TIMEOUT_SECONDS,
    ) -> AsyncReporter:
        """Report on many jobs in the background: a context manager for workers.

        Its `update` returns at once. Updates are sent in batches of up to 500, in their order, and retried while the
        service cannot be reached, without taking effect twice. While it limits the rate of calls or updates, they are
        sent less often, with the newest state of each job. Reporting never breaks the work: nothing is raised.
        Leaving the block sends the pending updates. `track` is for one job, and also claims it and sends heartbeats.

        The two functions are called where batches are sent, and delay them; for an update that cannot be queued,
        on_error is called by `update`. Both may call `update`.

        Args:
            on_error: called with each update that has no effect, and the error: the service refused it, it could not be
                sent until the end, or the queue was full. None: log an error.
            on_job: called with each job as it was answered, without its `result`; check its `cancel_requested`.
            flush_interval_seconds: how long the first update waits for others to share its call.
            max_pending: the largest number of updates in the queue. When it is full, the oldest with nothing but
                progress, reason and estimated_completion is dropped; without any such, the newest update is.
            finish_timeout_seconds: how long the end of the block waits at most for all answers.
        """
        state = ReporterState(
            Callbacks(on_job, on_error),
            flush_interval_seconds=values.seconds(flush_interval_seconds, "flush_interval_seconds"),
            max_pending=values.integer(max_pending, "max_pending"),
            finish_timeout_seconds=values.seconds(finish_timeout_seconds, "finish_timeout_seconds"),
            call_timeout_seconds=self._connection.timeout_seconds,
            trace_parent=lambda: self._connection.trace_parent,
        )
        return AsyncReporter(state, self._connection.send_once, self._finishing)

    async def whoami(self, *, timeout_seconds: float | None = None) -> Identity:
        """Return the identity as which the server makes this client's calls.

        It has the principal, the tenant, the role, the jobs that the caller is limited to, and the expiry.

        Raises:
            UnauthenticatedError: the server does not accept the credentials; its subclass says why.
        """
        response = await self._connection.call("GetCallerIdentity", pb.GetCallerIdentityRequest(), timeout_seconds)
        return requests.identity_in(response)

    async def close(self) -> None:
        """Close the connection. Calls and watches that are open end with UnavailableError, and so do later ones.

        What tracked jobs and reporters still have to send after their blocks is sent before, for at most their
        finish_timeout_seconds. May be called more than once.
        """
        await self._finishing.close(self._connection.close)
