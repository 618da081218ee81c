"""Requests → commands."""

from __future__ import annotations

import timeit
from datetime import datetime, timedelta, timezone

import pytest
from google.protobuf import duration_pb2, field_mask_pb2, struct_pb2, timestamp_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Identity
from jobstatus_grpc.errors import InvalidFieldError
from jobstatus_grpc.job import WRITABLE_FIELDS, JobError, JobState, Update
from jobstatus_grpc.server import requests
from jobstatus_grpc.server.requests import to_updates

CALLER = Identity("me", tenant="ours")
RESULT = struct_pb2.Struct()
RESULT.update({"rows": 1})
TRACE_PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
WRITTEN = pb.JobStatus(
    id="a", state=pb.JOB_STATE_FAILED, reason="r", reports_progress=True, progress=0.0,
    estimated_completion=timestamp_pb2.Timestamp(seconds=1), error=pb.JobError(code=3, message="m", reason="R"),
    heartbeat_timeout=duration_pb2.Duration(seconds=5), labels={"k": "v"}, result=RESULT,
    trace_parent=TRACE_PARENT,
)  # fmt: skip
CHANGES = {
    "state": JobState.FAILED,
    "reason": "r",
    "reports_progress": True,
    "progress": 0.0,
    "estimated_completion": datetime(1970, 1, 1, 0, 0, 1, tzinfo=timezone.utc),
    "error": JobError(3, "m", "R"),
    "heartbeat_timeout": timedelta(seconds=5),
    "labels": {"k": "v"},
    "result": {"rows": 1.0},
    "trace_parent": TRACE_PARENT,
}
CLEARED = {
    "reason": "", "reports_progress": False, "progress": None, "estimated_completion": None, "error": None,
    "heartbeat_timeout": None, "labels": {}, "result": None, "trace_parent": "",
}  # fmt: skip


def masked(job, *paths, **fields):
    return pb.UpdateJobRequest(job=job, update_mask=field_mask_pb2.FieldMask(paths=paths), **fields)


def to_update(request):
    return requests.to_update(request, CALLER)


def test_every_writable_field_that_is_set_is_written():
    assert set(CHANGES) == WRITABLE_FIELDS
    assert to_update(pb.UpdateJobRequest(job=WRITTEN)).changes == CHANGES


@pytest.mark.parametrize("path", sorted(WRITABLE_FIELDS))
def test_a_mask_picks_what_it_names(path):
    assert to_update(masked(WRITTEN, path)).changes == {path: CHANGES[path]}


@pytest.mark.parametrize("path", sorted(CLEARED))
def test_what_a_mask_names_and_the_job_lacks_is_cleared(path):
    assert to_update(masked(pb.JobStatus(id="a"), path)).changes == {path: CLEARED[path]}


def test_nothing_set_and_nothing_named_is_a_heartbeat():
    assert to_update(pb.UpdateJobRequest(job=pb.JobStatus(id="a"))).changes == {}
    assert to_update(masked(WRITTEN)).changes == {}


def test_fences_and_caller_are_taken_over():
    request = pb.UpdateJobRequest(job=pb.JobStatus(id="a"), attempt=2, expected_revision=7)
    command = to_update(request)
    assert (command.id, command.attempt, command.expected_revision) == ("a", 2, 7)
    assert (command.actor, command.tenant, command.request) == ("me", "ours", None)


@pytest.mark.parametrize("missing", [True, False])
def test_name_parent_and_labels_count_where_the_job_may_be_missing(missing):
    job = pb.JobStatus(id="a", name="n", parent_id="p", labels={"k": "v"})
    command = to_update(pb.UpdateJobRequest(job=job, allow_missing=missing))
    taken = command.allow_missing, command.name, command.parent_id, command.labels_if_missing
    assert taken == ((True, "n", "p", {"k": "v"}) if missing else (False, "", "", {}))


def test_a_create_takes_what_a_creator_may_choose():
    job = pb.JobStatus()
    job.CopyFrom(WRITTEN)
    job.ClearField("error")
    job.state, job.name, job.parent_id = pb.JOB_STATE_IN_PROGRESS, "n", "p"
    command = requests.to_create(pb.CreateJobRequest(job=job, request_id="r"), CALLER)
    chosen = {name: getattr(command, name) for name in CHANGES if name not in ("state", "error")}
    assert chosen == {name: value for name, value in CHANGES.items() if name not in ("state", "error")}
    assert (command.state, command.name, command.parent_id) == (JobState.IN_PROGRESS, "n", "p")
    assert (command.actor, command.tenant) == ("me", "ours")
    assert command.request is not None
    assert command.request.value == "r"


def test_an_empty_create_is_a_pending_job_without_an_id():
    command = requests.to_create(pb.CreateJobRequest(), CALLER)
    assert (command.id, command.state, command.request) == ("", JobState.PENDING, None)


