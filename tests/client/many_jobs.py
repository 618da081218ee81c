"""A worker with many jobs, on a clock of its own, and the service that answers it."""

from __future__ import annotations

from typing import Any

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import JobUpdate
from jobstatus_grpc.client.reporter import Answers, Gathering
from jobstatus_grpc.client.sender import Step
from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.wire import status
from tests.client.scripted import a_job


class Worker:
    """A Gathering on a clock, with its sender."""

    def __init__(self, *, tells: bool = True, max_pending: int = 1000) -> None:
        self.now = 1000.0
        self.wakes = 0
        self.refused: list[tuple[str, str]] = []
        self.jobs: list[str] = []
        self.gathering = Gathering(
            Answers(lambda job: self.jobs.append(job.id), self.refuse if tells else None),
            flush_interval_seconds=0.05,
            max_pending=max_pending,
            finish_timeout_seconds=10,
            call_timeout_seconds=10,
            clock=lambda: self.now,
        )
        self.gathering.wake = self.wake

    def wake(self) -> None:
        self.wakes += 1

    def refuse(self, update: JobUpdate, error: JobStatusError) -> None:
        self.refused.append((update.id, type(error).__name__))

    def give(self, id: str, **fields: Any) -> Worker:
        self.gathering.update(JobUpdate(id, **fields))
        return self

    def next_due(self) -> Step:
        """Let time pass until a step is due, and return it."""
        due = self.gathering.due_in_seconds()
        assert due is not None
        self.now += due
        return self.gathering.next_step()[0]

    def send(self, *results: JobStatusError | None) -> list[pb.UpdateJobRequest]:
        """Let time pass until a step is due, answer it, and return its updates."""
        step = self.next_due()
        updates = list(step.request.updates)  # type: ignore[attr-defined]
        response = pb.BatchUpdateJobsResponse()
        for index, update in enumerate(updates):
            error = results[index] if index < len(results) else None
            if error is not None:
                response.results.add(error=status.to_job_error(error))
            else:
                response.results.add(job=a_job(id=update.job.id))
        self.gathering.succeeded(step, response)
        return updates

    @property
    def is_idle(self) -> bool:
        due = self.gathering.due_in_seconds()
        return due is not None and due > 60


def sent(updates: list[pb.UpdateJobRequest]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (update.job.id, {path: getattr(update.job, path) for path in update.update_mask.paths}) for update in updates
    ]
