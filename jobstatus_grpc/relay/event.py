"""What is delivered: the end of a job, or its change to another state, as a CloudEvent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jobstatus_grpc.job import Job, JobState

SPEC_VERSION = "1.0"

TYPE_PREFIX = "jobstatus.v1.job."
"""Of the type of an event; the state in lower case follows."""

_ID_CHARACTERS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A job in a state, and the attributes of its CloudEvent."""

    id: str
    """The same whenever the event is delivered again."""
    source: str
    job: Job
    data: Mapping[str, Any]
    """The job as a JSON object."""

    @property
    def at(self) -> datetime:
        """When the job entered its state; when it changed last, if that is not known."""
        return entered_at(self.job)

    @property
    def attributes(self) -> dict[str, str]:
        """The context attributes of the CloudEvent."""
        return {
            "specversion": SPEC_VERSION,
            "id": self.id,
            "source": self.source,
            "type": TYPE_PREFIX + self.job.state.word,
            "subject": self.job.id,
            "time": self.at.isoformat().replace("+00:00", "Z"),
        }

    @property
    def envelope(self) -> dict[str, Any]:
        """The whole CloudEvent as a JSON object."""
        return {**self.attributes, "datacontenttype": "application/json", "data": self.data}


def event_id(source: str, job: Job) -> str:
    """Return the id of the event that a job is in its state: a job is in each state once in an attempt, and ends once.

    The time of the end counts, because a store that was set back to a backup may see another end of the same attempt.
    """
    parts = [source, job.id, job.created_at.isoformat(), str(job.attempt), job.state.name]
    parts.append(job.finished_at.isoformat() if job.finished_at else "")
    return f"evt_{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_ID_CHARACTERS]}"


def entered_at(job: Job) -> datetime:
    """Return when the job entered its state; when it changed last, if that is not known."""
    if job.state is JobState.PENDING:
        return job.created_at
    if job.state is JobState.IN_PROGRESS:
        return job.started_at or job.updated_at
    return job.finished_at or job.updated_at
