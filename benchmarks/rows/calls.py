"""Rows of unary calls, and the steady load that servers take in turns: read a job, update it, update a hundred, create.

No row calls one job again and again: a caller goes through its share of JOBS jobs, a call for each in turn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, repeat
from typing import NamedTuple

from jobstatus.v1 import job_status_pb2 as pb

from benchmarks.load.apis import BATCH, Updates, batches, job_at_work
from benchmarks.load.client import NextRequest, shared_out
from benchmarks.report import EACH, Table, Target, at_quantile, row
from benchmarks.servers import BARE, BARE_NATIVE, ETCD, GRPCIO, NATIVE, OURS, SIDES, Bench, Plan, Server, numbered_jobs

JOBS = 256
ALONE, CALLERS = 1, 64
"""The numbers of callers that have targets."""
BATCH_CALLERS = 8
BRIEF_CALLERS = (4, 16, 256)
"""Numbers of callers without targets: their load takes a quarter of the time."""
SLICE_SECONDS = 0.4
"""The length of a turn, at most."""
WARM_UP_SECONDS = 0.1
SPEED = ("calls/s", "p50, ms", "p99, ms", "p99.9, ms")
CALL_CPU = "server CPU, µs a call"
COST = (CALL_CPU, "server busy, % of a core", "load's own capacity, calls/s", "load busy, % of its core")


@row("get", "GetJob")
def get_job(bench: Bench, table: Table) -> None:
    """Each caller reads its share of 256 jobs in turn; etcd: Range of a key, linearizable. The value of etcd's key is
    the same JobStatus message.
    """
    job_ids = numbered_jobs(JOBS)
    with bench.run_all(bench.among(*SIDES), job_ids) as servers:
        subjects = {side: reading(server, job_ids) for side, server in servers.items()}
        take_turns(bench.plan, table, subjects, _figures(bench.plan.callers))
    targets = Target(GRPCIO, "≥", 0.90, BARE), Target(NATIVE, "≥", 1.1, ETCD)
    table.expect(f"calls/s, {CALLERS} in flight", "GetJob", *targets)


@row("update", "UpdateJob")
def update_job(bench: Bench, table: Table) -> None:
    """Each caller reports progress of its share of 256 jobs in turn, the next as soon as it has the reply, which the
    server sends once the update is durable; etcd: Put. The bare handlers store nothing.
    """
    job_ids = numbered_jobs(JOBS)
    with bench.run_all(bench.among(*SIDES), job_ids) as servers:
        subjects = {side: updating(server, [[job_id] for job_id in job_ids]) for side, server in servers.items()}
        take_turns(bench.plan, table, subjects, _figures(bench.plan.callers))
        record_changes(table, subjects, "changes per update", "changes per update")
    targets = Target(GRPCIO, "≤", 2.5, ETCD), Target(NATIVE, "≤", 1.5, ETCD)
    table.expect(f"p50, ms, {ALONE} in flight", "durable UpdateJob of a lone caller, p50", *targets)
    targets = Target(GRPCIO, "≥", 0.75, BARE), Target(NATIVE, "≥", 1.2, ETCD)
    table.expect(f"calls/s, {CALLERS} in flight", f"durable UpdateJob, {CALLERS} in flight", *targets)


@row("batch", "BatchUpdateJobs")
def batch_update(bench: Bench, table: Table) -> None:
    """Each caller reports progress of a hundred jobs in one call, of 800 in turn; etcd: Txn of a hundred Puts."""
    job_ids = numbered_jobs(BATCH_CALLERS * BATCH)
    with bench.run_all(bench.among(GRPCIO, NATIVE, ETCD, BARE, BARE_NATIVE), job_ids) as servers:
        subjects = {side: updating(server, batches(job_ids)) for side, server in servers.items()}
        take_turns(bench.plan, table, subjects, _batch_figures("updates/s"))
        record_changes(table, subjects, "changes per update", "changes per batch")
    goal = f"BatchUpdateJobs of {BATCH}, updates a second"
    table.expect(f"updates/s, {BATCH_CALLERS} in flight", goal, *(Target(side, "≥", 25_000) for side in OURS))


@row("create", "Creation in batches")
def create_jobs(bench: Bench, table: Table) -> None:
    """Each caller creates a hundred jobs in one BatchUpdateJobs, with `allow_missing`; every job is new."""
    with bench.run_all(bench.among(*OURS)) as servers:
        creations = {side: [Creations(f"{caller}") for caller in range(BATCH_CALLERS)] for side in servers}
        subjects = {side: Subject(server, server.api.batch, creations[side]) for side, server in servers.items()}
        take_turns(bench.plan, table, subjects, _batch_figures("jobs/s"))
        for side, server in servers.items():
            with server.client() as client:  # a reply does not say whether each of its jobs was created
                last = [each.last_id for each in creations[side]]
                client.call_all(server.api.read, [server.api.read_request(job_id) for job_id in last])
    goal = f"creations in batches of {BATCH}, jobs a second"
    table.expect(f"jobs/s, {BATCH_CALLERS} in flight", goal, *(Target(side, "≥", 12_000) for side in OURS))


class Creations:
    """Batches of creations; `prefix` begins their ids."""

    def __init__(self, prefix: str) -> None:
        self._ids = (f"created-{prefix}-{number}" for number in count())
        self.last_id = ""

    def __call__(self) -> bytes:
        jobs = [job_at_work(next(self._ids)) for _ in range(BATCH)]
        self.last_id = jobs[-1].id
        return pb.BatchUpdateJobsRequest(
            updates=[pb.UpdateJobRequest(job=job, allow_missing=True) for job in jobs]
        ).SerializeToString()


def _figures(callers: Sequence[int]) -> list[tuple[str, int]]:
    speed = [(kind, each) for kind in SPEED for each in callers]
    return [*speed, (CALL_CPU, ALONE), *((kind, CALLERS) for kind in COST)]


def _batch_figures(rate: str) -> list[tuple[str, int]]:
    speed = [(kind, callers) for kind in (rate, *SPEED[1:]) for callers in (ALONE, BATCH_CALLERS)]
    return [*speed, (CALL_CPU, ALONE), *((kind, BATCH_CALLERS) for kind in COST)]


class Subject(NamedTuple):
    """One server under a steady load of one method."""

    server: Server
    path: str
    requests: Sequence[NextRequest]
    """A source of requests for each job, or for each batch of jobs. The callers share them out."""
    connections: int | None = None
    """At most; fewer callers have a connection each. None: as many as usual with this kind of server."""

    def lanes(self, callers: int) -> Iterator[NextRequest]:
        """Return each caller's requests."""
        return shared_out(self.requests, callers)


