"""Large requests that are refused: the server keeps nothing of them."""

from __future__ import annotations

import grpc
import psutil
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from tests.support.service import update_of

pytestmark = pytest.mark.slow  # all together

MIB = 1024 * 1024
REQUESTS, REQUESTS_IN_FULL = 40, 1000
MAX_GROWTH_BYTES = 50 * MIB
KINDS = {
    "a million tiny updates": ("BatchUpdateJobs", b"\n\x00" * 1_000_000),
    "501 updates": (
        "BatchUpdateJobs",
        pb.BatchUpdateJobsRequest(updates=[update_of("a", reason="x" * 4000)] * 501).SerializeToString(),
    ),
    "a reason of 4 MB": ("UpdateJob", update_of("a", reason="x" * 4_000_000).SerializeToString()),
    "200,000 labels": (
        "UpdateJob",
        update_of("a", labels={f"{number}": "" for number in range(200_000)}).SerializeToString(),
    ),
    "what is no message": ("UpdateJob", b"\xff" * 4_000_000),
    "a filter of 400,000 ids": (
        "ListJobs",
        pb.ListJobsRequest(filter=pb.JobFilter(ids=["job"] * 400_000)).SerializeToString(),
    ),
    "a token of 4 MB": ("ListJobs", pb.ListJobsRequest(page_token="x" * 4_000_000).SerializeToString()),
    "more than 4 MiB": ("UpdateJob", b"x" * (5 * MIB)),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["grpcio", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_the_server_is_flat_over_refused_requests(serve, is_full, record_fault, kind, transport):
    if transport == "native":
        pytest.importorskip("pygrpc_native", reason="pygrpc-native is not built for this Python")
    service = serve("--transport", transport)
    process = psutil.Process(service.process.pid)
    count = REQUESTS_IN_FULL if is_full else REQUESTS
    before, codes = 0, set()
    for number in range(count):
        if number == 10:
            before = process.memory_info().rss
        with pytest.raises(grpc.RpcError) as caught:
            service.send(*KINDS[kind])
        codes.add(caught.value.code().name)
    assert codes == {"RESOURCE_EXHAUSTED" if kind == "more than 4 MiB" else "INVALID_ARGUMENT"}
    assert process.memory_info().rss - before < MAX_GROWTH_BYTES
    record_fault(f"refused requests: {kind}", count=count, checked="the server's memory", result="flat")
