"""docs/capacity.md: what a number of jobs a day costs, computed from the figures of the benchmark by a linear model.

The costs of a job are those of its calls; those of its watchers, of their messages and of the time that they are open.
tests/unit/test_capacity.py compares the model with a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.report import Figure, aligned, number
from benchmarks.servers import OURS

CREATION, UPDATE, READ, END, MESSAGE = "a creation", "an update", "a read", "an end", "a message to a watcher"
DAY, DAYS_PER_MONTH = 86_400, 30
PEAK = 4.0
"""The rate of the busiest second as a multiple of the day's mean. An assumption: measure yours."""
HEADROOM = 0.7
"""The share of its capacity up to which a server is loaded: beyond it, latencies rise quickly."""
FEED_DAYS = 1.0
JOBS_PER_DAY = (10**4, 10**6, 10**8)
REPLICAS, GROUPS = 3, 10
# Figures of the row `postgres`, and their columns.
WRITES, DATABASE_CPU = "UpdateJob, calls/s, 64 in flight", "UpdateJob, PostgreSQL's CPU, µs a call, 64 in flight"
POSTGRESQL, TWO_WORKERS = "PostgreSQL", "2 workers"


def of_cpu(kind: str) -> str:
    return f"{kind}, CPU, µs"


def of_bytes(kind: str) -> str:
    return f"{kind}, bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What callers do. The defaults are those of docs/capacity.md."""

    jobs: float
    """New jobs, a day or in all."""
    updates: float = 10
    """Of each job, between its creation and its end."""
    reads: float = 2
    """Of each job."""
    watchers: float = 1
    """Of each job, from its creation to its end."""
    seconds: float = 300
    """From a job's creation to its end."""
    retention_days: float = 7

    @property
    def writes(self) -> float:
        return self.jobs * (2 + self.updates)

    @property
    def open_watches(self) -> float:
        """Return how many watches are open at a time, if `jobs` are those of a day."""
        return self.jobs * self.watchers * self.seconds / DAY


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one call of each kind costs a server."""

    cpu: Mapping[str, float]
    """In seconds, by kind."""
    bytes: Mapping[str, float]
    """Of the database, by kind; of an update it is a row of the change feed."""
    watch_bytes: float = 0
    """Memory of an open watch."""
    watch_cpu: float = 0
    """CPU seconds of an open watch a second, while nothing changes."""
    writes_per_second: float = math.inf
    """What one process with a core to itself can do."""

    @classmethod
    def of(cls, figures: Mapping[str, float]) -> Costs:
        """Return the costs in the figures of the row `cost`."""
        kinds = (CREATION, UPDATE, READ, END, MESSAGE)
        cpu = {kind: figures[of_cpu(kind)] / 1e6 for kind in kinds}
        return cls(cpu=cpu, bytes={kind: figures[of_bytes(kind)] for kind in (CREATION, UPDATE, END)})

    def cpu_seconds(self, workload: Workload) -> float:
        """Return the CPU time of all calls and messages of a workload."""
        job = self.cpu[CREATION] + self.cpu[END]
        job += workload.updates * self.cpu[UPDATE] + workload.reads * self.cpu[READ]
        job += workload.watchers * (2 + workload.updates) * self.cpu[MESSAGE]
        return workload.jobs * job

    def written_bytes(self, workload: Workload) -> float:
        """Return by how much a workload enlarges the database before anything of it is removed."""
        job = self.bytes[CREATION] + workload.updates * self.bytes[UPDATE] + self.bytes[END]
        return workload.jobs * job

    def kept_bytes(self, daily: Workload) -> float:
        """Return the size of the database in its steady state: jobs for their retention, changes for a day."""
        job = self.bytes[CREATION] + self.bytes[END]
        return daily.jobs * (job * daily.retention_days + daily.updates * self.bytes[UPDATE] * FEED_DAYS)

    def mean_cores(self, daily: Workload) -> float:
        """Return the cores that a day's calls and open watches take in the mean."""
        return self.cpu_seconds(daily) / DAY + daily.open_watches * self.watch_cpu

    def processes(self, daily: Workload) -> int:
        """Return how many processes, each with a core, the busiest second needs."""
        by_writes = daily.writes / DAY * PEAK / self.writes_per_second
        return math.ceil(max(by_writes, self.mean_cores(daily) * PEAK) / HEADROOM)


