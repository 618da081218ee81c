"""What stands in a job's row on a terminal. What jobs say is text here, never markup."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
