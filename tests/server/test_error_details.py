"""The details of errors: every violation at once, and never more than fits trailers."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, timestamp_pb2

# Client defaults: grpcio refuses some metadata above 8 KiB and all above 16 KiB.
MAX_TRAILER_BYTES = 3584

WRONG: dict[str, Any] = {
    "reason": "\0",
    "progress": 101,
    "estimated_completion": timestamp_pb2.Timestamp(nanos=-1),
    "heartbeat_timeout": duration_pb2.Duration(seconds=0),
    "labels": {"k": "\0"},
    "result": {"x": float("nan")},
}
WRONG_FIELDS = {f"job.{name}" for name in WRONG if name != "labels"} | {"job.labels['k']"}


def test_a_create_gets_all_its_violations(service, refused):
    refusal = refused(service.create, id="/", state=99, name="\0", parent_id="/", request_id="\0", **WRONG)
    others = {"job.id", "job.state", "job.name", "job.parent_id", "request_id"}
    assert sorted(refusal.fields) == sorted(WRONG_FIELDS | others)
    assert refusal.domain == "jobstatus.v1"
    assert all(field in refusal.message for field in refusal.fields)


@pytest.mark.parametrize("masked", [True, False])
def test_an_update_gets_all_its_violations(service, refused, masked):
    error = {"code": 17, "message": "\0", "reason": "\0"}
    mask = [*WRONG, "error", "state", "name", "nonsense"] if masked else None
    refusal = refused(
        service.update,
        "/",
        mask=mask,
        state=99,
        error=error,
        attempt=-1,
        expected_revision=-1,
        request_id="\0",
        **WRONG,
    )
    others = ["attempt", "expected_revision", "job.id", "job.state", "request_id"]
    others += ["job.error.code", "job.error.message", "job.error.reason", *(["update_mask"] * 2 if masked else [])]
    assert sorted(refusal.fields) == sorted([*WRONG_FIELDS, *others])


def test_a_cancel_gets_all_its_violations(service, refused):
    assert refused(service.cancel, "/", reason="\0", request_id="\0").fields == ["id", "reason", "request_id"]


def test_a_watch_gets_all_its_violations(service, refused):
    span = duration_pb2.Duration(seconds=-1)
    refusal = refused(lambda: list(service.watch("/", heartbeat_interval=span, min_update_interval=span)))
    assert refusal.fields == ["id", "heartbeat_interval", "min_update_interval"]


MANY: dict[str, dict[str, Any]] = {
    "labels": {"labels": {f"{number:063}": "\0" for number in range(64)}},
    "too many labels": {"labels": {f"{number:063}": "\0" for number in range(1000)}},
    "wide labels": {"labels": {chr(0x1F600 + number) * 63: "" for number in range(64)}},
    "control characters": {"labels": {"\0" * 60 + str(number): "" for number in range(64)}},
    "mask of 23 paths": {"mask": [f"no_such_field_{number}" for number in range(23)]},
    "mask": {"mask": [f"path {number} ".ljust(200, "x") for number in range(300)]},
    "wide mask": {"mask": [chr(0x1F600 + number) * 200 for number in range(64)]},
    "percent signs": {"mask": [f"{number}" + "%\n" * 100 for number in range(64)]},
}


@pytest.mark.parametrize("case", MANY)
def test_very_many_violations_still_reach_their_caller(service, refused, new_id, case):
    job = service.job_in("IN_PROGRESS", id=new_id())
    refusal = refused(service.update, job.id, **MANY[case])
    assert refusal.kind == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert refusal.fields
    assert refusal.message
    assert service.get(job.id) == job


@pytest.mark.parametrize("case", MANY)
def test_the_trailer_of_an_error_fits_what_clients_take(service, update_of, case):
    with pytest.raises(grpc.RpcError) as caught:
        service.stub.UpdateJob(update_of("a", **MANY[case]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert trailer_bytes(caught.value) <= MAX_TRAILER_BYTES


def trailer_bytes(error):
    """The size of the trailers on the wire: the message percent-encoded, binary values in base64, 32 an entry."""
    message = sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in error.details().encode())
    entries = [("grpc-message", message), ("grpc-status", 2)]
    entries += [(key, -(-len(value) // 3) * 4) for key, value in error.trailing_metadata() if key.endswith("-bin")]
    return sum(len(key) + size + 32 for key, size in entries)


def test_the_message_of_a_body_that_cannot_be_read_begins_with_what_is_wrong(service, refused):
    assert refused(service.send, "GetJob", b"\xff").message[0].isalpha()
