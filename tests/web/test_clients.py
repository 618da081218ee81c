"""Clients of other projects call every RPC over the HTTP gateway, and see what gRPC's see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import json_format
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.server.services import JOB_STATUS
from tests.support.web import DESCRIPTOR_SET, SERVICE_PATH, run_node

NODE_CLIENTS = [
    "connect-node json", "connect-node binary gzip", "connect-node grpc-web", "connect-web json", "connect-web binary",
    "connect-web grpc-web", "grpc-web binary", "grpc-web text",
]  # fmt: skip

RPCS = {method.name for method in JOB_STATUS.methods}


@pytest.mark.parametrize("client", NODE_CLIENTS)
def test_a_client_in_node_calls_every_rpc(web, node_folder, client):
    printed = run_node(node_folder, "clients.mjs", web.url, str(DESCRIPTOR_SET), client)
    answers = [json.loads(line) for line in printed.splitlines()]
    expected = RPCS - ({"WatchJobs"} if client.startswith("grpc-web") else set())
    assert {each["name"] for each in answers} == expected | {"error"}
    events = [each["answer"]["event"] for each in answers if each["name"] == "WatchJob"]
    assert (events[-1]["job"]["state"], events[-1]["job"]["result"]) == ("JOB_STATE_SUCCEEDED", {"bytes": 12})
    error = answers[-1]["answer"]
    assert (error["code"], error["message"].endswith("was deleted or has expired")) == (5, True)
    assert error["details"]


@pytest.mark.parametrize("protocol", ["connect", "grpcweb"])
def test_buf_curl_calls_over_connect_and_grpc_web(web, web_service, new_id, tmp_path, protocol):
    job_id = new_id()
    done = subprocess.run(
        [
            Path(sys.executable).with_name("buf"), "curl", "--protocol", protocol, "--schema", DESCRIPTOR_SET,
            "--data", json.dumps({"job": {"id": job_id, "name": "ü"}}), f"{web.url}{SERVICE_PATH}/CreateJob",
        ],
        env={**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert web_service.get(job_id).name == "ü"


def test_curl_creates_a_job(web, web_service, new_id):
    job_id = new_id()
    body = json.dumps({"job": {"id": job_id, "labels": {"a": "b"}}})
    command = ["curl", "-sf", f"{web.url}{SERVICE_PATH}/CreateJob", "-H", "content-type: application/json", "-d", body]
    reply = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout)
    assert json_format.ParseDict(reply, pb.CreateJobResponse()).job == web_service.get(job_id)


def test_json_has_all_that_binary_has(web, web_service):
    job = web_service.job_in("FAILED")
    reply = web.call("GetJob", {"id": job.id})
    assert json_format.Parse(reply.body, pb.GetJobResponse()).job == job


def test_binary_is_the_message_itself(web, web_service):
    job = web_service.job_in("IN_PROGRESS")
    data = pb.GetJobRequest(id=job.id).SerializeToString()
    reply = web.request("POST", f"{SERVICE_PATH}/GetJob", data, content_type="application/proto")
    assert pb.GetJobResponse.FromString(reply.body).job == job
    assert reply.headers["content-type"] == "application/proto"


def test_health_is_served_too(web):
    path = "/grpc.health.v1.Health/Check"
    assert web.request("POST", path, {"service": "jobstatus.v1.JobStatusService"}).json() == {"status": "SERVING"}
