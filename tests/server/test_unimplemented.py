"""RPCs that are in the API and not yet in the server say so."""

from __future__ import annotations

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

NOT_YET = {
    "DeleteJob": pb.DeleteJobRequest(id="a"),
    "ListJobs": pb.ListJobsRequest(),
    "ListJobTransitions": pb.ListJobTransitionsRequest(id="a"),
    "WatchJobs": pb.WatchJobsRequest(),
}


@pytest.mark.parametrize("name", NOT_YET)
def test_an_rpc_of_the_next_version_is_unimplemented(service, name):
    def call():
        return list(getattr(service.stub, name)(NOT_YET[name]))

    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("path", ["NoSuchMethod", "", "GetJob/", "getjob"])
def test_an_unknown_method_is_unimplemented(service, refused, path):
    with pytest.raises(grpc.RpcError) as caught:
        service.send(path, b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
