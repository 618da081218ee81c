"""Every limit, at it and one over: INVALID_FIELD names the field, and nothing is written."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf import duration_pb2, struct_pb2, timestamp_pb2
from jobstatus.v1 import job_status_pb2 as pb

FIRST_SECOND, LAST_SECOND = -62_135_596_800, 253_402_300_799  # of the years 1 and 9999
DAYS_7 = 7 * 86_400


def instant(seconds: int, nanos: int = 0) -> timestamp_pb2.Timestamp:
    return timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos)


def span(seconds: int, nanos: int = 0) -> duration_pb2.Duration:
    return duration_pb2.Duration(seconds=seconds, nanos=nanos)


def result(**values: Any) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(values)
    return struct


def result_of_bytes(size: int) -> struct_pb2.Struct:
    """A result that is this large on the wire."""
    struct = result(text="")
    while (missing := size - struct.ByteSize()) > 0:
        struct.fields["text"].string_value += "x" * max(1, missing - 8)
    assert struct.ByteSize() == size
    return struct


def result_of_depth(depth: int, kind: str) -> struct_pb2.Struct:
    """Objects, lists, or both by turns within each other; the outermost object counts as one."""
    value: Any = "leaf"
    for level in range(depth - 1):
        is_list = kind == "lists" or (kind == "both" and level % 2)
        value = [value] if is_list else {"a": value}
    return result(a=value)


def labels(count: int) -> dict[str, str]:
    return {f"key-{number}": "" for number in range(count)}


# The field that a violation names; values that are within its limit; values that are not.
EVERYWHERE: dict[str, tuple[str, list[Any], list[Any]]] = {
    "reason": ("job.reason", ["x" * 4096, "é" * 2048, "a\n\tb", "\u2028"], ["x" * 4097, "é" * 2048 + "x", "\r", "\0"]),
    "progress": ("job.progress", [0, 100, 5e-324], [-1e-9, 100.0000001, math.nan, math.inf, -math.inf]),
    "estimated_completion": (
        "job.estimated_completion",
        [instant(FIRST_SECOND), instant(LAST_SECOND, 999_999_999), instant(0)],
        [instant(FIRST_SECOND - 1), instant(LAST_SECOND + 1), instant(0, -1), instant(0, 10**9), instant(2**63 - 1)],
    ),
    "heartbeat_timeout": (
        "job.heartbeat_timeout",
        [span(1), span(DAYS_7), span(1, 500_000_000)],
        [span(0), span(0, 999_999_000), span(DAYS_7, 1000), span(-1), span(1, -1), span(2, 10**9), span(2**63 - 1)],
    ),
    "labels": (
        "job.labels",
        [labels(64), {"k" * 63: "v" * 256}, {"é" * 31 + "x": "é" * 128}],
        [labels(65), {"": "v"}, {"k" * 64: ""}, {"é" * 32: ""}, {"k": "v" * 257}, {"k": "\n"}, {"\t": ""}],
    ),
    "result": (
        "job.result",
        [result(), result_of_bytes(65_536), *(result_of_depth(32, kind) for kind in ("objects", "lists", "both"))],
        [
            result_of_bytes(65_537), result_of_depth(33, "lists"), result_of_depth(33, "both"),
            *(result(deep=[{"er": value}]) for value in (math.nan, math.inf, -math.inf)),
        ],
    ),
}  # fmt: skip
AT_CREATION: dict[str, tuple[str, list[Any], list[Any]]] = {
    "name": ("job.name", ["x" * 256, "é" * 128, "\xa0"], ["x" * 257, "é" * 129, "a\nb", "\t", "\x7f", "\x9f"]),
    "parent_id": ("job.parent_id", ["x" * 128, "A-z0.9_:"], ["x" * 129, "a b", "ä", "a/b", "a\n"]),
}
IN_UPDATES: dict[str, tuple[str, list[Any], list[Any]]] = {
    "error": (
        "job.error",
        [{"code": 16, "message": "x" * 4096, "reason": "R" * 128}, {"code": 1, "message": "a\n\tb"}, {}],
        [
            {"code": 17}, {"code": -1}, {"message": "x" * 4097}, {"message": "é" * 2049}, {"message": "\r"},
            {"reason": "R" * 129}, {"reason": "\n"},
        ],
    ),
    "state": ("job.state", [3, 5, 6, 7], [8, 99, -1, 2**31 - 1, -(2**31)]),
}  # fmt: skip


def cases(*tables: dict[str, tuple[str, list[Any], list[Any]]], good: bool) -> list[Any]:
    """One case for each value, with field and number as its id."""
    return [
        pytest.param(name, field, value, id=f"{name}-{number}")
        for table in tables
        for name, (field, within, beyond) in table.items()
        for number, value in enumerate(within if good else beyond)
    ]


@pytest.mark.parametrize(("name", "field", "value"), cases(EVERYWHERE, AT_CREATION, good=True))
def test_a_job_is_created_at_its_limits(any_service, new_id, name, field, value):
    job = any_service.create(id=new_id(), **{name: value})
    assert any_service.get(job.id) == job
    assert pb.JobStatus(**{name: getattr(job, name)}) == pb.JobStatus(**{name: cut_to_microseconds(value)})


def cut_to_microseconds(value):
    return instant(value.seconds, value.nanos // 1000 * 1000) if isinstance(value, timestamp_pb2.Timestamp) else value


@pytest.mark.parametrize(("name", "field", "value"), cases(EVERYWHERE, AT_CREATION, good=False))
def test_a_job_is_not_created_beyond_its_limits(service, refused, new_id, name, field, value):
    job_id = new_id()
    refusal = refused(service.create, id=job_id, **{name: value})
    assert refusal.kind == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert {violated.partition("[")[0] for violated in refusal.fields} == {field}
    assert refused(service.get, job_id).reason == "JOB_NOT_FOUND"


@pytest.mark.parametrize(("name", "field", "value"), cases(EVERYWHERE, IN_UPDATES, good=True))
def test_an_update_may_reach_the_limits(any_service, update_of, new_id, name, field, value):
    for send in (any_service.update, lambda *args, **fields: any_service.batch(update_of(*args, **fields))[0].job):
        job = any_service.job_in("RETRYING", id=new_id())
        assert send(job.id, **{name: value}).revision in (job.revision, job.revision + 1)
        assert send(job.id, mask=[name], **{name: value}).revision in (job.revision, job.revision + 1)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("name", "field", "value"), cases(EVERYWHERE, IN_UPDATES, good=False))
def test_an_update_beyond_the_limits_is_refused(service, update_of, refused, new_id, name, field, value, masked):
    job = service.job_in("RETRYING", id=new_id())
    update = update_of(job.id, mask=["reason", name] if masked else None, **{"reason": "written?", name: value})
    refusal = refused(service.stub.UpdateJob, update)
    assert refusal.kind == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert refusal.fields
    assert all(violated.startswith(field) for violated in refusal.fields)
    assert service.get(job.id) == job
    good = update_of(job.id, reason="beside it")
    first, second = service.batch(update, good)
    assert (first.error.code, first.error.message, first.error.reason) == (3, refusal.message, "INVALID_FIELD")
    assert second.job.revision == job.revision + 1


def test_a_result_of_objects_33_deep_is_refused_in_its_place(service, update_of, refused, new_id):
    job = service.job_in("IN_PROGRESS", id=new_id())
    update = update_of(job.id, result=result_of_depth(33, "objects"))
    assert refused(service.stub.UpdateJob, update).kind == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert service.get(job.id) == job
    first, second = service.batch(update, update_of(job.id, reason="beside it"))
    assert first.error.reason == "INVALID_FIELD"
    assert second.job.reason == "beside it"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"attempt": -1}, "attempt"),
        ({"attempt": -(2**31)}, "attempt"),
        ({"expected_revision": -1}, "expected_revision"),
        ({"request_id": "x" * 65}, "request_id"),
        ({"request_id": "é" * 33}, "request_id"),
        ({"request_id": "a\n"}, "request_id"),
        ({"allow_missing": True, "name": "x" * 257}, "job.name"),
        ({"allow_missing": True, "parent_id": "a b"}, "job.parent_id"),
        ({"allow_missing": True, "mask": [], "labels": labels(65)}, "job.labels"),
    ],
)
def test_what_stands_beside_the_job_has_limits_too(service, refused, new_id, fields, field):
    job = service.job_in("IN_PROGRESS", id=new_id())
    assert refused(service.update, job.id, reason="x", **fields).fields == [field]
    assert service.get(job.id) == job


def test_a_violation_is_reported_once(service, refused, new_id):
    refusal = refused(service.update, new_id(), allow_missing=True, labels={"k": "v" * 257})
    assert refusal.fields == ["job.labels['k']"]


def test_a_request_id_of_64_bytes_is_fine(any_service, new_id):
    job = any_service.create(id=new_id(), request_id="é" * 32)
    assert any_service.update(job.id, reason="x", request_id="y" * 64).reason == "x"
    assert any_service.cancel(job.id, reason="x" * 4096, request_id="z" * 64).done


IDS = {"empty": "", "long": "x" * 129, "space": "a b", "umlaut": "ä", "slash": "a/b", "newline": "a\n", "nul": "\0"}


@pytest.mark.parametrize("job_id", IDS.values(), ids=IDS)
def test_what_cannot_be_an_id_is_refused_by_every_rpc(service, refused, job_id):
    def watch(job_id):
        return list(service.watch(job_id))

    expected = ("INVALID_ARGUMENT", "INVALID_FIELD")
    for call, field in ((service.get, "id"), (service.cancel, "id"), (watch, "id"), (service.update, "job.id")):
        refusal = refused(call, job_id)
        assert (refusal.kind, refusal.fields) == (expected, [field])
    if job_id:
        assert refused(service.create, id=job_id).fields == ["job.id"]


def test_an_id_of_128_characters_is_fine(any_service, new_id):
    job_id = f"{new_id()}:A_z.9-".ljust(128, "0")
    assert any_service.create(id=job_id, parent_id=job_id).id == job_id
    assert any_service.update(job_id, reason="x").id == job_id
    assert any_service.cancel(job_id).id == job_id
    assert [message.event.job.id for message in any_service.watch(job_id)] == [job_id]


@pytest.mark.parametrize(
    ("fields", "field"), [({"reason": "x" * 4097}, "reason"), ({"request_id": "x" * 65}, "request_id")]
)
def test_a_cancel_beyond_its_limits_is_refused(service, refused, new_id, fields, field):
    job = service.job_in("IN_PROGRESS", id=new_id())
    refusal = refused(service.cancel, job.id, **fields)
    assert (refusal.kind, refusal.fields) == (("INVALID_ARGUMENT", "INVALID_FIELD"), [field])
    assert service.get(job.id) == job


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"heartbeat_interval": span(0)}, "heartbeat_interval"),
        ({"heartbeat_interval": span(0, 999_999_000)}, "heartbeat_interval"),
        ({"heartbeat_interval": span(-1)}, "heartbeat_interval"),
        ({"heartbeat_interval": span(1, -1)}, "heartbeat_interval"),
        ({"heartbeat_interval": span(2**63 - 1)}, "heartbeat_interval"),
        ({"min_update_interval": span(0, -1000)}, "min_update_interval"),
        ({"min_update_interval": span(-(2**63))}, "min_update_interval"),
    ],
)
def test_a_watch_beyond_its_limits_is_refused(service, refused, new_id, fields, field):
    job = service.job_in("SUCCEEDED", id=new_id())
    refusal = refused(lambda: list(service.watch(job.id, **fields)))
    assert (refusal.kind, refusal.fields) == (("INVALID_ARGUMENT", "INVALID_FIELD"), [field])
