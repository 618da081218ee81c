"""A job's life with `buf curl`, which reads the API from the server as grpcurl does, and speaks proto3's JSON."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from google.rpc import error_details_pb2

BUF = Path(sys.executable).with_name("buf")
SERVICE = "jobstatus.v1.JobStatusService"
DEADLINE_SECONDS = 30


def objects_in(text):
    """Read JSON objects that stand behind each other."""
    decoder = json.JSONDecoder()
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        yield value
        text = text[end:]


@pytest.fixture
def buf_curl(service, tmp_path):
    """Call a method of the server with a request; returns how it went."""
    homes = {name: str(tmp_path) for name in ("HOME", "XDG_CACHE_HOME", "BUF_CACHE_DIR")}

    def run(method, request):
        url = f"http://{service.address}/{SERVICE}/{method}"
        flags = ["--protocol", "grpc", "--http2-prior-knowledge", "--data", json.dumps(request)]
        return subprocess.run(
            [BUF, "curl", *flags, url],
            env={**os.environ, **homes}, capture_output=True, text=True, timeout=DEADLINE_SECONDS,
        )  # fmt: skip

    return run


@pytest.fixture
def call(buf_curl):
    def run(method, **request):
        done = buf_curl(method, request)
        assert (done.returncode, done.stderr) == (0, "")
        return list(objects_in(done.stdout))

    return run


def test_a_job_is_created_claimed_and_followed_to_its_end(call, new_id):
    job_id = new_id()
    (created,) = call("CreateJob", job={"id": job_id, "name": "backup", "heartbeatTimeout": "90s"})
    assert (created["job"]["state"], created["job"]["heartbeatTimeout"]) == ("JOB_STATE_PENDING", "90s")
    (claimed,) = call("UpdateJob", job={"id": job_id, "state": "JOB_STATE_IN_PROGRESS"}, attempt=1)
    assert claimed["job"]["attempt"] == 1
    call("UpdateJob", job={"id": job_id, "state": "JOB_STATE_FAILED", "error": {"code": 8}}, attempt=1)
    (message,) = call("WatchJob", id=job_id)
    assert message["event"]["type"] == "JOB_EVENT_TYPE_SNAPSHOT"
    assert message["event"]["job"]["error"] == {"code": 8}
    assert message["serverTime"]


def test_a_mask_is_a_string_of_names_in_json(call, service, new_id):
    job = service.job_in("IN_PROGRESS", id=new_id(), labels={"a": "b"}, progress=5.0)
    mask = "labels,hasProgress,estimatedCompletion"
    eta = "2040-01-01T00:00:00Z"
    (updated,) = call("UpdateJob", job={"id": job.id, "estimatedCompletion": eta, "reason": "x"}, updateMask=mask)
    assert not {"labels", "reason", "progress", "hasProgress"} & updated["job"].keys()
    assert updated["job"]["estimatedCompletion"] == eta


def test_why_a_call_was_refused_is_readable(buf_curl):
    done = buf_curl("CreateJob", {"job": {"id": "/", "progress": -1}})
    assert done.returncode != 0
    error = json.loads(done.stderr)
    assert error["code"] == "invalid_argument"
    details = {detail["type"]: base64.b64decode(detail["value"] + "==") for detail in error["details"]}
    info = error_details_pb2.ErrorInfo.FromString(details["google.rpc.ErrorInfo"])
    assert (info.domain, info.reason) == ("jobstatus.v1", "INVALID_FIELD")
    bad_request = error_details_pb2.BadRequest.FromString(details["google.rpc.BadRequest"])
    assert [violation.field for violation in bad_request.field_violations] == ["job.id", "job.progress"]
