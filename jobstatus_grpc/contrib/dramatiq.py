"""Dramatiq's messages as jobs: `report(broker, client)`, in the module that declares the actors."""

from __future__ import annotations

import contextlib
from typing import Any

from jobstatus_grpc.client import JobStatusClient
from jobstatus_grpc.client.track import DEFAULT_HEARTBEAT_TIMEOUT_SECONDS
from jobstatus_grpc.contrib.task import DEFAULT_END_TIMEOUT_SECONDS, TaskReporter, current_job, job_id_of
from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.job import JobState

try:
    import dramatiq
    from dramatiq.middleware import Retries, TimeLimit, TimeLimitExceeded
except ImportError as error:
    raise ImportError(
        "jobstatus_grpc.contrib.dramatiq needs Dramatiq: pip install 'jobstatus-grpc[dramatiq]'"
    ) from error

__all__ = ["JobStatusMiddleware", "current_job", "job_id_of", "report"]


def report(
    broker: dramatiq.Broker,
    client: JobStatusClient,
    *,
    heartbeat_timeout_seconds: float = DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
    end_timeout_seconds: float = DEFAULT_END_TIMEOUT_SECONDS,
) -> JobStatusMiddleware:
    """Report all messages of a broker as jobs, with the ids of the messages. Return the middleware that does.

    They are PENDING when enqueued, then IN_PROGRESS, RETRYING if the middleware Retries enqueues them again, and done.
    The job of a worker that was killed is stalled until the message comes to another.

    Args:
        broker: with its other middleware.
        client: of the server.
        heartbeat_timeout_seconds: as of TaskReporter.
        end_timeout_seconds: as of TaskReporter.
    """
    middleware = JobStatusMiddleware(
        TaskReporter(
            client, heartbeat_timeout_seconds=heartbeat_timeout_seconds, end_timeout_seconds=end_timeout_seconds
        )
    )
    # Before Retries, whose after_process_message then runs first: it decides whether the message has failed. And before
    # TimeLimit, which is then set after the beginning is reported, and removed before the end.
    first = next((type(other) for other in broker.middleware if isinstance(other, (TimeLimit, Retries))), None)
    broker.add_middleware(middleware, before=first)
    return middleware


class JobStatusMiddleware(dramatiq.Middleware):
    """The hooks of Dramatiq; `report` adds it in its place."""

    def __init__(self, tasks: TaskReporter) -> None:
        self._tasks = tasks

    def flush(self) -> None:
        """Wait until the messages that this process has sent are known to the service, for at most ten seconds."""
        self._tasks.flush()

    def before_enqueue(self, broker: dramatiq.Broker, message: Any, delay: int | None) -> None:
        if not message.options.get("retries"):
            self._tasks.sent(message.message_id, message.actor_name)

    def before_process_message(self, broker: dramatiq.Broker, message: Any) -> None:
        self._tasks.begin(message.message_id, message.actor_name)

    def after_process_message(
        self, broker: dramatiq.Broker, message: Any, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        is_retried = exception is not None and not message.failed and self._retries(broker)
        job = self._tasks.running(message.message_id)
        if job is not None and isinstance(exception, TimeLimitExceeded):
            # As it is no Exception, it would mean ABORTED: that the actor was stopped from outside.
            kind = type(exception).__name__
            job.fail(str(exception) or kind, reason=kind)
        self._tasks.end(message.message_id, exception, is_retried=is_retried)

    def after_skip_message(self, broker: dramatiq.Broker, message: Any) -> None:
        self._tasks.abandon(message.message_id)
        self._tasks.ended_elsewhere(message.message_id, message.actor_name, JobState.ABORTED, reason="skipped")

    def after_worker_shutdown(self, broker: dramatiq.Broker, worker: Any) -> None:
        # The process of a worker ends without the functions of atexit.
        with contextlib.suppress(JobStatusError):
            self._tasks.flush()

    @staticmethod
    def _retries(broker: dramatiq.Broker) -> bool:
        return any(isinstance(middleware, Retries) for middleware in broker.middleware)
