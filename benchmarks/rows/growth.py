"""The row of SQLite stores that grow to a million jobs."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from operator import truediv
from pathlib import Path

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from jobstatus.v1 import job_status_pb2 as pb

from benchmarks.load.apis import BATCH, JobsApi, batches, path
from benchmarks.load.client import CallFailedError, Client, NextRequest
from benchmarks.report import Table, Target, at_quantile, row
from benchmarks.rows.calls import ALONE, CALLERS, JOBS, Subject, reading, take_turns
from benchmarks.servers import GRPCIO, NATIVE, Bench

FIGURES = (("p50, ms", 1), ("p99, ms", 1), ("calls/s", CALLERS))
METHODS: Mapping[str, Callable[[pb.JobStatus], Message]] = {
    "GetJob": lambda job: pb.GetJobRequest(id=job.id),
    "UpdateJob": lambda job: pb.UpdateJobRequest(job=job),
}
CACHED, TIMES_CACHED = f"GetJob of the same {JOBS} jobs, ", "GetJob of any job by that of cached ones, p50"
RARE = "a rare conjunction"
PAGES = 20
BATCHES_AT_ONCE = 16
SETTLE_SECONDS = 3.0
"""Silent jobs stall after a second, and the sweeper marks them within another."""
SLOWEST = 2.0
"""The limit of a start-up in seconds, and of other figures as a multiple of the smallest store's."""
DONE = (*[pb.JOB_STATE_SUCCEEDED] * 5, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)
STATES = (pb.JOB_STATE_PENDING, pb.JOB_STATE_IN_PROGRESS, pb.JOB_STATE_IN_PROGRESS, *DONE)
"""The states of ten jobs. Of the first in progress, a tenth sends no heartbeat and stalls."""


@row("jobs", "Growth with jobs")
def jobs(bench: Bench, table: Table) -> None:
    """One SQLite file for each number of jobs, created with BatchUpdateJobs; all are served with grpcio at the same
    time and called in turns. Jobs are chosen at random, in the largest store nearly none of the 20,000 in the cache. A
    page is the first of 50 jobs, read with one call in flight; no job matches the rare conjunction.
    """
    with ExitStack() as stack:
        stores = {size: stack.enter_context(bench.folder()) for size in bench.plan.jobs}
        for size, folder in stores.items():
            _create(bench, folder, size, table)
        for _ in range(bench.plan.repetitions):
            for size, folder in stores.items():
                _start(bench, folder, size, "start-up, s", table)
        _call_in_turns(bench, stores, table)
        for size, folder in stores.items():
            _start(bench, folder, size, "start-up after kill -9, s", table)
    smallest, largest = f"{bench.plan.jobs[0]:,}", f"{bench.plan.jobs[-1]:,}"
    for name in table:
        goal = f"{largest} jobs: {name.partition(',')[0]}"
        if name.startswith("start-up"):
            table.expect(name, goal, Target(largest, "≤", SLOWEST))
        elif "calls/s" in name:
            table.expect(name, goal, Target(largest, "≥", 1 / SLOWEST, smallest))
        elif name == TIMES_CACHED:
            table.expect(name, f"{largest} jobs: GetJob of a job that is not cached", Target(largest, "≤", 1.5))
        elif RARE in name:
            table.expect(name, f"{largest} jobs: page of {RARE}, p50, ms", Target(largest, "≤", 5))
        elif "p50" in name:
            table.expect(name, goal, Target(largest, "≤", SLOWEST, smallest))


def _create(bench: Bench, folder: Path, size: int, table: Table) -> None:
    """Create jobs through the faster transport, if that is among the sides."""
    side, at_once = NATIVE if NATIVE in bench.sides else GRPCIO, BATCHES_AT_ONCE * BATCH
    with bench.run(side, folder) as server, server.client(connections=JobsApi.connections) as client:
        started = time.perf_counter()
        for start in range(0, size, at_once):
            updates = batches([_creation(number) for number in range(start, min(start + at_once, size))])
            requests = [pb.BatchUpdateJobsRequest(updates=batch).SerializeToString() for batch in updates]
            for reply in client.call_all(path("BatchUpdateJobs"), requests):
                if any(result.HasField("error") for result in pb.BatchUpdateJobsResponse.FromString(reply).results):
                    raise CallFailedError("a job was not created")
        table.add(size, {"made with BatchUpdateJobs, jobs/s": size / (time.perf_counter() - started)})
        client.run_for(SETTLE_SECONDS)
    table.add(size, {"file, bytes a job": sum(file.stat().st_size for file in folder.glob("jobs.db*")) / size})


def _creation(number: int) -> pb.UpdateJobRequest:
    """Return the creation of a job; a hundredth of the jobs share each name, each label and each parent."""
    group = number % 100
    job = pb.JobStatus(id=_id(number), name=f"name-{group}", state=STATES[number % len(STATES)], parent_id=_id(group))
    job.labels["team"] = f"team-{group}"
    if group == 1:
        job.heartbeat_timeout.seconds = 1
    return pb.UpdateJobRequest(job=job, allow_missing=True)


