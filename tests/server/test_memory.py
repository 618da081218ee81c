"""The memory of a server is bounded in bytes, not only in numbers of jobs."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf import struct_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.job import JobState, Update
from jobstatus_grpc.stores.embedded import StallClocks
from tests.support.jobs import job_in
from tests.support.service import read_refusal
from tests.support.slow_commits import COMMIT_SECONDS
from tests.support.timing import MAX_PAUSE_SECONDS, within_a_second

BATCHES, BATCH_SIZE, RESULT_BYTES = 25, 60, 60_000
MIB = 1024 * 1024


def test_a_server_does_not_grow_by_the_results_that_it_stores(serve, update_of, tmp_path):
    service = serve("--log-level", "warning", store=f"sqlite:///{tmp_path}/jobs.db")
    process = psutil.Process(service.process.pid)
    result = struct_pb2.Struct()
    result["text"] = "x" * RESULT_BYTES
    end = {"allow_missing": True, "state": pb.JOB_STATE_SUCCEEDED, "result": result}
    service.batch(*(update_of(f"first-{number}", **end) for number in range(BATCH_SIZE)))
    before = process.memory_info().rss
    for batch in range(BATCHES):
        service.batch(*(update_of(f"job-{batch}-{number}", **end) for number in range(BATCH_SIZE)))
    # 86 MiB of results were received.
    assert process.memory_info().rss - before < 64 * MIB
    assert service.get("job-0-0").result == result


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_a_refused_request_is_not_kept(serve, update_of, transport):
    service = serve("--transport", transport)
    process = psutil.Process(service.process.pid)
    too_long = {"reason": "x" * MIB}
    before = 0
    for number in range(40):
        with pytest.raises(grpc.RpcError, match="at most 4096 bytes"):
            service.update("a", **too_long)
        if number == 9:
            before = process.memory_info().rss
    assert process.memory_info().rss - before < 15 * MIB


UNKNOWN_FIELD = b"\xfa\x07"
"""The tag of field 127, length-delimited, which no request has."""


def padded(request, size=MIB):
    """A request with an unknown field of `size` bytes."""
    return request.SerializeToString() + UNKNOWN_FIELD + varint(size) + b"x" * size


def varint(value):
    return bytes([value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14 & 0x7F | 0x80, value >> 21])


def rss(service):
    return psutil.Process(service.process.pid).memory_info().rss


def open_watches(service, method, streams):
    """Open watches until one is refused, and return the refusal."""
    call = service.channel.unary_stream(f"/jobstatus.v1.JobStatusService/{method}")
    for number in range(500):
        stream = call(WATCH_REQUESTS[method](number), timeout=60)
        try:
            next(stream)
        except grpc.RpcError as error:
            return read_refusal(error)
        streams.append(stream)
    raise AssertionError("none was refused")


WATCH_REQUESTS = {
    "WatchJob": lambda number: padded(pb.WatchJobRequest(id="a")),
    "WatchJobs": lambda number: pb.WatchJobsRequest(
        filter=pb.JobFilter(ids=[f"{number}-{each}" for each in range(1000)])
    ).SerializeToString(),
}


@pytest.mark.parametrize("transport", ["grpcio", "native"])
@pytest.mark.parametrize("method", WATCH_REQUESTS)
def test_what_watches_hold_is_bounded_until_they_end(serve, method, transport):
    service = serve("--transport", transport, "--max-held-mib", "64")
    service.create(id="a")
    streams: list[Any] = []
    before = rss(service)
    refusal = open_watches(service, method, streams)
    assert rss(service) - before < 120 * MIB
    assert refusal.kind == ("RESOURCE_EXHAUSTED", "TOO_MANY_WATCHERS")
    assert refusal.retry_seconds
    assert service.get("a").id == "a"
    for stream in streams:
        stream.cancel()
    again: list[Any] = []
    assert within_a_second(lambda: open_watches(service, method, again) is not None and bool(again))


def test_the_jobs_that_watches_follow_are_bounded(serve, update_of):
    service = serve("--max-held-mib", "40")
    for batch in range(10):
        service.batch(*(update_of(f"job-{batch}-{number}", allow_missing=True) for number in range(500)))
    before = rss(service)
    streams: list[Any] = []

    def watch_until_refused():
        while len(streams) < 100:
            streams.append(service.stub.WatchJobs(pb.WatchJobsRequest(), timeout=60))
            while not any(event.type == pb.JOB_EVENT_TYPE_SYNCED for event in next(streams[-1]).events):
                pass

    with pytest.raises(grpc.RpcError) as caught:
        watch_until_refused()
    assert read_refusal(caught.value).kind == ("RESOURCE_EXHAUSTED", "TOO_MANY_WATCHERS")
    assert len(streams) > 10
    assert rss(service) - before < 60 * MIB


def test_large_requests_that_wait_for_a_commit_are_bounded(slow, update_of):
    body = padded(pb.BatchUpdateJobsRequest(updates=[update_of("a", allow_missing=True)]))
    call = slow.channel.unary_unary("/jobstatus.v1.JobStatusService/BatchUpdateJobs")
    before = rss(slow)
    futures = [call.future(body, timeout=60) for _ in range(100)]
    kinds = {"OK" if (error := future.exception()) is None else read_refusal(error).kind for future in futures}
    assert kinds == {"OK", ("RESOURCE_EXHAUSTED", "TOO_MANY_REQUESTS")}
    assert rss(slow) - before < 120 * MIB


def test_writes_that_are_cancelled_do_not_stay_in_the_queue(slow, update_of):
    result = struct_pb2.Struct()
    result["text"] = "x" * RESULT_BYTES
    end = {"allow_missing": True, "state": pb.JOB_STATE_SUCCEEDED, "result": result}

    before = rss(slow)
    for number in range(1000):
        call = slow.stub.UpdateJob.future(update_of(f"job-{number}", **end), timeout=60)
        with pytest.raises(grpc.FutureTimeoutError):
            call.result(timeout=0.002)
        call.cancel()
    assert rss(slow) - before < 40 * MIB
    began_at = time.monotonic()
    slow.update("honest", allow_missing=True)
    assert time.monotonic() - began_at < 4 * COMMIT_SECONDS + MAX_PAUSE_SECONDS


@pytest.fixture
def slow(serve):
    return serve("--max-held-mib", "64", program=("-m", "tests.support.slow_commits"))


def test_the_stall_clocks_of_done_jobs_are_not_kept_for_their_timeout():
    clocks = StallClocks()
    now, running = datetime.now(timezone.utc), job_in(JobState.IN_PROGRESS, heartbeat_timeout=timedelta(days=7))

    def run_jobs(count):
        for number in range(count):
            command = Update(id=f"job-{number}", changes={})
            clocks.note([command], [running], now)
            clocks.note([command], [replace(running, state=JobState.SUCCEEDED)], now)

    run_jobs(3000)
    tracemalloc.start()
    run_jobs(20_000)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < MIB
