"""Requests as bytes that no well-behaved client sends."""

from __future__ import annotations

import contextlib
import random
import time

import grpc
import psutil
import pytest
from google.protobuf import field_mask_pb2, struct_pb2
from google.protobuf.message import DecodeError
from jobstatus.v1 import job_status_pb2 as pb

MARK, NOT_UTF8 = "MARKED", [b"MARK\xff\xfe", b"\xed\xa0\x80MAR", b"MARKE\xc3", b"\xc0\x80MARK", b"\xf5\x80\x80\x80MA"]
MAX_REQUEST_BYTES = 4 * 1024 * 1024


def result(**values):
    struct = struct_pb2.Struct()
    struct.update(values)
    return struct


def update(job_id="a", **fields):
    return pb.UpdateJobRequest(job=pb.JobStatus(id=job_id, **fields))


TEXTS = {
    "create id": ("CreateJob", pb.CreateJobRequest(job=pb.JobStatus(id=MARK))),
    "create name": ("CreateJob", pb.CreateJobRequest(job=pb.JobStatus(id="utf8", name=MARK))),
    "create label": ("CreateJob", pb.CreateJobRequest(job=pb.JobStatus(id="utf8", labels={MARK: "v"}))),
    "create result key": ("CreateJob", pb.CreateJobRequest(job=pb.JobStatus(id="utf8", result=result(MARKED=1)))),
    "create request_id": ("CreateJob", pb.CreateJobRequest(job=pb.JobStatus(id="utf8"), request_id=MARK)),
    "get id": ("GetJob", pb.GetJobRequest(id=MARK)),
    "update id": ("UpdateJob", update(MARK)),
    "update reason": ("UpdateJob", update("utf8", reason=MARK)),
    "update error": ("UpdateJob", update("utf8", error={"message": MARK})),
    "update label": ("UpdateJob", update("utf8", labels={"k": MARK})),
    "update result": ("UpdateJob", update("utf8", result=result(deep=[{"er": MARK}]))),
    "update mask": ("UpdateJob", pb.UpdateJobRequest(update_mask=field_mask_pb2.FieldMask(paths=["reason", MARK]))),
    "update request_id": ("UpdateJob", pb.UpdateJobRequest(request_id=MARK)),
    "cancel id": ("CancelJob", pb.CancelJobRequest(id=MARK)),
    "cancel reason": ("CancelJob", pb.CancelJobRequest(id="utf8", reason=MARK)),
    "watch id": ("WatchJob", pb.WatchJobRequest(id=MARK)),
}
METHODS = ["CreateJob", "GetJob", "UpdateJob", "BatchUpdateJobs", "CancelJob", "WatchJob"]
FORESEEN = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "ALREADY_EXISTS", "ABORTED"}


def sender(service, method):
    return service.send_watch if method == "WatchJob" else lambda body: service.send(method, body)


def code_of(service, method, body):
    try:
        sender(service, method)(body)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


@pytest.fixture
def job(service):
    """The job that the bodies above name."""
    return service.update("utf8", allow_missing=True, state="JOB_STATE_IN_PROGRESS")


@pytest.mark.parametrize("bad", NOT_UTF8)
@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_is_not_utf8_is_invalid_and_nothing_is_written(service, refused, job, case, bad):
    method, request = TEXTS[case]
    body = request.SerializeToString().replace(MARK.encode(), bad)
    assert bad in body
    refusal = refused(sender(service, method), body)
    assert refusal.kind == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert len(refusal.fields) == 1
    assert service.get("utf8") == job


def test_one_text_that_is_not_utf8_does_not_stop_the_others_of_its_batch(service, job):
    request = pb.BatchUpdateJobsRequest(updates=[update("utf8", reason=MARK), update("utf8", reason="beside it")])
    body = request.SerializeToString().replace(MARK.encode(), NOT_UTF8[0])
    first, second = pb.BatchUpdateJobsResponse.FromString(service.send("BatchUpdateJobs", body)).results
    assert first.error.reason == "INVALID_FIELD"
    assert second.job.reason == "beside it"


@pytest.mark.parametrize("method", METHODS)
def test_random_bytes_are_answered_with_an_error_of_ours(service, method):
    chance = random.Random(method)
    codes = {code_of(service, method, chance.randbytes(chance.randrange(1, 200))) for _ in range(50)}
    assert "INVALID_ARGUMENT" in codes
    assert codes <= FORESEEN


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_body_is_a_request_without_an_id(service, refused, method):
    if method in ("CreateJob", "BatchUpdateJobs"):
        sender(service, method)(b"")
        return
    assert refused(sender(service, method), b"").kind == ("INVALID_ARGUMENT", "INVALID_FIELD")