def hash_of(request):
    made = to_update(request) if isinstance(request, pb.UpdateJobRequest) else requests.to_create(request, CALLER)
    assert made.request is not None
    return made.request.payload_hash


def test_the_hash_of_a_payload_differs_from_every_other():
    job = pb.JobStatus(id="a")
    payloads = [
        pb.UpdateJobRequest(job=job, request_id="r"),
        pb.UpdateJobRequest(job=job, request_id="s"),
        pb.UpdateJobRequest(job=job, request_id="r", attempt=1),
        pb.UpdateJobRequest(job=pb.JobStatus(id="b"), request_id="r"),
        pb.UpdateJobRequest(job=pb.JobStatus(id="a", progress=0), request_id="r"),
        masked(job, request_id="r"),
        masked(job, "reason", request_id="r"),
        pb.CreateJobRequest(job=job, request_id="r"),
    ]
    assert len({hash_of(payload) for payload in payloads}) == len(payloads)


def test_the_hash_of_a_payload_does_not_depend_on_the_order_of_its_maps():
    labels = {f"key-{number}": str(number) for number in range(64)}
    forth, back = pb.UpdateJobRequest(request_id="r"), pb.UpdateJobRequest(request_id="r")
    for request, order in ((forth, labels), (back, dict(reversed(labels.items())))):
        request.job.CopyFrom(pb.JobStatus(id="a", labels=order))
        request.job.result.update(order)
    assert hash_of(forth) == hash_of(back)


def test_each_update_of_a_batch_is_a_command_or_its_error():
    good = pb.UpdateJobRequest(job=pb.JobStatus(id="a"))
    bad = pb.UpdateJobRequest(job=pb.JobStatus(id="/", progress=101))
    batch = pb.BatchUpdateJobsRequest(updates=[good, bad, good]).SerializeToString()
    first, second, third = to_updates(batch, CALLER)
    assert isinstance(first, Update)
    assert isinstance(second, InvalidFieldError)
    assert [violation.field for violation in second.violations] == ["job.id", "job.progress"]
    assert first == third


def test_a_watch_has_its_documented_intervals():
    watch = requests.to_watch(pb.WatchJobRequest(id="a"))
    assert (watch.heartbeat_interval, watch.min_update_interval) == (timedelta(seconds=30), timedelta(milliseconds=100))
    span = duration_pb2.Duration(seconds=1)
    asked = requests.to_watch(
        pb.WatchJobRequest(id="a", heartbeat_interval=span, min_update_interval=duration_pb2.Duration())
    )
    assert (asked.heartbeat_interval, asked.min_update_interval) == (timedelta(seconds=1), timedelta(0))


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05ab", b"\x0a\x02\xff\xfe", b"\x0b" * 200])
def test_bytes_that_are_no_request_are_an_error_of_ours(data):
    with pytest.raises(InvalidFieldError):
        requests.parse(pb.GetJobRequest, data)


def quickest(use):
    return min(timeit.repeat(use, number=1, repeat=3))


MILLION_UPDATES = b"\x0a\x00" * 1_000_000
"""The bytes of a batch, each update empty."""

UNKNOWN_FIELDS = b"\x10\x01\x1a\x02ab\x21" + bytes(8) + b"\x2d" + bytes(4)


@pytest.mark.parametrize(
    ("before", "count"),
    [(b"", 500), (UNKNOWN_FIELDS, 500), (b"\x13\x14", 1), (b"\x10\x01" * 101, 1)],
    ids=["updates", "unknown fields", "a group", "many unknown fields"],
)
def test_the_updates_of_a_batch_that_is_too_large_are_counted_without_parsing_it(before, count):
    data = before + MILLION_UPDATES
    assert requests.updates_in("BatchUpdateJobs", data) == count
    counting = quickest(lambda: requests.updates_in("BatchUpdateJobs", data))
    assert counting < quickest(lambda: pb.BatchUpdateJobsRequest.FromString(data)) / 5
    with pytest.raises(InvalidFieldError):
        requests.to_updates(data, CALLER)


def test_the_log_does_not_parse_requests_that_name_no_job():
    logging = quickest(lambda: requests.subject_of("BatchUpdateJobs", MILLION_UPDATES, None))
    assert logging < quickest(lambda: pb.BatchUpdateJobsRequest.FromString(MILLION_UPDATES)) / 5


def test_fields_of_a_newer_client_are_no_reason_to_refuse_a_large_batch():
    updates = [pb.UpdateJobRequest(job=pb.JobStatus(id="a", reason="x" * 500))] * 400
    data = UNKNOWN_FIELDS + pb.BatchUpdateJobsRequest(updates=updates).SerializeToString() + UNKNOWN_FIELDS
    assert len(data) > requests.UNCOUNTED_BYTES
    assert requests.updates_in("BatchUpdateJobs", data) == 400
    assert all(isinstance(each, Update) for each in requests.to_updates(data, CALLER))
