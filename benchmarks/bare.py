"""`python -m benchmarks.bare DIRECTORY`: the least that a grpc.aio server of the same API does with the same messages.

It parses each request and answers with a ready message, read from a file of the method's name in the directory, which
gRPC serialises as usual. It keeps nothing; an update wakes all watchers at once.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from jobstatus.v1 import job_status_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]


class BareServicer:
    """Knows one job and no rules."""

    def __init__(self, replies: Path) -> None:
        """Read the replies; a file that is missing makes an empty one."""
        self._get = pb.GetJobResponse.FromString(_read(replies / "GetJob"))
        self._update = pb.UpdateJobResponse.FromString(_read(replies / "UpdateJob"))
        self._batch = pb.BatchUpdateJobsResponse.FromString(_read(replies / "BatchUpdateJobs"))
        self._event = pb.WatchJobResponse.FromString(_read(replies / "WatchJob"))
        self._bell = asyncio.Event()

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        return self._get

    async def UpdateJob(self, request: pb.UpdateJobRequest, context: Context) -> pb.UpdateJobResponse:
        if request.job.state == pb.JOB_STATE_SUCCEEDED:
            self._event.event.job.done = True
        self._bell.set()
        self._bell.clear()
        return self._update

    async def BatchUpdateJobs(self, request: pb.BatchUpdateJobsRequest, context: Context) -> pb.BatchUpdateJobsResponse:
        return self._batch

    async def WatchJob(self, request: pb.WatchJobRequest, context: Context) -> AsyncIterator[pb.WatchJobResponse]:
        yield self._event
        while not self._event.event.job.done:
            await self._bell.wait()
            yield self._event


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _handlers(servicer: BareServicer) -> grpc.GenericRpcHandler:
    """Return what the generated `add_…_to_server` registers, for the methods that the servicer has."""
    unary = grpc.unary_unary_rpc_method_handler
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "GetJob": unary(servicer.GetJob, pb.GetJobRequest.FromString, pb.GetJobResponse.SerializeToString),
        "UpdateJob": unary(servicer.UpdateJob, pb.UpdateJobRequest.FromString, pb.UpdateJobResponse.SerializeToString),
        "BatchUpdateJobs": unary(
            servicer.BatchUpdateJobs,
            pb.BatchUpdateJobsRequest.FromString,
            pb.BatchUpdateJobsResponse.SerializeToString,
        ),
        "WatchJob": grpc.unary_stream_rpc_method_handler(
            servicer.WatchJob, pb.WatchJobRequest.FromString, pb.WatchJobResponse.SerializeToString
        ),
    }
    return grpc.method_handlers_generic_handler("jobstatus.v1.JobStatusService", methods)


async def serve(replies: Path) -> None:
    """Serve for ever, on a free port."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_handlers(BareServicer(replies)),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
