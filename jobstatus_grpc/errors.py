"""The errors of the service: raised by the rules and the stores, sent as gRPC status, raised again by the clients.

A class's docstring is its default message, its `reason` the ErrorInfo reason on the wire.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator
from typing import ClassVar


class JobStatusError(Exception):
    """The call failed."""

    reason: ClassVar[str] = ""

    def __init__(self, message: str | None = None, /, **metadata: str) -> None:
        """Take a message for people (default: the docstring) and facts for machines, such as `id="a"`."""
        super().__init__(message or inspect.cleandoc(type(self).__doc__ or "").split("\n\n")[0])
        self.metadata = metadata

    @property
    def message(self) -> str:
        """What went wrong and what to do, for people."""
        return str(self.args[0])


class RetryableError(JobStatusError):
    """The service cannot take this now. Try again later."""

    retry_after_seconds: float = 1.0


# NOT_FOUND


class NotFoundError(JobStatusError):
    """No such thing."""


class JobNotFoundError(NotFoundError):
    """No job has this id.

    Check the id, and the tenant of the caller: it is not known whether the job ever existed.
    """

    reason = "JOB_NOT_FOUND"


class JobExpiredError(NotFoundError):
    """The job with this id was deleted or has expired.

    It does not come back. Keep what is needed of a job longer than the retention of the server elsewhere.
    """

    reason = "JOB_EXPIRED"


# ALREADY_EXISTS


class JobAlreadyExistsError(JobStatusError):
    """A job with this id exists, or did within the last 24 hours. Choose another id."""

    reason = "JOB_ALREADY_EXISTS"


# INVALID_ARGUMENT


class InvalidArgumentError(JobStatusError):
    """The request is not valid. Do not retry it unchanged."""


@dataclasses.dataclass(frozen=True, slots=True)
class FieldViolation:
    """An invalid field of a request: its path, and what it must be."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}" if self.field else self.description


MAX_LISTED_VIOLATIONS = 20


class InvalidFieldError(InvalidArgumentError):
    """A field of the request is not valid.

    Change each field that BadRequest in the details names.
    """

    reason = "INVALID_FIELD"

    def __init__(
        self, message: str | None = None, /, *, violations: Iterable[FieldViolation] = (), **metadata: str
    ) -> None:
        """Take all violations; the message lists the first MAX_LISTED_VIOLATIONS unless one is given."""
        self.violations = tuple(violations)
        listed = "; ".join(map(str, self.violations[:MAX_LISTED_VIOLATIONS]))
        super().__init__(message or listed or None, **metadata)


class RequestIdReusedError(InvalidArgumentError):
    """This request_id was used before with another payload. Use a new request_id for each new request."""

    reason = "REQUEST_ID_REUSED"


class InvalidTokenError(InvalidArgumentError):
    """The token is malformed, or belongs to another filter or job. Start again without one."""

    reason = "INVALID_TOKEN"


# FAILED_PRECONDITION


class FailedPreconditionError(JobStatusError):
    """The job is not in a state that allows this."""


class IllegalTransitionError(FailedPreconditionError):
    """The job cannot move from its state to the one asked for.

    Read the job: its state is another one than the caller expects.
    """

    reason = "ILLEGAL_TRANSITION"


class StaleAttemptError(FailedPreconditionError):
    """Another attempt owns this job. Stop working on it."""

    reason = "STALE_ATTEMPT"


class RequestIdTooOldError(FailedPreconditionError):
    """The request_id is older than the service remembers: the request may have taken effect. Read the job."""

    reason = "REQUEST_ID_TOO_OLD"


class JobNotDoneError(FailedPreconditionError):
    """The job is not done. Cancel it, or wait for its end."""

    reason = "JOB_NOT_DONE"


# ABORTED


class RevisionMismatchError(JobStatusError):
    """The job has changed since the expected revision. Read it again."""

    reason = "REVISION_MISMATCH"


# RESOURCE_EXHAUSTED


