"""`python -m benchmarks.bare DIRECTORY [aio | native | uvloop]`: the least that a server of the same API does.

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
        self._event.event.job.reason = request.job.reason
        self._event.event.job.done = request.job.state == pb.JOB_STATE_SUCCEEDED
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


def _register(servicer: BareServicer, server: grpc.aio.Server) -> None:
    """Do what the generated `add_…_to_server` does, for the methods that the servicer has."""
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
    server.add_registered_method_handlers("jobstatus.v1.JobStatusService", methods)


async def serve(replies: Path, *, is_native: bool) -> None:
    """Serve for ever, on a free port."""
    if is_native:
        import pygrpc_native.aio

        server: grpc.aio.Server = pygrpc_native.aio.server()
    else:
        server = grpc.aio.server()
    _register(BareServicer(replies), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def main() -> None:
    """Serve as the command line says."""
    replies, kind = Path(sys.argv[1]), sys.argv[2:]
    serving = serve(replies, is_native=kind == ["native"])
    if kind == ["uvloop"]:
        import uvloop

        uvloop.run(serving)
    else:
        asyncio.run(serving)


if __name__ == "__main__":
    main()
