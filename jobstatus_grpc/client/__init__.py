"""The clients and what they return."""

from jobstatus_grpc.client.aio import AsyncJobStatusClient
from jobstatus_grpc.client.endpoint import Tls
from jobstatus_grpc.client.reporter import AsyncReporter, Reporter
from jobstatus_grpc.client.requests import UNSET, JobChange, JobChangeType, JobPage, JobUpdate, TransitionPage, Unset
from jobstatus_grpc.client.sync import JobStatusClient
from jobstatus_grpc.client.token import TokenCommand
from jobstatus_grpc.client.track import AsyncTrackedJob, TrackedJob
from jobstatus_grpc.client.watch import AsyncJobsWatch, AsyncWatch, JobsWatch, Watch

__all__ = [
    "UNSET",
    "AsyncJobStatusClient",
    "AsyncJobsWatch",
    "AsyncReporter",
    "AsyncTrackedJob",
    "AsyncWatch",
    "JobChange",
    "JobChangeType",
    "JobPage",
    "JobStatusClient",
    "JobUpdate",
    "JobsWatch",
    "Reporter",
    "Tls",
    "TokenCommand",
    "TrackedJob",
    "TransitionPage",
    "Unset",
    "Watch",
]
