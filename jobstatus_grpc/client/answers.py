"""What became of updates that were gathered: who gave them is told, or the log says so."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import defaultdict
from collections.abc import Callable

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.errors import InternalError, JobStatusError, ResourceExhaustedError
from jobstatus_grpc.record import Job
from jobstatus_grpc.wire import calls
from jobstatus_grpc.wire.calls import JobUpdate

log = logging.getLogger("jobstatus_grpc.client")

OnJob = Callable[[Job], object]
OnError = Callable[[JobUpdate, JobStatusError], object]
IDS_LOGGED = 5


class Answers:
    """Gathers answers while a lock is held, and tells of them when none is: what it calls may call us."""

    def __init__(self, on_job: OnJob | None, on_error: OnError | None) -> None:
        """Take whom to tell of jobs as they were answered (None: nobody), of updates without effect (None: the log)."""
        self._on_job = on_job
        self._on_error = on_error
        self._lock = threading.Lock()
        self._jobs: list[Job] = []
        self._refusals: list[tuple[JobUpdate, JobStatusError]] = []
        self._dropped = 0

    def accepted(self, result: pb.BatchUpdateJobsResult) -> None:
        """Take an update's answer: its job."""
        if self._on_job is not None:
            with contextlib.suppress(InternalError), self._lock:  # one that makes no sense is nothing to tell
                self._jobs.append(calls.job_in(result))

    def refused(self, update: JobUpdate, error: JobStatusError) -> None:
        """Take an update that has no effect, and why."""
        with self._lock:
            self._refusals.append((update, error))

    def dropped(self, update: JobUpdate, max_pending: int) -> None:
        """Take an update for which there was no room. Without `on_error` the log says once that there are such."""
        error = ResourceExhaustedError(f"{max_pending} updates wait already, which is all that may (max_pending)")
        with self._lock:
            self._dropped += 1
            if self._on_error is not None or self._dropped == 1:
                self._refusals.append((update, error))

    def all_sent(self) -> None:
        """Take note that there is room again."""
        dropped, self._dropped = self._dropped, 0
        if dropped > 1:
            log.error("%d updates were dropped, as too many waited", dropped)

    def tell(self) -> None:
        """Tell of what was taken since the last time; nothing that is raised comes back to the caller."""
        if not self._jobs and not self._refusals:
            return
        with self._lock:
            jobs, self._jobs = self._jobs, []
            refusals, self._refusals = self._refusals, []
        for job in jobs:
            self._call(self._on_job, job)
        if self._on_error is None:
            _log_refusals(refusals)
        else:
            for refusal in refusals:
                self._call(self._on_error, *refusal)

    def _call(self, function: Callable[..., object] | None, *args: object) -> None:
        try:
            if function is not None:
                function(*args)
        except Exception:
            log.exception("what a reporter calls with its answers raised")


def _log_refusals(refusals: list[tuple[JobUpdate, JobStatusError]]) -> None:
    """Log one line for each error: where a whole batch is refused, there are hundreds with the same."""
    ids: defaultdict[str, list[str]] = defaultdict(list)
    for update, error in refusals:
        ids[str(error)].append(update.id)
    for error_text, refused in ids.items():
        some = ", ".join(refused[:IDS_LOGGED]) + (", …" if len(refused) > IDS_LOGGED else "")
        log.error("%d updates have no effect (of %s): %s", len(refused), some, error_text)
