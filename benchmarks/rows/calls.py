"""Rows of unary calls, and the steady load that servers take in turns: read a job, update it, update a hundred."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple

from benchmarks.load.apis import BATCH, Updates, batches
from benchmarks.load.client import CallFailedError, Client, NextRequest
from benchmarks.report import EACH, Table, Target, at_quantile, row
from benchmarks.servers import BARE, BARE_NATIVE, ETCD, GRPCIO, NATIVE, Bench, Plan, Server, numbered_jobs

CONNECTIONS = 8
CALLERS = 64
"""The number of callers that has targets."""
BATCH_CALLERS = 8
SLICE_SECONDS = 0.5
"""The length of a turn."""
WARM_UP_SECONDS = 0.2
SPEED = ("calls/s", "p50, ms", "p99, ms")
COST = ("server CPU, µs a call", "server busy, % of a core", "load's own capacity, calls/s", "load busy, % of its core")


@row("get", "GetJob")
def get_job(bench: Bench, table: Table) -> None:
    """Each caller reads one job repeatedly; etcd: Range of a key, linearizable. The value of etcd's key is the same
    JobStatus message. The targets apply to 64 callers.
    """
    job_ids = numbered_jobs(max(bench.plan.callers))
    with bench.run_all(bench.sides, job_ids) as servers:
        subjects: dict[str, Subject] = {}
        for side, server in servers.items():
            requests = [server.api.read_request(job_id) for job_id in job_ids]
            subjects[side] = Subject(server, server.api.read, [repeat(request).__next__ for request in requests])
        take_turns(bench.plan, table, subjects, _figures(bench.plan.callers))
    targets = Target(GRPCIO, "≥", 0.90, BARE), Target(NATIVE, "≥", 1.1, ETCD)
    table.expect(f"calls/s, {CALLERS} in flight", "GetJob", *targets)


@row("update", "UpdateJob")
def update_job(bench: Bench, table: Table) -> None:
    """Each caller reports progress of one job, again as soon as it has the reply, which the server sends once the
    update is durable; etcd: Put. The bare handlers store nothing. The targets apply to 64 callers.
    """
    job_ids = numbered_jobs(max(bench.plan.callers))
    with bench.run_all(bench.sides, job_ids) as servers:
        subjects = {side: updating(server, [[job_id] for job_id in job_ids]) for side, server in servers.items()}
        take_turns(bench.plan, table, subjects, _figures(bench.plan.callers))
        record_changes(table, subjects, "changes per update", "changes per update")
    targets = Target(GRPCIO, "≥", 0.65, BARE), Target(NATIVE, "≥", 1.5, ETCD)
    table.expect(f"calls/s, {CALLERS} in flight", "durable UpdateJob, every one a change", *targets)


@row("batch", "BatchUpdateJobs")
def batch_update(bench: Bench, table: Table) -> None:
    """8 callers each report progress of a hundred jobs in one call."""
    job_ids = numbered_jobs(BATCH_CALLERS * BATCH)
    with bench.run_all(bench.among(GRPCIO, NATIVE, BARE, BARE_NATIVE), job_ids) as servers:
        subjects = {side: updating(server, batches(job_ids)) for side, server in servers.items()}
        take_turns(bench.plan, table, subjects, [("updates/s", BATCH_CALLERS), *_figures([BATCH_CALLERS])])
        record_changes(table, subjects, "changes per update", "changes per batch")
    targets = Target(GRPCIO, "≥", 15_000), Target(NATIVE, "≥", 20_000)
    table.expect(f"updates/s, {BATCH_CALLERS} in flight", f"BatchUpdateJobs of {BATCH}, updates a second", *targets)


def _figures(callers: Sequence[int]) -> list[tuple[str, int]]:
    judged = CALLERS if CALLERS in callers else callers[-1]
    return [(kind, count) for kind in SPEED for count in callers] + [(kind, judged) for kind in COST]


class Subject(NamedTuple):
    """One server under a steady load of one method; each lane is a caller with jobs of its own."""

    server: Server
    path: str
    lanes: Sequence[NextRequest]
    connections: int = CONNECTIONS
    """At most; fewer callers have a connection each."""


def updating(server: Server, lanes: Sequence[Sequence[str]], connections: int = CONNECTIONS) -> Subject:
    """Load a server with updates of the jobs in each lane, in batches if a lane has several."""
    path = server.api.batch if len(lanes[0]) > 1 else server.api.update
    return Subject(server, path, [server.api.updates(lane) for lane in lanes], connections)


def take_turns(
    plan: Plan, table: Table, subjects: Mapping[str, Subject], figures: Sequence[tuple[str, int]], prefix: str = ""
) -> None:
    """Load the servers in turns, and record figures: each a kind and a number of callers.

    The last number has targets: its load takes `plan.seconds`, that of the others a quarter of it.
    """
    for kind, count in figures:
        table.expect(f"{prefix}{kind}, {count} in flight", "")  # sets the order of the lines
    counts = list(dict.fromkeys(count for _, count in figures))
    for _ in range(plan.repetitions):
        for count in counts:
            totals = {column: _Total() for column in subjects}
            seconds = plan.seconds if count == figures[-1][1] else plan.seconds / 4
            for _ in range(max(1, round(seconds / SLICE_SECONDS))):
                for column, subject in subjects.items():
                    totals[column].add_slice(subject, count)
            for column, total in totals.items():
                for kind, value in total.figures().items():
                    if (kind, count) in figures:
                        table.add(column, {f"{prefix}{kind}, {count} in flight": value})


@dataclass(slots=True)
class _Total:
    """The sum of the slices of one repetition; times in seconds."""

    seconds: float = 0.0
    server_cpu: float = 0.0
    load_cpu: float = 0.0
    database_cpu: float = 0.0
    latencies: list[float] = field(default_factory=list)

    def add_slice(self, subject: Subject, callers: int) -> None:
        """Load the server for a slice."""
        server, connections = subject.server, min(callers, subject.connections)
        with (
            Client(server.address, tls=server.tls, connections=connections) as client,
            client.load(subject.path, subject.lanes[:callers]) as load,
        ):
            load.measure(WARM_UP_SECONDS)
            # The database's time encloses the others: finding its processes takes milliseconds.
            stored = server.database_cpu_seconds()
            started, served, loaded = time.perf_counter(), server.cpu_seconds(), time.process_time()
            self.latencies += load.measure(SLICE_SECONDS)
            self.seconds += time.perf_counter() - started
            self.server_cpu += server.cpu_seconds() - served
            self.load_cpu += time.process_time() - loaded
            self.database_cpu += server.database_cpu_seconds() - stored

    def figures(self) -> Mapping[str, float]:
        """Return the figures by kind. A load generator that is close to 100 % busy would itself be measured."""
        calls = len(self.latencies)
        if not calls:
            raise CallFailedError("no call was answered")
        figures = {
            "calls/s": calls / self.seconds,
            "updates/s": calls / self.seconds * BATCH,
            "p50, ms": at_quantile(self.latencies, 0.5) * 1e3,
            "p99, ms": at_quantile(self.latencies, 0.99) * 1e3,
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
        updates = [lane for lane in subject.lanes if isinstance(lane, Updates)]
        with Client(subject.server.address) as client:
            changes = subject.server.api.changes_of(client, [job_id for each in updates for job_id in each.job_ids])
        if changes is not None:
            table.add(column, {name: changes / sum(each.sent * len(each.job_ids) for each in updates)})
    table.expect(name, goal, Target(EACH, "=", 1))
