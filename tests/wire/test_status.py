"""Errors as gRPC status and back, over the table and the error tree themselves."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from jobstatus_grpc import errors
from jobstatus_grpc.errors import FieldViolation, InvalidFieldError, JobStatusError, RetryableError
from jobstatus_grpc.wire import status

CLASSES = [cls for cls in errors.error_classes() if cls.__module__ == errors.__name__]
REASONS = {
    "JOB_NOT_FOUND": "NOT_FOUND",
    "JOB_EXPIRED": "NOT_FOUND",
    "JOB_ALREADY_EXISTS": "ALREADY_EXISTS",
    "INVALID_FIELD": "INVALID_ARGUMENT",
    "REQUEST_ID_REUSED": "INVALID_ARGUMENT",
    "INVALID_TOKEN": "INVALID_ARGUMENT",
    "ILLEGAL_TRANSITION": "FAILED_PRECONDITION",
    "STALE_ATTEMPT": "FAILED_PRECONDITION",
    "REQUEST_ID_TOO_OLD": "FAILED_PRECONDITION",
    "JOB_NOT_DONE": "FAILED_PRECONDITION",
    "REVISION_MISMATCH": "ABORTED",
    "JOB_DAMAGED": "DATA_LOSS",
    "TOO_MANY_WATCHERS": "RESOURCE_EXHAUSTED",
    "TOO_MANY_REQUESTS": "RESOURCE_EXHAUSTED",
    "TOO_MANY_JOBS": "RESOURCE_EXHAUSTED",
    "STORE_FULL": "RESOURCE_EXHAUSTED",
    "STORE_UNAVAILABLE": "UNAVAILABLE",
    "DRAINING": "UNAVAILABLE",
    "STREAM_AGE": "UNAVAILABLE",
    "STORE_CHANGED": "UNAVAILABLE",
    "IDENTITY_UNAVAILABLE": "UNAVAILABLE",
    "IDENTITY_CHANGED": "UNAVAILABLE",
    "NO_IDENTITY": "UNAUTHENTICATED",
    "BAD_IDENTITY": "UNAUTHENTICATED",
    "IDENTITY_EXPIRED": "UNAUTHENTICATED",
    "NOT_ALLOWED": "PERMISSION_DENIED",
}


class Failed(grpc.RpcError):
    """A failed call with the interface of grpc's."""

    def __init__(self, code, details="", trailers=()):
        super().__init__()
        self._parts = code, details, trailers

    def code(self):
        return self._parts[0]

    def details(self):
        return self._parts[1]

    def trailing_metadata(self):
        return self._parts[2]


def sent(error):
    """The error as its caller receives it."""
    return Failed(status.code_of(error), status.short_message(error), status.trailers_of(error))


def details_of(error):
    (trailer,) = status.trailers_of(error)
    assert trailer[0] == "grpc-status-details-bin"
    return status_pb2.Status.FromString(trailer[1])


def test_every_reason_has_the_code_that_is_documented():
    assert {cls.reason: status.code_of(cls()).name for cls in CLASSES if cls.reason} == REASONS


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_comes_back_as_what_it_was(cls):
    error = cls("what happened", id="a", other="b")
    back = status.from_rpc_error(sent(error))
    if status.code_of(error) is grpc.StatusCode.UNKNOWN:
        assert type(back) is JobStatusError
        return
    assert (type(back), back.message, back.metadata) == (cls, "what happened", {"id": "a", "other": "b"})


@pytest.mark.parametrize("cls", CLASSES)
def test_status_and_details_say_the_same(cls):
    error = cls("what happened", id="a")
    message, info = details_of(error), error_details_pb2.ErrorInfo()
    assert (message.code, message.message) == (status.code_number(error), "what happened")
    assert message.details[0].Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == (cls.reason, "jobstatus.v1", {"id": "a"})


