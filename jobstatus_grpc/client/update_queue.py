"""The updates that wait to be sent, in their order: reports on one job are put into one, and there are never too many.

No I/O.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import limits
from jobstatus_grpc.client.answers import Answers
from jobstatus_grpc.errors import InvalidArgumentError
from jobstatus_grpc.wire import calls
from jobstatus_grpc.wire.calls import UNSET, JobUpdate

MAX_FIELD_HEADER_BYTES = 5
"""The tag of an update in its batch, and its length."""

_REPORTED = ("progress", "reason", "estimated_completion")
_NOT_REPORTED = ("state", "has_progress", "error", "heartbeat_timeout_seconds", "labels", "result")


@dataclass(slots=True)
class Waiting:
    """An update that waits, and its request, which is made once: request_id included."""

    number: int
    """Rises with each."""
    update: JobUpdate
    request: pb.UpdateJobRequest
    since: float


class UpdateQueue:
    """At most `max_pending` updates. What it cannot take is told to `answers`."""

    def __init__(self, answers: Answers, max_pending: int) -> None:
        self.newest_number = 0
        self._answers = answers
        self._max_pending = max_pending
        self._queue: OrderedDict[int, Waiting] = OrderedDict()
        self._reports: OrderedDict[int, Waiting] = OrderedDict()
        """Those in the queue that may be dropped."""
        self._open_reports: dict[str, Waiting] = {}
        """By job, where its newest update in the queue is a report: the next can be put into it."""

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def oldest(self) -> Waiting | None:
        """The next to be sent."""
        return next(iter(self._queue.values()), None)

    def add(self, update: JobUpdate, now: float) -> None:
        """Take an update. Where there is no room, the oldest report is dropped, and without any, `update`."""
        is_report = _is_report(update)
        report = self._open_reports.get(update.id) if is_report else None
        if report is not None and report.update.attempt == update.attempt:
            changes = {name: value for name in _REPORTED if (value := getattr(update, name)) is not UNSET}
            merged = replace(report.update, **changes)
            if (request := self._request(merged, update)) is not None:
                report.update, report.request = merged, request
            return
        request = self._request(update, update)
        if request is None or not self._has_room(update):
            return
        self.newest_number += 1
        waiting = Waiting(self.newest_number, update, request, now)
        self._queue[waiting.number] = waiting
        self._open_reports.pop(update.id, None)
        if is_report:
            self._reports[waiting.number] = self._open_reports[update.id] = waiting

    def take_batch(self) -> list[Waiting]:
        """Return the oldest, as many as fit into one call."""
        batch: list[Waiting] = []
        size = 0
        while len(batch) < limits.MAX_BATCH_UPDATES and (waiting := self.oldest) is not None:
            size += waiting.request.ByteSize() + MAX_FIELD_HEADER_BYTES
            if size > limits.MAX_REQUEST_BYTES:
                break
            self._remove(waiting)
            batch.append(waiting)
        if not self._queue:
            self._answers.all_sent()
        return batch

    def clear(self) -> list[Waiting]:
        """Return all, and forget them."""
        everything = list(self._queue.values())
        self._queue.clear()
        self._reports.clear()
        self._open_reports.clear()
        return everything

    def _request(self, update: JobUpdate, given: JobUpdate) -> pb.UpdateJobRequest | None:
        """Return the request for `update`, in which what was `given` is; None: there can be none."""
        try:
            request = calls.update_request(update)
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            self._answers.refused(given, InvalidArgumentError(f"the update cannot be sent: {error}"))
            return None
        if request.ByteSize() + MAX_FIELD_HEADER_BYTES > limits.MAX_REQUEST_BYTES:
            what = f"the update must be smaller than {limits.MAX_REQUEST_BYTES} bytes; put a large result behind a URL"
            self._answers.refused(given, InvalidArgumentError(what))
            return None
        return request

    def _has_room(self, update: JobUpdate) -> bool:
        if len(self._queue) < self._max_pending:
            return True
        report = next(iter(self._reports.values()), None)
        self._answers.dropped(update if report is None else report.update, self._max_pending)
        if report is not None:
            self._remove(report)
        return report is not None

    def _remove(self, waiting: Waiting) -> None:
        del self._queue[waiting.number]
        self._reports.pop(waiting.number, None)
        if self._open_reports.get(waiting.update.id) is waiting:
            del self._open_reports[waiting.update.id]


def _is_report(update: JobUpdate) -> bool:
    """Tell whether an update only reports: of two of them by one attempt the newer is enough."""
    return (
        all(getattr(update, name) is UNSET for name in _NOT_REPORTED)
        and not update.expected_revision
        and update.request_id is None
        and not update.allow_missing
    )
