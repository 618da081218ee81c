"""How a watch goes on: which messages are news, which ends of a stream are survived, how long to wait. No I/O.

Both clients' watches ask this what to do: `begin` a stream, `take` each message, tell that it `ended`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import grpc
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.client.retry import Backoff
from jobstatus_grpc.errors import DeadlineExceededError, InternalError, JobStatusError, UnavailableError
from jobstatus_grpc.record import Job
from jobstatus_grpc.wire import calls, status

log = logging.getLogger("jobstatus_grpc.client")

DEFAULT_HEARTBEAT_INTERVAL_SECONDS = 30.0
"""The server's, where a watch names none."""
SHORTEST_HEARTBEAT_INTERVAL_SECONDS = 1.0
SILENT_HEARTBEATS = 3
LAST_TRY_SECONDS = 1.0
WARN_AFTER_ENDS = 3
WAIT_UPDATE_INTERVAL_SECONDS = 60.0
"""Who only waits for the end need not hear of each step of progress."""

_SURVIVED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
}
_WITH_A_JOB = {
    pb.JobEventType.JOB_EVENT_TYPE_SNAPSHOT,
    pb.JobEventType.JOB_EVENT_TYPE_UPDATED,
    pb.JobEventType.JOB_EVENT_TYPE_HEARTBEAT,
}


class Watching:
    """One watch of one job, over as many streams as it takes. `is_over` once a done job was taken."""

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
        self._now = clock
        if heartbeat_interval_seconds is None and give_up_seconds is not None:
            third = max(give_up_seconds / SILENT_HEARTBEATS, SHORTEST_HEARTBEAT_INTERVAL_SECONDS)
            heartbeat_interval_seconds = min(third, DEFAULT_HEARTBEAT_INTERVAL_SECONDS)
        self.id = id
        self.request = calls.watch_request(id, heartbeat_interval_seconds, min_update_interval_seconds)
        self.is_over = False
        self._silence_seconds = SILENT_HEARTBEATS * (heartbeat_interval_seconds or DEFAULT_HEARTBEAT_INTERVAL_SECONDS)
        self._give_up_seconds = give_up_seconds
        self._timeout_seconds = timeout_seconds
        self._deadline = None if timeout_seconds is None else self._now() + timeout_seconds
        self._heard_at = self._now()
        self._was_opened = False
        self._is_open = False
        self._yielded: tuple[int, int, int] | None = None
        self._backoff = Backoff()
        self._ends = 0

    def begin(self) -> float | None:
        """Begin a stream: return the deadline that its call gets, in seconds from now; None for none."""
        self._is_open = False
        return None if self._deadline is None else max(self._deadline - self._now(), 0.0)

    @property
    def silence_seconds(self) -> float:
        """How long the stream may be silent from now on before it counts as dead."""
        if self._is_open or self._give_up_seconds is None:
            return self._silence_seconds
        return min(self._silence_seconds, max(self._left_seconds, LAST_TRY_SECONDS))

    def take(self, message: pb.WatchJobResponse | None) -> Job | None:
        """Return the job in `message` if it is news, else None; grpc.aio gives None for one that it could not parse.

        Raises:
            InternalError: the message makes no sense; the stream is to be ended with this.
        """
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
        """Return how long to wait before the next stream begins, after one that ended.

        Args:
            error: how it ended: the call's error, one of ours (InternalError for a message that makes no sense,
                UnavailableError for silence), or None for OK, although the job was not done.

        Raises:
            JobStatusError: the watch is not to go on: the error is not one that passes, or patience is at its end.
        """
        cause = status.from_rpc_error(error) if isinstance(error, grpc.RpcError) else error
        if self._is_past_deadline(cause):
            within = f"within {self._timeout_seconds:g} s"
            raise DeadlineExceededError(f"job {self.id!r} is not known to be done {within}") from error
        if cause is not None and not self._survives(error):
            raise cause from error
        pause = self._backoff.pause_seconds(cause)
        if self._give_up_seconds is not None:
            if self._left_seconds <= 0:
                heard = f"nothing was heard from the server for {self._give_up_seconds:g} s"
                raise UnavailableError(f"{heard}; last: {cause or 'the stream ended'}") from error
            pause = min(pause, self._left_seconds)
        if self._deadline is not None:
            pause = min(pause, max(self._deadline - self._now(), 0.0))
        self._log_end(cause, pause)
        return pause

    @property
    def _left_seconds(self) -> float:
        """How long until the watch gives up; endless without give_up_seconds."""
        give_up_seconds = float("inf") if self._give_up_seconds is None else self._give_up_seconds
        return self._heard_at + give_up_seconds - self._now()

    def _note_life(self) -> None:
        self._heard_at = self._now()
        if not self._is_open:
            self._is_open = self._was_opened = True
            self._backoff.reset()
            if self._ends >= WARN_AFTER_ENDS:
                log.warning("the watch of job %s goes on", self.id)
            self._ends = 0

    def _is_past_deadline(self, cause: JobStatusError | None) -> bool:
        if self._deadline is None:
            return False
        # The core's clock may be a little ahead of ours.
        return isinstance(cause, DeadlineExceededError) or self._now() >= self._deadline

    def _survives(self, error: grpc.RpcError | JobStatusError | None) -> bool:
        if not isinstance(error, grpc.RpcError):
            return isinstance(error, (InternalError, UnavailableError))
        code = error.code()
        return code in _SURVIVED or (self._was_opened and code is grpc.StatusCode.RESOURCE_EXHAUSTED)

    def _log_end(self, cause: JobStatusError | None, pause: float) -> None:
        """Say once in each row of failures that something is wrong; a single end is everyday life."""
        self._ends += 1
        level = logging.WARNING if self._ends == WARN_AFTER_ENDS else logging.DEBUG
        log.log(level, "the watch of job %s was cut (%s); next try in %.1f s", self.id, cause or "no reason", pause)
