"""A table on a terminal: rows under a header, printed as they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from jobstatus_grpc.cli import output
from jobstatus_grpc.cli.text import one_line
from jobstatus_grpc.job import JobState

if TYPE_CHECKING:
    from jobstatus_grpc.job import Job

STYLES = {
    JobState.PENDING: "dim",
    JobState.IN_PROGRESS: "cyan",
    JobState.RETRYING: "magenta",
    JobState.SUCCEEDED: "green",
    JobState.ABORTED: "yellow",
    JobState.FAILED: "red",
    JobState.CANCELLED: "yellow",
}


def name(job: Job) -> Text:
    """Return its name, else its id."""
    return Text(one_line(job.name) or job.id)


def state(value: JobState) -> Text:
    """Return the state in its colour."""
    return Text(value.word, style=STYLES[value])


def percent(job: Job) -> Text:
    """Return how far it is; empty where that is not known."""
    return Text(output.percent(job.progress) if job.progress is not None else "")


def remaining(job: Job) -> Text:
    """Return how long it will still take; empty where nobody knows."""
    left = output.remaining(job)
    return Text(str(left).split(".")[0] if left is not None else "", style="dim")


def words(job: Job) -> Text:
    """Return what is special about its state, and why it is in it."""
    notes = output.notes(job)
    return Text(one_line(f"({notes}) {output.why(job)}" if notes else output.why(job)))


SHORTEST = 12
"""No column is made narrower to give the last one room."""

SHORTEST_LAST = 16

LEAST_LAST = 6
"""With less room than that for the last column, lines are as long as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column; the last one of a table takes what the others leave of the line."""

    title: str
    longest: int | None = None
    """A longer text is cut; None: it is not, and its row is longer than the others."""
    is_number: bool = False


class Table:
    """Prints rows; the first that are printed together decide how wide the columns are."""

    def __init__(self, *columns: Column) -> None:
        self._console = Console(highlight=False)
        self._columns = columns
        self._widths: list[int] = []

    @property
    def width(self) -> int:
        """The terminal's."""
        return self._console.width

    def print(self, rows: Iterable[Sequence[Text]]) -> None:
        """Print these rows below those that were printed before."""
        rows = list(rows)
        lines = [self._line(row) for row in rows] if self._widths else self._first_lines(rows)
        for line in lines:
            self._console.print(line, soft_wrap=True)

    def _first_lines(self, rows: Sequence[Sequence[Text]]) -> list[Text]:
        header = [Text(column.title, style="bold") for column in self._columns]
        widths = []
        for number, column in enumerate(self._columns):
            longest = max(row[number].cell_len for row in (header, *rows))
            widths.append(min(longest, column.longest or longest))
        rest = self.width - sum(widths[:-1]) - self._gap * len(widths[:-1])
        lacking = min(widths[-1], SHORTEST_LAST) - rest
        for number, column in enumerate(self._columns[:-1]):
            if lacking > 0 and column.longest:
                spared = min(lacking, max(widths[number] - SHORTEST, 0))
                widths[number] -= spared
                lacking -= spared
        self._widths = widths
        return [self._line(header), *(self._line(row) for row in rows)]

    @property
    def _gap(self) -> int:
        return 2 if self.width >= 100 else 1

    def _line(self, row: Sequence[Text]) -> Text:
        line = Text(no_wrap=True)
        for cell, column, width in zip(row[:-1], self._columns, self._widths, strict=False):
            if column.longest:
                cell.truncate(width, overflow="ellipsis")
            pad = max(width - cell.cell_len, 0)
            line.append_text(Text(" " * pad).append_text(cell) if column.is_number else cell.append(" " * pad))
            line.append(" " * self._gap)
        last = row[-1]
        rest = self.width - line.cell_len
        last.truncate(rest if rest >= LEAST_LAST else self.width, overflow="ellipsis")
        line.append_text(last)
        line.rstrip()
        return line