def _id(number: int) -> str:
    return f"job-{number:08}"


def _start(bench: Bench, folder: Path, size: int, name: str, table: Table) -> None:
    started = time.perf_counter()
    with bench.run(GRPCIO, folder) as server:
        table.add(size, {name: time.perf_counter() - started})
        table.add(size, {"memory after start-up, MB": server.memory_bytes() / 1e6})


def _call_in_turns(bench: Bench, stores: Mapping[int, Path], table: Table) -> None:
    """Call the servers of all stores in turns; at the end, kill them."""
    with ExitStack() as stack:
        servers = {size: stack.enter_context(bench.run(GRPCIO, folder)) for size, folder in stores.items()}
        chances = {size: random.Random(size) for size in stores}
        brief = replace(bench.plan, seconds=bench.plan.seconds * 2 / 3)
        for method, request in METHODS.items():
            sources = {size: [_random_requests(size, chances[size], request)] * CALLERS for size in stores}
            subjects = {f"{size:,}": Subject(server, path(method), sources[size]) for size, server in servers.items()}
            take_turns(brief, table, subjects, FIGURES, f"{method}, ")
        cached = [_id(number) for number in range(2, bench.plan.jobs[0], len(STATES))][:JOBS]
        subjects = {f"{size:,}": reading(server, cached) for size, server in servers.items()}
        take_turns(brief, table, subjects, [("p50, ms", ALONE)], CACHED)
        for size in stores:
            of_random, of_cached = (
                table[f"{name}p50, ms, {ALONE} in flight"].values[f"{size:,}"] for name in ("GetJob, ", CACHED)
            )
            for ratio in map(truediv, of_random, of_cached):
                table.add(size, {TIMES_CACHED: ratio})
        clients = {size: stack.enter_context(server.client()) for size, server in servers.items()}
        pages = {size: _pages(client, size) for size, client in clients.items()}
        for _ in range(bench.plan.repetitions):
            for name in pages[bench.plan.jobs[0]]:
                for size, client in clients.items():
                    taken = [client.timed(path("ListJobs"), pages[size][name]) for _ in range(PAGES)]
                    table.add(size, {f"filtered page, {name}, p50, ms": at_quantile(taken, 0.5) * 1e3})
        for size, server in servers.items():
            table.add(size, {"memory at the end, MB": server.memory_bytes() / 1e6})
            server.process.kill()


def _random_requests(size: int, chance: random.Random, make: Callable[[pb.JobStatus], Message]) -> NextRequest:
    """Return a source of requests for random jobs in progress; every update is a change, since the progress rises."""
    numbers = itertools.count(1)

    def next_request() -> bytes:
        job = pb.JobStatus(id=_id(chance.randrange(2, size, len(STATES))), progress=10 + next(numbers) * 1e-5)
        return make(job).SerializeToString()

    return next_request


def _pages(client: Client, count: int) -> Mapping[str, bytes]:
    """Return a ListJobsRequest for each way to filter; all but the last have matches."""
    replies = [client.call(path("GetJob"), JobsApi().read_request(_id(count // 2 + later))) for later in (0, BATCH)]
    times = [pb.GetJobResponse.FromString(reply).job.created_at for reply in replies]
    middle, later = sorted(times, key=Timestamp.ToMicroseconds)  # batches are created at once, in any order
    # Jobs that one commit creates have one creation time, which a range leaves out at both ends.
    middle.FromMicroseconds(middle.ToMicroseconds() - 1)
    later.FromMicroseconds(later.ToMicroseconds() + 1)
    failed = [pb.JOB_STATE_FAILED]
    filters = {
        "no filter": pb.JobFilter(),
        "ids": pb.JobFilter(ids=[_id(number) for number in range(0, count, count // 50)]),
        "states": pb.JobFilter(states=failed),
        "done": pb.JobFilter(done=True),
        "not done": pb.JobFilter(done=False),
        "stalled": pb.JobFilter(stalled=True),
        "names": pb.JobFilter(names=["name-7", "name-8"]),
        "name_prefix": pb.JobFilter(name_prefix="name-5"),
        "a label": pb.JobFilter(labels={"team": "team-7"}),
        "parent_id": pb.JobFilter(parent_id=_id(7)),
        "created_before": pb.JobFilter(created_before=middle),
        "created, a range": pb.JobFilter(created_after=middle, created_before=later),
        "state and label": pb.JobFilter(states=failed, labels={"team": "team-8"}),
        RARE: pb.JobFilter(states=failed, names=["name-7"]),
    }
    pages = {name: pb.ListJobsRequest(filter=filter).SerializeToString() for name, filter in filters.items()}
    for name, page in pages.items():
        if name != RARE and not pb.ListJobsResponse.FromString(client.call(path("ListJobs"), page)).jobs:
            raise CallFailedError(f"no job matches the filter {name!r}")
    return pages
