"""Applies the commands of one transaction to the jobs that they name. Every store commits its batches with it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any

from jobstatus_grpc.errors import DataLossError, JobStatusError
from jobstatus_grpc.job import (
    PROGRESS,
    Children,
    Command,
    Delete,
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
    progress_of_child,
    with_heartbeat,
)
from jobstatus_grpc.stores.interface import STALLED, Change, Key, RequestKey, Silence

log = logging.getLogger("jobstatus_grpc.jobs")
"""The log that says what happened to each job."""

MAX_LOGGED_CHARACTERS = 500
"""Of a reason or an error in a line of the log. `jobstatus history` and `jobstatus get` show them whole."""

_ROUTINE_MOVES = frozenset({
    (None, JobState.PENDING), (None, JobState.IN_PROGRESS), (JobState.PENDING, JobState.IN_PROGRESS),
    (JobState.IN_PROGRESS, JobState.SUCCEEDED),
})  # fmt: skip
"""What happens to each job that goes well."""


def _always() -> bool:
    return True


_admits_routine: Callable[[], bool] = _always

_NOT_SHOWN: dict[str, Any] = {"creation_request": None, "requests": ()}
"""The fields that a removed job's final state leaves out: they only serve later commands."""


def limit_routine_lines(admits: Callable[[], bool]) -> None:
    """Log a line about a job that is created, claimed or succeeds only if `admits` returns True, in this process.

    Its record has the attribute `is_routine`. Row `jobs`, made with BatchUpdateJobs: to make lines that are then left
    out took 7 to 8 % of the CPU time of a creation.
    """
    global _admits_routine
    _admits_routine = admits


