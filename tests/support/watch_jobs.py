"""A reader of WatchJobs, which checks the rules that every stream must keep, and a writer of random changes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobstatus.v1 import job_status_pb2 as pb

if TYPE_CHECKING:
    from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceAsyncStub

JOBS = 15

SNAPSHOT, UPDATED, REMOVED = pb.JOB_EVENT_TYPE_SNAPSHOT, pb.JOB_EVENT_TYPE_UPDATED, pb.JOB_EVENT_TYPE_REMOVED
SYNCED, HEARTBEAT, RESET = pb.JOB_EVENT_TYPE_SYNCED, pb.JOB_EVENT_TYPE_HEARTBEAT, pb.JOB_EVENT_TYPE_RESET
MIB = 1024 * 1024


class Reader:
    """The matching jobs, as sent by the server over many streams."""

    def __init__(self) -> None:
        self.jobs: dict[str, pb.JobStatus] = {}
        self.token = ""
        self.resets = 0
        self.is_synced: Any = False
        self._sent: dict[str, int] = {}

    @property
    def revisions(self) -> dict[str, int]:
        """The revision of each matching job."""
        return {job.id: job.revision for job in self.jobs.values()}

    def begin(self, **fields: Any) -> pb.WatchJobsRequest:
        """Return the request of the next stream, with the last token, if there is one."""
        self.is_synced = False
        self._sent.clear()
        if not self.token:
            self.jobs.clear()
        return pb.WatchJobsRequest(resume_token=self.token, **fields)

    def take(self, message: Any) -> None:
        """Apply a message as a client would."""
        assert message.HasField("server_time")
        assert 1 <= len(message.events) <= 256
        assert len(message.events) == 1 or message.ByteSize() < MIB + 1000
        was_synced, resets = self.is_synced, self.resets
        for event in message.events:
            self._take(event)
        if not was_synced and not self.is_synced and self.resets == resets:
            assert message.resume_token == self.token
        self.token = message.resume_token or self.token

    def _take(self, event: pb.JobEvent) -> None:
        job = event.job
        if event.type == RESET:
            self.jobs.clear()
            self._sent.clear()
            self.resets += 1
            self.is_synced = False
        elif event.type == SYNCED:
            assert not self.is_synced
            self.is_synced = True
        elif event.type == REMOVED:
            assert job.revision >= self._sent.get(job.id, 0)
            self._sent[job.id] = job.revision
            self.jobs.pop(job.id, None)
        elif event.type in (SNAPSHOT, UPDATED):
            assert event.type == UPDATED or not self.is_synced
            # A change of the numbers of children repeats the revision.
            least = self._sent.get(job.id, 0) + (
                job.id not in self.jobs or not _has_other_numbers(job, self.jobs[job.id])
            )
            assert job.revision >= least, "never an older state after a newer one"
            self._sent[job.id] = job.revision
            self.jobs[job.id] = job
        else:
            assert event == pb.JobEvent(type=pb.JOB_EVENT_TYPE_HEARTBEAT)


def _has_other_numbers(job: pb.JobStatus, before: pb.JobStatus) -> bool:
    return (job.children, job.children_progress) != (before.children, before.children_progress)


async def listed(stub: JobStatusServiceAsyncStub, job_filter: pb.JobFilter) -> dict[str, int]:
    """The revisions of the jobs that match."""
    request = pb.ListJobsRequest(filter=job_filter)
    revisions: dict[str, int] = {}
    while True:
        page = await stub.ListJobs(request)
        revisions |= {job.id: job.revision for job in page.jobs}
        request.page_token = page.next_page_token
        if not page.next_page_token:
            return revisions


def pauses(messages: Sequence[Any]) -> list[float]:
    """The seconds between the sending of each message and the next."""
    sent_at = [message.server_time.ToNanoseconds() / 1e9 for message in messages]
    return [later - earlier for earlier, later in itertools.pairwise(sent_at)]


def events_of(message: Any) -> list[tuple[int, str]]:
    """The type and job id of each event."""
    return [(event.type, event.job.id) for event in message.events]


class Writer:
    """Makes random changes to its own jobs, one after another."""

    def __init__(self, stub, number, seed):
        self._stub = stub
        self._chance = random.Random(seed)
        self._jobs: dict[str, bool] = {}
        self._number = number
        self._created = 0
        self.deleted = 0

    async def run(self):
        while True:
            await self.step()

    async def step(self):
        chance = self._chance
        if len(self._jobs) < JOBS:
            return await self._create()
        job_id = chance.choice(list(self._jobs))
        if self._jobs[job_id]:
            del self._jobs[job_id]
            self.deleted += 1
            return await self._stub.DeleteJob(pb.DeleteJobRequest(id=job_id))
        job = pb.JobStatus(id=job_id)
        kind = chance.randrange(10)
        if kind == 0:
            job.state = pb.JOB_STATE_SUCCEEDED
            self._jobs[job_id] = True
        elif kind < 4:
            job.labels["color"] = chance.choice(["red", "green", "blue"])
        else:
            job.progress = chance.uniform(0, 100)
            job.reason = str(chance.random())
        return await self._stub.UpdateJob(pb.UpdateJobRequest(job=job))

    async def _create(self):
        self._created += 1
        job = pb.JobStatus(id=f"job-{self._number}-{self._created}", labels={"color": "red"})
        job.name = self._chance.choice(["odd", "even"])
        job.state = self._chance.choice([pb.JOB_STATE_PENDING, pb.JOB_STATE_IN_PROGRESS])
        self._jobs[job.id] = False
        await self._stub.CreateJob(pb.CreateJobRequest(job=job))
