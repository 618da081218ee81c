"""The end of a server by a signal, while it is watched."""

from __future__ import annotations

import time


def end_by_signal(service, refused, number):
    """Signal a server that twenty watch, require that all are told to call again, and return its seconds to the end."""
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
