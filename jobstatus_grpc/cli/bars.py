"""Live progress bars on a terminal: one row a job, drawn by rich. What jobs say is text here, never markup."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column
from rich.text import Text

from jobstatus_grpc.cli import output
from jobstatus_grpc.cli.text import one_line
from jobstatus_grpc.state import JobState

if TYPE_CHECKING:
    from jobstatus_grpc.record import Job

STYLES = {
    JobState.PENDING: "dim",
    JobState.IN_PROGRESS: "cyan",
    JobState.RETRYING: "magenta",
    JobState.SUCCEEDED: "green",
    JobState.ABORTED: "yellow",
    JobState.FAILED: "red",
    JobState.CANCELLED: "yellow",
}


class JobColumn(ProgressColumn):
    """A column whose text is made from the job."""

    def __init__(self, render: Callable[[Job], Text], column: Column | None = None) -> None:
        super().__init__(column or Column(no_wrap=True))
        self._render_job = render

    def render(self, task: Task) -> Text:
        """Return the text; empty until the job is known."""
        job: Job | None = task.fields["job"]
        return self._render_job(job) if job is not None else Text()


class RoomyConsole(Console):
    """A console that leaves the last columns empty: a `^C` that the terminal echoes there would break the line."""

    @property
    def options(self) -> ConsoleOptions:
        """How to draw."""
        options = super().options
        return options.update_width(max(options.max_width - 3, 1))


def draw(states: Iterable[Job], ids: Sequence[str]) -> list[Job]:
    """Draw the newest state of each job until `states` ends; return the last of each. The last drawing stays."""
    console = RoomyConsole()
    progress = Progress(*_columns(console.width), console=console, expand=True)
    rows: dict[str, TaskID] = {}
    last: dict[str, Job] = {}
    with progress:
        for job_id in ids:
            rows[job_id] = progress.add_task("", total=None, job=None)
        for job in states:
            last[job.id] = job
            _show(progress, rows[job.id], job)
    return list(last.values())


def _columns(width: int) -> list[ProgressColumn]:
    """Return what fits: words get what the rest leaves, and the remaining time is the first to go."""
    bar = max(width // 6, 10)
    remaining = [JobColumn(_remaining, Column(no_wrap=True, justify="right"))] if width >= 80 else []
    return [
        JobColumn(_name, Column(no_wrap=True, overflow="ellipsis", max_width=max(width // 5, 10))),
        JobColumn(_state, Column(no_wrap=True)),
        BarColumn(bar_width=bar, table_column=Column(no_wrap=True, width=bar)),
        JobColumn(_percent, Column(no_wrap=True, justify="right")),
        *remaining,
        JobColumn(_words, Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    ]


def _show(progress: Progress, row: TaskID, job: Job) -> None:
    """Fill the bar by what is known; without a progress it pulses while the job runs, and is full once it is done."""
    known = job.progress is not None or job.done or job.state is JobState.PENDING
    default = 100.0 if job.done else 0.0
    completed = job.progress if job.progress is not None else default
    progress.update(row, total=100.0 if known else None, completed=completed, job=job)


def _name(job: Job) -> Text:
    return Text(one_line(job.name) or job.id)


def _state(job: Job) -> Text:
    return Text(job.state.word, style=STYLES[job.state])


def _percent(job: Job) -> Text:
    return Text(output.percent(job.progress) if job.progress is not None else "")


def _remaining(job: Job) -> Text:
    left = output.remaining(job)
    return Text(str(left).split(".")[0] if left is not None else "", style="dim")


def _words(job: Job) -> Text:
    words = job.error.message if job.error and job.error.message else job.reason
    notes = output.notes(job)
    return Text(one_line(f"({notes}) {words}" if notes else words))
