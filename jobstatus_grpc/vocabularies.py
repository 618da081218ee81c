"""Jobs as JSON of two other APIs, for gateways to them: a task API and a content queue.

A document of theirs that is read and written again stays the same. A job that is written and read again may not, as
they have fewer states: RETRYING is `processing` in a content queue, like IN_PROGRESS.

To serve such an API, convert what the service returns: `to_task_api(client.get(id))`. To take its reports, read them
and send the fields that a client may write; the service checks the values, and creates the job with its first report:

    known = from_content_queue(json.loads(body))
    client.update(**writable(known), allow_missing=True)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any, TypedDict

from jobstatus_grpc.errors import FieldViolation, InvalidFieldError
from jobstatus_grpc.job import Job, JobError, JobState, limits
from jobstatus_grpc.job.validation import clean_text

__all__ = [
    "CONTENT_QUEUE_WORDS",
    "TASK_API_WORDS",
    "ContentQueueJob",
    "TaskApiJob",
    "from_content_queue",
    "from_task_api",
    "to_content_queue",
    "to_task_api",
    "writable",
]


class _TaskApiJob(TypedDict):
    id: str
    name: str
    state: str
    createdAt: str


class TaskApiJob(_TaskApiJob, total=False):
    """A job of a task API. Unset fields are absent; progress is in percent."""

    reason: str
    hasProgress: bool
    progress: float
    updatedAt: str


class _ContentQueueJob(TypedDict):
    id: str
    status: str


class ContentQueueJob(_ContentQueueJob, total=False):
    """A job of a content queue. Unset fields are absent; progress is in percent."""

    progress: float
    estimatedCompletion: str
    error: str


TASK_API_WORDS: Mapping[JobState, str] = {
    JobState.PENDING: "pending",
    JobState.IN_PROGRESS: "in_progress",
    JobState.RETRYING: "retrying",
    JobState.SUCCEEDED: "succeeded",
    JobState.ABORTED: "aborted",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "aborted",
}
CONTENT_QUEUE_WORDS: Mapping[JobState, str] = {
    JobState.PENDING: "queued",
    JobState.IN_PROGRESS: "processing",
    JobState.RETRYING: "processing",
    JobState.SUCCEEDED: "completed",
    JobState.ABORTED: "cancelled",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}
# A word that two states share is read as the more general one.
_TASK_API_STATES = {word: state for state, word in TASK_API_WORDS.items() if state is not JobState.CANCELLED}
_CONTENT_QUEUE_STATES = {
    word: state for state, word in CONTENT_QUEUE_WORDS.items() if state not in (JobState.RETRYING, JobState.ABORTED)
}


def to_task_api(job: Job) -> TaskApiJob:
    """Return `job` as a task API's JSON object. `updatedAt` is absent until the job changes."""
    document = TaskApiJob(
        id=job.id, name=job.name, state=TASK_API_WORDS[job.state], createdAt=_to_rfc3339(job.created_at)
    )
    if job.reason:
        document["reason"] = job.reason
    if job.reports_progress:
        document["hasProgress"] = True
    if job.progress is not None:
        document["progress"] = _to_number(job.progress)
    if job.updated_at != job.created_at:
        document["updatedAt"] = _to_rfc3339(job.updated_at)
    return document


def to_content_queue(job: Job) -> ContentQueueJob:
    """Return `job` as a content queue's JSON object.

    `error` is the error's message, or its reason where it has no message; absent if both are empty.
    `estimatedCompletion` is the worker's own.
    """
    document = ContentQueueJob(id=job.id, status=CONTENT_QUEUE_WORDS[job.state])
    if job.progress is not None:
        document["progress"] = _to_number(job.progress)
    if job.estimated_completion is not None:
        document["estimatedCompletion"] = _to_rfc3339(job.estimated_completion)
    if job.error is not None and (text := job.error.message or job.error.reason):
        document["error"] = text
    return document


def from_task_api(document: object) -> dict[str, Any]:
    """Return the fields of a task API's JSON object, by the names of Job's fields.

    Every field may be missing or null, as in the body of a request, and unknown fields are ignored. Without `updatedAt`
    it is `createdAt`, so that a whole document is a whole job: `Job(**known)`. Reasons and errors are cleaned and cut
    to what the service accepts: a control character must not cost the end of a job.

    Raises:
        InvalidFieldError: a value has the wrong type, or is not a known word or time; it lists all of them.
    """
    known = _read(document, _TASK_API_FIELDS)
    if "created_at" in known:
        known.setdefault("updated_at", known["created_at"])
    return known


