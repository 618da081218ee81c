"""Jobs and their history as rows of a database, and back. The columns and their encodings stand here alone.

Instants and durations are whole microseconds, instants since 1970; texts of several values are JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

from jobstatus_grpc.job import JOB_FIELDS, REPORT_FIELDS, Job, JobError, JobState, RequestId, Transition
from jobstatus_grpc.stores.interface import Key

Row: TypeAlias = tuple[Any, ...]

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

_MICROSECOND = timedelta(microseconds=1)

# json.dumps with arguments would make an encoder for each call.
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


# Most of the instants written together are the same.
@lru_cache(maxsize=4096)
def from_instant(instant: datetime) -> int:
    """Return microseconds since 1970."""
    return (instant - _EPOCH) // _MICROSECOND


def to_instant(microseconds: int) -> datetime:
    """Return the instant in UTC."""
    return _EPOCH + timedelta(microseconds=microseconds)


def to_duration(microseconds: int) -> timedelta:
    """Return the duration."""
    return timedelta(microseconds=microseconds)


def _from_requests(requests: tuple[RequestId, ...]) -> str | None:
    """Return an object of JSON with one line per request, the oldest first."""
    lines = [f"{_to_json(request.value)}:{_to_json(request.payload_hash)}" for request in requests]
    return "{" + ",\n".join(lines) + "}" if lines else None


def _unless_none(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else convert(value)


def _as_it_is(value: Any) -> Any:
    return value


_Codec: TypeAlias = tuple[Callable[[Any], Any], Callable[[Any], Any]]

_PLAIN: _Codec = (_as_it_is, _as_it_is)

_FLAG: _Codec = (int, bool)  # SQLite's binding takes long over subclasses of int

_INSTANT: _Codec = (_unless_none(from_instant), _unless_none(to_instant))

_CODECS: dict[str, _Codec] = dict.fromkeys(JOB_FIELDS, _PLAIN) | {
    "state": (int, JobState),
    "has_progress": _FLAG,
    "cancel_requested": _FLAG,
    "stalled": _FLAG,
    "created_at": _INSTANT,
    "updated_at": _INSTANT,
    "started_at": _INSTANT,
    "finished_at": _INSTANT,
    "expires_at": _INSTANT,
    "estimated_completion": _INSTANT,
    "heartbeat_timeout": (
        _unless_none(lambda timeout: timeout // _MICROSECOND),
        _unless_none(to_duration),
    ),
    "error": (
        _unless_none(lambda error: _to_json({"code": error.code, "message": error.message, "reason": error.reason})),
        _unless_none(lambda text: JobError(**json.loads(text))),
    ),
    "labels": (
        lambda labels: _to_json(dict(labels)) if labels else None,
        lambda text: {} if text is None else json.loads(text),
    ),
    "creation_request": (
        _unless_none(lambda request: _from_requests((request,))),
        _unless_none(lambda text: RequestId(*next(iter(json.loads(text).items())))),
    ),
    "requests": (
        lambda _: None,  # see StoredJob.requests
        lambda text: () if text is None else tuple(RequestId(*item) for item in json.loads(text).items()),
    ),
    "result": (_unless_none(_to_json), _unless_none(json.loads)),
}

JOB_COLUMNS = (*(name for name in JOB_FIELDS if name != "result"), "result")
"""What follows the key, the largest last. Each column is named as its field."""

CONSTANT_COLUMNS = frozenset({"tenant", "id", "name", "created_at", "parent_id", "creation_request"})

REPORT_COLUMNS = ("tenant", "id", *REPORT_FIELDS)
"""What a report of progress changes, after what every row must have. No index holds any: naming one would write it."""

LABEL_COLUMNS = ("tenant", "name", "value", "created_at", "job_key")

TRANSITION_COLUMNS = (
    "tenant", "id", "revision", "from_state", "to_state", "reason", "transitioned_at", "attempt", "actor",
)  # fmt: skip

_ENCODERS = tuple(_CODECS[name][0] for name in JOB_COLUMNS)

_DECODERS = tuple(_CODECS[name][1] for name in JOB_COLUMNS)

_REQUESTS = JOB_COLUMNS.index("requests")

_fields_of = itemgetter(*JOB_COLUMNS)


class StoredJob(NamedTuple):
    """A job with what its row is known by."""

    key: int
    job: Job
    requests: str | None
    """The text of its requests: the next change adds to it."""


def store_job(key: int, job: Job, before: StoredJob | None) -> StoredJob:
    """Return `job` as it will be stored under `key`, in place of `before` (None: new)."""
    if before is None:
        return StoredJob(key, job, _from_requests(job.requests))
    if job.requests is before.job.requests:
        return StoredJob(key, job, before.requests)
    return StoredJob(key, job, _next_requests(job.requests, before))


def report_row(stored: StoredJob) -> Row:
    """Return the key, then the values of REPORT_COLUMNS."""
    key, job, requests = stored
    return (
        key,
        job.tenant,
        job.id,
        job.revision,
        from_instant(job.updated_at),
        1 if job.has_progress else 0,
        job.progress,
        job.reason,
        None if job.estimated_completion is None else from_instant(job.estimated_completion),
        requests,
    )


def job_row(stored: StoredJob) -> Row:
    """Return the key, then the values of JOB_COLUMNS."""
    values = [encode(value) for encode, value in zip(_ENCODERS, _fields_of(vars(stored.job)), strict=True)]
    values[_REQUESTS] = stored.requests
    return (stored.key, *values)


def label_changes(
    before: Mapping[Key, StoredJob], written: Mapping[Key, StoredJob], removed: Iterable[Key]
) -> tuple[list[Row], list[Row]]:
    """Return the values of LABEL_COLUMNS that a transaction makes obsolete, and those that it brings, in order."""
    old: set[Row] = set()
    new: set[Row] = set()
    for key, stored in written.items():
        earlier = before.get(key)
        if earlier is None:
            new.update(_label_rows(stored))
        elif earlier.job.labels is not stored.job.labels:
            old.update(_label_rows(earlier))
            new.update(_label_rows(stored))
    for key in removed:
        if key in before:
            old.update(_label_rows(before[key]))
    return sorted(old - new), sorted(new - old)


def _label_rows(stored: StoredJob) -> list[Row]:
    key, job, _ = stored
    created_at = from_instant(job.created_at)
    return [(job.tenant, name, value, created_at, key) for name, value in job.labels.items()]


def read_job(row: Sequence[Any]) -> StoredJob:
    """Return the job of a row that holds the key, then JOB_COLUMNS."""
    key, *values = row
    job = object.__new__(Job)  # see record.evolve: the generated __init__ is slow
    fields = [decode(value) for decode, value in zip(_DECODERS, values, strict=True)]
    vars(job).update(zip(JOB_COLUMNS, fields, strict=True))
    return StoredJob(key, job, values[_REQUESTS])


def _next_requests(requests: tuple[RequestId, ...], before: StoredJob) -> str | None:
    """Return the text of `requests`, most often that of the ones before and one more. All anew would cost the most."""
    known, text = before.job.requests, before.requests
    dropped = len(known) + 1 - len(requests)
    if text is None or dropped not in (0, 1) or requests[:-1] != known[dropped:]:
        return _from_requests(requests)
    newest = f"{_to_json(requests[-1].value)}:{_to_json(requests[-1].payload_hash)}"
    kept = text[1:-1] if not dropped else text[text.index("\n") + 1 : -1]
    return f"{{{kept},\n{newest}}}"


def transition_row(key: Key, entry: Transition) -> Row:
    """Return the values of TRANSITION_COLUMNS."""
    return (
        *key,
        entry.revision,
        None if entry.from_state is None else int(entry.from_state),
        int(entry.to_state),
        entry.reason,
        from_instant(entry.transitioned_at),
        entry.attempt,
        entry.actor,
    )


def read_transition(row: Row) -> Transition:
    """Return the entry of a row of TRANSITION_COLUMNS."""
    _, _, revision, from_state, to_state, reason, transitioned_at, attempt, actor = row
    return Transition(
        from_state=None if from_state is None else JobState(from_state),
        to_state=JobState(to_state),
        reason=reason,
        transitioned_at=to_instant(transitioned_at),
        attempt=attempt,
        actor=actor,
        revision=revision,
    )
