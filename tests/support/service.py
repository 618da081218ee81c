"""Calls on a server through the generated stub, and the errors that they raise."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.longrunning.operations_pb2_grpc import OperationsStub
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from tests.support.servers import ServerProcess

DEADLINE_SECONDS = 20.0


@dataclass(frozen=True)
class Refusal:
    """An error as its caller can read it."""

    code: grpc.StatusCode
    message: str
    reason: str
    domain: str
    metadata: dict[str, str]
    fields: list[str]
    retry_seconds: float | None

    @property
    def kind(self) -> tuple[str, str]:
        """Code and reason."""
        return self.code.name, self.reason


def read_refusal(error: Any) -> Refusal:
    """Read an error the way grpcio-status does it, without any code of ours."""
    status = rpc_status.from_call(error)
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    retry_seconds = None
    for detail in status.details if status else ():
        if detail.Unpack(retry):
            retry_seconds = retry.retry_delay.ToTimedelta().total_seconds()
        else:
            assert detail.Unpack(info) or detail.Unpack(bad_request), detail.type_url
    fields = [violation.field for violation in bad_request.field_violations]
    return Refusal(error.code(), error.details(), info.reason, info.domain, dict(info.metadata), fields, retry_seconds)


class Service:
    """The raw stub of one server, and short forms of common calls."""

    def __init__(
        self,
        address: str,
        process: ServerProcess | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.address = address
        self.process = process
        # A connection of its own, which is closed with the channel.
        options = [("grpc.use_local_subchannel_pool", 1)]
        if credentials is None:
            self.channel = grpc.insecure_channel(address, options)
        else:
            self.channel = grpc.secure_channel(address, credentials, options)
        channel = grpc.intercept_channel(self.channel, _Metadata(metadata))
        self.stub = JobStatusServiceStub(channel)
        self.operations: Any = OperationsStub(channel)

    def close(self) -> None:
        self.channel.close()

    def create(self, *, request_id: str = "", **fields: Any) -> pb.JobStatus:
        request = pb.CreateJobRequest(job=pb.JobStatus(**fields), request_id=request_id)
        return self.stub.CreateJob(request, timeout=DEADLINE_SECONDS).job

    def get(self, job_id: str) -> pb.JobStatus:
        return self.stub.GetJob(pb.GetJobRequest(id=job_id), timeout=DEADLINE_SECONDS).job

    def update(self, job_id: str, **fields: Any) -> pb.JobStatus:
        return self.stub.UpdateJob(update_of(job_id, **fields), timeout=DEADLINE_SECONDS).job

    def cancel(self, job_id: str, **fields: Any) -> pb.JobStatus:
        return self.stub.CancelJob(pb.CancelJobRequest(id=job_id, **fields), timeout=DEADLINE_SECONDS).job

    def batch(self, *updates: pb.UpdateJobRequest) -> list[pb.BatchUpdateJobsResult]:
        request = pb.BatchUpdateJobsRequest(updates=updates)
        return list(self.stub.BatchUpdateJobs(request, timeout=DEADLINE_SECONDS).results)

    def watch(self, job_id: str, *, timeout: float = DEADLINE_SECONDS, **fields: Any) -> Any:
        return self.stub.WatchJob(pb.WatchJobRequest(id=job_id, **fields), timeout=timeout)

    def job_in(self, state: str, **fields: Any) -> pb.JobStatus:
        """Create a job and bring it to a state, in one attempt unless it is PENDING."""
        job = self.create(**fields)
        if state != "PENDING":
            job = self.update(job.id, state="JOB_STATE_IN_PROGRESS", attempt=1)
        if state not in ("PENDING", "IN_PROGRESS"):
            job = self.update(job.id, state=f"JOB_STATE_{state}")
        return job

    def send(self, method: str, body: bytes) -> bytes:
        """Call with a serialised request, and return the serialised response."""
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(
            f"/jobstatus.v1.JobStatusService/{method}"
        )
        return call(body, timeout=DEADLINE_SECONDS)

    def send_watch(self, body: bytes) -> list[bytes]:
        call: grpc.UnaryStreamMultiCallable[bytes, bytes] = self.channel.unary_stream(
            "/jobstatus.v1.JobStatusService/WatchJob"
        )
        return list(call(body, timeout=DEADLINE_SECONDS))


class _Metadata(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds metadata to each call."""

    def __init__(self, metadata: Sequence[tuple[str, str]]) -> None:
        self._metadata = metadata

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        metadata = [*(client_call_details.metadata or ()), *self._metadata]
        return continuation(client_call_details._replace(metadata=metadata), request)

    intercept_unary_stream = intercept_unary_unary


def update_of(job_id: str, *, mask: list[str] | None = None, **fields: Any) -> pb.UpdateJobRequest:
    """Make an UpdateJobRequest; other names are fields of its job."""
    names = ("attempt", "expected_revision", "request_id", "allow_missing")
    request = pb.UpdateJobRequest(**{name: fields.pop(name) for name in names if name in fields})
    request.job.CopyFrom(pb.JobStatus(id=job_id, **fields))
    if mask is not None:
        request.update_mask.paths.extend(mask)
        request.update_mask.SetInParent()
    return request


def end_by_signal(service, refused, number):
    """Signal a server with 20 watches; each must end with a retry delay. Return the seconds until its exit."""
    job = service.job_in("IN_PROGRESS")
    streams = [service.watch(job.id) for _ in range(20)]
    for stream in streams:
        next(stream)
    started = time.monotonic()
    service.process.signal(number)
    refusals = [refused(list, stream) for stream in streams]
    assert service.process.wait() == 0
    seconds = time.monotonic() - started
    assert {refusal.kind for refusal in refusals} == {("UNAVAILABLE", "DRAINING")}
    assert all(refusal.retry_seconds > 0 for refusal in refusals)
    return seconds
