"""Ends a command whose job is to end: somebody asked for that, ended it, or gave it to another worker."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from jobstatus_grpc.cli import exits
from jobstatus_grpc.errors import JobStatusError

if TYPE_CHECKING:
    from jobstatus_grpc.cli.child import Child
    from jobstatus_grpc.client import JobStatusClient, TrackedJob
    from jobstatus_grpc.record import Job

PAUSE_SECONDS = 1.0
SELDOM_SECONDS = 60.0
"""Progress is of no interest here."""


class Overseer:
    """Watches a tracked job in a thread of its own, and stops `child` where the job asks for it.

    The tracked job itself learns that with its next heartbeat only.
    """

    THREAD_NAME = "overseer"

    def __init__(self, client: JobStatusClient, tracked: TrackedJob, child: Child) -> None:
        self._client = client
        self._tracked = tracked
        self._child = child
        self._leaving = threading.Event()
        self.job: Job | None = None
        """The job for which the command was stopped."""
        threading.Thread(target=self._oversee, name=self.THREAD_NAME, daemon=True).start()

    def leave(self) -> None:
        """Stop nothing from now on."""
        self._leaving.set()

    def _oversee(self) -> None:
        was_away = not self._tracked.attempt
        while not self._leaving.is_set() and not self._must_stop():
            if self._tracked.attempt:
                if was_away:
                    exits.say(f"jobstatus: job {self._tracked.id} is reported from now on")
                was_away = False
                self._watch()
            self._leaving.wait(PAUSE_SECONDS)
        if self._must_stop():
            self._child.stop()

    def _must_stop(self) -> bool:
        return not self._leaving.is_set() and (self.job is not None or self._tracked.lost)

    def _watch(self) -> None:
        """Watch until the job is to end; errors that a watch does not survive are left to the next try."""
        try:
            for job in self._client.watch(self._tracked.id, min_update_interval_seconds=SELDOM_SECONDS):
                if self._leaving.is_set():
                    return
                if job.done or job.cancel_requested or job.attempt > self._tracked.attempt:
                    self.job = job
                    exits.say(f"jobstatus: {_why(job)}; stopping the command")
                    # Also brings the tracked job the answer in which it learns that.
                    self._tracked.progress(reason=f"stopping: {_why(job)}")
                    self._child.stop()
                    return
        except JobStatusError:
            return


def _why(job: Job) -> str:
    if job.done:
        return f"the job was ended by somebody else, as {job.state.word}"
    return "cancel requested" if job.cancel_requested else "another worker has the job now"
