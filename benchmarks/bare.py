"""`python -m benchmarks.bare DIRECTORY aio|native|uvloop [CERT KEY]`: the minimal server of the same API.

It parses each request and replies with a ready message, which it reads from the file in the directory that has the
method's name, and which gRPC serialises as usual. It stores nothing; an update wakes all watchers at once.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceServicer, add_JobStatusServiceServicer_to_server


class BareServicer(JobStatusServiceServicer):
    """Serves one job without any rules; other methods are unimplemented."""

    def __init__(self, replies: Path) -> None:
        self._get = pb.GetJobResponse.FromString((replies / "GetJob").read_bytes())
        self._update = pb.UpdateJobResponse.FromString((replies / "UpdateJob").read_bytes())
        self._batch = pb.BatchUpdateJobsResponse.FromString((replies / "BatchUpdateJobs").read_bytes())
        self._event = pb.WatchJobResponse.FromString((replies / "WatchJob").read_bytes())
        self._updated = asyncio.Event()

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        return self._get

    async def UpdateJob(self, request: pb.UpdateJobRequest, context: Any) -> pb.UpdateJobResponse:
        self._event.event.job.reason = request.job.reason
        self._event.event.job.done = request.job.state == pb.JOB_STATE_SUCCEEDED
        self._updated.set()
        self._updated.clear()
        return self._update

    async def BatchUpdateJobs(self, request: pb.BatchUpdateJobsRequest, context: Any) -> pb.BatchUpdateJobsResponse:
        return self._batch

    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> AsyncIterator[pb.WatchJobResponse]:
        yield self._event
        while not self._event.event.job.done:
            await self._updated.wait()
            yield self._event


async def serve(replies: Path, kind: str, *pem: bytes) -> None:
    """Serve until the process ends, on a free port, with TLS if `pem` is a certificate and its key."""
    aio = importlib.import_module("pygrpc_native.aio" if kind == "native" else "grpc.aio")
    server: grpc.aio.Server = aio.server()
    add_JobStatusServiceServicer_to_server(BareServicer(replies), server)  # type: ignore[abstract]
    if pem:
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(pem[1], pem[0])]))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    loop = importlib.import_module("uvloop" if sys.argv[2] == "uvloop" else "asyncio")
    loop.run(serve(Path(sys.argv[1]), sys.argv[2], *(Path(path).read_bytes() for path in sys.argv[3:])))
