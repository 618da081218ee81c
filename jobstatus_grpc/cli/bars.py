"""Live progress bars on a terminal, drawn by rich: one row per job, as many as fit."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
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

MIN_WIDTH_FOR_IDS = 150
"""Columns of a terminal from which on whole ids are shown."""

ID_SUFFIX = 4
"""Characters of the id that are shown if several jobs have names that look the same."""

LONGEST_MARK = 36
"""The width of a whole id: a UUID."""


class NarrowConsole(Console):
    """A console that leaves the last columns empty, where a terminal echoes `^C`: on a full line it would wrap."""

    @property
    def options(self) -> ConsoleOptions:
        """The options that rich draws with."""
        options = super().options
        return options.update_width(max(options.max_width - 3, 1))


def draw(states: Iterable[Job], ids: Sequence[str], is_connected: Callable[[], bool]) -> list[Job]:
    """Draw the newest state of each job until `states` ends, and leave that drawing; return the last state of each."""
    last: dict[str, Job] = {}
    place = {job_id: number for number, job_id in enumerate(ids)}
    board = Board(last, lambda job: (job.done and len(ids) > board.room, place[job.id]), is_connected)
    with board.drawn():
        for job in states:
            last[job.id] = job
        board.shows_all = True
    return list(last.values())


def draw_matches(changes: Iterable[object], jobs: Mapping[str, Job], is_connected: Callable[[], bool]) -> None:
    """Draw the jobs in `jobs`, open ones first, until `changes` ends, and leave that drawing. Reading `changes` updates
    `jobs`."""
    board = Board(jobs, lambda job: (job.done, -job.created_at.timestamp(), job.id), is_connected)
    board.notice, board.shows_ids = "no job matches", True
    with board.drawn():
        for _ in changes:
            pass


class Board:
    """Draws the jobs in a mapping that another thread may change."""

    notice = ""
    """Text that is shown while there are no jobs."""
    shows_ids = False
    """Show ids if the terminal is wide enough."""
    shows_all = False
    """Show all jobs, also more than fit on the terminal."""

    def __init__(self, jobs: Mapping[str, Job], order: Callable[[Job], Any], is_connected: Callable[[], bool]) -> None:
        """Prepare to draw `jobs`, sorted by the key `order`. The remaining times stop unless `is_connected`."""
        self._is_connected = is_connected
        self._now = datetime.now(timezone.utc)
        self._jobs = jobs
        self._order = order
        self._console = NarrowConsole()

    @property
    def room(self) -> int:
        """Number of jobs that fit on the terminal, with a line that counts the others."""
        return max(self._console.height - 2, 1)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Draw while the block runs. Ctrl-C exits with INTERRUPTED."""
        try:
            with Live(console=self._console, refresh_per_second=10, get_renderable=self._render):
                yield
        except KeyboardInterrupt:
            # LazyGroup would print a newline for a KeyboardInterrupt; rich has printed it.
            raise click.exceptions.Exit(exits.INTERRUPTED) from None

    def _render(self) -> RenderableType:
        if self._is_connected():
            self._now = datetime.now(timezone.utc)
        jobs = list(self._jobs.values())  # one atomic step: another thread may change it
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
                *([tables.remaining(job, self._now)] if width >= 80 else []),
                tables.words(job),
            )
        return rows

    def _marks(self, jobs: Sequence[Job]) -> list[str]:
        """Return a mark for each job: its id if there is room, or else its end if another name looks the same."""
        if self.shows_ids and self._console.width >= MIN_WIDTH_FOR_IDS:
            return [job.id for job in jobs]
        names = [tables.name(job) for job in jobs]
        for name in names:
            name.truncate(_name_width(self._console.width), overflow="ellipsis")
        times = Counter(name.plain for name in names)
        return [job.id[-ID_SUFFIX:] if times[name.plain] > 1 else "" for job, name in zip(jobs, names, strict=True)]


def _name_width(width: int) -> int:
    """Return the width of the column of names."""
    return max(width // 5, 10)


def _columns(width: int, bar_width: int, *, marked: bool, steady: bool) -> list[Column]:
    """Return the columns that fit: the last one gets the rest; without room, the remaining time is left out first.

    Args:
        marked: with a column for marks.
        steady: columns have the width of their usual content, so that they do not move when it changes.
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
    """Return a bar; without progress it pulses while the job runs, and is full once the job is done."""
    known = job.progress is not None or job.done or job.state is JobState.PENDING
    default = 100.0 if job.done else 0.0
    completed = job.progress if job.progress is not None else default
    return ProgressBar(total=100.0 if known else None, completed=completed, width=width)
