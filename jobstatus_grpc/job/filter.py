"""JobFilter: which jobs ListJobs returns and WatchJobs follows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jobstatus_grpc.job.model import STATES_UNTIL, TERMINAL_STATES, Job, JobState, to_state

_ALL_STATES = frozenset(JobState)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Fields are ANDed, the values of one field ORed, labels must all match; an empty filter matches all jobs.

    The order and the container of `ids`, `states` and `names` do not matter, also for equality. A state may be given by
    its name.

    Raises:
        ValueError: `states` holds a value that is no state.
        TypeError: `ids`, `states` or `names` is no collection.
    """

    ids: Collection[str] = frozenset()
    states: Collection[JobState] = frozenset()
    names: Collection[str] = frozenset()
    name_prefix: str = ""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    parent_id: str = ""
    created_after: datetime | None = None
    """Inclusive."""
    created_before: datetime | None = None
    """Exclusive."""
    done: bool | None = None
    stalled: bool | None = None

    def __post_init__(self) -> None:
        for name in ("ids", "states", "names"):
            values = getattr(self, name)
            if isinstance(values, str):
                raise TypeError(f"{name} must be a collection of values, not one string")
            try:
                object.__setattr__(self, name, frozenset(values))
            except TypeError:
                raise TypeError(f"{name} must be a collection of values, is {type(values).__name__}") from None
        if not all(isinstance(state, JobState) for state in self.states):
            object.__setattr__(self, "states", frozenset(map(_to_state, self.states)))

    @property
    def possible_states(self) -> frozenset[JobState]:
        """The states that matching jobs can have, by `states`, `done` and `stalled`: only jobs IN_PROGRESS stall."""
        possible = frozenset(self.states) or _ALL_STATES
        if self.done is not None:
            possible &= TERMINAL_STATES if self.done else _ALL_STATES - TERMINAL_STATES
        return possible & {JobState.IN_PROGRESS} if self.stalled else possible

    def __and__(self, other: JobFilter) -> JobFilter:
        """Return the filter of the jobs that match both; NOTHING where two values exclude each other."""
        both: dict[str, Any] = {"labels": {**self.labels, **other.labels}}
        for name in ("ids", "states", "names"):
            ours, theirs = getattr(self, name), getattr(other, name)
            both[name] = ours & theirs if ours and theirs else ours or theirs
            if ours and not both[name]:
                return NOTHING
        for name in ("parent_id", "done", "stalled"):
            given = [value for value in (getattr(self, name), getattr(other, name)) if value not in ("", None)]
            if len(set(given)) > 1:
                return NOTHING
            if given:
                both[name] = given[0]
        shorter, longer = sorted((self.name_prefix, other.name_prefix), key=len)
        if both["labels"] != {**other.labels, **self.labels} or not longer.startswith(shorter):
            return NOTHING
        return JobFilter(
            **both,
            name_prefix=longer,
            created_after=max(filter(None, (self.created_after, other.created_after)), default=None),
            created_before=min(filter(None, (self.created_before, other.created_before)), default=None),
        )

    def may_match(self, job: Job) -> bool:
        """Return whether the constant fields of `job` match: if they do not, it will never match."""
        return (
            (not self.ids or job.id in self.ids)
            and (not self.names or job.name in self.names)
            and job.name.startswith(self.name_prefix)
            and (not self.parent_id or job.parent_id == self.parent_id)
            and (self.created_after is None or job.created_at >= self.created_after)
            and (self.created_before is None or job.created_at < self.created_before)
        )

    def may_have_matched(self, job: Job) -> bool:
        """Return whether `job` may have matched up to now: with any labels, and in any state that it may have had."""
        return self.may_match(job) and not self.possible_states.isdisjoint(STATES_UNTIL[job.state])

    def matches(self, job: Job) -> bool:
        """Return whether `job` matches; its tenant is not compared."""
        return (
            self.may_match(job)
            and (not self.states or job.state in self.states)
            and (self.done is None or job.done is self.done)
            and (self.stalled is None or job.stalled is self.stalled)
            and all(job.labels.get(key) == value for key, value in self.labels.items())
        )


NOTHING = JobFilter(states={JobState.PENDING}, done=True)
"""No job matches it."""


def _to_state(value: object) -> JobState:
    try:
        return to_state(value)
    except ValueError as error:
        raise ValueError(f"states: {error}") from None