class Batch:
    """What a transaction has to write, and the outcomes of its commands."""

    __slots__ = (
        "changes",
        "children",
        "counts",
        "deletions",
        "is_unsure",
        "jobs",
        "outcomes",
        "removed",
        "requests",
        "transitions",
    )

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
        self.counts: Counter[int] = Counter()
        """The differences in the number of jobs by state, and of the stalled ones under STALLED."""
        self.children: dict[Key, Counter[int]] = {}
        """The differences in the numbers of children, by their parents, which need not exist: see `child_changes`."""
        self.deletions: list[tuple[Tombstone, str]] = []
        """The tombstones of the jobs that were deleted, not expired, and the actors of the deletions."""
        self.requests: dict[RequestKey, str] = {}
        """The requests to remember, with the hashes of their payloads. If one of them is stored already, its command
        was a repeat: the commands have to be applied again with what is known."""
        self.is_unsure = False
        """Whether a command that leaves nothing to remember may be a repeat: as with a stored request."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return not self.jobs and not self.removed and not self.requests

    def child_changes(self) -> dict[Key, Children]:
        """Return what changes in the numbers of children, by their parents; only what is not 0."""
        changes = {key: {state: by for state, by in counts.items() if by} for key, counts in self.children.items()}
        return {key: change for key, change in changes.items() if change}

    def log(self) -> None:
        """Log a line for each entry of the history and each deletion. Stores call it once the batch is durable."""
        if not (self.transitions or self.deletions) or not log.isEnabledFor(logging.INFO):
            return
        for key, entry in self.transitions:
            is_routine = (entry.from_state, entry.to_state) in _ROUTINE_MOVES
            if is_routine and not _admits_routine():
                continue
            fields = {
                "job": key[1],
                "from": "" if entry.from_state is None else entry.from_state.word,
                "to": entry.to_state.word,
                "attempt": entry.attempt,
                "revision": entry.revision,
                "actor": entry.actor,
                "reason": entry.reason[:MAX_LOGGED_CHARACTERS],
                "error": _error_of(self.jobs.get(key), entry),
                "request_id": entry.request_id,
            }
            fields = {name: value for name, value in fields.items() if value != ""}
            log.info("job", extra={"fields": fields, "is_routine": is_routine})
        for tombstone, actor in self.deletions:
            fields = {"job": tombstone.id, "to": "deleted", "revision": tombstone.revision, "actor": actor}
            log.info("job", extra={"fields": fields})

    def _count_child(self, job: Job, by: int) -> None:
        """Add a job to the numbers of its parent, or with -1 take it from these."""
        counts = self.children.setdefault((job.tenant, job.parent_id), Counter())
        counts[job.state] += by
        counts[PROGRESS] += by * progress_of_child(job)

    def _remove(self, key: Key, job: Job) -> Tombstone:
        tombstone = Tombstone(*key, job.revision + 1)
        self.jobs.pop(key, None)
        self.removed[key] = tombstone
        self.transitions = [entry for entry in self.transitions if entry[0] != key]
        self.requests = {request: payload for request, payload in self.requests.items() if request[:2] != key}
        self.changes[key] = Change(*key, tombstone.revision, None, evolve(job, _NOT_SHOWN))
        self.counts[job.state] -= 1
        self.counts[STALLED] -= job.stalled
        if job.parent_id:
            self._count_child(job, -1)
        return tombstone


def apply_all(
    commands: Iterable[Command],
    found: dict[Key, Found],
    *,
    now: datetime,
    retention: timedelta,
    silence_of: Callable[[Key], Silence],
    known: Mapping[RequestKey, str] | None = None,
    damaged: Mapping[Key, DataLossError] = MappingProxyType({}),
) -> Batch:
    """Apply `commands` in order, each to the result of the ones before it.

    Args:
        commands: the commands.
        found: the jobs and tombstones under the commands' keys; updated in place. A key that is missing was never used.
        now: the store's time.
        retention: how long a job is kept after its end.
        silence_of: returns the silence of a job's worker.
        known: those of the commands' requests that the jobs remember, with the hashes of their payloads. None: they are
            not looked up, as most requests are new.
        damaged: the errors that refuse all commands on jobs that cannot be read.
    """
    batch = Batch()
    outcomes, jobs, changes = batch.outcomes, batch.jobs, batch.changes
    is_looked_up, known = known is not None, known or {}
    updated: set[Key] = set()
    for command in commands:
        key = (command.tenant, command.id)
        if damaged and key in damaged:
            outcomes.append(damaged[key])
            continue
        before = found.get(key)
        if isinstance(command, Stall) and key not in updated:
            duration, heard_at = silence_of(key)
            command = replace(command, silent_for=duration)
            before = with_heartbeat(before, heard_at) if isinstance(before, Job) else before
        request, payload = command.request, None
        if request is not None:
            request_key = (*key, request.value)
            payload = batch.requests.get(request_key) or known.get(request_key)
        may_be_repeat = not is_looked_up and request is not None and payload is None and isinstance(before, Job)
        try:
            applied = apply(before, command, now=now, retention=retention, known_payload=payload)
        except JobStatusError as refusal:
            outcomes.append(refusal)
            batch.is_unsure |= may_be_repeat
            continue
        job = applied.job
        if applied.request is not None:
            batch.requests[request_key] = applied.request.payload_hash
        else:
            batch.is_unsure |= may_be_repeat
        outcomes.append(job)
        if isinstance(command, Update):
            updated.add(key)
        if applied.removed:
            found[key] = tombstone = batch._remove(key, job)
            if isinstance(command, Delete):
                batch.deletions.append((tombstone, command.actor))
        elif job is not before:
            found[key] = jobs[key] = job
            was = before.state if isinstance(before, Job) else None
            batch.counts[STALLED] += job.stalled - (isinstance(before, Job) and before.stalled)
            if was is not job.state:
                batch.counts[job.state] += 1
                if was is not None:
                    batch.counts[was] -= 1
            if not isinstance(before, Job) or before.revision != job.revision:
                changes[key] = Change(*key, job.revision, job)
            if job.parent_id:
                if isinstance(before, Job):
                    batch._count_child(before, -1)
                batch._count_child(job, 1)
            if applied.transition is not None:
                batch.transitions.append((key, applied.transition))
    return batch


def _error_of(job: Job | None, entry: Transition) -> str:
    """Return the message of the error with which a change left the job, cut for the log; empty if it has none."""
    error = job.error if job is not None and job.revision == entry.revision else None
    return "" if error is None else (error.message or error.reason)[:MAX_LOGGED_CHARACTERS]
