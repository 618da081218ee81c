"""The jobs and the requests of the benchmark: what a usual worker sends."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from jobstatus.v1 import job_status_pb2 as pb

_DOUBLE = struct.Struct("<d")
# Its eight bytes occur nowhere else in a request.
_PLACEHOLDER = 77.125731904731
FIRST_PROGRESS = 10.0
STEP = 0.0001


def create_request(job_id: str) -> bytes:
    """Return the CreateJobRequest of a job at work, in attempt 1."""
    request = pb.CreateJobRequest()
    request.job.id = job_id
    request.job.name = "nightly-backup"
    request.job.state = pb.JOB_STATE_IN_PROGRESS
    request.job.has_progress = True
    request.job.heartbeat_timeout.seconds = 600
    request.job.labels["team"] = "storage"
    return request.SerializeToString()


def get_request(job_id: str) -> bytes:
    """Return a GetJobRequest."""
    return pb.GetJobRequest(id=job_id).SerializeToString()


def watch_request(job_id: str) -> bytes:
    """Return a WatchJobRequest."""
    return pb.WatchJobRequest(id=job_id).SerializeToString()


def end_request(job_id: str) -> bytes:
    """Return the UpdateJobRequest that ends a job well."""
    return pb.UpdateJobRequest(job=pb.JobStatus(id=job_id, state=pb.JOB_STATE_SUCCEEDED), attempt=1).SerializeToString()


def is_end(message: bytes) -> bool:
    """Tell whether a message of a watch shows a done job."""
    return pb.WatchJobResponse.FromString(message).event.job.done


def revision_of(reply: bytes) -> int:
    """Return the job's revision in a GetJobResponse."""
    return pb.GetJobResponse.FromString(reply).job.revision


class Updates:
    """Requests that report progress, each a little more than the one before: every one changes its jobs."""

    def __init__(self, job_ids: Sequence[str], *, batch: bool = False) -> None:
        """Make UpdateJobRequests for the only job, or with `batch` BatchUpdateJobsRequests for all."""
        updates = [
            pb.UpdateJobRequest(
                job=pb.JobStatus(id=job_id, reason="copying /srv/data", progress=_PLACEHOLDER), attempt=1
            )
            for job_id in job_ids
        ]
        message = pb.BatchUpdateJobsRequest(updates=updates) if batch else updates[0]
        self._template = bytearray(message.SerializeToString())
        self._places = _find_all(bytes(self._template), _DOUBLE.pack(_PLACEHOLDER))
        self.job_ids = list(job_ids)
        self._batch = batch
        self.sent = 0
        """How many requests were made so far."""

    def copy(self) -> Updates:
        """Return the same requests from the first on."""
        return Updates(self.job_ids, batch=self._batch)

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
