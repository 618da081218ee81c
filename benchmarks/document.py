"""Figures as Markdown: a table per row of the benchmark, and the whole of BENCHMARKS.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from benchmarks.database import VERSION
from benchmarks.report import Figure, Verdict, number
from benchmarks.rows import ROWS
from benchmarks.servers import (
    BARE,
    BARE_NATIVE,
    BARE_UVLOOP,
    ETCD,
    GRPCIO,
    NATIVE,
    OURS,
    POSTGRESQL,
    SQLITE,
    STORES,
    TWO_WORKERS,
)

INTRODUCTION = """\
# Benchmarks

Measured by `make bench` in one run, every server on one core, everything that loads it on another. What loads is the
same program for all, and every update of every side is a change. Sides take turns of half a second, so that whatever
else the machine does hits all. A cell is the median of the repetitions where nothing else is said.

| column | what runs |
| --- | --- |
"""
COLUMNS = {
    GRPCIO: "this service, as `jobstatus serve` starts it, on a SQLite file with `synchronous=FULL`",
    NATIVE: "the same with `--transport native`",
    ETCD: "etcd with its defaults: each Put is on the disk before it is answered, each Range is linearizable",
    BARE: "a `grpc.aio` handler that parses the request, keeps nothing, and answers with a message of ours",
    BARE_NATIVE: "the same handler on `pygrpc-native`",
    BARE_UVLOOP: "the same handler on `grpc.aio` with uvloop's event loop, where that is installed",
    SQLITE: "what is called grpcio in other tables",
    POSTGRESQL: f"the same with a database of PostgreSQL {VERSION} that runs with its defaults, on both cores",
    TWO_WORKERS: "the same with `--workers 2`, on both cores, and a database of its own",
}
"""Of those that occur, the document's head says what they are."""


def whole(about: Sequence[str], figures: Sequence[Figure], plot: str | None) -> str:
    """Return BENCHMARKS.md; `plot` is the path of the picture, from the document."""
    parts = [_introduction(figures), "\n".join(f"* {line}" for line in about), "## Targets", goals(figures)]
    if plot:
        parts.append(f"![Rate and latency against callers]({plot})")
    for row, of_row in groupby(figures, key=lambda figure: figure.row):
        parts += [f"## {ROWS[row].title}", ROWS[row].text, f'`make bench ARGS="--only {row}"`', tables(list(of_row))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _introduction(figures: Iterable[Figure]) -> str:
    occur = {column for figure in figures for column in figure.values}
    return INTRODUCTION + "\n".join(f"| {column} | {what} |" for column, what in COLUMNS.items() if column in occur)


def goals(figures: Iterable[Figure]) -> str:
    """Return the targets, and what came of them, on each transport; of several for one goal, the worst."""
    found: dict[str, dict[str, list[Verdict]]] = {}
    for figure in figures:
        for verdict in figure.verdicts():
            column = verdict.target.column
            column = GRPCIO if _is_size(column) or column in STORES else column
            found.setdefault(figure.goal or figure.name, {}).setdefault(column, []).append(verdict)
    lines = [["", GRPCIO, NATIVE]]
    for goal, of_goal in found.items():
        if of_goal.keys() & OURS:
            lines.append([goal, *(_worst(of_goal.get(side, [])) for side in OURS)])
    return _table(lines, right=range(0))


def _worst(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    worst = str(max(verdicts, key=lambda verdict: verdict.badness))
    return f"{worst}, the worst of {len(verdicts)}" if len(verdicts) > 1 else worst


def tables(figures: Sequence[Figure]) -> str:
    """Return a table for each kind of columns that the figures have."""
    parts: list[str] = []
    for _, group in groupby(figures, key=lambda figure: all(map(_is_size, figure.values))):
        parts.append(_one_table(list(group)))
    return "\n\n".join(parts)


def missed(figures: Iterable[Figure]) -> int:
    """Return how many targets were measured and not reached."""
    return sum(verdict.is_missed for figure in figures for verdict in figure.verdicts())


def _is_size(column: str) -> bool:
    return column.replace(",", "").isdigit()


def _one_table(figures: Sequence[Figure]) -> str:
    columns = list(dict.fromkeys(column for figure in figures for column in figure.values))
    has_notes = any(figure.note for figure in figures)
    lines = [["", *columns, *(["growth"] if has_notes else []), "targets"]]
    for figure in figures:
        notes = [figure.note] if has_notes else []
        verdicts = "; ".join(f"{verdict.target.column} {verdict}" for verdict in figure.verdicts())
        lines.append([figure.name, *(number(figure.value(column)) for column in columns), *notes, verdicts])
    if not any(line[-1] for line in lines[1:]):
        lines = [line[:-1] for line in lines]
    return _table(lines, right=range(1, 1 + len(columns)))


def _table(lines: Sequence[Sequence[str]], *, right: range) -> str:
    """Return a Markdown table whose columns stand straight in plain text too."""
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = [f"{'-' * (width - 1)}:" if i in right else "-" * width for i, width in enumerate(widths)]
    return "\n".join(_aligned(line, widths, right) for line in (lines[0], rule, *lines[1:]))


def _aligned(cells: Sequence[str], widths: Sequence[int], right: range) -> str:
    return f"| {' | '.join(_pad(cells, widths, right))} |"


def _pad(cells: Sequence[str], widths: Sequence[int], right: range) -> Iterator[str]:
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        yield cell.rjust(width) if i in right else cell.ljust(width)
