"""`python -m benchmarks.client_programs NAME ADDRESS …`: programs that use our Python client, each in its own process.

The last line that a program prints is its result as JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from itertools import cycle
from typing import Any

import grpc
import psutil
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from benchmarks.servers import numbered_jobs
from jobstatus_grpc import AsyncJobStatusClient, JobState, JobStatusClient, ResourceExhaustedError

SLICE_SECONDS = 0.25
DEADLINE_SECONDS = 10.0
MANY_TASKS = 64
WATCHES_PER_CLIENT = 250
REPORTS_PER_SECOND = 10
TICK_SECONDS = 0.01

Call = Callable[[], Any]


async def call(address: str, jobs: str, seconds: str) -> Mapping[str, float]:
    """Return the rates of GetJob through our clients and through the raw stubs, each for `seconds` in turns."""
    turns = round(2 * float(seconds) / SLICE_SECONDS)

    def calls(channel: Any, client: Any) -> Mapping[str, Call]:
        stub, job_ids = JobStatusServiceStub(channel), numbered_jobs(int(jobs))
        requests, ids = cycle([pb.GetJobRequest(id=job_id) for job_id in job_ids]), cycle(job_ids)
        return {
            "stub": lambda: stub.GetJob(next(requests), timeout=DEADLINE_SECONDS),
            "client": lambda: client.get(next(ids)),
        }

    with grpc.insecure_channel(address) as channel, JobStatusClient(address) as client:
        rates = await _rates("sync, one thread", calls(channel, client), turns)
    async with grpc.aio.insecure_channel(address) as aio_channel, AsyncJobStatusClient(address) as aio_client:
        aio_calls = calls(aio_channel, aio_client)
        rates |= await _rates("asyncio, one task", aio_calls, turns)
        rates |= await _rates(f"asyncio, {MANY_TASKS} tasks", aio_calls, turns, MANY_TASKS)
    return rates


async def _rates(kind: str, calls: Mapping[str, Call], turns: int, tasks: int = 1) -> dict[str, float]:
    made, spent = dict.fromkeys(calls, 0), dict.fromkeys(calls, 0.0)
    for turn in range(1 + turns):
        for name, call in calls.items():
            started = time.perf_counter()
            counts = await asyncio.gather(*(_call_until(started + SLICE_SECONDS, call) for _ in range(tasks)))
            if turn:  # the first warms up
                made[name] += sum(counts)
                spent[name] += time.perf_counter() - started
    rates = {f"{kind}: {name}, calls/s": made[name] / spent[name] for name in calls}
    stub, client = rates.values()
    return rates | {f"{kind}: client by stub": client / stub}


async def _call_until(ends_at: float, call: Call) -> int:
    count = 0
    while time.perf_counter() < ends_at:
        reply = call()
        if hasattr(reply, "__await__"):
            await reply
        count += 1
    return count


async def follow(address: str, jobs: str, watches: str) -> Mapping[str, int]:
    """Watch jobs, each many times, until stdin ends; return how often a watch was cut, and how often it was refused.

    It prints `all REVISION` when all watches have returned a revision.
    """
    ends, seen, job_ids = Counter[str](), Counter[int](), numbered_jobs(int(jobs))

    def count(record: logging.LogRecord) -> bool:
        """Count the end of a stream, which the client logs with its cause before it opens the stream again."""
        if isinstance(record.args, tuple) and len(record.args) == 3:  # the subject, the cause, the pause
            ends["refused" if isinstance(record.args[1], ResourceExhaustedError) else "cut"] += 1
        return False

    async def watch(client: AsyncJobStatusClient, job_id: str) -> None:
        async for job in client.watch(job_id):
            seen[job.revision] += 1
            if seen[job.revision] == int(watches):
                print(f"all {job.revision}", flush=True)

    logger = logging.getLogger("jobstatus_grpc.client")
    logger.setLevel(logging.DEBUG)
    logger.addFilter(count)
    async with AsyncExitStack() as clients:
        tasks: list[asyncio.Task[None]] = []
        for number in range(int(watches)):
            if number % WATCHES_PER_CLIENT == 0:
                client = await clients.enter_async_context(AsyncJobStatusClient(address))
            tasks.append(asyncio.create_task(watch(client, job_ids[number % len(job_ids)])))
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return ends


def report(address: str, metrics: str, server: str, jobs: str, seconds: str) -> Mapping[str, float]:
    """Let jobs report through our sync client's `reporter()`; return rates, also of the reporting loop by itself.

    `metrics` is the address of the server's metrics, `server` its process id.
    """
    failures: list[Exception] = []
    process = psutil.Process(int(server))
    with (
        JobStatusClient(address) as client,
        client.reporter(on_error=lambda update, error: failures.append(error)) as reporter,
    ):
        for number in range(int(jobs)):
            reporter.update(f"job-{number}", state=JobState.IN_PROGRESS, allow_missing=True)
        reporter.flush()
        before, served, started = _counters(metrics), sum(process.cpu_times()[:2]), time.perf_counter()
        given, used = _report(int(jobs), float(seconds), lambda job_id, value: reporter.update(job_id, progress=value))
        reporter.flush()
        spent = time.perf_counter() - started
        served = sum(process.cpu_times()[:2]) - served
        calls, updates = (now - earlier for now, earlier in zip(_counters(metrics), before, strict=True))
    _, loop_used = _report(int(jobs), float(seconds), lambda job_id, value: None)
    return {
        "calls/s": calls / spent,
        "updates given/s": given / spent,
        "updates sent/s, only the newest of each job": updates / spent,
        "failed updates": len(failures),
        "worker's CPU, % of a core": used / spent * 100,
        "of that, the loop that reports, %": loop_used / spent * 100,
        "server's CPU, % of a core": served / spent * 100,
    }


def _counters(metrics: str) -> tuple[float, float]:
    """Return how many BatchUpdateJobs calls the server has begun, and how many updates it has committed."""
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as page:
        text = page.read().decode()
    calls = re.findall(r'^grpc_server_started_total{.*grpc_method="BatchUpdateJobs".*} (.+)$', text, re.MULTILINE)
    updates = re.findall(r"^jobstatus_commit_commands_sum (.+)$", text, re.MULTILINE)
    return sum(map(float, calls)), sum(map(float, updates))


def _report(jobs: int, seconds: float, update: Callable[[str, float], object]) -> tuple[int, float]:
    """Let each job report at its times, evenly spread; return the number of reports and the process's CPU seconds."""
    each_tick = max(1, round(jobs * REPORTS_PER_SECOND * TICK_SECONDS))
    started, used, given = time.perf_counter(), time.process_time(), 0
    for tick in range(round(seconds / TICK_SECONDS)):
        for _ in range(each_tick):
            update(f"job-{given % jobs}", given / jobs * 0.01)
            given += 1
        time.sleep(max(0.0, started + (tick + 1) * TICK_SECONDS - time.perf_counter()))
    return given, time.process_time() - used


if __name__ == "__main__":
    programs: Mapping[str, Callable[..., Any]] = {"call": call, "follow": follow, "report": report}
    result = programs[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(asyncio.run(result) if asyncio.iscoroutine(result) else result))
