"""Errors to gRPC status and back, by one table for the server and the clients.

An error of this service carries google.rpc.ErrorInfo (and BadRequest, RetryInfo) in `grpc-status-details-bin`, by the
richer error model of https://grpc.io/docs/guides/error/.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import errors
from jobstatus_grpc.errors import FieldViolation, InvalidFieldError, JobStatusError, RetryableError

DOMAIN = "jobstatus.v1"

DETAILS_KEY = "grpc-status-details-bin"

MAX_MESSAGE_BYTES = 640
"""Of an error's message, percent-encoded. It travels twice: so, and in the details."""

MAX_DETAILS_BYTES = 2080
"""Of the details before base64. All trailers together stay under 3.5 KiB: a proxy with a header buffer of one page, as
nginx has by default, answers a call with larger ones by HTTP 502, which clients take for an outage."""

MAX_FIELD_BYTES = 150

MAX_DESCRIPTION_BYTES = 300

MAX_METADATA_BYTES = 150
"""Of one value in the details' metadata."""

_CODE_OF_CLASS: Mapping[type[JobStatusError], grpc.StatusCode] = {
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.JobAlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    errors.InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.FailedPreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.RevisionMismatchError: grpc.StatusCode.ABORTED,
    errors.ResourceExhaustedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DataLossError: grpc.StatusCode.DATA_LOSS,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.UnimplementedError: grpc.StatusCode.UNIMPLEMENTED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}

_CLASS_OF_REASON = {cls.reason: cls for cls in errors.error_classes() if vars(cls).get("reason")}
"""A class without a reason of its own, such as one of an authenticator, is its base class to clients."""

_CLASS_OF_CODE = {code: cls for cls, code in _CODE_OF_CLASS.items()}


def code_of(error: JobStatusError) -> grpc.StatusCode:
    """Return the gRPC code of the class of `error`, or of its nearest base class that has one."""
    for cls in type(error).__mro__:
        if cls in _CODE_OF_CLASS:
            return _CODE_OF_CLASS[cls]
    return grpc.StatusCode.UNKNOWN


def code_number(error: JobStatusError) -> int:
    """Return the google.rpc.Code of `error`."""
    number: int = code_of(error).value[0]
    return number


