"""`python -m benchmarks.calling ADDRESS JOB SECONDS`: calls of our Python clients and of the raw stubs, in turns.

It says how many GetJobs a second each made.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable

import grpc
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from jobstatus_grpc import AsyncJobStatusClient, JobStatusClient

SLICE_SECONDS = 0.25
MANY = 64
DEADLINE_SECONDS = 10.0

Rates = dict[str, float]


def _sync_rates(address: str, job_id: str, seconds: float) -> Rates:
    request = pb.GetJobRequest(id=job_id)
    with grpc.insecure_channel(address) as channel, JobStatusClient(address) as client:
        stub = JobStatusServiceStub(channel)
        calls: dict[str, Callable[[], object]] = {
            "stub": lambda: stub.GetJob(request, timeout=DEADLINE_SECONDS),
            "client": lambda: client.get(job_id),
        }
        made, spent = dict.fromkeys(calls, 0), dict.fromkeys(calls, 0.0)
        for turn in range(1 + round(2 * seconds / SLICE_SECONDS)):
            for name, call in calls.items():
                started, count = time.perf_counter(), 0
                while time.perf_counter() - started < SLICE_SECONDS:
                    call()
                    count += 1
                if turn:  # the first warms up
                    made[name] += count
                    spent[name] += time.perf_counter() - started
    return {name: made[name] / spent[name] for name in calls}


async def _async_rates(address: str, job_id: str, seconds: float, callers: int) -> Rates:
    request = pb.GetJobRequest(id=job_id)
    async with grpc.aio.insecure_channel(address) as channel, AsyncJobStatusClient(address) as client:
        stub = JobStatusServiceStub(channel)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "stub": lambda: stub.GetJob(request, timeout=DEADLINE_SECONDS),
            "client": lambda: client.get(job_id),
        }
        made, spent = dict.fromkeys(calls, 0), dict.fromkeys(calls, 0.0)
        for turn in range(1 + round(2 * seconds / SLICE_SECONDS)):
            for name, call in calls.items():
                started = time.perf_counter()
                counts = await asyncio.gather(*(_call(call, started + SLICE_SECONDS) for _ in range(callers)))
                if turn:
                    made[name] += sum(counts)
                    spent[name] += time.perf_counter() - started
    return {name: made[name] / spent[name] for name in calls}


async def _call(call: Callable[[], Awaitable[object]], until: float) -> int:
    count = 0
    while time.perf_counter() < until:
        await call()
        count += 1
    return count


def main() -> None:
    """Measure as the command line says."""
    address, job_id, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    found = {
        "sync, one thread": _sync_rates(address, job_id, seconds),
        "asyncio, one task": asyncio.run(_async_rates(address, job_id, seconds, 1)),
        f"asyncio, {MANY} tasks": asyncio.run(_async_rates(address, job_id, seconds, MANY)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
