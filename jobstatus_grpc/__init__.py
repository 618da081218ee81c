"""Job status over gRPC: report what a job does, follow it to its end.

The clients, and what they return and raise. The clients are loaded when they are first asked for: the rules, the stores
and the command line need neither them nor grpc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobstatus_grpc.errors import (
    DeadlineExceededError,
    DrainingError,
    FailedPreconditionError,
    FieldViolation,
    IllegalTransitionError,
    InternalError,
    InvalidArgumentError,
    InvalidFieldError,
    InvalidTokenError,
    JobAlreadyExistsError,
    JobExpiredError,
    JobNotDoneError,
    JobNotFoundError,
    JobStatusError,
    NotFoundError,
    PermissionDeniedError,
    RequestIdReusedError,
    ResourceExhaustedError,
    RetryableError,
    RevisionMismatchError,
    StaleAttemptError,
    StoreChangedError,
    StoreFullError,
    StoreUnavailableError,
    StreamAgeError,
    TooManyRequestsError,
    TooManyWatchersError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from jobstatus_grpc.record import Job, JobError
from jobstatus_grpc.state import JobState

if TYPE_CHECKING:
    from jobstatus_grpc.client import (
        UNSET,
        AsyncJobStatusClient,
        AsyncTrackedJob,
        AsyncWatch,
        JobStatusClient,
        JobUpdate,
        TrackedJob,
        Unset,
        Watch,
    )

    __version__: str

__all__ = [
    "UNSET",
    "AsyncJobStatusClient",
    "AsyncTrackedJob",
    "AsyncWatch",
    "DeadlineExceededError",
    "DrainingError",
    "FailedPreconditionError",
    "FieldViolation",
    "IllegalTransitionError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidFieldError",
    "InvalidTokenError",
    "Job",
    "JobAlreadyExistsError",
    "JobError",
    "JobExpiredError",
    "JobNotDoneError",
    "JobNotFoundError",
    "JobState",
    "JobStatusClient",
    "JobStatusError",
    "JobUpdate",
    "NotFoundError",
    "PermissionDeniedError",
    "RequestIdReusedError",
    "ResourceExhaustedError",
    "RetryableError",
    "RevisionMismatchError",
    "StaleAttemptError",
    "StoreChangedError",
    "StoreFullError",
    "StoreUnavailableError",
    "StreamAgeError",
    "TooManyRequestsError",
    "TooManyWatchersError",
    "TrackedJob",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Unset",
    "Watch",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("jobstatus-grpc")
        except metadata.PackageNotFoundError:
            return "0+unknown"  # used from a checkout that is not installed
    if name in __all__:
        from jobstatus_grpc import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
