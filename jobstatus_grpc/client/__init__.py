"""The clients and what they return."""

from jobstatus_grpc.client.aio import AsyncJobStatusClient
from jobstatus_grpc.client.sync import JobStatusClient
from jobstatus_grpc.client.track import AsyncTrackedJob, TrackedJob
from jobstatus_grpc.client.watch import AsyncWatch, Watch
from jobstatus_grpc.wire.calls import UNSET, JobUpdate, Unset

__all__ = [
    "UNSET",
    "AsyncJobStatusClient",
    "AsyncTrackedJob",
    "AsyncWatch",
    "JobStatusClient",
    "JobUpdate",
    "TrackedJob",
    "Unset",
    "Watch",
]
