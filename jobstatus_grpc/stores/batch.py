"""Applies the commands of one transaction to the jobs that they name. Every store commits its batches with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.job import (
    Command,
    Found,
    Job,
    JobState,
    Outcome,
    Stall,
    Tombstone,
    Transition,
    Update,
    apply,
    evolve,
)
from jobstatus_grpc.stores.interface import Change, Key

_NOT_SHOWN: dict[str, Any] = {"creation_request": None, "requests": ()}
"""The fields that a removed job's final state leaves out: they only serve later commands."""


class Batch:
    """What a transaction has to write, and the outcomes of its commands."""

    __slots__ = ("changes", "counts", "jobs", "outcomes", "removed", "transitions")

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        """One per command, in order."""
        self.jobs: dict[Key, Job] = {}
        """The jobs to write, as the last command left them."""
        self.removed: dict[Key, Tombstone] = {}
        """The tombstones of the jobs to remove with their history. The batch may have created a job that it removes."""
        self.transitions: list[tuple[Key, Transition]] = []
        """The entries for the history, in order; none of removed jobs."""
        self.changes: dict[Key, Change] = {}
        """The changes for the feed, at most one per job, in the order in which the jobs first changed."""
        self.counts: Counter[JobState] = Counter()
        """The differences in the number of jobs by state."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return not self.jobs and not self.removed

    def _remove(self, key: Key, job: Job) -> Tombstone:
        tombstone = Tombstone(*key, job.revision + 1)
        self.jobs.pop(key, None)
        self.removed[key] = tombstone
        self.transitions = [entry for entry in self.transitions if entry[0] != key]
        self.changes[key] = Change(*key, tombstone.revision, None, evolve(job, _NOT_SHOWN))
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
    """Apply `commands` in order, each to the result of the ones before it.

    Args:
        commands: the commands.
        found: the jobs and tombstones under the commands' keys; updated in place. A key that is missing was never used.
        now: the store's time.
        retention: how long a job is kept after its end.
        silent_for: returns how long the worker of a job has been silent.
    """
    batch = Batch()
    outcomes, jobs, changes = batch.outcomes, batch.jobs, batch.changes
    updated: set[Key] = set()
    for command in commands:
        key = (command.tenant, command.id)
        before = found.get(key)
        if isinstance(command, Stall):
            command = replace(command, silent_for=timedelta(0) if key in updated else silent_for(key))
        try:
            applied = apply(before, command, now=now, retention=retention)
        except JobStatusError as refusal:
            outcomes.append(refusal)
            continue
        job = applied.job
        outcomes.append(job)
        if isinstance(command, Update):
            updated.add(key)
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
