"""What a watch by filter knows: the jobs that match now, and how those ended that did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from jobstatus_grpc.cli import output

if TYPE_CHECKING:
    from jobstatus_grpc.client import JobChange
    from jobstatus_grpc.record import Job
    from jobstatus_grpc.state import JobState


class Matches:
    """The jobs that match, kept up to date by `take`."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.outcomes: set[JobState] = set()
        """Of all jobs that were seen done."""
        self._is_synced = False
        self._open: set[str] = set()

    def following(self, changes: Iterable[JobChange], *, until_done: bool) -> Iterator[tuple[JobChange, Job | None]]:
        """Take `changes`, and yield each with the job as it was known before.

        Args:
            until_done: end once all jobs are known, and none of those that match is open.
        """
        for change in changes:
            before = self.jobs.get(change.id)
            self.take(change)
            yield change, before
            if until_done and self._is_synced and not self._open:
                return

    def take(self, change: JobChange) -> None:
        """Note what happened."""
        from jobstatus_grpc.client import JobChangeType

        if change.type is JobChangeType.RESET:
            self.jobs.clear()
            self._open.clear()
            self._is_synced = False
        elif change.type is JobChangeType.SYNCED:
            self._is_synced = True
        self._open.discard(change.id)
        if change.type is JobChangeType.REMOVED:
            self.jobs.pop(change.id, None)
        elif change.job is not None:
            self.jobs[change.id] = change.job
            if not change.job.done:
                self._open.add(change.id)
        if change.job is not None and change.job.done:
            self.outcomes.add(change.job.state)


def to_json(change: JobChange) -> str:
    """Return one line of JSON: `{"event": "updated", "job": {…}}`."""
    from jobstatus_grpc.client import JobChangeType

    event: dict[str, Any] = {"event": change.type.name.lower()}
    if change.type is JobChangeType.REMOVED:
        event |= {"id": change.id, "revision": str(change.revision)}
    if change.job is not None:
        event["job"] = output.to_object(change.job)
    return output.in_json(event)


def line(change: JobChange, before: Job | None) -> str:
    """Return the news in one line; empty where they are about no job.

    Args:
        before: the job as it was known until now.
    """
    from jobstatus_grpc.client import JobChangeType

    if change.type is not JobChangeType.REMOVED:
        return output.line(change.job) if change.job is not None else ""
    if change.job is not None:
        return f"{output.line(change.job)}  removed: matches no longer"
    return f"{output.line(before) if before is not None else change.id}  removed: deleted or expired"
