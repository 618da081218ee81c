"""Jobs and outcomes → replies, as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import limits
from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.job import Outcome
from jobstatus_grpc.record import Job
from jobstatus_grpc.wire import convert, status

JobReply: TypeAlias = pb.CreateJobResponse | pb.GetJobResponse | pb.UpdateJobResponse | pb.CancelJobResponse


def job_reply(response: JobReply, job: Job) -> bytes:
    """Return `response`, which must be empty, with `job` in it."""
    convert.job_to_wire(job, response.job)
    return response.SerializeToString()


def batch_reply(outcomes: Sequence[Outcome]) -> bytes:
    """Return one result per outcome, in order; jobs without their results.

    Once the reply has reached 1 MiB, further results are cut to what a worker must know.
    """
    response = pb.BatchUpdateJobsResponse()
    for outcome in outcomes:
        result = response.results.add()
        if isinstance(outcome, JobStatusError):
            result.error.CopyFrom(status.to_job_error(outcome))
        else:
            convert.job_to_wire(outcome, result.job, with_result=False)
    if response.ByteSize() > limits.MAX_RESPONSE_BYTES:
        _cut(response)
    return response.SerializeToString()


def _cut(response: pb.BatchUpdateJobsResponse) -> None:
    size = 0
    for result in response.results:
        size += result.ByteSize()
        if size <= limits.MAX_RESPONSE_BYTES:
            continue
        if result.HasField("error"):
            result.error.ClearField("message")
        else:
            for field in ("name", "reason", "error", "labels", "parent_id"):
                result.job.ClearField(field)
