"""Live progress bars on a terminal: one row a job, as many as there is room for, drawn by rich."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from jobstatus_grpc.cli import exits, tables
from jobstatus_grpc.job import JobState

if TYPE_CHECKING:
    from jobstatus_grpc.job import Job

WIDE = 150
"""So many columns have room for ids too."""

TAIL = 4
"""How much of its id tells a job from others whose names look the same."""

LONGEST_MARK = 36
"""A UUID."""


class RoomyConsole(Console):
    """A console that leaves the last columns empty: a `^C` that the terminal echoes there would break the line."""

    @property
    def options(self) -> ConsoleOptions:
        """How to draw."""
        options = super().options
        return options.update_width(max(options.max_width - 3, 1))


def draw(states: Iterable[Job], ids: Sequence[str]) -> list[Job]:
    """Draw the newest state of each job until `states` ends; return the last of each. The last drawing stays."""
    last: dict[str, Job] = {}
    place = {job_id: number for number, job_id in enumerate(ids)}
    board = Board(last, lambda job: (job.done and len(ids) > board.room, place[job.id]))
    with board.drawn():
        for job in states:
            last[job.id] = job
        board.shows_all = True
    return list(last.values())


def draw_matches(news: Iterable[object], jobs: Mapping[str, Job]) -> None:
    """Draw the jobs in `jobs` until `news` ends, which changes them; those not done first. The last drawing stays."""
    board = Board(jobs, lambda job: (job.done, -job.created_at.timestamp(), job.id))
    board.notice, board.shows_ids = "no job matches", True
    with board.drawn():
        for _ in news:
            pass


class Board:
    """Draws the jobs in a mapping that another thread may change meanwhile."""

    notice = ""
    """Stands there while there are no jobs."""
    shows_ids = False
    """Where the terminal is wide enough."""
    shows_all = False
    """Even if that is more than the terminal has room for."""

    def __init__(self, jobs: Mapping[str, Job], order: Callable[[Job], Any]) -> None:
        """Take the jobs, and which of them come first."""
        self._jobs = jobs
        self._order = order
        self._console = RoomyConsole()

    @property
    def room(self) -> int:
        """For how many jobs the terminal has room, beside a line that counts the others."""
        return max(self._console.height - 2, 1)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Draw as long as the block runs; Ctrl-C ends the program."""
        try:
            with Live(console=self._console, refresh_per_second=10, get_renderable=self._render):
                yield
        except KeyboardInterrupt:
            # Without a new line: the drawing has ended its own.
            raise click.exceptions.Exit(exits.INTERRUPTED) from None

    def _render(self) -> RenderableType:
        jobs = list(self._jobs.values())  # in one step, unlike a loop over what is changed meanwhile
        if not jobs:
            return Text(self.notice, style="dim")
        shown = heapq.nsmallest(len(jobs) if self.shows_all else self.room, jobs, key=self._order)
        rows = self._rows(shown)
        more = len(jobs) - len(shown)
        return Group(rows, Text(f"… and {more:,} more", style="dim")) if more else rows

    def _rows(self, jobs: Sequence[Job]) -> Table:
        width = self._console.width
        bar_width = max(width // 6, 10)
        marks = self._marks(jobs)
        columns = _columns(width, bar_width, marked=any(marks), steady=len(self._jobs) > 1)
        rows = Table.grid(*columns, padding=(0, 1), expand=True)
        for job, mark in zip(jobs, marks, strict=True):
            rows.add_row(
                *([Text(mark, style="dim")] if any(marks) else []),
                tables.name(job),
                tables.state(job.state),
                _bar(job, bar_width),
                tables.percent(job),
                *([tables.remaining(job)] if width >= 80 else []),
                tables.words(job),
            )
        return rows

    def _marks(self, jobs: Sequence[Job]) -> list[str]:
        """Return what tells jobs apart beside their names: the id where that has room, or the end of it."""
        if self.shows_ids and self._console.width >= WIDE:
            return [job.id for job in jobs]
        names = [tables.name(job) for job in jobs]
        for name in names:
            name.truncate(_name_width(self._console.width), overflow="ellipsis")
        times = Counter(name.plain for name in names)
        return [job.id[-TAIL:] if times[name.plain] > 1 else "" for job, name in zip(jobs, names, strict=True)]


def _name_width(width: int) -> int:
    """Return how much of a name has room."""
    return max(width // 5, 10)


def _columns(width: int, bar_width: int, *, marked: bool, steady: bool) -> list[Column]:
    """Return what fits: words get what the rest leaves, and the remaining time is the first to go.

    Args:
        steady: columns are as wide as what they usually hold, so that they do not move about.
    """
    marks = [Column(no_wrap=True, overflow="ellipsis", max_width=LONGEST_MARK)] if marked else []
    remaining = [Column(no_wrap=True, justify="right", min_width=7 * steady)] if width >= 80 else []
    return [
        *marks,
        Column(no_wrap=True, overflow="ellipsis", max_width=_name_width(width)),
        Column(no_wrap=True, min_width=len(JobState.IN_PROGRESS.word) * steady),
        Column(no_wrap=True, width=bar_width),
        Column(no_wrap=True, justify="right", min_width=5 * steady),
        *remaining,
        Column(no_wrap=True, overflow="ellipsis", ratio=1),
    ]


def _bar(job: Job, width: int) -> ProgressBar:
    """Return a bar filled by what is known; without a progress it pulses while the job runs, and is full once done."""
    known = job.progress is not None or job.done or job.state is JobState.PENDING
    default = 100.0 if job.done else 0.0
    completed = job.progress if job.progress is not None else default
    return ProgressBar(total=100.0 if known else None, completed=completed, width=width)
