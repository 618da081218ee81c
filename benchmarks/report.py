"""The rows of the benchmark, their figures, and whether a figure reaches its targets."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from benchmarks.servers import Bench

Choose = Callable[[Sequence[float]], float]
CHOICES: Mapping[str, Choose] = {"median": statistics.median, "min": min, "max": max}
EACH = ""
"""Instead of a target's column: each column that was measured."""


class Target(NamedTuple):
    """A bound of a column's value, or of its ratio to the value of the column `beside`."""

    column: str
    sign: Literal["≥", "≤", "="]
    bound: float
    beside: str = ""
    otherwise: Target | None = None
    """Another bound of the column: either is enough."""


class Verdict(NamedTuple):
    """How a column compares with a target."""

    column: str
    target: Target
    reached: float

    @property
    def badness(self) -> float:
        """Return how far the value is beyond the bound, as a factor; at most 1 if the target was reached."""
        target, reached = self.target, self.reached
        if target.sign == "=":
            return 1.0 if reached == target.bound else math.inf
        smaller, larger = (target.bound, reached) if target.sign == "≥" else (reached, target.bound)
        return smaller / larger if larger else math.inf

    def __str__(self) -> str:
        beside = f" × {self.target.beside}" if self.target.beside else ""
        word = "MISSED" if self.badness > 1 else "ok"
        return f"{number(self.reached)}{beside} ({self.target.sign} {number(self.target.bound)}) {word}"


@dataclass(slots=True)
class Figure:
    """One line of a table: the same quantity measured several times in each column."""

    name: str
    row: str = ""
    values: dict[str, list[float]] = field(default_factory=dict)
    """The values of all repetitions, by column: a side, a store or a size."""
    targets: Sequence[Target] = ()
    goal: str = ""
    """The line of the targets in the list of all targets, which figures may share; empty: the name."""
    choose: Choose = statistics.median
    """Chooses the repetition that counts."""

    def value(self, column: str) -> float | None:
        """Return the value that counts; None: the column was not measured."""
        return self.choose(self.values[column]) if column in self.values else None

    def verdicts(self) -> list[Verdict]:
        """Return the verdict of each target whose columns were measured."""
        verdicts: list[Verdict] = []
        for target in self.targets:
            for column in [target.column] if target.column else self.values:
                either = [self._verdict(column, each) for each in (target, target.otherwise) if each]
                if found := [verdict for verdict in either if verdict]:
                    verdicts.append(min(found, key=lambda verdict: verdict.badness))
        return verdicts

    def _verdict(self, column: str, target: Target) -> Verdict | None:
        value, beside = self.value(column), self.value(target.beside) if target.beside else 1.0
        return Verdict(column, target, value / beside) if value is not None and beside else None

    def by_size(self) -> Mapping[int, Sequence[float]]:
        """Return the values by size; empty if a column is no size."""
        by_size = {size_of(column): values for column, values in self.values.items()}
        return by_size if all(by_size) else {}

    def as_json(self) -> dict[str, Any]:
        """Return the figure with the value of each repetition, to six digits."""
        found: dict[str, Any] = {"row": self.row, "name": self.name, "goal": self.goal}
        found["choose"] = next(name for name, choose in CHOICES.items() if choose is self.choose)
        found["values"] = {column: [_rounded(value) for value in values] for column, values in self.values.items()}
        found["targets"] = [[*target[:4], target.otherwise and target.otherwise[:4]] for target in self.targets]
        return {key: value for key, value in found.items() if value and value != "median"}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Figure:
        """Return the figure that `as_json` described."""
        targets = [
            Target(*each[:4])._replace(otherwise=each[4] and Target(*each[4])) for each in found.get("targets", ())
        ]
        return cls(
            found["name"],
            found["row"],
            dict(found["values"]),
            targets,
            found.get("goal", ""),
            CHOICES[found.get("choose", "median")],
        )


class Table(dict[str, Figure]):
    """The figures of one row by name, in the order in which they are first mentioned."""

    def __missing__(self, name: str) -> Figure:
        return self.setdefault(name, Figure(name))

    def add(self, column: str | int, values: Mapping[str, float]) -> None:
        """Add one repetition of a column, a number for a size: the value of each figure by name."""
        for name, value in values.items():
            self[name].values.setdefault(column if isinstance(column, str) else f"{column:,}", []).append(value)

    def expect(self, name: str, goal: str, *targets: Target, choose: Choose = statistics.median) -> None:
        """Set the targets of a figure; see Figure. Its line comes next, unless it was mentioned before."""
        self[name].goal, self[name].targets, self[name].choose = goal, targets, choose


class Row(NamedTuple):
    """One thing to measure."""

    name: str
    """The argument of `--only`."""
    title: str
    text: str
    """How it is measured, for the readers of BENCHMARKS.md."""
    fill: Callable[[Bench, Table], None]
    is_apart: bool = False
    """Whether it is measured only if it is asked for."""

    def measure(self, bench: Bench) -> list[Figure]:
        """Return the figures that have a value; those by size come last."""
        table = Table()
        self.fill(bench, table)
        figures = [replace(figure, row=self.name) for figure in table.values() if figure.values]
        return sorted(figures, key=lambda figure: bool(figure.by_size()))


def row(name: str, title: str, *, is_apart: bool = False) -> Callable[[Callable[[Bench, Table], None]], Row]:
    """Make a row of the function that fills its table. The function's docstring is the row's text."""
    return lambda fill: Row(name, title, " ".join((inspect.getdoc(fill) or "").split()), fill, is_apart)


def _rounded(value: float) -> float:
    return value if value == round(value) else float(f"{value:.6g}")


def size_of(column: str) -> int:
    """Return the number in a column's name; 0: the column is no size."""
    digits = column.replace(",", "")
    return int(digits) if digits.isdigit() else 0


def at_quantile(values: Sequence[float], quantile: float) -> float:
    """Return the smallest value that at least this part of `values` does not exceed."""
    return sorted(values)[math.ceil(quantile * len(values)) - 1]


def growth(values: Mapping[int, Sequence[float]]) -> str:
    """Return as text how a figure grows with the size at which it is measured, from the smallest to the largest."""
    if len(values) < 2:
        return ""
    smallest, largest = min(values), max(values)
    first, last = statistics.median(values[smallest]), statistics.median(values[largest])
    if first <= 0 or last <= 0:
        return ""
    power = math.log(last / first) / math.log(largest / smallest)
    if power < -0.15:
        return f"falls, n^{power:.1f}"
    if power < 0.15:
        return "O(1), constant"
    if power < 0.85:
        return f"less than linear, n^{power:.1f}"
    return "O(n), linear" if power <= 1.15 else f"MORE than linear, n^{power:.1f}"


def number(value: float | None) -> str:
    """Return three significant digits, or all digits of a number of a hundred and more."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 100 else f"{value:.3g}"


def aligned(lines: Sequence[Sequence[str]], *, right: range) -> str:
    """Return a Markdown table with columns that are also aligned in plain text; `right`: the columns aligned right."""
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = [f"{'-' * (width - 1)}:" if i in right else "-" * width for i, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(cells))
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, (lines[0], rule, *lines[1:])))
