"""The row of stores that keep ten thousand to a million changes of the same thousand jobs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from jobstatus.v1 import job_status_pb2 as pb

from benchmarks import growing, messages
from benchmarks.beside import CONNECTIONS
from benchmarks.client import CallFailedError, Client, path
from benchmarks.growing import Found, Stock
from benchmarks.messages import Updates
from benchmarks.plan import Plan
from benchmarks.report import Figure
from benchmarks.servers import Server, Workplace

JOBS = 1_000
BATCH = 100
LONE_CALLS = 200


def changes(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure one store, as its changes grow."""
    found = Found("changes")
    job_ids = [f"job-{number:03}" for number in range(JOBS)]
    with workplace.folder() as folder:
        empty = Stock(0, folder)
        with empty.filling(workplace) as server, Client(server.address, connections=1) as client:
            server.api.prepare(client, job_ids)
            lanes = [job_ids[start : start + BATCH] for start in range(0, JOBS, BATCH)]
            batches = [server.api.updates(lane, batch=True) for lane in lanes]
            before_all = _newest_token(client)
        empty_bytes = empty.file_bytes()
        for size in plan.changes:
            stock = Stock(size, folder)
            with stock.filling(workplace) as server, Client(server.address, connections=CONNECTIONS) as client:
                _fill(server, client, batches, size // JOBS)
            found.note("file, bytes a change", size, (stock.file_bytes() - empty_bytes) / size)
            for _ in range(plan.repetitions):
                growing.started(workplace, stock, found, "start-up, s")
            with stock.serving(workplace) as server, Client(server.address, connections=CONNECTIONS) as client:
                for _ in range(plan.repetitions):
                    _ask(client, size, before_all, found)
                found.note("memory in the end, MB", size, server.memory_bytes() / 1e6)
    yield from found.figures("changes")


def _fill(server: Server, client: Client, batches: Sequence[Updates], rounds: int) -> None:
    """Update all jobs until each has so many changes.

    Raises:
        CallFailedError: an update was no change.
    """
    job_ids = [job_id for batch in batches for job_id in batch.job_ids]
    before, missing = server.api.changes_of(client, job_ids), rounds - batches[0].sent
    for _ in range(missing):
        client.call_all(server.api.batch, [batch() for batch in batches])
    after = server.api.changes_of(client, job_ids)
    if before is None or after is None or after - before != missing * JOBS:
        raise CallFailedError(f"{missing * JOBS} updates made the revisions rise from {before} to {after}")


def _ask(client: Client, size: int, before_all: str, found: Found) -> None:
    began = time.time_ns()
    requests = [messages.marked_request("job-000", f"seen at {began + number}") for number in range(LONE_CALLS)]
    growing.note_quantiles(found, size, "UpdateJob", growing.latencies(client, path("UpdateJob"), requests))
    for name, token in (("the newest", _newest_token(client)), ("before all", before_all)):
        found.note(f"a watch of all resumes from {name}, ms", size, _resume(client, token) * 1e3)


def _newest_token(client: Client) -> str:
    reply = client.call(path("ListJobs"), pb.ListJobsRequest(page_size=1).SerializeToString())
    return pb.ListJobsResponse.FromString(reply).resume_token


class _Resumption:
    """A watch of all jobs, until it has caught up."""

    def __init__(self) -> None:
        self.is_synced = False

    def on_message(self, message: bytes) -> None:
        events = pb.WatchJobsResponse.FromString(message).events
        self.is_synced |= any(event.type == pb.JOB_EVENT_TYPE_SYNCED for event in events)

    def on_end(self, is_ok: bool) -> None:
        return


def _resume(client: Client, token: str) -> float:
    """Return how long a watch takes until it has caught up, in seconds."""
    watch = _Resumption()
    request = pb.WatchJobsRequest(resume_token=token).SerializeToString()
    began = time.perf_counter()
    client.connections[-1].call(path("WatchJobs"), request, watch)
    client.run_until(lambda: watch.is_synced)
    return time.perf_counter() - began