def reading(server: Server, job_ids: Sequence[str]) -> Subject:
    """Load a server with reads of these jobs."""
    requests = [server.api.read_request(job_id) for job_id in job_ids]
    return Subject(server, server.api.read, [repeat(request).__next__ for request in requests])


def updating(server: Server, jobs: Sequence[Sequence[str]], connections: int | None = None) -> Subject:
    """Load a server with updates of jobs, in batches if there are several together."""
    path = server.api.batch if len(jobs[0]) > 1 else server.api.update
    return Subject(server, path, [server.api.updates(each) for each in jobs], connections)


def read_and_update(
    plan: Plan, table: Table, servers: Mapping[str, Server], figures: Sequence[tuple[str, int]]
) -> None:
    """Create JOBS jobs on each server, then load the servers in turns with reads and with updates of these jobs."""
    job_ids = numbered_jobs(JOBS)
    for server in servers.values():
        server.create(job_ids)
    reads = {column: reading(server, job_ids) for column, server in servers.items()}
    writes = {column: updating(server, [[job_id] for job_id in job_ids]) for column, server in servers.items()}
    for method, subjects in ("GetJob", reads), ("UpdateJob", writes):
        take_turns(plan, table, subjects, figures, f"{method}: ")


def take_turns(
    plan: Plan, table: Table, subjects: Mapping[str, Subject], figures: Sequence[tuple[str, int]], prefix: str = ""
) -> None:
    """Load the servers in turns, and record figures: each a kind and a number of callers.

    A load takes `plan.seconds`, with BRIEF_CALLERS a quarter of it.
    """
    for kind, callers in figures:
        table.expect(f"{prefix}{kind}, {callers} in flight", "")  # sets the order of the lines
    for _ in range(plan.repetitions):
        for callers in dict.fromkeys(callers for _, callers in figures):
            totals = {column: _Total() for column in subjects}
            seconds = plan.seconds / 4 if callers in BRIEF_CALLERS else plan.seconds
            slices = max(1, round(seconds / SLICE_SECONDS))
            for _ in range(slices):
                for column, subject in subjects.items():
                    totals[column].add_slice(subject, callers, seconds / slices)
            for column, total in totals.items():
                for kind, value in total.figures().items():
                    if (kind, callers) in figures:
                        table.add(column, {f"{prefix}{kind}, {callers} in flight": value})


