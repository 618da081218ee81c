"""The asyncio client. The sync one has the same methods, and takes their documentation from here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

from jobstatus_grpc.client.aio_calls import AsyncCalls
from jobstatus_grpc.client.aio_connection import AsyncConnection
from jobstatus_grpc.client.answers import Answers
from jobstatus_grpc.client.channel import DEFAULT_TIMEOUT_SECONDS, ClientClosedError, endpoint
from jobstatus_grpc.client.claim import Claim
from jobstatus_grpc.client.gathering import Gathering
from jobstatus_grpc.client.jobs_watching import JobsWatching
from jobstatus_grpc.client.reporter import DEFAULT_FLUSH_INTERVAL_SECONDS, DEFAULT_MAX_PENDING, AsyncReporter
from jobstatus_grpc.client.reporting import (
    DEFAULT_FINISH_TIMEOUT_SECONDS,
    DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
    Reporting,
)
from jobstatus_grpc.client.track import AsyncTrackedJob
from jobstatus_grpc.client.watch import AsyncJobsWatch, AsyncWatch
from jobstatus_grpc.client.watching import WAIT_UPDATE_INTERVAL_SECONDS, Watching
from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.record import Job
from jobstatus_grpc.wire.calls import JobUpdate


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
        )
        return AsyncTrackedJob(reporting, self._connection.report)

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
