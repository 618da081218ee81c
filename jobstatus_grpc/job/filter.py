"""Which jobs: the filter of lists and of watches of many."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from jobstatus_grpc.job.model import TERMINAL_STATES, Job, JobState

_ALL_STATES = frozenset(JobState)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Fields are ANDed, values within one ORed, labels must all match; an empty filter matches all of a tenant's jobs.

    Equal filters are equal, in whatever order and container their values were given.
    """

    ids: Collection[str] = frozenset()
    states: Collection[JobState] = frozenset()
    names: Collection[str] = frozenset()
    name_prefix: str = ""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    parent_id: str = ""
    created_after: datetime | None = None
    """Created then or later."""
    created_before: datetime | None = None
    """Created earlier than that."""
    done: bool | None = None
    stalled: bool | None = None

    def __post_init__(self) -> None:
        for name in ("ids", "states", "names"):
            values = getattr(self, name)
            if isinstance(values, str):
                raise TypeError(f"{name} must be a collection of values, not one string")
            object.__setattr__(self, name, frozenset(values))

    @property
    def possible_states(self) -> frozenset[JobState]:
        """The states that a job may have to match, by `states`, `done` and `stalled`: only a started job is stalled."""
        possible = frozenset(self.states) or _ALL_STATES
        if self.done is not None:
            possible &= TERMINAL_STATES if self.done else _ALL_STATES - TERMINAL_STATES
        return possible & {JobState.IN_PROGRESS} if self.stalled else possible

    def may_match(self, job: Job) -> bool:
        """Tell whether `job` matches as far as it can never change: a job that does not will never match."""
        return (
            (not self.ids or job.id in self.ids)
            and (not self.names or job.name in self.names)
            and job.name.startswith(self.name_prefix)
            and (not self.parent_id or job.parent_id == self.parent_id)
            and (self.created_after is None or job.created_at >= self.created_after)
            and (self.created_before is None or job.created_at < self.created_before)
        )

    def matches(self, job: Job) -> bool:
        """Tell whether `job` is one of them; its tenant is not looked at."""
        return (
            self.may_match(job)
            and (not self.states or job.state in self.states)
            and (self.done is None or job.done is self.done)
            and (self.stalled is None or job.stalled is self.stalled)
            and all(job.labels.get(key) == value for key, value in self.labels.items())
        )