@dataclass(slots=True)
class _Total:
    """The sum of the slices of one repetition; times in seconds."""

    seconds: float = 0.0
    server_cpu: float = 0.0
    load_cpu: float = 0.0
    database_cpu: float = 0.0
    latencies: list[float] = field(default_factory=list)

    def add_slice(self, subject: Subject, callers: int, seconds: float) -> None:
        """Load the server for `seconds`, after a warm-up."""
        server = subject.server
        with (
            server.client(connections=min(callers, subject.connections or server.api.connections)) as client,
            client.load(subject.path, list(subject.lanes(callers))) as load,
        ):
            load.measure(WARM_UP_SECONDS)
            # The database's time encloses the others: finding its processes takes milliseconds.
            stored = server.database_cpu_seconds()
            started, served, loaded = time.perf_counter(), server.cpu_seconds(), time.process_time()
            self.latencies += load.measure(seconds)
            self.seconds += time.perf_counter() - started
            self.server_cpu += server.cpu_seconds() - served
            self.load_cpu += time.process_time() - loaded
            self.database_cpu += server.database_cpu_seconds() - stored

    def figures(self) -> Mapping[str, float]:
        """Return the figures by kind. A load generator that is close to 100 % busy would itself be measured."""
        calls = len(self.latencies)
        figures = {
            "calls/s": calls / self.seconds,
            "updates/s": calls / self.seconds * BATCH,
            "jobs/s": calls / self.seconds * BATCH,
            "p50, ms": at_quantile(self.latencies, 0.5) * 1e3,
            "p99, ms": at_quantile(self.latencies, 0.99) * 1e3,
            "p99.9, ms": at_quantile(self.latencies, 0.999) * 1e3,
            "server CPU, µs a call": self.server_cpu / calls * 1e6,
            "load's CPU, µs a call": self.load_cpu / calls * 1e6,
            "server busy, % of a core": self.server_cpu / self.seconds * 100,
            "load's own capacity, calls/s": calls / self.load_cpu,
            "load busy, % of its core": self.load_cpu / self.seconds * 100,
        }
        return figures | ({"PostgreSQL's CPU, µs a call": self.database_cpu / calls * 1e6} if self.database_cpu else {})


def record_changes(table: Table, subjects: Mapping[str, Subject], name: str, goal: str) -> None:
    """Add the number of changes that each server counted for each update that was sent; it has to be 1."""
    for column, subject in subjects.items():
        updates = [source for source in subject.requests if isinstance(source, Updates)]
        with subject.server.client() as client:
            changes = subject.server.api.changes_of(client, [job_id for each in updates for job_id in each.job_ids])
        if changes is not None:
            table.add(column, {name: changes / sum(each.sent * len(each.job_ids) for each in updates)})
    table.expect(name, goal, Target(EACH, "=", 1))