@pytest.mark.parametrize("cls", CLASSES)
def test_the_error_of_a_batchs_result_is_that_of_its_own_call(cls):
    error = cls("what happened")
    message = status.to_job_error(error)
    assert (message.code, message.message, message.reason) == (status.code_number(error), "what happened", cls.reason)
    if status.code_of(error) is not grpc.StatusCode.UNKNOWN:
        assert type(status.from_job_error(message)) is cls


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if issubclass(cls, RetryableError) and cls.reason])
def test_a_retryable_error_has_a_retry_delay(cls):
    error = cls()
    error.retry_after_seconds = 2.5
    back = status.from_rpc_error(sent(error))
    assert isinstance(back, RetryableError)
    assert back.retry_after_seconds == 2.5


def test_every_violation_comes_back():
    violations = tuple(FieldViolation(f"field_{number}", f"must be {number}") for number in range(20))
    back = status.from_rpc_error(sent(InvalidFieldError(violations=violations)))
    assert isinstance(back, InvalidFieldError)
    assert back.violations == violations
    assert back.message.startswith("field_0: must be 0; field_1: must be 1")


def test_of_too_many_violations_the_number_left_out_is_reported():
    violations = [FieldViolation("f" * 100, "d" * 100) for _ in range(500)]
    back = status.from_rpc_error(sent(InvalidFieldError(violations=violations)))
    assert isinstance(back, InvalidFieldError)
    assert back.violations[-1].description == f"and {500 - len(back.violations) + 1} more"


@pytest.mark.parametrize("character", ["x", "é", "日", "😀", "%", "\n"])
@pytest.mark.parametrize("field", ["field", "description", "message"])
def test_details_stay_within_what_a_trailer_takes(character, field):
    if field == "message":
        error = InvalidFieldError(character * 5000)
    else:
        text = character * 300
        violations = [FieldViolation(**{"field": "f", "description": "d", field: text}) for _ in range(100)]
        error = InvalidFieldError(violations=violations)
    message = status.short_message(error).encode()
    on_the_wire = sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in message)
    details = sum(len(value) for _, value in status.trailers_of(error)) * 4 / 3
    assert on_the_wire + details < 3440


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_a_status_without_details_is_an_error_of_the_tree(code):
    error = status.from_rpc_error(Failed(code, "from somewhere else"))
    assert isinstance(error, JobStatusError)
    assert error.message == "from somewhere else"


def packed(message):
    detail = AnyMessage()
    detail.Pack(message)
    return detail


def foreign(*details, data=None):
    message = status_pb2.Status(code=5, message="m", details=details)
    return Failed(
        grpc.StatusCode.NOT_FOUND,
        "m",
        (("grpc-status-details-bin", message.SerializeToString() if data is None else data),),
    )


@pytest.mark.parametrize("key", ["message", "self", "violations", "code", "reason", ""])
def test_metadata_of_any_name_does_no_harm(key):
    info = error_details_pb2.ErrorInfo(reason="JOB_NOT_FOUND", domain="jobstatus.v1", metadata={key: "x"})
    back = status.from_rpc_error(foreign(packed(info)))
    assert isinstance(back, errors.JobNotFoundError)
    assert back.metadata[key] == "x"
    info.reason = "INVALID_FIELD"
    assert isinstance(status.from_rpc_error(foreign(packed(info))), InvalidFieldError)


@pytest.mark.parametrize(
    "broken",
    [
        foreign(data=b"\xff\xff"),
        foreign(AnyMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")),
        foreign(AnyMessage(type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\xff\xff")),
        foreign(AnyMessage(type_url="nonsense", value=b"\xff\xff")),
        foreign(AnyMessage()),
    ],
)
def test_details_that_cannot_be_read_leave_the_status(broken):
    back = status.from_rpc_error(broken)
    assert (type(back), back.message) == (errors.NotFoundError, "m")


def test_a_reason_of_another_domain_is_not_ours():
    info = error_details_pb2.ErrorInfo(reason="STALE_ATTEMPT", domain="example.org")
    assert type(status.from_rpc_error(foreign(packed(info)))) is errors.NotFoundError


def test_a_reason_of_a_later_version_is_read_by_its_code():
    info = error_details_pb2.ErrorInfo(reason="SOMETHING_NEW", domain="jobstatus.v1")
    assert type(status.from_rpc_error(foreign(packed(info)))) is errors.NotFoundError
