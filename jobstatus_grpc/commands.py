"""What callers ask to be done to a job. `job.apply` judges it.

Whoever makes a command has checked its values against `limits`; apply checks them against the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from jobstatus_grpc.state import JobState

DEFAULT_TENANT = "default"
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class RequestId:
    """A request that has taken effect on a job, with a hash that tells its payload from another's."""

    value: str
    payload_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Create:
    """Create a job. The tracker has chosen its id."""

    id: str
    state: JobState = JobState.PENDING
    name: str = ""
    reason: str = ""
    has_progress: bool = False
    progress: float | None = None
    estimated_completion: datetime | None = None
    heartbeat_timeout: timedelta | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    parent_id: str = ""
    result: Mapping[str, Any] | None = None
    request: RequestId | None = None
    tenant: str = DEFAULT_TENANT
    actor: str = ""


WRITABLE_FIELDS = frozenset(
    {
        "state", "reason", "has_progress", "progress", "estimated_completion", "error", "heartbeat_timeout", "labels",
        "result",
    }
)  # fmt: skip


class Update(NamedTuple):  # made for every update there is: a frozen dataclass takes three times as long
    """Report on a job: write `changes`, by a worker that holds `attempt`.

    `changes` maps writable fields to their new values; None (for texts "", for labels {}) clears one. `attempt` 0 is
    not fenced. `expected_revision` 0 means any.
    """

    id: str
    changes: Mapping[str, Any] = _NOTHING
    attempt: int = 0
    expected_revision: int = 0
    request: RequestId | None = None
    allow_missing: bool = False
    name: str = ""
    """With parent_id and labels_if_missing: what the job gets where allow_missing creates it."""
    parent_id: str = ""
    labels_if_missing: Mapping[str, str] = _NOTHING
    tenant: str = DEFAULT_TENANT
    actor: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Ask for a job's end."""

    id: str
    reason: str = ""
    request: RequestId | None = None
    tenant: str = DEFAULT_TENANT
    actor: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """Forget a done job."""

    id: str
    expected_revision: int = 0
    tenant: str = DEFAULT_TENANT
    actor: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """Judge a job by its worker's silence.

    IN_PROGRESS and silent for its heartbeat_timeout, it is marked as stalled; after `fail_after` more (None: never) it
    fails.
    """

    id: str
    silent_for: timedelta = timedelta(0)
    """How long ago the last update came: the store fills it in, within the transaction."""
    fail_after: timedelta | None = None
    tenant: str = DEFAULT_TENANT
    actor: str = "server"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expire:
    """Forget a done job whose time has come."""

    id: str
    tenant: str = DEFAULT_TENANT
    actor: str = "server"


Command: TypeAlias = Create | Update | Cancel | Delete | Stall | Expire
