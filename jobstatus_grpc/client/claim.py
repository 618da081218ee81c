"""How a worker comes by its job: it creates one, or claims one that is there. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from google.protobuf.message import Message

from jobstatus_grpc.errors import JobNotFoundError
from jobstatus_grpc.job_id import new_job_id
from jobstatus_grpc.record import Job
from jobstatus_grpc.state import JobState
from jobstatus_grpc.wire import calls
from jobstatus_grpc.wire.calls import UNSET, JobUpdate


@dataclass(frozen=True, slots=True)
class Step:
    """One call to make: the RPC's name, its request, and the changes in it that count as reported once it succeeds."""

    method: str
    request: Message
    changes: Mapping[str, Any] = field(default_factory=dict)
    begun_at: float = 0.0


class Claim:
    """The calls that make a job this worker's. Each may be repeated: its request stays the same, request_id included.

    `id` is known from the beginning; `attempt` is 0 until the job is claimed.
    """

    def __init__(
        self,
        *,
        name: str,
        id: str | None,
        labels: Mapping[str, str] | None,
        parent_id: str,
        heartbeat_timeout_seconds: float | None,
    ) -> None:
        """Take the arguments of the clients' `track`."""
        self.id = id or new_job_id(datetime.now(timezone.utc))
        self.attempt = 0
        self._claimed = 1
        self._name = name
        self._labels = labels
        self._parent_id = parent_id
        self._heartbeat_timeout_seconds = heartbeat_timeout_seconds
        self._step = Step("GetJob", calls.get_request(self.id)) if id else self._creation()

    @property
    def step(self) -> Step:
        """The call to make now."""
        return self._step

    def answered(self, job: Job) -> None:
        """Take the answer to the step."""
        if self._step.method == "GetJob":
            self._step = self._claim(job.attempt + 1)
        else:
            # Not the job's: a step sent twice is answered with the job as it is now, which another may have claimed.
            self.attempt = self._claimed

    def is_saved_from(self, error: Exception) -> bool:
        """Tell whether there is another way after `error`: a job that is not there can be created if it has a name."""
        if isinstance(error, JobNotFoundError) and self._step.method == "GetJob" and self._name:
            self._step = self._claim(1)
            return True
        return False

    def _creation(self) -> Step:
        request = calls.create_request(
            id=self.id,
            name=self._name,
            state=JobState.IN_PROGRESS,
            labels=self._labels,
            parent_id=self._parent_id,
            heartbeat_timeout_seconds=self._heartbeat_timeout_seconds,
        )
        return Step("CreateJob", request)

    def _claim(self, attempt: int) -> Step:
        self._claimed = attempt
        timeout = self._heartbeat_timeout_seconds
        update = JobUpdate(
            self.id,
            state=JobState.IN_PROGRESS,
            attempt=attempt,
            heartbeat_timeout_seconds=UNSET if timeout is None else timeout,
            allow_missing=bool(self._name),
            name=self._name,
            parent_id=self._parent_id,
        )
        request = calls.update_request(update)
        # Outside the mask labels are for a job that is created; one that is there keeps its own.
        request.job.labels.update(self._labels or {})
        return Step("UpdateJob", request)
