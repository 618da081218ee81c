"""The gRPC service config in examples/, with plain grpcio and no client of ours."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from tests.support.scripted_server import SERVICE, ScriptedServer, fail
from tests.support.servers import ServerProcess

SERVICE_CONFIG = Path(__file__).parents[2] / "examples" / "service_config.json"
RPCS = {each.name: each.server_streaming for each in pb.DESCRIPTOR.services_by_name["JobStatusService"].methods}


def channel_to(address):
    return grpc.insecure_channel(address, [("grpc.service_config", SERVICE_CONFIG.read_text(encoding="utf-8"))])


def test_a_call_waits_for_the_server():
    states: queue.Queue[grpc.ChannelConnectivity] = queue.Queue()
    with ServerProcess() as server:
        server.kill()
        with channel_to(server.address) as channel:
            channel.subscribe(states.put)
            call = JobStatusServiceStub(channel).CreateJob.future(pb.CreateJobRequest(), timeout=30)
            while states.get(timeout=10) is not grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                pass
            server.start()
            assert call.result().job.id


@pytest.mark.parametrize("code", ["UNAVAILABLE", "CANCELLED"])
@pytest.mark.parametrize("rpc", RPCS)
def test_each_rpc_is_retried(rpc, code):
    answers: Any = {rpc: [fail(grpc.StatusCode[code]), fail(grpc.StatusCode.NOT_FOUND)]}
    with ScriptedServer(**answers) as server, channel_to(server.address) as channel:
        open_call = channel.unary_stream if RPCS[rpc] else channel.unary_unary
        call = open_call(f"/{SERVICE}/{rpc}")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(b"", timeout=30))
    assert (caught.value.code(), len(server.metadata)) == (grpc.StatusCode.NOT_FOUND, 2)
