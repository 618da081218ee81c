"""How the watch of one job goes on: which messages are news, and when it is over. No I/O."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.client.endurance import Endurance, meaning_of
from jobstatus_grpc.errors import DeadlineExceededError, InternalError, JobStatusError
from jobstatus_grpc.record import Job
from jobstatus_grpc.wire import calls

WAIT_UPDATE_INTERVAL_SECONDS = 60.0
"""Who only waits for the end need not hear of each step of progress."""

_WITH_A_JOB = {
    pb.JobEventType.JOB_EVENT_TYPE_SNAPSHOT,
    pb.JobEventType.JOB_EVENT_TYPE_UPDATED,
    pb.JobEventType.JOB_EVENT_TYPE_HEARTBEAT,
}


class Watching(Endurance[pb.WatchJobResponse, Job]):
    """One watch of one job. `is_over` once a done job was taken."""

    def __init__(
        self,
        id: str,
        *,
        heartbeat_interval_seconds: float | None = None,
        min_update_interval_seconds: float | None = None,
        give_up_seconds: float | None = None,
        timeout_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the arguments of the clients' `watch`, and for `wait` when to raise DeadlineExceededError."""
        super().__init__(
            f"job {id}",
            heartbeat_interval_seconds=heartbeat_interval_seconds,
            give_up_seconds=give_up_seconds,
            clock=clock,
        )
        self.id = id
        self.request = calls.watch_request(id, self._heartbeat_interval_seconds, min_update_interval_seconds)
        self._timeout_seconds = timeout_seconds
        self._deadline = None if timeout_seconds is None else self._now() + timeout_seconds
        self._yielded: tuple[int, int, int] | None = None

    def begin(self) -> float | None:
        """As of any watch; a `wait` has a deadline."""
        super().begin()
        return None if self._deadline is None else max(self._deadline - self._now(), 0.0)

    def take(self, message: pb.WatchJobResponse | None) -> Job | None:
        """Return the job in `message` if it is news."""
        if message is None:
            raise InternalError("a message of the server cannot be read")
        event = message.event
        key = (event.job.created_at.seconds, event.job.created_at.nanos, event.job.revision)
        is_news = event.type in _WITH_A_JOB and event.HasField("job") and key != self._yielded
        job = calls.job_in(event) if is_news else None
        self._note_life()
        if job is not None:
            self._yielded = key
            self.is_over = job.done
        return job

    def ended(self, error: grpc.RpcError | JobStatusError | None) -> float:
        """As of any watch; the end of a `wait` past its deadline is DeadlineExceededError."""
        if self._deadline is None:
            return super().ended(error)
        # The core's clock may be a little ahead of ours.
        if self._now() >= self._deadline or isinstance(meaning_of(error), DeadlineExceededError):
            within = f"within {self._timeout_seconds:g} s"
            raise DeadlineExceededError(f"job {self.id!r} is not known to be done {within}") from error
        return min(super().ended(error), max(self._deadline - self._now(), 0.0))
