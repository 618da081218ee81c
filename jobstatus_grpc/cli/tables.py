"""Tables on a terminal, printed row by row as jobs arrive; and the cells that tables and bars share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from jobstatus_grpc.cli import output
from jobstatus_grpc.cli.text import one_line
from jobstatus_grpc.job import JobState

if TYPE_CHECKING:
    from jobstatus_grpc.job import Job

MIN_WIDTH = 12
"""Characters that a column keeps when columns are cut to give the last one room."""

MIN_LAST_WIDTH = 16
"""Characters for the last column below which the others are cut."""

MIN_USEFUL_LAST_WIDTH = 6
"""Characters for the last column below which it is not cut to fit: the line is then longer than the terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column. The last column of a table gets the rest of the line."""

    title: str
    longest: int | None = None
    """Longer text is cut; None: it is not cut, and moves the rest of its row."""
    is_number: bool = False


class Table:
    """Prints rows under a header. The rows of the first `print` determine the widths of the columns."""

    def __init__(self, *columns: Column) -> None:
        self._console = Console(highlight=False)
        self._columns = columns
        self._widths: list[int] = []

    def print(self, rows: Iterable[Sequence[Text]]) -> None:
        """Print rows below those printed before."""
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
        rest = self._console.width - sum(widths[:-1]) - self._gap * len(widths[:-1])
        missing = min(widths[-1], MIN_LAST_WIDTH) - rest
        for number, column in enumerate(self._columns[:-1]):
            if missing > 0 and column.longest:
                cut = min(missing, max(widths[number] - MIN_WIDTH, 0))
                widths[number] -= cut
                missing -= cut
        self._widths = widths
        return [self._line(header), *(self._line(row) for row in rows)]

    @property
    def _gap(self) -> int:
        return 2 if self._console.width >= 100 else 1

    def _line(self, row: Sequence[Text]) -> Text:
        line = Text(no_wrap=True)
        for cell, column, width in zip(row[:-1], self._columns, self._widths, strict=False):
            if column.longest:
                cell.truncate(width, overflow="ellipsis")
            pad = max(width - cell.cell_len, 0)
            line.append_text(Text(" " * pad).append_text(cell) if column.is_number else cell.append(" " * pad))
            line.append(" " * self._gap)
        last = row[-1]
        width = self._console.width
        rest = width - line.cell_len
        last.truncate(rest if rest >= MIN_USEFUL_LAST_WIDTH else width, overflow="ellipsis")
        line.append_text(last)
        line.rstrip()
        return line


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
    """Return the name, or else the id."""
    return Text(one_line(job.name) or job.id)


def state(value: JobState) -> Text:
    """Return the state in its colour."""
    return Text(value.word, style=STYLES[value])


def percent(job: Job) -> Text:
    """Return the progress; empty if there is none."""
    return Text(output.percent(job.progress) if job.progress is not None else "")


def remaining(job: Job, now: datetime) -> Text:
    """Return the remaining time; empty if unknown."""
    left = output.remaining(job, now)
    return Text(str(left).split(".")[0] if left is not None else "", style="dim")


def words(job: Job) -> Text:
    """Return the notes on the state, and the error message or the reason."""
    notes = output.notes(job)
    return Text(one_line(f"({notes}) {output.why(job)}" if notes else output.why(job)))
