"""Events of watches as bytes, ready to be sent to many."""

from __future__ import annotations

from datetime import datetime

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.record import Job
from jobstatus_grpc.wire import convert
from jobstatus_grpc.wire.render import job_event, render_job


def render_job_event(event_type: int, job: Job) -> bytes:
    """Return a WatchJobResponse that lacks its server_time."""
    return job_event(event_type, render_job(job))


def stamp(now: datetime) -> bytes:
    """Return a WatchJobResponse with nothing but its server_time.

    Appended to another it completes it: "parsers … merge" the concatenation of two messages
    (https://protobuf.dev/programming-guides/encoding/#last-one-wins).
    """
    response = pb.WatchJobResponse()
    convert.instant_to_wire(now, response.server_time)
    return response.SerializeToString()
