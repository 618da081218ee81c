"""What is kept of a job: Job, its history, and what remains of it. Instants are aware UTC datetimes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Any, ClassVar

from jobstatus_grpc.commands import DEFAULT_TENANT, RequestId
from jobstatus_grpc.state import TERMINAL_STATES, JobState


@dataclass(frozen=True, slots=True)
class JobError:
    """What went wrong: a google.rpc.Code (1 to 16), a text for people, a word for machines."""

    code: int
    message: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)  # no slots: `evolve` copies the instance's dictionary
class Job:
    """A job as stored after one of its changes. The fields are those of the API's JobStatus, which explains them.

    labels and result belong to the job: do not change them.
    """

    id: str
    state: JobState
    created_at: datetime
    updated_at: datetime
    name: str = ""
    reason: str = ""
    has_progress: bool = False
    progress: float | None = None
    estimated_completion: datetime | None = None
    error: JobError | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    attempt: int = 0
    cancel_requested: bool = False
    stalled: bool = False
    heartbeat_timeout: timedelta | None = None
    revision: int = 1
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    parent_id: str = ""
    result: Mapping[str, Any] | None = field(default=None, hash=False)
    expires_at: datetime | None = None
    tenant: str = field(default=DEFAULT_TENANT, repr=False)
    creation_request: RequestId | None = field(default=None, repr=False)
    """Kept as long as the job, and never sent."""
    requests: tuple[RequestId, ...] = field(default=(), repr=False)
    """The newest 16 that took effect after the creation, oldest first; never sent."""

    rendering: ClassVar[bytes | None] = None
    """No fields: room for what wire.render has made of the job, and of all its fields but REPORT_FIELDS."""
    lasting_rendering: ClassVar[bytes | None] = None

    @property
    def done(self) -> bool:
        """Whether the job has ended."""
        return self.state in TERMINAL_STATES

    @property
    def projected_completion(self) -> datetime | None:
        """When the job will be done at the pace of its current attempt; None where progress does not tell."""
        if (
            self.state is not JobState.IN_PROGRESS
            or self.progress is None
            or self.progress < 1
            or self.started_at is None
        ):
            return None
        return self.started_at + (self.updated_at - self.started_at) * (100 / self.progress)


JOB_FIELDS = tuple(field.name for field in fields(Job))


REPORT_FIELDS = (
    "revision", "updated_at", "has_progress", "progress", "reason", "estimated_completion", "requests",
)  # fmt: skip
"""What a report of progress changes."""
_report_fields = frozenset(REPORT_FIELDS)


def evolve(job: Job, changes: Mapping[str, Any]) -> Job:
    """Return `job` with some fields changed: `dataclasses.replace` at a sixth of its time."""
    values = job.__dict__.copy()
    values.update(changes)
    values["rendering"] = None
    if not _report_fields.issuperset(changes):
        values["lasting_rendering"] = None
    after = object.__new__(Job)
    object.__setattr__(after, "__dict__", values)  # frozen, for others
    return after


def is_report(before: Job, after: Job) -> bool:
    """Tell whether REPORT_FIELDS are all that changed."""
    lasting = after.lasting_rendering
    if lasting is not None and lasting is before.lasting_rendering:
        return True
    return bool(_lasting_values_of(before) == _lasting_values_of(after))


_lasting_values_of = attrgetter(*(name for name in JOB_FIELDS if name not in _report_fields))
_URGENT_FIELDS = (
    "state", "error", "started_at", "finished_at", "attempt", "cancel_requested", "stalled",
    "heartbeat_timeout", "labels", "result", "expires_at",
)  # fmt: skip
_urgent_values_of = attrgetter(*_URGENT_FIELDS)


def is_urgent(before: Job, after: Job) -> bool:
    """Tell whether more changed than progress, reason, estimated_completion and what follows from them."""
    lasting = after.lasting_rendering
    if lasting is not None and lasting is before.lasting_rendering:
        return False
    return bool(_urgent_values_of(before) != _urgent_values_of(after))


def urgent_mark(job: Job) -> int:
    """Return a number that stays as long as no change is urgent: to compare with a job that is not kept."""
    return hash(repr(_urgent_values_of(job)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One entry of a job's history; `from_state` is None for its creation."""

    from_state: JobState | None
    to_state: JobState
    reason: str
    transitioned_at: datetime
    attempt: int
    actor: str
    revision: int


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What is left of a deleted or expired job: its id is not free, and the revision of its removal is known."""

    tenant: str
    id: str
    revision: int
