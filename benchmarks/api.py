"""What the load generator says to a server: the same few things to each side, in its own words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jobstatus.v1 import job_status_pb2 as pb

from benchmarks import messages
from benchmarks.client import Client, path
from benchmarks.messages import Updates


class Api(Protocol):
    """How to read a job, change it and follow it."""

    read: str
    """The path of the method that reads one job."""
    update: str
    batch: str
    """Empty where there is none."""
    watch: str
    ends_watches: bool
    """Whether the server closes the watches of a done job."""

    def prepare(self, client: Client, job_ids: Sequence[str]) -> None:
        """Create the jobs."""

    def read_request(self, job_id: str) -> bytes:
        """Return the request that reads a job."""

    def updates(self, job_ids: Sequence[str], *, batch: bool = False) -> Updates:
        """Return requests, each of which changes the only job, or with `batch` all."""

    def marked_request(self, job_id: str, mark: str, *, is_end: bool = False) -> bytes:
        """Return the update whose messages to watchers hold `mark`; the last of the job if `is_end`."""

    def watch_request(self, job_id: str) -> bytes:
        """Return the request that follows a job."""

    def changes_in(self, message: bytes) -> int:
        """Return how many changes a message of a watch tells."""

    def changes_of(self, client: Client, job_ids: Sequence[str]) -> int | None:
        """Return how many changes these jobs, and no others, have seen since they were created; None: it cannot say."""


class JobsApi:
    """Of our service."""

    read = path("GetJob")
    update = path("UpdateJob")
    batch = path("BatchUpdateJobs")
    watch = path("WatchJob")
    ends_watches = True

    def prepare(self, client: Client, job_ids: Sequence[str]) -> None:
        client.call_all(path("CreateJob"), [messages.create_request(job_id) for job_id in job_ids])

    def read_request(self, job_id: str) -> bytes:
        return messages.get_request(job_id)

    def updates(self, job_ids: Sequence[str], *, batch: bool = False) -> Updates:
        return messages.job_updates(job_ids, batch=batch)

    def marked_request(self, job_id: str, mark: str, *, is_end: bool = False) -> bytes:
        return messages.marked_request(job_id, mark, is_end=is_end)

    def watch_request(self, job_id: str) -> bytes:
        return pb.WatchJobRequest(id=job_id).SerializeToString()

    def changes_in(self, message: bytes) -> int:
        return 1

    def changes_of(self, client: Client, job_ids: Sequence[str]) -> int | None:
        replies = client.call_all(self.read, [self.read_request(job_id) for job_id in job_ids])
        return sum(messages.revision_of(reply) - 1 for reply in replies)


class BareApi(JobsApi):
    """Of the bare handlers, which know no job."""

    def prepare(self, client: Client, job_ids: Sequence[str]) -> None:
        return None

    def changes_of(self, client: Client, job_ids: Sequence[str]) -> int | None:
        return None
