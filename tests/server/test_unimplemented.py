"""Every RPC of the API is served; any other method is UNIMPLEMENTED."""

from __future__ import annotations

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

METHODS = pb.DESCRIPTOR.services_by_name["JobStatusService"].methods_by_name


@pytest.mark.parametrize("name", METHODS)
def test_every_rpc_of_the_api_is_served(service, refused, name):
    call = service.channel.unary_stream if METHODS[name].server_streaming else service.channel.unary_unary
    method = call(f"/jobstatus.v1.JobStatusService/{name}")
    refusal = refused(lambda: list(method(b"\xff", timeout=20)))
    assert refusal.kind == ("INVALID_ARGUMENT", "INVALID_FIELD")


@pytest.mark.parametrize("path", ["NoSuchMethod", "", "GetJob/", "getjob"])
def test_an_unknown_method_is_unimplemented(service, refused, path):
    with pytest.raises(grpc.RpcError) as caught:
        service.send(path, b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
