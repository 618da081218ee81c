"""The asyncio client. The sync one has the same methods, and takes their documentation from here."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from jobstatus_grpc.client.aio_calls import AsyncCalls
from jobstatus_grpc.client.aio_connection import AsyncConnection
from jobstatus_grpc.client.channel import DEFAULT_TIMEOUT_SECONDS, ClientClosedError, endpoint
from jobstatus_grpc.client.claim import Claim
from jobstatus_grpc.client.reporting import (
    DEFAULT_FINISH_TIMEOUT_SECONDS,
    DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
    Reporting,
)
from jobstatus_grpc.client.track import AsyncTrackedJob
from jobstatus_grpc.client.watch import AsyncWatch
from jobstatus_grpc.client.watching import WAIT_UPDATE_INTERVAL_SECONDS, Watching
from jobstatus_grpc.record import Job


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