class ResourceExhaustedError(RetryableError):
    """A limit is reached. Try again later."""


class TooManyWatchersError(ResourceExhaustedError):
    """The server has reached its limit of open watches. Try again later.

    The same reason as for a limit of the caller or of its tenant: the metadata has limit, scope and value.
    """

    reason = "TOO_MANY_WATCHERS"


class TooManyRequestsError(ResourceExhaustedError):
    """The server has reached its limit of calls in flight. Try again later.

    The same reason as for a limit of the caller or of its tenant: the metadata has limit, scope and value.
    """

    reason = "TOO_MANY_REQUESTS"
    retry_after_seconds = 0.1


class TooManyJobsError(ResourceExhaustedError):
    """The tenant has as many jobs as it may. Delete some, or wait until some expire."""

    reason = "TOO_MANY_JOBS"
    retry_after_seconds = 5.0


class StoreFullError(ResourceExhaustedError):
    """The store's disk is full; nothing was written. Make room, then try again."""

    reason = "STORE_FULL"
    retry_after_seconds = 5.0


# DATA_LOSS


class DataLossError(JobStatusError):
    """What is stored of this job is damaged. Other jobs are not affected; the operator can restore a backup."""

    reason = "JOB_DAMAGED"


# UNAVAILABLE


class UnavailableError(RetryableError):
    """The service cannot be reached. Check the address, then try again."""


class StoreUnavailableError(UnavailableError):
    """The store cannot be reached. Try again later."""

    reason = "STORE_UNAVAILABLE"


class DrainingError(UnavailableError):
    """The server is shutting down. Try again: another server, or its successor, answers."""

    reason = "DRAINING"


class StreamAgeError(UnavailableError):
    """The stream has reached its maximum age. Call again to continue."""

    reason = "STREAM_AGE"
    retry_after_seconds = 0.1


class StoreChangedError(UnavailableError):
    """The store was replaced by another incarnation. Call again to continue from its state."""

    reason = "STORE_CHANGED"
    retry_after_seconds = 0.1


class IdentityUnavailableError(UnavailableError):
    """The credentials of the call cannot be checked now. Try again later."""

    reason = "IDENTITY_UNAVAILABLE"


class IdentityChangedError(UnavailableError):
    """The tenant of the caller, or the jobs that it may see, have changed. Call again to continue."""

    reason = "IDENTITY_CHANGED"
    retry_after_seconds = 0.1


# The rest


class UnauthenticatedError(JobStatusError):
    """The call carries no valid credentials."""


class NoIdentityError(UnauthenticatedError):
    """The call carries no credentials. Send a token, or connect with a client certificate."""

    reason = "NO_IDENTITY"


class BadIdentityError(UnauthenticatedError):
    """The credentials of the call are not valid here. Check the token or the certificate."""

    reason = "BAD_IDENTITY"


class IdentityExpiredError(UnauthenticatedError):
    """The credentials of the call have expired. Renew the token or the certificate."""

    reason = "IDENTITY_EXPIRED"


class PermissionDeniedError(JobStatusError):
    """The caller's role does not allow this.

    Use the credentials of a caller with the role that the message names, or have the role of this one changed.
    """

    reason = "NOT_ALLOWED"


class DeadlineExceededError(JobStatusError):
    """The call did not end within its deadline; whether it took effect is not known."""


class UnimplementedError(JobStatusError):
    """The server does not offer this call."""


class InternalError(JobStatusError):
    """The server failed. Its log has the details under this id."""


class CannotStartError(Exception):
    """The server or a store cannot start with these settings; the message says what to do. Never sent over the wire."""


class StoreUnreachableError(CannotStartError):
    """The store's database cannot be reached at the moment; with the same settings it may be later."""


def error_classes(root: type[JobStatusError] = JobStatusError) -> Iterator[type[JobStatusError]]:
    """Yield `root` and every class below it, parents first."""
    yield root
    for child in root.__subclasses__():
        yield from error_classes(child)
