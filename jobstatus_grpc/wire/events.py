"""Events of watches as bytes, ready to be sent to many."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.record import Job
from jobstatus_grpc.wire import convert
from jobstatus_grpc.wire.render import job_event, render_job


def render_job_event(event_type: int, job: Job) -> bytes:
    """Return a WatchJobResponse that lacks its server_time."""
    return job_event(event_type, render_job(job))


def each_millisecond(make: Callable[[], bytes]) -> Callable[[], bytes]:
    """Return what returns what `make` does, asked once in each millisecond: many messages are sent in one."""
    known_at, known = -1, b""

    def stamp() -> bytes:
        nonlocal known_at, known
        now = time.time_ns() // 1_000_000
        if now != known_at:
            known_at, known = now, make()
        return known

    return stamp


def stamp(now: datetime) -> bytes:
    """Return a WatchJobResponse with nothing but its server_time.

    Appended to another it completes it: "parsers … merge" the concatenation of two messages
    (https://protobuf.dev/programming-guides/encoding/#last-one-wins).
    """
    response = pb.WatchJobResponse()
    convert.instant_to_wire(now, response.server_time)
    return response.SerializeToString()
