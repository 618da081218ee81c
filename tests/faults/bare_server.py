"""A server of bare grpc.aio handlers: what it keeps of a cancelled watch is grpcio's own."""

from __future__ import annotations

import asyncio

import grpc
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceServicer, add_JobStatusServiceServicer_to_server

from jobstatus_grpc.server import config


class Bare(JobStatusServiceServicer):
    """Sends one message on each watch, and stores nothing."""

    async def WatchJob(self, request, context):
        yield pb.WatchJobResponse()
        await asyncio.Event().wait()

    async def WatchJobs(self, request, context):
        yield pb.WatchJobsResponse()
        await asyncio.Event().wait()

    async def CreateJob(self, request, context):
        return pb.CreateJobResponse(job=request.job)

    async def UpdateJob(self, request, context):
        return pb.UpdateJobResponse(job=request.job)


async def main():
    server = grpc.aio.server(options=config.channel_options(config.ServerConfig()))
    add_JobStatusServiceServicer_to_server(Bare(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
