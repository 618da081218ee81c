"""Figures, and the table and the JSON that they are shown in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

MISSED = "MISSED"
_NUMBERS = range(2, 5)
"""The columns whose figures stand to the right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a figure has to reach: bounds, both included, of our value or of its ratio to the bare one's."""

    of_ratio: bool = False
    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        what = "ratio " if self.of_ratio else ""
        if self.at_least == self.at_most:
            return f"{what}= {number(self.at_least)}"
        if self.at_least is not None:
            return f"{what}≥ {number(self.at_least)}"
        return f"{what}≤ {number(self.at_most)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table: the same thing measured several times on our server and, where it has it, the bare one."""

    row: str
    name: str
    ours: Sequence[float]
    bare: Sequence[float] = ()
    target: Target | None = None
    choose: Callable[[Sequence[float]], float] = field(default=statistics.median)
    """Which of the repetitions counts."""

    @property
    def value(self) -> float:
        """Our value."""
        return self.choose(self.ours)

    @property
    def bare_value(self) -> float | None:
        """The bare server's; None where it was not measured."""
        return self.choose(self.bare) if self.bare else None

    @property
    def ratio(self) -> float | None:
        """Ours by the bare one's."""
        return self.value / self.bare_value if self.bare_value else None

    @property
    def is_missed(self) -> bool:
        """Whether there is a target that was not reached."""
        target = self.target
        if target is None:
            return False
        reached = self.ratio if target.of_ratio else self.value
        return (
            reached is None
            or (target.at_least is not None and reached < target.at_least)
            or (target.at_most is not None and reached > target.at_most)
        )

    def as_json(self) -> dict[str, object]:
        """Return it with each repetition's value."""
        return {
            "row": self.row,
            "name": self.name,
            "ours": self.value,
            "bare": self.bare_value,
            "ratio": self.ratio,
            "target": str(self.target) if self.target else None,
            "missed": self.is_missed,
            "repetitions": {"ours": list(self.ours), "bare": list(self.bare)},
        }


def at_quantile(values: Sequence[float], quantile: float) -> float:
    """Return the smallest value that at least this part of `values` does not exceed."""
    return sorted(values)[math.ceil(quantile * len(values)) - 1]


def number(value: float | None) -> str:
    """Return three digits that count, or all of those before the point."""
    if value is None:
        return ""
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a Markdown table whose columns stand straight in plain text too."""
    cells = [["row", "figure", "ours", "bare", "ratio", "target", ""]]
    row = ""
    for figure in figures:
        ratio = f"{figure.ratio:.2f}" if figure.ratio is not None else ""
        verdict = "" if figure.target is None else MISSED if figure.is_missed else "ok"
        first = "" if figure.row == row else figure.row
        row = figure.row
        target = str(figure.target or "")
        cells.append([first, figure.name, number(figure.value), number(figure.bare_value), ratio, target, verdict])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = [f"{'-' * (width - 1)}:" if i in _NUMBERS else "-" * width for i, width in enumerate(widths)]
    lines = [_line(cells[0], widths), _line(rule, widths), *(_line(line, widths) for line in cells[1:])]
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = (
        cell.rjust(width) if i in _NUMBERS else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return f"| {' | '.join(aligned)} |"
