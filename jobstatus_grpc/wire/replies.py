"""Jobs and outcomes → replies, as bytes.

A job is rendered once; the messages around it are its tag and its length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import limits
from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.job import Outcome
from jobstatus_grpc.record import Job, evolve
from jobstatus_grpc.wire import status
from jobstatus_grpc.wire.render import field_1, render_job

MAX_CUT_RESULT_BYTES = 320
_WORDY_FIELDS: Mapping[str, Any] = {"name": "", "reason": "", "error": None, "labels": {}, "parent_id": ""}


def job_reply(job: Job) -> bytes:
    """Return a CreateJobResponse, GetJobResponse, UpdateJobResponse or CancelJobResponse: `job` is field 1 of each."""
    return field_1(render_job(job))


def batch_reply(outcomes: Sequence[Outcome]) -> bytes:
    """Return a BatchUpdateJobsResponse: one result per outcome, in order; jobs without their results.

    Results that would take the reply beyond 1 MiB are cut to what a worker must know.
    """
    room = limits.MAX_RESPONSE_BYTES - MAX_CUT_RESULT_BYTES * len(outcomes)
    results: list[bytes] = []
    size = 0
    for outcome in outcomes:
        result = field_1(_result(outcome, is_cut=size >= room))
        size += len(result)
        results.append(result)
    return b"".join(results)


def _result(outcome: Outcome, *, is_cut: bool) -> bytes:
    """Return a BatchUpdateJobsResult."""
    if isinstance(outcome, JobStatusError):
        error = status.to_job_error(outcome)
        if is_cut:
            error.ClearField("message")
        return pb.BatchUpdateJobsResult(error=error).SerializeToString()
    if is_cut:
        outcome = evolve(outcome, _WORDY_FIELDS)
    if outcome.result is not None:
        outcome = evolve(outcome, {"result": None})
    return field_1(render_job(outcome))
