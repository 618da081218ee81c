"""What the commands of one transaction make of the jobs that they name. Every store judges its batches here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timedelta

from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.job import Command, Found, Job, JobState, Outcome, Stall, Tombstone, Transition, Update, apply
from jobstatus_grpc.stores.interface import Change, Key


class Batch:
    """What has to be written, and what has to be answered."""

    __slots__ = ("changes", "counts", "jobs", "outcomes", "removed", "transitions")

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
        self.counts: Counter[JobState] = Counter()
        """By how much the number of jobs in each state rises."""

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
        self.counts[job.state] -= 1
        return tombstone


def apply_all(
    commands: Iterable[Command],
    found: dict[Key, Found],
    *,
    now: datetime,
    retention: timedelta,
    silent_for: Callable[[Key], timedelta],
) -> Batch:
    """Apply `commands` in order, each to what the ones before it left.

    Args:
        found: what is stored under the keys; is brought up to date. A key without an entry was never used.
        silent_for: how long the worker of a job has been silent.
    """
    batch = Batch()
    outcomes, jobs, changes = batch.outcomes, batch.jobs, batch.changes
    heard: set[Key] = set()
    for command in commands:
        key = (command.tenant, command.id)
        before = found.get(key)
        if isinstance(command, Stall):
            command = replace(command, silent_for=timedelta(0) if key in heard else silent_for(key))
        try:
            applied = apply(before, command, now=now, retention=retention)
        except JobStatusError as refusal:
            outcomes.append(refusal)
            continue
        job = applied.job
        outcomes.append(job)
        if isinstance(command, Update):
            heard.add(key)
        if applied.removed:
            found[key] = batch._remove(key, job)
        elif job is not before:
            found[key] = jobs[key] = job
            was = before.state if isinstance(before, Job) else None
            if was is not job.state:
                batch.counts[job.state] += 1
                if was is not None:
                    batch.counts[was] -= 1
            if not isinstance(before, Job) or before.revision != job.revision:
                changes[key] = Change(*key, job.revision, job)
            if applied.transition is not None:
                batch.transitions.append((key, applied.transition))
    return batch
