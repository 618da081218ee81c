"""The jobs and the requests of the benchmark: what a usual worker sends."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from jobstatus.v1 import job_status_pb2 as pb

_DOUBLE = struct.Struct("<d")
# Its eight bytes occur nowhere else in a request.
PLACEHOLDER = 77.125731904731
FIRST_PROGRESS = 10.0
STEP = 0.0001


def job_at_work(job_id: str) -> pb.JobStatus:
    """Return a job in attempt 1."""
    job = pb.JobStatus(id=job_id, name="nightly-backup", state=pb.JOB_STATE_IN_PROGRESS, has_progress=True)
    job.heartbeat_timeout.seconds = 600
    job.labels["team"] = "storage"
    return job


def create_request(job_id: str) -> bytes:
    """Return the CreateJobRequest of a job at work."""
    return pb.CreateJobRequest(job=job_at_work(job_id)).SerializeToString()


def get_request(job_id: str) -> bytes:
    """Return a GetJobRequest."""
    return pb.GetJobRequest(id=job_id).SerializeToString()


def marked_request(job_id: str, mark: str, *, is_end: bool = False) -> bytes:
    """Return the UpdateJobRequest that gives `mark` as reason, and ends the job well if `is_end`."""
    state = pb.JOB_STATE_SUCCEEDED if is_end else pb.JOB_STATE_UNSPECIFIED
    job = pb.JobStatus(id=job_id, state=state, reason=mark)
    return pb.UpdateJobRequest(job=job, attempt=1).SerializeToString()


def watch_message(reply: bytes) -> bytes:
    """Return the WatchJobResponse that tells the job in a GetJobResponse."""
    event = pb.JobEvent(type=pb.JOB_EVENT_TYPE_UPDATED, job=pb.GetJobResponse.FromString(reply).job)
    return pb.WatchJobResponse(event=event, server_time=event.job.updated_at).SerializeToString()


def revision_of(reply: bytes) -> int:
    """Return the job's revision in a GetJobResponse."""
    return pb.GetJobResponse.FromString(reply).job.revision


def job_updates(job_ids: Sequence[str], *, batch: bool = False) -> Updates:
    """Return UpdateJobRequests for the only job, or with `batch` BatchUpdateJobsRequests for all."""
    updates = [
        pb.UpdateJobRequest(job=pb.JobStatus(id=job_id, reason="copying /srv/data", progress=PLACEHOLDER), attempt=1)
        for job_id in job_ids
    ]
    message = pb.BatchUpdateJobsRequest(updates=updates) if batch else updates[0]
    return Updates(message.SerializeToString(), job_ids)


class Updates:
    """Requests that report progress, each a little more than the one before: every one changes its jobs."""

    def __init__(self, template: bytes, job_ids: Sequence[str]) -> None:
        """Take a request whose progress is PLACEHOLDER, and the jobs in it."""
        self._template = bytearray(template)
        self._places = _find_all(template, _DOUBLE.pack(PLACEHOLDER))
        self.job_ids = list(job_ids)
        self.sent = 0
        """How many requests were made so far."""

    def __call__(self) -> bytes:
        """Return the next request."""
        progress = FIRST_PROGRESS + self.sent * STEP
        self.sent += 1
        for place in self._places:
            _DOUBLE.pack_into(self._template, place, progress)
        return bytes(self._template)


def _find_all(data: bytes, part: bytes) -> list[int]:
    places: list[int] = []
    place = data.find(part)
    while place >= 0:
        places.append(place)
        place = data.find(part, place + 1)
    return places