def status_of(error: JobStatusError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Return `error` as the arguments of a context's `abort`: code, message, trailing metadata."""
    if isinstance(error, errors.ResourceExhaustedError):
        cls: Any = type(error)  # mypy takes the __hash__ of its instances for its own
        return _status_of_refusal(cls, error.message, tuple(error.metadata.items()), error.retry_after_seconds)
    return code_of(error), short_message(error), trailers_of(error)


@functools.lru_cache(maxsize=1024)
def _status_of_refusal(
    cls: type[errors.ResourceExhaustedError],
    message: str,
    metadata: tuple[tuple[str, str], ...],
    retry_after_seconds: float,
) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Return the status of an error that a busy server sends often: to render it takes as long as to answer a call."""
    error = cls(message, **dict(metadata))
    error.retry_after_seconds = retry_after_seconds
    return code_of(error), short_message(error), trailers_of(error)


def short_message(error: JobStatusError) -> str:
    """Return the message of `error`, cut to MAX_MESSAGE_BYTES."""
    return _cut(error.message, MAX_MESSAGE_BYTES)


def _cut(text: str, max_bytes: int) -> str:
    """Return `text`, cut so that it takes at most `max_bytes` when percent-encoded."""
    if len(text) * 12 <= max_bytes:
        return text
    size = 0
    for index, character in enumerate(text):
        is_plain = " " <= character <= "~" and character != "%"
        size += 1 if is_plain else 3 * len(character.encode("utf-8", "replace"))
        if size > max_bytes:
            return text[:index] + "…"
    return text


def trailers_of(error: JobStatusError) -> tuple[tuple[str, bytes], ...]:
    """Return the trailing metadata that carries the details of `error`."""
    metadata = {key: _cut(value, MAX_METADATA_BYTES) for key, value in error.metadata.items()}
    status = status_pb2.Status(code=code_number(error), message=short_message(error))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    if isinstance(error, RetryableError):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_after_seconds * 1000))
        status.details.add().Pack(retry)
    if isinstance(error, InvalidFieldError) and error.violations:
        room = MAX_DETAILS_BYTES - status.ByteSize()
        status.details.add().Pack(_bad_request(error.violations, max_bytes=room))
    return ((DETAILS_KEY, status.SerializeToString()),)


_REST_BYTES = 100
"""Room for the number of violations that are left out, and for what wraps a BadRequest."""


def _bad_request(violations: Sequence[FieldViolation], *, max_bytes: int) -> error_details_pb2.BadRequest:
    """List all violations, or as many as fit and the number of the others."""
    bad_request = error_details_pb2.BadRequest()
    for index, violation in enumerate(violations):
        bad_request.field_violations.add(
            field=_cut(violation.field, MAX_FIELD_BYTES),
            description=_cut(violation.description, MAX_DESCRIPTION_BYTES),
        )
        if bad_request.ByteSize() + _REST_BYTES > max_bytes:
            del bad_request.field_violations[-1]
            bad_request.field_violations.add(description=f"and {len(violations) - index} more")
            break
    return bad_request


def to_job_error(error: JobStatusError) -> pb.JobError:
    """Return `error` as a result in a batch: code, message and reason are those of a call of its own."""
    return pb.JobError(code=code_number(error), message=short_message(error), reason=error.reason)


def from_job_error(message: pb.JobError) -> JobStatusError:
    """Return the error of a result in a batch."""
    return _make(message.code, message.message, message.reason, {}, ())


def from_rpc_error(rpc_error: grpc.RpcError) -> JobStatusError:
    """Return the error of a failed call as one of `errors`, with its details if the server sent some."""
    # Every error that a call raises is a grpc.Call too, or its asyncio counterpart; the base class declares nothing.
    call: Any = rpc_error
    trailers = dict(call.trailing_metadata() or ())
    info, violations, retry_after_seconds = _read_details(trailers.get(DETAILS_KEY))
    number: int = call.code().value[0]
    error = _make(number, _explained(call.details() or ""), info.reason, dict(info.metadata), violations)
    if retry_after_seconds is not None and isinstance(error, RetryableError):
        error.retry_after_seconds = retry_after_seconds
    return error


_EXPLAINED = "cannot connect to "

_NOT_CONNECTED = re.compile(r"failed to connect to all addresses; last error: \w+: (\S+): (.*)", re.DOTALL)

_TLS_CAUSES = {
    r"Hostname Verification Check failed": (
        "the server's certificate is for another host name; use that in the address, or as --server-name (server_name)"
    ),
    r"WRONG_VERSION_NUMBER": "the server does not use TLS; leave out grpcs:// and --ca (tls), or use its port with TLS",
    r"ALERT_([A-Z_]+)": "the server ended the TLS handshake: {0}. Check the client's certificate (--cert, cert_file)",
    # What the core writes if the certificate has not been verified yet.
    r"OPENSSL_internal:(\w+): Invalid certificate verification context": "the TLS handshake failed: {0}",
    r"OPENSSL_internal:\w+: (.*?)(?:: OK)?$": (
        "the server's certificate is not trusted: {0}. Check it, and the CA (--ca, ca_file)"
    ),
    r"Failed to create security handshaker": "the CA, certificate or key of the client cannot be used",
    r"Socket closed|Connection reset by peer|End of TCP stream": (
        "the server closes connections at once: it may require TLS (grpcs://, --ca, tls), or a client certificate that "
        "it trusts (--cert, cert_file)"
    ),
}
"""By what gRPC's core writes of a failed connection: what it means, and what to do."""


def _explained(details: str) -> str:
    """Return the details of an error, in one line where they are those of a connection that failed because of TLS."""
    if failed := _NOT_CONNECTED.match(details):
        for pattern, text in _TLS_CAUSES.items():
            if cause := re.search(pattern, failed[2]):
                return f"{_EXPLAINED}{failed[1]}: {text.format(*cause.groups())}"
    return details


def better_explained(error: JobStatusError, before: JobStatusError | None) -> JobStatusError:
    """Return which of the errors of two tries to raise: `error`, unless that of the try before says more.

    Of a host with several addresses gRPC names the error of one, now of this and now of that. Where TLS failed at one
    and nothing listens at another, as at ::1 of localhost, the first is the one to mend.
    """
    failed = _NOT_CONNECTED.match(error.message)
    if failed and before and before.message.startswith(_EXPLAINED):
        is_of_another = not before.message.startswith(f"{_EXPLAINED}{failed[1]}: ")
        return before if is_of_another else error
    return error


def has_details(rpc_error: grpc.RpcError) -> bool:
    """Return whether a call was refused by the service, and not by a proxy: its errors have details."""
    call: Any = rpc_error
    return any(key == DETAILS_KEY for key, _ in call.trailing_metadata() or ())


def _read_details(
    data: bytes | None,
) -> tuple[error_details_pb2.ErrorInfo, tuple[FieldViolation, ...], float | None]:
    info = error_details_pb2.ErrorInfo()
    violations: tuple[FieldViolation, ...] = ()
    retry_after_seconds: float | None = None
    try:
        details = status_pb2.Status.FromString(data or b"").details
    except DecodeError:
        return info, violations, retry_after_seconds
    for detail in details:
        bad_request, retry, read = (
            error_details_pb2.BadRequest(), error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()
        )  # fmt: skip
        with contextlib.suppress(DecodeError):
            if detail.Unpack(bad_request):
                found = bad_request.field_violations
                violations = tuple(FieldViolation(item.field, item.description) for item in found)
            elif detail.Unpack(retry):
                retry_after_seconds = retry.retry_delay.ToMilliseconds() / 1000
            elif detail.Unpack(read) and read.domain == DOMAIN:
                info = read
    return info, violations, retry_after_seconds


def _make(
    code_value: int,
    message: str,
    reason: str,
    metadata: dict[str, str],
    violations: tuple[FieldViolation, ...],
) -> JobStatusError:
    code = next((code for code in grpc.StatusCode if code.value[0] == code_value), grpc.StatusCode.UNKNOWN)
    cls = _CLASS_OF_REASON.get(reason) or _CLASS_OF_CODE.get(code, JobStatusError)
    error: JobStatusError
    if issubclass(cls, InvalidFieldError):
        error = cls(message or None, violations=violations)
    else:
        error = cls(message or None)
    error.metadata.update(metadata)
    if cls is JobStatusError:
        error.metadata["code"] = code.name
    return error
