"""Jobs in every state, for tests of the rules."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from jobstatus_grpc.job import Job, JobError, JobState, Tombstone, Update, apply
from jobstatus_grpc.job.model import TERMINAL_STATES

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
LATER = START + timedelta(seconds=10)
RETENTION = timedelta(days=7)
S = JobState


def job_in(state: JobState, **fields: Any) -> Job:
    """A job in `state`, with the fields that the usual way there sets."""
    values: dict[str, Any] = {"attempt": 0 if state is S.PENDING else 1, "revision": 5}
    if values["attempt"]:
        values["started_at"] = START
    if state in TERMINAL_STATES:
        values |= {"finished_at": START, "expires_at": START + RETENTION}
    if state is S.FAILED:
        values["error"] = JobError(2, "")
    return Job(id="a", state=state, created_at=START, updated_at=START, **{**values, **fields})


def update(job: Job | Tombstone | None, now: datetime = LATER, /, **fields: Any) -> Job:
    fences = {name: fields.pop(name) for name in ("attempt", "expected_revision", "request") if name in fields}
    known_payload = fields.pop("known_payload", None)
    command = Update(id="a", changes=fields, **fences)
    return apply(job, command, now=now, retention=RETENTION, known_payload=known_payload).job