def from_content_queue(document: object) -> dict[str, Any]:
    """Return the fields of a content queue's JSON object, by the names of Job's fields.

    As `from_task_api`. An error's code is UNKNOWN; an empty error is none. `processing` with an error is RETRYING: a
    job IN_PROGRESS has none.
    """
    known = _read(document, _CONTENT_QUEUE_FIELDS)
    if known.get("state") is JobState.IN_PROGRESS and "error" in known:
        known["state"] = JobState.RETRYING
    return known


def writable(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `known` that the clients' `update` takes: all but the times, which the service sets."""
    return {name: value for name, value in known.items() if name not in ("created_at", "updated_at")}


def _read(document: object, fields: Mapping[str, tuple[str, Callable[[Any], Any]]]) -> dict[str, Any]:
    if not isinstance(document, Mapping):
        raise InvalidFieldError("must be a JSON object")
    known: dict[str, Any] = {}
    violations = []
    for name, (field, read) in fields.items():
        value = document.get(name)
        if value is None or (name == "error" and value == ""):
            continue
        try:
            known[field] = read(value)
        except ValueError as error:
            violations.append(FieldViolation(name, str(error)))
    if violations:
        raise InvalidFieldError(violations=violations)
    return known


def read_text(value: Any) -> str:
    """Return a text of a document; raise ValueError if it is none that can be stored."""
    if not isinstance(value, str):
        raise ValueError("must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, without lone surrogates") from None
    return value


def _reason(value: Any) -> str:
    return clean_text(read_text(value), limits.MAX_REASON_BYTES, multiline=True)


def read_flag(value: Any) -> bool:
    """Return a flag of a document; raise ValueError if it is none."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("must be a number from 0 to 100") from None


def _error(value: Any) -> JobError:
    return JobError(limits.UNKNOWN_CODE, clean_text(read_text(value), limits.MAX_ERROR_MESSAGE_BYTES, multiline=True))


def _one_of(states: Mapping[str, JobState]) -> Callable[[Any], JobState]:
    def read(value: Any) -> JobState:
        state = states.get(read_text(value))
        if state is None:
            raise ValueError(f"must be one of {', '.join(states)}")
        return state

    return read


_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:\d\d)(?:\.(\d+))?([Zz]|[+-]\d\d:[0-5]\d)", re.ASCII)


def _instant(value: Any) -> datetime:
    """Return the time in UTC, truncated to microseconds."""
    wanted = "must be a time such as 2026-01-31T12:00:00Z"
    match = _RFC3339.fullmatch(read_text(value))
    if match is None:
        raise ValueError(wanted)
    date, time, fraction, offset = match.groups(default="")
    # The form that Python 3.10 reads: six digits, and no Z.
    iso = f"{date}T{time}.{fraction[:6]:0<6}{'+00:00' if offset in 'Zz' else offset}"
    try:
        return datetime.fromisoformat(iso).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        raise ValueError(wanted) from None


def _to_rfc3339(instant: datetime) -> str:
    """Write 0, 3 or 6 digits of a second, as protobuf's JSON does."""
    microsecond = instant.microsecond
    precision = "seconds" if not microsecond else "microseconds" if microsecond % 1000 else "milliseconds"
    return instant.astimezone(timezone.utc).replace(tzinfo=None).isoformat(timespec=precision) + "Z"


def _to_number(progress: float) -> float:
    """Return whole numbers as int, for readers that expect integers."""
    return int(progress) if progress.is_integer() else progress


_TASK_API_FIELDS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "id": ("id", read_text),
    "name": ("name", read_text),
    "state": ("state", _one_of(_TASK_API_STATES)),
    "reason": ("reason", _reason),
    "hasProgress": ("reports_progress", read_flag),
    "progress": ("progress", _number),
    "createdAt": ("created_at", _instant),
    "updatedAt": ("updated_at", _instant),
}
_CONTENT_QUEUE_FIELDS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "id": ("id", read_text),
    "status": ("state", _one_of(_CONTENT_QUEUE_STATES)),
    "progress": ("progress", _number),
    "estimatedCompletion": ("estimated_completion", _instant),
    "error": ("error", _error),
}