def test_a_request_cut_short_or_bent_is_answered_with_an_error_of_ours(service, update_of, new_id):
    chance = random.Random(1)
    whole = update_of(
        service.job_in("IN_PROGRESS", id=new_id()).id, state="JOB_STATE_IN_PROGRESS", reason="r", progress=5,
        estimated_completion={"seconds": 2_000_000_000}, labels={"a": "b"}, result=result(a=[1, {"b": None}]),
        mask=["progress", "reason"], request_id="r",
    ).SerializeToString()  # fmt: skip
    bent = []
    for _ in range(150):
        body = bytearray(whole)
        body[chance.randrange(len(body))] = chance.randrange(256)
        bent.append(bytes(body))
    codes = {code_of(service, "UpdateJob", body) for body in [*(whole[:end] for end in range(len(whole))), *bent]}
    assert codes <= FORESEEN


def test_fields_of_a_later_version_are_ignored(service, new_id):
    unknown = b"\xfa\x3e\x03abc\xf8\x3e\x01"
    body = pb.CreateJobRequest(job=pb.JobStatus(id=new_id())).SerializeToString() + unknown
    assert pb.CreateJobResponse.FromString(service.send("CreateJob", body)).job.revision == 1


def padded(request, size):
    """The request with an unknown field that brings it to this size."""
    body = request.SerializeToString()
    padding = size - len(body) - 6
    assert padding >= 2**21
    length = bytes((padding >> shift & 0x7F) | (0x80 if shift < 21 else 0) for shift in (0, 7, 14, 21))
    return body + b"\xfa\x3e" + length + b"x" * padding


@pytest.mark.parametrize("over", [0, 1])
def test_a_body_of_4_mib_is_read_and_a_larger_one_is_refused(any_service, refused, new_id, over):
    job_id = new_id()
    body = padded(pb.CreateJobRequest(job=pb.JobStatus(id=job_id)), MAX_REQUEST_BYTES + over)
    assert len(body) == MAX_REQUEST_BYTES + over
    assert code_of(any_service, "CreateJob", body) == ("RESOURCE_EXHAUSTED" if over else "OK")
    if over:
        assert refused(any_service.get, job_id).reason == "JOB_NOT_FOUND"
    else:
        assert any_service.get(job_id).revision == 1


def test_a_compressed_body_counts_as_what_it_unpacks_to(service, refused, new_id):
    job_id = new_id()
    body = padded(pb.CreateJobRequest(job=pb.JobStatus(id=job_id)), 16 * MAX_REQUEST_BYTES)
    call = service.channel.unary_unary("/jobstatus.v1.JobStatusService/CreateJob")
    with pytest.raises(grpc.RpcError) as caught:
        call(body, timeout=20, compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused(service.get, job_id).reason == "JOB_NOT_FOUND"


def test_a_refused_body_does_not_end_its_connection(service, new_id):
    job = service.job_in("IN_PROGRESS", id=new_id())
    stream = service.watch(job.id)
    next(stream)
    assert code_of(service, "UpdateJob", b"x" * (MAX_REQUEST_BYTES + 1)) == "RESOURCE_EXHAUSTED"
    service.update(job.id, state="JOB_STATE_SUCCEEDED")
    assert [message.event.job.done for message in stream] == [True]


PATHS, CROWD = [str(number) for number in range(480_000)], range(260_000)
LARGE = {
    "mask paths": pb.UpdateJobRequest(update_mask=field_mask_pb2.FieldMask(paths=PATHS)),
    "labels": pb.UpdateJobRequest(job=pb.JobStatus(labels={f"{number}\n": "" for number in CROWD})),
    "good labels": pb.UpdateJobRequest(job=pb.JobStatus(labels={f"{number}": "" for number in CROWD})),
    "batch of mask paths": pb.BatchUpdateJobsRequest(
        updates=[pb.UpdateJobRequest(update_mask=field_mask_pb2.FieldMask(paths=PATHS[:1200]))] * 500
    ),
    "batch of nothing": pb.BatchUpdateJobsRequest(updates=[pb.UpdateJobRequest()] * 2_000_000),
}


def seconds_of_work(clock, work):
    """The CPU time of some work, in seconds."""
    started = clock()
    work()
    return clock() - started


def read(request_class, body):
    with contextlib.suppress(DecodeError):
        request_class.FromString(body)


CUT = [
    pytest.param("labels", b"\xff", id="labels, cut short"),
    pytest.param("batch of nothing", b"\x0a\x01\xff", id="batch of nothing, the last one broken"),
]


@pytest.mark.parametrize(("case", "end"), [*(pytest.param(case, b"", id=case) for case in LARGE), *CUT])
def test_a_large_body_with_everything_wrong_costs_the_server_hardly_more_than_reading_it(service, case, end):
    body = LARGE[case].SerializeToString() + end
    assert MAX_REQUEST_BYTES * 0.7 < len(body) <= MAX_REQUEST_BYTES
    method = "BatchUpdateJobs" if "batch" in case else "UpdateJob"
    server = psutil.Process(service.process.pid)
    to_read = seconds_of_work(time.process_time, lambda: read(type(LARGE[case]), body))
    to_answer = seconds_of_work(lambda: sum(server.cpu_times()[:2]), lambda: code_of(service, method, body))
    assert to_answer < 0.4 + 2 * to_read
