"""What the gateway takes and refuses: errors as those of gRPC, content types, frames, compression, deadlines."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import time
import zlib

import pytest
from google.rpc import error_details_pb2, status_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import errors
from jobstatus_grpc.job.limits import MAX_REQUEST_BYTES
from jobstatus_grpc.server.transports.interface import CallContext, StreamContext
from jobstatus_grpc.web.calls import Call
from jobstatus_grpc.web.http import HTTP_STATUS_OF_CODE, UNCOUNTED_BODY_BYTES
from jobstatus_grpc.wire import status
from tests.support.auth import AuthText
from tests.support.web import SERVICE_PATH, read_all

GET = f"{SERVICE_PATH}/GetJob"
WATCH = f"{SERVICE_PATH}/WatchJob"
FRAME = b"\0\0\0\0\2{}"


def test_a_call_has_what_the_methods_of_the_server_take():
    assert {name for name in vars(StreamContext) | vars(CallContext) if name[0] != "_"} <= set(dir(Call))


def test_the_memory_of_large_responses_is_free_again_when_they_are_sent(serve_web):
    service, web = serve_web("--max-held-mib", "40")
    for _ in range(60):
        service.job_in("IN_PROGRESS", result={"text": "x" * 15_000})
    replies = [web.call("ListJobs", {"page_size": 60}) for _ in range(20)]
    replies += [web.request("GET", "/v1/jobs?pageSize=60") for _ in range(20)]
    assert {reply.status for reply in replies} == {200}


@pytest.mark.slow
def test_large_bodies_are_taken_from_admitted_callers_only_and_within_the_memory_for_calls(serve_web, tmp_path):
    auth = AuthText(tmp_path / "auth.toml")
    bearer = f"Bearer {auth.admit('anna')}"
    _, web = serve_web("--max-held-mib", "40", "--auth", str(auth.path))
    fields = f"host: {web.host}:{web.port}\r\ncontent-type: application/json\r\ncontent-length: {MAX_REQUEST_BYTES}\r\n"

    def begin(path, more=""):
        part = b" " * (UNCOUNTED_BODY_BYTES + 1)
        return web.raw(f"POST {path} HTTP/1.1\r\n{fields}{more}\r\n".encode() + part)

    def get():
        body = b'{"id": "a"' + b" " * (MAX_REQUEST_BYTES - 11) + b"}"
        return web.request("POST", GET, body, content_type="application/json", authorization=bearer)

    for path, code in ((GET, b"401"), ("/v1/jobs", b"413"), ("/login", b"413")):
        assert read_all(begin(path)).startswith(b"HTTP/1.1 " + code)
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(begin(GET, f"authorization: {bearer}\r\n"))
        while (reply := get()).status != 429:  # until they are received
            assert reply.status == 404
        assert reply.reason == "TOO_MANY_REQUESTS"
    while (reply := get()).status == 429:
        pass
    assert reply.status == 404


@pytest.mark.parametrize("cls", list(errors.error_classes()), ids=lambda cls: cls.__name__)
def test_each_error_has_an_http_status(cls):
    assert HTTP_STATUS_OF_CODE[status.code_of(cls()).name] >= 400


def test_an_error_has_the_code_message_and_details_of_grpc(web, web_service, refused, update_of):
    job = web_service.job_in("SUCCEEDED")
    update = {"job": {"id": job.id, "state": "JOB_STATE_FAILED"}}
    refusal = refused(web_service.stub.UpdateJob, update_of(job.id, state="JOB_STATE_FAILED"))
    reply = web.call("UpdateJob", update)
    body = reply.json()
    assert (reply.status, body["code"], body["message"]) == (400, "failed_precondition", refusal.message)
    (detail,) = body["details"]
    info = error_details_pb2.ErrorInfo.FromString(base64.b64decode(detail["value"] + "=="))
    assert (detail["type"], info.reason, dict(info.metadata)) == (
        "google.rpc.ErrorInfo", refusal.reason, refusal.metadata,
    )  # fmt: skip


def test_an_error_over_grpc_web_is_in_the_trailers(web):
    data = pb.GetJobRequest(id="nö").SerializeToString()
    body = b"\0" + len(data).to_bytes(4, "big") + data
    reply = web.request("POST", GET, body, content_type="application/grpc-web+proto")
    flags, size, text = reply.body[0], int.from_bytes(reply.body[1:5], "big"), reply.body[5:].decode("ascii")
    trailers = dict(line.split(": ", 1) for line in text.split("\r\n") if line)
    assert (reply.status, flags, size) == (200, 0x80, len(text))
    assert trailers["grpc-status"] == "3"
    details = status_pb2.Status.FromString(base64.b64decode(trailers["grpc-status-details-bin"] + "=="))
    assert details.details[0].type_url == "type.googleapis.com/google.rpc.ErrorInfo"


def test_the_end_of_a_stream_has_its_error(web):
    (end,) = web.stream("WatchJob", {"id": "unknown"})
    assert (end["error"]["code"], end["error"]["details"][0]["debug"]["reason"]) == ("not_found", "JOB_NOT_FOUND")


BAD_JSON = [
    b"{", b"[]", b"null", b'"x"', b"\xff", b'{"id": 5}', b'{"id": "\\ud800"}', b"{" * 50_000, b"[" * 100_000,
    b'{"id": "a", "id": "b"}', b"1e999", b'{"id": NaN}',
]  # fmt: skip


@pytest.mark.parametrize("body", BAD_JSON, ids=lambda body: repr(body[:20]))
def test_json_that_is_no_request_is_an_invalid_field(web, body):
    reply = web.request("POST", GET, body, content_type="application/json")
    assert (reply.status, reply.reason) == (400, "INVALID_FIELD")


@pytest.mark.parametrize("job", [{"result": "\ud800"}, {"heartbeatTimeout": "\ud800s"}], ids=repr)
def test_an_error_that_quotes_a_lone_surrogate_can_be_sent(web, job):
    reply = web.call("CreateJob", {"job": job})
    assert (reply.status, reply.reason) == (400, "INVALID_FIELD")
    assert "\\ud800" in reply.json()["message"]


def test_unknown_fields_of_json_are_ignored_as_in_binary(web, web_service):
    job = web_service.job_in("PENDING")
    assert web.call("GetJob", {"id": job.id, "newer": 1}).status == 200


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        (GET, "text/plain"),
        (GET, ""),
        (GET, "application/connect+json"),
        (GET, "application/grpc"),
        (GET, "application/grpc+proto"),
        (GET, "application/x-www-form-urlencoded"),
        (WATCH, "application/json"),
        (WATCH, "application/proto"),
    ],
)
def test_another_content_type_is_refused_with_those_that_are_taken(web, path, content_type):
    reply = web.request("POST", path, b"{}", content_type=content_type)
    assert reply.status == 415
    assert reply.headers["accept-post"] in reply.json()["detail"]


def test_parameters_of_a_content_type_do_not_count(web):
    assert web.request("POST", GET, b"{}", content_type="Application/JSON; charset=utf-8").reason == "INVALID_FIELD"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD"])
def test_rpcs_are_called_with_post(web, method):
    reply = web.request(method, GET)
    assert (reply.status, reply.headers["allow"]) == (405, "POST, OPTIONS")


@pytest.mark.parametrize("frame", [b"", b"{}", b"\0\0\0\0\3{}", b"\0\0\0\0\1{}", FRAME * 2, b"\2\0\0\0\2{}", b"\0" * 3])
def test_a_stream_takes_one_frame(web, frame):
    reply = web.request("POST", WATCH, frame, content_type="application/connect+json")
    assert json.loads(reply.body[5:])["error"]["code"] == "invalid_argument"


@pytest.mark.parametrize(
    ("timeout", "status"), [("1", 504), ("x", 400), ("-1", 400), ("12345678901", 400), ("1_0", 400), ("", 400)]
)
def test_a_deadline_in_milliseconds_ends_a_call(web, web_service, timeout, status):
    job = web_service.job_in("IN_PROGRESS")
    body = b"\0\0\0\0\x00" if status == 400 else json.dumps({"id": job.id}).encode()
    frame = b"\0" + len(body).to_bytes(4, "big") + body
    reply = web.request(
        "POST", WATCH, frame, content_type="application/connect+json", connect_timeout_ms=timeout
    )  # fmt: skip
    if status == 400:
        assert reply.status == 400
    else:
        assert b'"deadline_exceeded"' in reply.body


@pytest.mark.parametrize(
    ("timeout", "status"), [("20m", b"grpc-status: 4"), ("1", b""), ("9Y", b""), ("1" * 9 + "m", b"")]
)
def test_a_deadline_of_grpc_ends_a_stream(web, web_service, timeout, status):
    data = pb.WatchJobRequest(id=web_service.job_in("IN_PROGRESS").id).SerializeToString()
    frame = b"\0" + len(data).to_bytes(4, "big") + data
    reply = web.request("POST", WATCH, frame, content_type="application/grpc-web", grpc_timeout=timeout)
    assert status in reply.body if status else reply.status == 400


def test_gzip_is_taken_and_no_other_compression(web, web_service):
    body = json.dumps({"id": web_service.job_in("PENDING").id}).encode()
    post = ("POST", GET)
    packed = {"content_type": "application/json", "content_encoding": "gzip"}
    assert web.request(*post, gzip.compress(body), **packed).status == 200
    assert web.request(*post, body, **packed).reason == "INVALID_FIELD"
    assert web.request(*post, gzip.compress(body)[:-4], **packed).reason == "INVALID_FIELD"
    assert web.request(*post, zlib.compress(body), **{**packed, "content_encoding": "br"}).status == 501


def test_a_small_body_that_unpacks_to_a_large_one_is_refused(web):
    bomb = gzip.compress(b" " * 2**26)
    started = time.monotonic()
    reply = web.request("POST", GET, bomb, content_type="application/json", content_encoding="gzip")
    assert (reply.status, reply.json()["code"]) == (413, "resource_exhausted")
    assert time.monotonic() - started < 5


def test_a_request_of_megabytes_in_json_is_answered(web, web_service):
    job = web_service.job_in("IN_PROGRESS")
    updates = [{"job": {"id": job.id, "reason": "x" * 4000}} for _ in range(500)]
    reply = web.call("BatchUpdateJobs", {"updates": updates})
    assert len(reply.json()["results"]) == 500
