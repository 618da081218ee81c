"""The memory of a server is bounded in bytes, not only in numbers of jobs."""

from __future__ import annotations

import grpc
import psutil
import pytest
from google.protobuf import struct_pb2
from jobstatus.v1 import job_status_pb2 as pb

BATCHES, BATCH_SIZE, RESULT_BYTES = 25, 60, 60_000
MIB = 1024 * 1024


def test_a_server_does_not_grow_by_the_results_that_it_stores(serve, update_of, tmp_path):
    service = serve("--log-level", "warning", store=f"sqlite:///{tmp_path}/jobs.db")
    process = psutil.Process(service.process.pid)
    result = struct_pb2.Struct()
    result["text"] = "x" * RESULT_BYTES
    end = {"allow_missing": True, "state": pb.JOB_STATE_SUCCEEDED, "result": result}
    service.batch(*(update_of(f"first-{number}", **end) for number in range(BATCH_SIZE)))
    before = process.memory_info().rss
    for batch in range(BATCHES):
        service.batch(*(update_of(f"job-{batch}-{number}", **end) for number in range(BATCH_SIZE)))
    # 86 MiB of results were received.
    assert process.memory_info().rss - before < 64 * MIB
    assert service.get("job-0-0").result == result


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_a_refused_request_is_not_kept(serve, update_of, transport):
    service = serve("--transport", transport)
    process = psutil.Process(service.process.pid)
    too_long = {"reason": "x" * MIB}
    before = 0
    for number in range(40):
        with pytest.raises(grpc.RpcError, match="at most 4096 bytes"):
            service.update("a", **too_long)
        if number == 9:
            before = process.memory_info().rss
    assert process.memory_info().rss - before < 15 * MIB
