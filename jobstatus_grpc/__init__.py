"""Job status over gRPC: report the progress of jobs, and watch them to their end.

The public names: the clients, and the types that they return and raise. The clients are imported on first use, because
the rules, the stores and the command line need neither them nor grpc.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from jobstatus_grpc.auth import Identity, Role
from jobstatus_grpc.errors import (
    BadIdentityError,
    DataLossError,
    DeadlineExceededError,
    DrainingError,
    FailedPreconditionError,
    FieldViolation,
    IdentityChangedError,
    IdentityExpiredError,
    IdentityUnavailableError,
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
    NoIdentityError,
    NotFoundError,
    PermissionDeniedError,
    RequestIdReusedError,
    RequestIdTooOldError,
    ResourceExhaustedError,
    RetryableError,
    RevisionMismatchError,
    StaleAttemptError,
    StoreChangedError,
    StoreFullError,
    StoreUnavailableError,
    StreamAgeError,
    TooManyJobsError,
    TooManyRequestsError,
    TooManyWatchersError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from jobstatus_grpc.job import Job, JobError, JobFilter, JobState, Transition

if TYPE_CHECKING:
    from jobstatus_grpc.client import (
        UNSET,
        AsyncJobStatusClient,
        AsyncJobsWatch,
        AsyncReporter,
        AsyncTrackedJob,
        AsyncWatch,
        JobChange,
        JobChangeType,
        JobPage,
        JobStatusClient,
        JobsWatch,
        JobUpdate,
        Reporter,
        Tls,
        TokenCommand,
        TrackedJob,
        TransitionPage,
        Unset,
        Watch,
    )

    __version__: str

__all__ = [
    "UNSET",
    "AsyncJobStatusClient",
    "AsyncJobsWatch",
    "AsyncReporter",
    "AsyncTrackedJob",
    "AsyncWatch",
    "BadIdentityError",
    "DataLossError",
    "DeadlineExceededError",
    "DrainingError",
    "FailedPreconditionError",
    "FieldViolation",
    "Identity",
    "IdentityChangedError",
    "IdentityExpiredError",
    "IdentityUnavailableError",
    "IllegalTransitionError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidFieldError",
    "InvalidTokenError",
    "Job",
    "JobAlreadyExistsError",
    "JobChange",
    "JobChangeType",
    "JobError",
    "JobExpiredError",
    "JobFilter",
    "JobNotDoneError",
    "JobNotFoundError",
    "JobPage",
    "JobState",
    "JobStatusClient",
    "JobStatusError",
    "JobUpdate",
    "JobsWatch",
    "NoIdentityError",
    "NotFoundError",
    "PermissionDeniedError",
    "Reporter",
    "RequestIdReusedError",
    "RequestIdTooOldError",
    "ResourceExhaustedError",
    "RetryableError",
    "RevisionMismatchError",
    "Role",
    "StaleAttemptError",
    "StoreChangedError",
    "StoreFullError",
    "StoreUnavailableError",
    "StreamAgeError",
    "Tls",
    "TokenCommand",
    "TooManyJobsError",
    "TooManyRequestsError",
    "TooManyWatchersError",
    "TrackedJob",
    "Transition",
    "TransitionPage",
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
        # gRPC reads it when it is loaded. Without it, calls hang in a child that was forked while a call was open.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")
        from jobstatus_grpc import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
