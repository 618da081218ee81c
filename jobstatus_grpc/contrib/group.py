"""A group of tasks as the parent of their jobs: no task ends a group, so that each process that ends a member looks."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import OrderedDict

from jobstatus_grpc.client import JobStatusClient
from jobstatus_grpc.client.fork import renew_in_children
from jobstatus_grpc.contrib.task import TaskReporter, job_id_of, percent_of
from jobstatus_grpc.errors import FailedPreconditionError, JobStatusError, NotFoundError
from jobstatus_grpc.job import Job, JobError, JobFilter, JobState, limits

log = logging.getLogger("jobstatus_grpc.contrib")

SIZE_LABEL = "group_size"
"""The label of a group's job that tells how many members it has, once all are sent."""

CHECK_SECONDS = 0.2
"""The shortest time between two looks at one group: members that end in between share the next."""

MAX_UNSIZED = 1000
"""Groups that this process sends at the same time; of older ones it does not report the size."""

CLOSE_SECONDS = 10.0
"""How long the end of a process waits for its last look at groups: as long as for its last reports."""

_WORST_FIRST = (JobState.FAILED, JobState.CANCELLED, JobState.ABORTED)


class GroupReporter:
    """Reports groups: PENDING when sent, then the share of members that are done, then an end by the members' ends.

    A group ends once its size is known and all members are done. The sender of the group looks after it has reported
    the size, and a worker after it has reported the end of a member: one of them sees both.
    """

    def __init__(self, client: JobStatusClient, tasks: TaskReporter) -> None:
        self._client = client
        self._tasks = tasks
        self._unsized: OrderedDict[str, None] = OrderedDict()
        self._after_fork()
        renew_in_children(self, GroupReporter._after_fork)

    def _after_fork(self) -> None:
        self._changed = threading.Condition()
        self._due_at: dict[str, float] = {}
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def sent(self, group_id: str) -> None:
        """Report a group that has a member; another call for the same group does nothing."""
        if group_id not in self._unsized:
            self._unsized[group_id] = None
            if len(self._unsized) > MAX_UNSIZED:
                self._unsized.popitem(last=False)
            self._tasks.sent(group_id, "group")

    def sized(self, group_id: str, size: int) -> None:
        """Report how many members a group has that was sent here."""
        if group_id in self._unsized:
            del self._unsized[group_id]
            self._tasks.update(group_id, labels={SIZE_LABEL: str(size)})
            self.member_ended(group_id)

    def member_ended(self, group_id: str) -> None:
        """Look soon, in a thread, whether a group is done; the id may also be that of the member."""
        with self._changed:
            self._due_at.setdefault(group_id, time.monotonic() + CHECK_SECONDS)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._check_all, name="jobstatus-groups", daemon=True)
                self._thread.start()
                atexit.register(self.close)

    def close(self) -> None:
        """Look at the groups that are due, for at most ten seconds."""
        with self._changed:
            thread, self._is_closing = self._thread, True
            self._changed.notify_all()
        if thread is not None:
            thread.join(CLOSE_SECONDS)

    def _check_all(self) -> None:
        while (group_id := self._next_due()) is not None:
            try:
                self._check(group_id)
            except (FailedPreconditionError, NotFoundError):
                pass  # another process has ended it, or its sender does not report groups
            except JobStatusError as error:
                log.warning("group %s: its state cannot be reported: %s", group_id, error)
            except Exception:
                log.exception("group %s: its state cannot be reported", group_id)

    def _next_due(self) -> str | None:
        """Wait for a group to look at; None: there is none, and no other follows."""
        with self._changed:
            while True:
                group_id, due_at = min(self._due_at.items(), key=lambda item: item[1], default=("", None))
                left = None if due_at is None else due_at - time.monotonic()
                if left is not None and (left <= 0 or self._is_closing):
                    del self._due_at[group_id]
                    return group_id
                if self._is_closing:
                    return None
                self._changed.wait(left)

    def _check(self, group_id: str) -> None:
        self._tasks.flush()
        group = self._client.get(job_id_of(group_id))
        if SIZE_LABEL not in group.labels and group.parent_id:
            group = self._client.get(group.parent_id)
        size = int(group.labels.get(SIZE_LABEL, "0"))
        if group.done or not size:
            return
        members = list(self._client.list_all(JobFilter(parent_id=group.id)))
        done = [member for member in members if member.done]
        if len(done) < max(size, len(members)):
            self._client.update(group.id, state=JobState.IN_PROGRESS, progress=percent_of(len(done), size))
            return
        state = next((bad for bad in _WORST_FIRST if any(job.state is bad for job in done)), JobState.SUCCEEDED)
        if state is JobState.SUCCEEDED:
            self._client.update(group.id, state=state)
        else:
            self._client.update(group.id, state=state, error=_error_of([job for job in done if job.state is state]))


def _error_of(members: list[Job]) -> JobError:
    first = min(members, key=lambda job: job.finished_at or job.updated_at)
    error = first.error or JobError(limits.UNKNOWN_CODE, first.reason)
    count = f"{len(members)} of the members {'are' if len(members) > 1 else 'is'} {first.state.word}"
    return JobError(error.code, f"{count}, first job {first.id}: {error.message}", error.reason)
