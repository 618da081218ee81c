"""Job → bytes for the server's replies and events: what a report of progress leaves alone is rendered once.

The bytes of one message's fields, put one behind the other, are the message: "parsers … merge" what is concatenated
(https://protobuf.dev/programming-guides/encoding/#last-one-wins).
"""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.record import Job
from jobstatus_grpc.wire import convert

MAX_KEPT_BYTES = 2048
"""Of larger renderings none is kept with its job: memory is for jobs."""


def render_job(job: Job) -> bytes:
    """Return `job` as the bytes of a JobStatus; a small one is rendered once for all that it goes to."""
    known = job.rendering
    if known is not None:
        return known
    lasting = job.lasting_rendering
    if lasting is None:
        message = pb.JobStatus()
        convert.lasting_to_wire(job, message)
        lasting = message.SerializeToString()
    data = lasting + _report(job)
    if len(data) <= MAX_KEPT_BYTES:
        # Renderings are no fields: a frozen job may get them later.
        values = vars(job)
        values["rendering"] = data
        values["lasting_rendering"] = lasting
    return data


def field_1(message: bytes) -> bytes:
    """Return a message whose field 1 is the message in `message`, and which has no other.

    A tag, the length as a base-128 varint, the bytes: https://protobuf.dev/programming-guides/encoding/#length-types
    """
    size = len(message)
    if size < 0x80:
        return b"\x0a%c%b" % (size, message)
    if size < 0x4000:
        return b"\x0a%c%c%b" % (size & 0x7F | 0x80, size >> 7, message)
    length = bytearray(b"\x0a")
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return bytes(length) + message


def job_event(event_type: int, job: bytes | None) -> bytes:
    """Return a WatchJobResponse or WatchJobsResponse with one event: it is field 1 of both."""
    event = b"\x08%c" % event_type  # JobEvent.type, a varint
    if job is not None:
        event += b"\x12" + field_1(job)[1:]  # JobEvent.job is field 2
    return field_1(event)


def _report(job: Job) -> bytes:
    """Return those of the fields that a report of progress changes."""
    message = pb.JobStatus()
    convert.report_to_wire(job, message)
    return message.SerializeToString() + _updated_at(job.updated_at)


@lru_cache(maxsize=64)  # jobs that are committed together share it
def _updated_at(instant: datetime) -> bytes:
    message = pb.JobStatus()
    convert.instant_to_wire(instant, message.updated_at)
    return message.SerializeToString()