def costs_of(figures: Iterable[Figure], side: str) -> Costs | None:
    """Return the costs of one of our transports; None: its rows were not measured."""
    found = {(figure.row, figure.name): figure.value(side) for figure in figures}
    of_row = {name: value for (row, name), value in found.items() if row == "cost" and value is not None}
    rate = found.get(("update", "calls/s, 64 in flight"))
    memory = found.get(("watchers", "memory of each, kB"))
    idle = [(name, value) for (row, name), value in found.items() if row == "watchers" and "CPU while idle" in name]
    opened = [int(name.split()[0].replace(",", "")) for row, name in found if row == "watchers" and "opened" in name]
    if not of_row or rate is None or memory is None or not idle or idle[0][1] is None:
        return None
    idle_cpu = idle[0][1] / 100 / opened[0]
    return replace(Costs.of(of_row), watch_bytes=memory * 1e3, watch_cpu=idle_cpu, writes_per_second=rate)


TEXT = """\
# Capacity

What jobs, updates and watchers cost, and what a server carries. This page is computed from the figures of `make bench`
([BENCHMARKS.md](../BENCHMARKS.md)) by a linear model, `benchmarks/capacity.py`. A test compares the model with a run:
CPU time and bytes are within 25 %. Measured on {machine}; CPU time is that of its cores.

## What one costs

{units}

"Alone" is one call at a time, each with a commit of its own; "together" is 256 calls in flight, which share commits. A
watch that is open takes memory, and CPU time for a heartbeat every 30 seconds. The bytes are those of the SQLite file.

## What a number of jobs a day costs

Each job has {updates:.0f} updates between its creation and its end, {reads:.0f} reads, and {watchers:.0f} watcher for
{minutes:.0f} minutes. Jobs are kept for {retention:.0f} days after their end, changes for 24 hours. The busiest second
has {peak:.0f} times the day's mean. A write is a creation, an update or an end; the CPU time is that of calls together.

{loads}

A process has a core of its own, and uses at most {headroom:.0f} % of what it can do. Below some ten writes a second,
most come alone and cost what the first line of the first table says, which is little a day. At 10⁸ jobs a day one
process is not enough: divide the tenants into groups, each with a server and a database.

## What a deployment carries

The same jobs, with {headroom:.0f} % of what the deployment can do used in the busiest second.

{deployments}

* One process: with a core of its own.
* One machine: the two processes of `--workers 2` share two cores with PostgreSQL and, here, with the load generator.
* Three replicas: three machines with a process each, and a PostgreSQL on a fourth. A write takes {database} of CPU time
  there; the last column is what the busiest second needs of its cores, and that one primary is the limit.
* A database for each group of tenants: the groups share nothing, so that n groups carry n times as much as one.
"""


Values = Mapping[tuple[str, str, str], float]
"""Figures by row, name and column."""


def document(about: Sequence[str], figures: Sequence[Figure]) -> str:
    """Return docs/capacity.md; empty if the rows that it needs were not measured."""
    costs = {side: found for side in OURS if (found := costs_of(figures, side))}
    values = {
        (figure.row, figure.name, column): value
        for figure in figures
        for column in figure.values
        if (value := figure.value(column)) is not None
    }
    on_postgresql = {column: values.get(("postgres", WRITES, column)) for column in (POSTGRESQL, TWO_WORKERS)}
    database_us = values.get(("postgres", DATABASE_CPU, POSTGRESQL))
    if set(costs) != set(OURS) or database_us is None or not all(on_postgresql.values()):
        return ""
    usual = Workload(jobs=1)
    return TEXT.format(
        machine=about[0],
        units=_units(costs, values),
        loads=_loads(costs),
        deployments=_deployments(costs, {name: rate or 0 for name, rate in on_postgresql.items()}, database_us / 1e6),
        database=f"{database_us:.0f} µs",
        updates=usual.updates,
        reads=usual.reads,
        watchers=usual.watchers,
        minutes=usual.seconds / 60,
        retention=usual.retention_days,
        peak=PEAK,
        headroom=HEADROOM * 100,
    )


