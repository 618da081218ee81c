"""A job in a notebook: `show(client, id)` displays it and follows it to its end, without widgets."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from jobstatus_grpc.client import JobStatusClient
from jobstatus_grpc.job import Job, JobState

try:
    from IPython.display import display
except ImportError as error:
    raise ImportError("jobstatus_grpc.contrib.jupyter needs IPython: pip install 'jobstatus-grpc[jupyter]'") from error

__all__ = ["JobView", "show"]

_COLOURS = {
    JobState.SUCCEEDED: "#2e7d32",
    JobState.FAILED: "#c62828",
    JobState.ABORTED: "#c62828",
    JobState.CANCELLED: "#757575",
}

_COLOUR = "#1565c0"
"""Of a job that is not done."""


def show(client: JobStatusClient, id: str) -> Job:
    """Display a job in the output of a cell, and update it until its end; return the done job.

    Interrupting the cell ends the display, not the job.

    Raises:
        NotFoundError: no job has this id.
        JobStatusError: an error of `client.watch` that is not transient.
    """
    handle = None
    for job in client.watch(id):
        if handle is None:
            handle = display(JobView(job), display_id=True)  # type: ignore[no-untyped-call]
        else:
            handle.update(JobView(job))
    return job


@dataclass(frozen=True, slots=True)
class JobView:
    """What is displayed of a job: HTML in a notebook, a line of text in a console."""

    job: Job

    def __repr__(self) -> str:
        return " ".join([self.job.name or self.job.id, *self._facts()])

    def _repr_html_(self) -> str:
        job = self.job
        colour = _COLOURS.get(job.state, _COLOUR)
        bar = ""
        if job.progress is not None:
            style = f"width: 20em; accent-color: {colour}"
            bar = f'<progress max="100" value="{job.progress:.1f}" style="{style}"></progress> '
        name = f"<b>{escape(job.name or job.id)}</b>"
        return f'<div>{name} {bar}<span style="color: {colour}">{escape(" ".join(self._facts()))}</span></div>'

    def _facts(self) -> list[str]:
        job = self.job
        facts = [job.state.word]
        if job.stalled:
            facts.append("(stalled)")
        if job.progress is not None:
            facts.append(f"{job.progress:.0f} %")
        facts.append(job.error.message if job.error is not None else job.reason)
        return [fact for fact in facts if fact]
