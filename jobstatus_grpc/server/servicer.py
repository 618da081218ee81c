"""Each RPC in a few lines: request → JobService → response.

Requests and responses are bytes, so that a request that cannot be parsed gets an error of this service, and one
rendering of a job serves all its watchers.
"""

from __future__ import annotations

from google.protobuf.descriptor import ServiceDescriptor
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Identity
from jobstatus_grpc.server import requests, responses
from jobstatus_grpc.server.middleware import Handler, WatchStream
from jobstatus_grpc.server.requests import parse
from jobstatus_grpc.server.services import LONG_POLLS
from jobstatus_grpc.server.transports.interface import CallContext, Rpc, StreamContext
from jobstatus_grpc.service import JobService


class JobStatusServicer:
    """Answers jobstatus.v1.JobStatusService; the middleware turns its errors into gRPC status."""

    def __init__(self, service: JobService) -> None:
        self._service = service

    async def CreateJob(self, data: bytes, caller: Identity, context: CallContext) -> bytes:
        """Create a job."""
        command = requests.to_create(parse(pb.CreateJobRequest, data), caller)
        return responses.job_reply(await self._service.create(command))

    async def GetJob(self, data: bytes, caller: Identity, context: CallContext) -> bytes:
        """Return a job."""
        job_id = requests.to_job_id(parse(pb.GetJobRequest, data))
        return responses.job_reply(await self._service.get(caller.tenant, job_id, only=caller.only))

    async def UpdateJob(self, data: bytes, caller: Identity, context: CallContext) -> bytes:
        """Update a job."""
        command = requests.to_update(parse(pb.UpdateJobRequest, data), caller)
        return responses.job_reply(await self._service.update(command))

    async def BatchUpdateJobs(self, data: bytes, caller: Identity, context: CallContext) -> bytes:
        """Update many jobs, each by itself."""
        updates = requests.to_updates(data, caller)
        return responses.batch_reply(await self._service.batch_update(updates))

    async def CancelJob(self, data: bytes, caller: Identity, context: CallContext) -> bytes:
        """Request the end of a job."""
        command = requests.to_cancel(parse(pb.CancelJobRequest, data), caller)
        return responses.job_reply(await self._service.cancel(command))

    async def DeleteJob(self, data: bytes, caller: Identity, context: CallContext) -> bytes:
        """Remove a done job."""
        await self._service.delete(requests.to_delete(parse(pb.DeleteJobRequest, data), caller))
        return b""

    async def ListJobs(self, data: bytes, caller: Identity, context: CallContext) -> bytes:
        """Return a page of jobs."""
        query = requests.to_jobs_query(parse(pb.ListJobsRequest, data), caller)
        position, page = await self._service.list(
            caller.tenant, query.filter, limit=query.limit, cursor=query.cursor, position=query.position
        )
        return await responses.jobs_reply(query, position, page)

    async def ListJobTransitions(self, data: bytes, caller: Identity, context: CallContext) -> bytes:
        """Return a page of a job's history."""
        query = requests.to_history_query(parse(pb.ListJobTransitionsRequest, data), caller)
        transitions = await self._service.transitions(
            caller.tenant, query.id, after=query.after, limit=query.limit + 1, only=caller.only
        )
        return responses.history_reply(query, transitions)

    async def WatchJob(self, data: bytes, caller: Identity, context: StreamContext) -> None:
        """Stream a job's changes until its end."""
        watch = requests.to_watch(parse(pb.WatchJobRequest, data))
        async with self._service.watch(
            caller.tenant,
            watch.id,
            heartbeat_interval=watch.heartbeat_interval,
            min_update_interval=watch.min_update_interval,
            try_send=context.try_send,
            only=caller.only,
        ) as watcher:
            while (message := await watcher.next()) is not None:
                await context.write(message)

    async def WatchJobs(self, data: bytes, caller: Identity, context: WatchStream) -> None:
        """Stream the changes of all jobs that match a filter."""
        watch = requests.to_jobs_watch(parse(pb.WatchJobsRequest, data), caller)
        await self._service.watch_jobs(
            caller.tenant,
            watch.filter,
            after=watch.after,
            heartbeat_interval=watch.heartbeat_interval,
            min_update_interval=watch.min_update_interval,
            send=responses.with_token(context.write, watch),
            hold=context.hold,
            only=caller.only,
        )

    async def GetCallerIdentity(self, data: bytes, caller: Identity, context: CallContext) -> bytes:
        """Return the caller's identity."""
        parse(pb.GetCallerIdentityRequest, data)
        return responses.identity_reply(caller)


def rpcs(service: ServiceDescriptor, servicer: object) -> list[Rpc[Handler]]:
    """Return the RPCs of a service that `servicer` implements; others are UNIMPLEMENTED."""
    return [
        Rpc(
            f"/{service.full_name}/{method.name}",
            getattr(servicer, method.name),
            method.server_streaming,
            is_long_poll=method.name in LONG_POLLS,
        )
        for method in service.methods
        if hasattr(servicer, method.name)
    ]
