"""Figures, and whether they reach their targets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What one column of a figure has to reach: bounds, both included, of its value or of its ratio to another's."""

    column: str
    beside: str | None = None
    """The column that it is divided by; None: its value counts."""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bound(self) -> str:
        """Return the bounds in words."""
        if self.at_least == self.at_most:
            return f"= {number(self.at_least)}"
        if self.at_least is not None:
            return f"≥ {number(self.at_least)}"
        return f"≤ {number(self.at_most)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of a target."""

    target: Target
    reached: float

    @property
    def is_missed(self) -> bool:
        """Whether the target was not reached."""
        return self.badness > 1

    @property
    def badness(self) -> float:
        """How far from the nearest bound: at most 1 if it was reached."""
        below = self._part(self.target.at_least, self.reached)
        return max(below, self._part(self.reached, self.target.at_most))

    @staticmethod
    def _part(value: float | None, bound: float | None) -> float:
        if value is None or bound is None:
            return 0.0
        return value / bound if bound else 1.0 + value

    def __str__(self) -> str:
        beside = f" × {self.target.beside}" if self.target.beside else ""
        word = "MISSED" if self.is_missed else "ok"
        return f"{number(self.reached)}{beside} ({self.target.bound}) {word}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of a table: the same thing measured several times in each column."""

    row: str
    """The name that `--only` knows."""
    name: str
    values: Mapping[str, Sequence[float]]
    """Each repetition's, by column: a side, or a size."""
    targets: Sequence[Target] = ()
    goal: str = ""
    """What the targets are about, in the list of all targets; empty: its name."""
    note: str = ""
    choose: Callable[[Sequence[float]], float] = field(default=statistics.median)
    """Which of the repetitions counts."""

    def value(self, column: str) -> float | None:
        """Return what counts of a column; None where it was not measured."""
        values = self.values.get(column)
        return self.choose(values) if values else None

    def verdicts(self) -> list[Verdict]:
        """Return what came of each target whose columns were measured."""
        verdicts: list[Verdict] = []
        for target in self.targets:
            value = self.value(target.column)
            beside = self.value(target.beside) if target.beside else 1.0
            if value is not None and beside:
                verdicts.append(Verdict(target=target, reached=value / beside))
        return verdicts

    def as_json(self) -> dict[str, object]:
        """Return it with each repetition's value."""
        return {
            "row": self.row,
            "name": self.name,
            "values": {column: self.value(column) for column in self.values},
            "repetitions": {column: list(values) for column, values in self.values.items()},
            "targets": [f"{verdict.target.column}: {verdict}" for verdict in self.verdicts()],
        }


def at_quantile(values: Sequence[float], quantile: float) -> float:
    """Return the smallest value that at least this part of `values` does not exceed."""
    return sorted(values)[math.ceil(quantile * len(values)) - 1]


def growth(values: Mapping[int, Sequence[float]]) -> str:
    """Return how a figure grows with the size that it is measured at, from the smallest to the largest, in a word."""
    sizes = sorted(values)
    first, last = statistics.median(values[sizes[0]]), statistics.median(values[sizes[-1]])
    if len(sizes) < 2 or first <= 0 or last <= 0:
        return ""
    power = math.log(last / first) / math.log(sizes[-1] / sizes[0])
    if power < -0.15:
        return f"falls, n^{power:.1f}"
    if power < 0.15:
        return "O(1), constant"
    if power < 0.85:
        return f"less than linear, n^{power:.1f}"
    return "O(n), linear" if power <= 1.15 else f"MORE than linear, n^{power:.1f}"


def number(value: float | None) -> str:
    """Return three digits that count, or all of those before the point."""
    if value is None:
        return ""
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
