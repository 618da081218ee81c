"""request → service → reply: each RPC in a few lines.

Handlers take and return bytes: a request that cannot be parsed then gets an error of ours, and one rendering of a job
serves all its watchers.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import grpc
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.server import requests, responses
from jobstatus_grpc.server.requests import Caller, parse
from jobstatus_grpc.service import JobService

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["JobStatusService"].full_name

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class JobStatusServicer:
    """Answers jobstatus.v1.JobStatusService; errors of the tree become gRPC status in the middleware."""

    def __init__(self, service: JobService) -> None:
        self._service = service

    async def CreateJob(self, data: bytes, context: Context) -> bytes:
        """Create a job."""
        command = requests.to_create(parse(pb.CreateJobRequest, data), caller_of(context))
        return responses.job_reply(await self._service.create(command))

    async def GetJob(self, data: bytes, context: Context) -> bytes:
        """Return a job."""
        job_id = requests.to_job_id(parse(pb.GetJobRequest, data))
        return responses.job_reply(await self._service.get(caller_of(context).tenant, job_id))

    async def UpdateJob(self, data: bytes, context: Context) -> bytes:
        """Report on a job."""
        command = requests.to_update(parse(pb.UpdateJobRequest, data), caller_of(context))
        return responses.job_reply(await self._service.update(command))

    async def BatchUpdateJobs(self, data: bytes, context: Context) -> bytes:
        """Report on many jobs."""
        updates = requests.to_updates(data, caller_of(context))
        return responses.batch_reply(await self._service.batch_update(updates))

    async def CancelJob(self, data: bytes, context: Context) -> bytes:
        """Ask for a job's end."""
        command = requests.to_cancel(parse(pb.CancelJobRequest, data), caller_of(context))
        return responses.job_reply(await self._service.cancel(command))

    async def DeleteJob(self, data: bytes, context: Context) -> bytes:
        """Forget a done job."""
        await self._service.delete(requests.to_delete(parse(pb.DeleteJobRequest, data), caller_of(context)))
        return b""

    async def ListJobs(self, data: bytes, context: Context) -> bytes:
        """Return a page of jobs."""
        caller = caller_of(context)
        query = requests.to_jobs_query(parse(pb.ListJobsRequest, data), caller)
        position, page = await self._service.list(
            caller.tenant, query.filter, limit=query.limit, cursor=query.cursor, position=query.position
        )
        return await responses.jobs_reply(query, position, page)

    async def ListJobTransitions(self, data: bytes, context: Context) -> bytes:
        """Return a page of a job's history."""
        caller = caller_of(context)
        query = requests.to_history_query(parse(pb.ListJobTransitionsRequest, data), caller)
        transitions = await self._service.transitions(
            caller.tenant, query.id, after_revision=query.after_revision, limit=query.limit + 1
        )
        return responses.history_reply(query, transitions)

    async def WatchJob(self, data: bytes, context: Context) -> None:
        """Follow a job to its end."""
        watch = requests.to_watch(parse(pb.WatchJobRequest, data))
        async with self._service.watch(
            caller_of(context).tenant,
            watch.id,
            heartbeat_interval=watch.heartbeat_interval,
            min_update_interval=watch.min_update_interval,
            try_send=getattr(context, "try_send", None),  # not every transport can
        ) as watcher:
            while (message := await watcher.next()) is not None:
                await context.write(message)

    async def WatchJobs(self, data: bytes, context: Context) -> None:
        """Follow all jobs that match a filter."""
        caller = caller_of(context)
        watch = requests.to_jobs_watch(parse(pb.WatchJobsRequest, data), caller)
        await self._service.watch_jobs(
            caller.tenant,
            watch.filter,
            after=watch.after,
            heartbeat_interval=watch.heartbeat_interval,
            min_update_interval=watch.min_update_interval,
            send=responses.with_token(context.write, watch),
        )


def caller_of(context: Context) -> Caller:
    """Return on whose behalf a call is made."""
    return _caller_at(context.peer())


@functools.lru_cache(maxsize=4096)
def _caller_at(peer: str) -> Caller:
    return Caller(actor=peer)


def methods(servicer: JobStatusServicer) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    """Return the handlers of the RPCs that the servicer has, by the method's name; others are UNIMPLEMENTED."""
    found: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in pb.DESCRIPTOR.services_by_name["JobStatusService"].methods:
        handler = getattr(servicer, method.name, None)
        if handler is not None:
            make = (
                grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
            )
            found[method.name] = make(handler)
    return found
