"""What gRPC refuses, the HTTP gateway refuses with the same error, in binary and in JSON."""

from __future__ import annotations

import pytest
from google.protobuf import json_format
from jobstatus.v1 import job_status_pb2 as pb

from tests.server.test_bad_input import AT_CREATION, EVERYWHERE, IDS, IN_UPDATES, cases
from tests.support.web import SERVICE_PATH


def refusal_over(web, rpc, message):
    """Make a call in binary; return the code and the message of its error."""
    reply = web.request("POST", f"{SERVICE_PATH}/{rpc}", message.SerializeToString(), content_type="application/proto")
    assert reply.reason == "INVALID_FIELD"
    return reply.json()["code"].upper(), reply.json()["message"]


def in_json(message):
    """Return a message as JSON, None if JSON cannot express it."""
    try:
        return json_format.MessageToJson(message).encode()
    except (ValueError, OverflowError, json_format.Error):
        return None


@pytest.mark.parametrize(("name", "field", "value"), cases(EVERYWHERE, AT_CREATION, good=False))
def test_a_creation_beyond_a_limit_is_refused_as_by_grpc(web, web_service, refused, name, field, value):
    request = pb.CreateJobRequest(job=pb.JobStatus(**{name: value}))
    refusal = refused(web_service.stub.CreateJob, request)
    assert refusal_over(web, "CreateJob", request) == (refusal.code.name, refusal.message)
    if (body := in_json(request)) is not None:
        assert web.request("POST", f"{SERVICE_PATH}/CreateJob", body, content_type="application/json").status == 400


@pytest.mark.parametrize(("name", "field", "value"), cases(EVERYWHERE, IN_UPDATES, good=False))
def test_an_update_beyond_a_limit_is_refused_as_by_grpc(web, web_service, refused, name, field, value):
    request = pb.UpdateJobRequest(job=pb.JobStatus(id="x", **{name: value}))
    refusal = refused(web_service.stub.UpdateJob, request)
    assert refusal_over(web, "UpdateJob", request) == (refusal.code.name, refusal.message)


@pytest.mark.parametrize("job_id", IDS.values(), ids=IDS)
@pytest.mark.parametrize("rpc", ["GetJob", "CancelJob", "DeleteJob", "ListJobTransitions"])
def test_an_id_that_is_none_is_refused_as_by_grpc(web, web_service, refused, rpc, job_id):
    request = getattr(pb, f"{rpc}Request")(id=job_id)
    refusal = refused(getattr(web_service.stub, rpc), request)
    assert refusal_over(web, rpc, request) == (refusal.code.name, refusal.message)