def _units(costs: Mapping[str, Costs], values: Values) -> str:
    alone = {side: values.get(("update", "server CPU, µs a call, 1 in flight", side)) for side in costs}
    lines: dict[str, Callable[[str, Costs], float | None]] = {
        "an update alone, CPU, µs": lambda side, one: alone[side],
        "an update together, CPU, µs": lambda side, one: one.cpu[UPDATE] * 1e6,
        "a creation together, CPU, µs": lambda side, one: one.cpu[CREATION] * 1e6,
        "an end together, CPU, µs": lambda side, one: one.cpu[END] * 1e6,
        "a read, CPU, µs": lambda side, one: one.cpu[READ] * 1e6,
        "a message to a watcher, CPU, µs": lambda side, one: one.cpu[MESSAGE] * 1e6,
        "a job, until it is forgotten: disk, bytes": lambda side, one: one.bytes[CREATION] + one.bytes[END],
        "an update, for 24 hours: disk, bytes": lambda side, one: one.bytes[UPDATE],
        "an open watch: memory, kB": lambda side, one: one.watch_bytes / 1e3,
        "an open watch for a month: CPU, s": lambda side, one: one.watch_cpu * DAY * DAYS_PER_MONTH,
        "a million updates a month: CPU, s": lambda side, one: one.cpu[UPDATE] * 1e6,
        "a million jobs a month, as below: CPU, s": lambda side, one: one.cpu_seconds(Workload(jobs=1e6)),
    }
    table = [[name, *(number(of_one(side, one)) for side, one in costs.items())] for name, of_one in lines.items()]
    return aligned([["", *costs], *table], right=range(1, 1 + len(costs)))


def _loads(costs: Mapping[str, Costs]) -> str:
    daily = [Workload(jobs=jobs) for jobs in JOBS_PER_DAY]
    lines: dict[str, Callable[[Workload], float]] = {
        "writes/s, mean": lambda each: each.writes / DAY,
        "writes/s, busiest": lambda each: each.writes / DAY * PEAK,
        "open watches, mean": lambda each: round(each.open_watches),
        "disk, GB": lambda each: costs[OURS[0]].kept_bytes(each) / 1e9,
    }
    for side, one in costs.items():
        lines[f"{side}: cores, mean"] = one.mean_cores
        lines[f"{side}: processes"] = one.processes
        lines[f"{side}: CPU a month, hours"] = lambda each, one=one: one.mean_cores(each) * 24 * DAYS_PER_MONTH  # type: ignore[misc]
        lines[f"{side}: memory of watches, busiest, GB"] = (
            lambda each, one=one: each.open_watches * PEAK * one.watch_bytes / 1e9  # type: ignore[misc]
        )
    head = ["", *(f"{jobs:,} jobs a day" for jobs in JOBS_PER_DAY)]
    table = [[name, *(number(of_load(each)) for each in daily)] for name, of_load in lines.items()]
    return aligned([head, *table], right=range(1, 1 + len(daily)))


def _deployments(costs: Mapping[str, Costs], on_postgresql: Mapping[str, float], database_seconds: float) -> str:
    alone, two_workers = on_postgresql.values()
    rates = {f"one process, {side}, SQLite": (one.writes_per_second, 0.0) for side, one in costs.items()}
    rates |= {
        "one process, grpcio, PostgreSQL": (alone, database_seconds),
        "one machine, grpcio, `--workers 2`, PostgreSQL": (two_workers, database_seconds),
        "three replicas, grpcio, PostgreSQL": (REPLICAS * alone, database_seconds),
    }
    rates |= {
        f"{GROUPS} groups of tenants, {side}, SQLite": (GROUPS * one.writes_per_second, 0.0)
        for side, one in costs.items()
    }
    lines = [["", "writes/s", "jobs a day", "their open watches", "cores of PostgreSQL"]]
    for name, (rate, seconds) in rates.items():
        jobs = rate * HEADROOM / PEAK * DAY / Workload(jobs=1).writes
        watches, cores = Workload(jobs=jobs).open_watches, rate * HEADROOM * seconds
        lines.append([name, *map(_two_digits, (rate, jobs, watches)), number(cores) if cores else "none"])
    return aligned(lines, right=range(1, 5))


def _two_digits(value: float) -> str:
    """Return a large number with two significant digits: the model promises no more."""
    return f"{round(value, 1 - math.floor(math.log10(value))):,.0f}"
