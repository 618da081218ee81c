"""Stores with many jobs: how they are made, and what is asked of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from jobstatus.v1 import job_status_pb2 as pb

from benchmarks.client import CallFailedError, Client, path
from benchmarks.messages import FIRST_PROGRESS, STEP

BATCH = 100
BATCHES_AT_ONCE = 16
PER_VALUE = 100
"""So many of every ten thousand jobs have each name, each label, and each parent."""
_STATES = (
    pb.JOB_STATE_PENDING,
    pb.JOB_STATE_IN_PROGRESS,  # of these every tenth falls silent, and is stalled
    pb.JOB_STATE_IN_PROGRESS,
    *[pb.JOB_STATE_SUCCEEDED] * 5,
    pb.JOB_STATE_FAILED,
    pb.JOB_STATE_CANCELLED,
)


def id_of(number: int) -> str:
    """Return the id of a job."""
    return f"job-{number:08}"


def _creation(number: int) -> pb.UpdateJobRequest:
    job = pb.JobStatus(id=id_of(number), name=f"name-{number % PER_VALUE}", state=_STATES[number % len(_STATES)])
    job.labels["team"] = f"team-{number % PER_VALUE}"
    job.parent_id = id_of(number % PER_VALUE)
    if number % PER_VALUE == 1:
        job.heartbeat_timeout.CopyFrom(Duration(seconds=1))
    return pb.UpdateJobRequest(job=job, allow_missing=True)


def make(client: Client, count: int) -> None:
    """Create so many jobs, with BatchUpdateJobs.

    Raises:
        CallFailedError: one could not be created.
    """
    many = BATCH * BATCHES_AT_ONCE
    for start in range(0, count, many):
        numbers = range(start, min(start + many, count))
        send_batches(client, [_creation(number) for number in numbers])


def send_batches(client: Client, updates: Sequence[pb.UpdateJobRequest]) -> None:
    """Send updates, a hundred a call, several calls at once.

    Raises:
        CallFailedError: one was refused.
    """
    batches = [updates[start : start + BATCH] for start in range(0, len(updates), BATCH)]
    requests = [pb.BatchUpdateJobsRequest(updates=batch).SerializeToString() for batch in batches]
    for reply in client.call_all(path("BatchUpdateJobs"), requests):
        for result in pb.BatchUpdateJobsResponse.FromString(reply).results:
            if result.HasField("error"):
                raise CallFailedError(f"an update of a batch was refused: {result.error.message}")


class RandomJobs:
    """Requests about jobs at work, of all that there are; each update is a change. The same ones in each run."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._random = random.Random(count)
        self._sent = 0

    def get(self) -> bytes:
        """Return the next GetJobRequest."""
        return pb.GetJobRequest(id=self._next_id()).SerializeToString()

    def update(self) -> bytes:
        """Return the next UpdateJobRequest."""
        self._sent += 1
        job = pb.JobStatus(id=self._next_id(), progress=FIRST_PROGRESS + self._sent * STEP)
        return pb.UpdateJobRequest(job=job).SerializeToString()

    def _next_id(self) -> str:
        return id_of(self._random.randrange(2, self._count, len(_STATES)))


def pages(client: Client, count: int) -> Mapping[str, bytes]:
    """Return a ListJobsRequest for each way to filter; where jobs match, at least a page full does."""
    middle, later = (_created_at(client, number) for number in (count // 2, count // 2 + BATCH))
    filters = {
        "no filter": pb.JobFilter(),
        "ids": pb.JobFilter(ids=[id_of(number) for number in range(0, count, count // 50)]),
        "states": pb.JobFilter(states=[pb.JOB_STATE_FAILED]),
        "done": pb.JobFilter(done=True),
        "not done": pb.JobFilter(done=False),
        "stalled": pb.JobFilter(stalled=True),
        "names": pb.JobFilter(names=["name-7", "name-8"]),
        "name_prefix": pb.JobFilter(name_prefix="name-5"),
        "a label": pb.JobFilter(labels={"team": "team-7"}),
        "parent_id": pb.JobFilter(parent_id=id_of(7)),
        "created_before": pb.JobFilter(created_before=middle),
        "created, a range": pb.JobFilter(created_after=middle, created_before=later),
        "state and label": pb.JobFilter(states=[pb.JOB_STATE_FAILED], labels={"team": "team-8"}),
        "a rare conjunction": pb.JobFilter(states=[pb.JOB_STATE_FAILED], names=["name-7"]),
    }
    return {name: pb.ListJobsRequest(filter=filter).SerializeToString() for name, filter in filters.items()}


def _created_at(client: Client, number: int) -> Timestamp:
    reply = client.call(path("GetJob"), pb.GetJobRequest(id=id_of(number)).SerializeToString())
    return pb.GetJobResponse.FromString(reply).job.created_at
