"""What the commands of one transaction make of the jobs that they name. Every store judges its batches here."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.job import Command, Found, Job, Outcome, Tombstone, Transition, apply
from jobstatus_grpc.stores.found import Key
from jobstatus_grpc.stores.interface import Change


class Batch:
    """What has to be written, and what has to be answered."""

    __slots__ = ("changes", "jobs", "outcomes", "removed", "transitions")

    def __init__(self) -> None:
        """Begin with nothing."""
        self.outcomes: list[Outcome] = []
        """One per command, in order."""
        self.jobs: dict[Key, Job] = {}
        """Jobs to write, as the last command left them."""
        self.removed: dict[Key, Tombstone] = {}
        """Jobs to remove with their history, and what to leave of them. A job made by this batch may be among them."""
        self.transitions: list[tuple[Key, Transition]] = []
        """For the history, in order; of jobs that stay only."""
        self.changes: dict[Key, Change] = {}
        """For the feed, at most one per job, the earliest changed first."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return not self.jobs and not self.removed

    def _remove(self, key: Key, job: Job) -> Tombstone:
        tombstone = Tombstone(*key, job.revision + 1)
        self.jobs.pop(key, None)
        self.removed[key] = tombstone
        self.transitions = [entry for entry in self.transitions if entry[0] != key]
        self.changes[key] = Change(*key, tombstone.revision, None)
        return tombstone


def apply_all(commands: Iterable[Command], found: dict[Key, Found], *, now: datetime, retention: timedelta) -> Batch:
    """Apply `commands` in order, each to what the ones before it left.

    Args:
        found: what is stored under the keys; is brought up to date. A key without an entry was never used.
    """
    batch = Batch()
    outcomes, jobs, changes = batch.outcomes, batch.jobs, batch.changes
    for command in commands:
        key = (command.tenant, command.id)
        before = found.get(key)
        try:
            applied = apply(before, command, now=now, retention=retention)
        except JobStatusError as refusal:
            outcomes.append(refusal)
            continue
        job = applied.job
        outcomes.append(job)
        if applied.removed:
            found[key] = batch._remove(key, job)
        elif job is not before:
            found[key] = jobs[key] = job
            if not isinstance(before, Job) or before.revision != job.revision:
                changes[key] = Change(*key, job.revision, job)
            if applied.transition is not None:
                batch.transitions.append((key, applied.transition))
    return batch
