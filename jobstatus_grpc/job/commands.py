"""The commands that change a job, as plain data.

`validation` checks them against the limits, `rules.apply` against the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeAlias

from jobstatus_grpc.job.filter import JobFilter
from jobstatus_grpc.job.model import DEFAULT_TENANT, JobState, RequestId

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Create:
    """Create a job. `JobService.create` fills in an empty id."""

    id: str
    state: JobState = JobState.PENDING
    name: str = ""
    reason: str = ""
    reports_progress: bool = False
    progress: float | None = None
    estimated_completion: datetime | None = None
    heartbeat_timeout: timedelta | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    parent_id: str = ""
    result: Mapping[str, Any] | None = None
    trace_parent: str = ""
    request: RequestId | None = None
    tenant: str = DEFAULT_TENANT
    actor: str = ""
    only: JobFilter | None = None
    """The caller sees, and may leave behind, only jobs that match; the others are not found. None: all jobs."""


CREATION_FIELDS = frozenset(field.name for field in fields(Create)) - {"request", "tenant", "actor", "only"}
"""The fields of the API's JobStatus that CreateJob sets. Create, Job and JobStatus have the same names for them."""

WRITABLE_FIELDS = frozenset(
    {
        "state", "reason", "reports_progress", "progress", "estimated_completion", "error", "heartbeat_timeout",
        "labels", "result", "trace_parent",
    }
)  # fmt: skip


class Update(NamedTuple):  # row `batch`: a frozen dataclass, which takes three times as long to make, costs 2 %
    """Update a job: write `changes`, as the worker that holds `attempt`.

    `changes` maps writable fields to new values; None (for texts "", for labels {}) clears a field. `attempt` 0 is not
    fenced. `expected_revision` 0 means any.
    """

    id: str
    changes: Mapping[str, Any] = _NOTHING
    attempt: int = 0
    expected_revision: int = 0
    request: RequestId | None = None
    allow_missing: bool = False
    name: str = ""
    """This, parent_id and labels_if_missing are used only when allow_missing creates the job."""
    parent_id: str = ""
    labels_if_missing: Mapping[str, str] = _NOTHING
    tenant: str = DEFAULT_TENANT
    actor: str = ""
    only: JobFilter | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Request the end of a job; with `force`, end it where it is stalled.

    `cascade` is for JobService.cancel, which then cancels the job's descendants too; a store cancels this job only.
    """

    id: str
    reason: str = ""
    force: bool = False
    cascade: bool = False
    request: RequestId | None = None
    tenant: str = DEFAULT_TENANT
    actor: str = ""
    only: JobFilter | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """Remove a done job."""

    id: str
    expected_revision: int = 0
    tenant: str = DEFAULT_TENANT
    actor: str = ""
    only: JobFilter | None = None
    request: ClassVar[None] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """Mark a job as stalled, or fail it, if its worker is silent.

    A job IN_PROGRESS without an update for its heartbeat_timeout becomes stalled; after `fail_after` more (None: never)
    it becomes FAILED.
    """

    id: str
    silent_for: timedelta = timedelta(0)
    """The worker's silence when the job was found overdue; the store fills it in, within the transaction."""
    fail_after: timedelta | None = None
    tenant: str = DEFAULT_TENANT
    actor: str = "server"
    only: ClassVar[None] = None
    request: ClassVar[None] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Expire:
    """Remove a done job after its expires_at; if its end is in the future, move it to now."""

    id: str
    tenant: str = DEFAULT_TENANT
    actor: str = "server"
    only: ClassVar[None] = None
    request: ClassVar[None] = None


Command: TypeAlias = Create | Update | Cancel | Delete | Stall | Expire
