"""Jobs and their history as rows of a database, and the cache of jobs that were read or written last.

Instants are whole microseconds since 1970 in UTC, durations whole microseconds. A column that holds several values
holds them as JSON.
"""

from __future__ import annotations

import json
import marshal
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from hashlib import blake2b
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias
from zlib import crc32

from jobstatus_grpc.job import (
    BLANK,
    JOB_FIELDS,
    NO_CHILDREN,
    PACE_FIELDS,
    QUIET_FIELDS,
    REPORT_FIELDS,
    URGENT_FIELDS,
    Children,
    Command,
    Job,
    JobError,
    JobState,
    RequestId,
    Tombstone,
    Transition,
    evolve,
    is_large,
    with_children,
)
from jobstatus_grpc.job.ids import uuid7_bytes
from jobstatus_grpc.stores.interface import Key, RequestKey, is_remembered

Row: TypeAlias = tuple[Any, ...]

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

_MICROSECOND = timedelta(microseconds=1)

# json.dumps with arguments makes a new encoder on each call.
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


# Most instants of one commit are equal.
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
    """Return a JSON object with one line per request, the oldest first."""
    lines = [f"{_to_json(request.value)}:{_to_json(request.payload_hash)}" for request in requests]
    return "{" + ",\n".join(lines) + "}" if lines else None


def _as_it_is(value: Any) -> Any:
    return value


_Codec: TypeAlias = tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""From the value of a field to that of its column, and back. None is NULL; what else is NULL, read_job decodes."""

_PLAIN: _Codec = (_as_it_is, _as_it_is)

_FLAG: _Codec = (int, bool)  # sqlite3 binds subclasses of int slowly

_REAL: _Codec = (float, _as_it_is)  # a checksum differs for 5 and 5.0

_INSTANT: _Codec = (from_instant, to_instant)

_CODECS: dict[str, _Codec] = dict.fromkeys(JOB_FIELDS, _PLAIN) | {
    "state": (int, JobState),
    "reports_progress": _FLAG,
    "cancel_requested": _FLAG,
    "stalled": _FLAG,
    "progress": _REAL,
    "first_progress": _REAL,
    "created_at": _INSTANT,
    "updated_at": _INSTANT,
    "started_at": _INSTANT,
    "finished_at": _INSTANT,
    "expires_at": _INSTANT,
    "estimated_completion": _INSTANT,
    "last_heartbeat_at": _INSTANT,
    "first_progress_at": _INSTANT,
    "heartbeat_timeout": (
        lambda timeout: timeout // _MICROSECOND,
        to_duration,
    ),
    "error": (
        lambda error: _to_json({"code": error.code, "message": error.message, "reason": error.reason}),
        lambda text: JobError(**json.loads(text)),
    ),
    "labels": (
        lambda labels: _to_json(dict(labels)) if labels else None,
        json.loads,
    ),
    "creation_request": (
        lambda request: _from_requests((request,)),
        lambda text: RequestId(*next(iter(json.loads(text).items()))),
    ),
    "requests": (
        _from_requests,
        lambda text: tuple(RequestId(*item) for item in json.loads(text).items()),
    ),
    "result": (_to_json, json.loads),
    "trace_parent": (lambda text: text or None, _as_it_is),
}

_LASTING_COLUMNS = (
    "tenant", "id", "name", "state", "attempt", "cancel_requested", "cancel_reason", "stalled", "created_at",
    "started_at", "finished_at", "expires_at", "heartbeat_timeout", "first_progress", "first_progress_at", "parent_id",
    "error", "labels", "creation_request", "requests", "result", "trace_parent",
)  # fmt: skip
"""The columns that a report does not change. Checksums depend on the order of these and of REPORT_FIELDS: a column
of a later version comes last, and is left out of the checksum where it is NULL, as it is in rows that exist."""

JOB_COLUMNS = (*_LASTING_COLUMNS, *REPORT_FIELDS)
"""The columns of a job besides its key, named as the fields of Job."""

STORED_COLUMNS = ("key", *JOB_COLUMNS)
"""The columns that `read_job` reads and `job_row` writes."""

_REPORT = 1 + len(_LASTING_COLUMNS)
"""The index of the first of REPORT_FIELDS in a row of STORED_COLUMNS."""

CONSTANT_COLUMNS = frozenset({"key", *JOB_FIELDS}) - {*REPORT_FIELDS, *URGENT_FIELDS, *QUIET_FIELDS, *PACE_FIELDS}
"""The columns that no update changes."""

REPORT_COLUMNS = ("tenant", "id", *REPORT_FIELDS)
"""The columns that a progress report writes. No index holds any of REPORT_FIELDS: a report must not update indexes."""

LABEL_COLUMNS = ("tenant", "name", "value", "created_at", "job_key")

TRANSITION_COLUMNS = (
    "tenant", "id", "revision", "from_state", "to_state", "reason", "transitioned_at", "attempt", "actor",
)  # fmt: skip

REQUEST_COLUMNS = ("request", "job_key", "payload_hash")

TOMBSTONE_COLUMNS = ("tenant", "id", "revision", "removed_at")

COUNT_COLUMNS = ("state", "jobs")

CHILDREN_COLUMNS = ("tenant", "parent_id", "numbers")

_ENCODED = tuple(
    (index, _CODECS[name][0]) for index, name in enumerate(JOB_COLUMNS) if _CODECS[name][0] is not _as_it_is
)

_DECODED = tuple((name, _CODECS[name][1]) for name in JOB_COLUMNS if _CODECS[name][1] is not _as_it_is)

_fields_of = attrgetter(*JOB_COLUMNS)


def checksum(values: Row, start: int = 0) -> int:
    """Return a CRC-32 of None, integers, floats and texts, to find bytes that the disk has changed.

    Args:
        values: the values of a row.
        start: the checksum of values before these.
    """
    # Version 2 of marshal's format: newer ones depend on the number of references to a value.
    return crc32(marshal.dumps(values, 2), start)


def lasting_checksum(row: Row) -> int:
    """Return the checksum of what a progress report does not change in a row that begins with STORED_COLUMNS."""
    end = _REPORT if row[_REPORT - 1] is not None else _REPORT - 1
    return checksum(row[:end])


def with_checksum(row: Row, lasting: int) -> Row:
    """Return a row of STORED_COLUMNS with its checksum; `lasting` is from `lasting_checksum`."""
    return (*row, checksum(row[_REPORT:], lasting))


def is_sound(row: Row, lasting: int) -> bool:
    """Return whether a row from `with_checksum` is what was written; True if its checksum is None."""
    return row[-1] is None or row[-1] == checksum(row[_REPORT:-1], lasting)


class StoredJob(NamedTuple):
    """A job and the key of its row."""

    key: int
    job: Job
    lasting: int = 0
    """The `lasting_checksum` of the row, if the store has checksums: a report does not encode all values again."""
    children: Children = NO_CHILDREN
    """The numbers of its children, in a store that only one process writes."""

    @property
    def shown(self) -> Job:
        """The job with the numbers of its children."""
        return with_children(self.job, self.children)


def report_row(stored: StoredJob) -> Row:
    """Return the key, followed by the values of REPORT_COLUMNS."""
    return (stored.key, stored.job.tenant, stored.job.id, *_report_values(stored.job))


def report_row_with_checksum(stored: StoredJob) -> Row:
    """Return `report_row`, followed by the checksum of the whole row."""
    values = _report_values(stored.job)
    return (stored.key, stored.job.tenant, stored.job.id, *values, checksum(values, stored.lasting))


def _report_values(job: Job) -> Row:
    """Return the values of REPORT_FIELDS."""
    return (
        job.revision,
        from_instant(job.updated_at),
        1 if job.reports_progress else 0,
        None if job.progress is None else float(job.progress),
        job.reason,
        None if job.estimated_completion is None else from_instant(job.estimated_completion),
        None if job.last_heartbeat_at is None else from_instant(job.last_heartbeat_at),
    )


def job_row(stored: StoredJob) -> Row:
    """Return the values of STORED_COLUMNS."""
    return (stored.key, *_encoded(stored.job))


def _encoded(job: Job) -> list[Any]:
    """Return the values of JOB_COLUMNS."""
    values = list(_fields_of(job))
    for index, encode in _ENCODED:
        if values[index] is not None:
            values[index] = encode(values[index])
    return values


def label_changes(
    before: Mapping[Key, StoredJob], written: Mapping[Key, StoredJob], removed: Iterable[Key]
) -> tuple[list[Row], list[Row]]:
    """Return the label rows that a transaction deletes and those that it inserts, as values of LABEL_COLUMNS, sorted.

    Args:
        before: the jobs as they were stored.
        written: the jobs as the transaction writes them.
        removed: the keys of the jobs that it removes.
    """
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
    key, job = stored.key, stored.job
    created_at = from_instant(job.created_at)
    return [(job.tenant, name, value, created_at, key) for name, value in job.labels.items()]


def read_job(row: Sequence[Any], lasting: int = 0) -> StoredJob:
    """Return the job in a row that begins with STORED_COLUMNS; `lasting` is from `lasting_checksum`."""
    values = dict(zip(STORED_COLUMNS, row, strict=False))
    key = values.pop("key")
    for name, decode in _DECODED:
        if values[name] is not None:
            values[name] = decode(values[name])
    if values["labels"] is None:
        values["labels"] = {}
    if values["requests"] is None:
        values["requests"] = ()
    if values["trace_parent"] is None:
        values["trace_parent"] = ""
    return StoredJob(key, evolve(BLANK, values), lasting)


def write_final(job: Job) -> str:
    """Return a removed job as the text of one column, for the change feed: a JSON object of its columns."""
    values = zip(JOB_COLUMNS, _encoded(job), strict=True)
    return _to_json({name: value for name, value in values if value is not None})


def read_final(text: str | None) -> Job | None:
    """Return the job in a text of `write_final`; None for none, as in rows of earlier versions of the schema."""
    if text is None:
        return None
    values = json.loads(text)
    return Job(**{name: _CODECS[name][1](values[name]) for name in JOB_COLUMNS if name in values})


def children_row(key: Key, children: Children) -> Row:
    """Return the values of CHILDREN_COLUMNS."""
    return (*key, _to_json({str(state): number for state, number in children.items()}))


def read_children_text(text: str) -> Children:
    """Return the numbers of children in a text of `children_row`."""
    return {int(state): number for state, number in json.loads(text).items()}


def request_row(job_key: int, request_id: str, payload_hash: str) -> Row:
    """Return the values of REQUEST_COLUMNS."""
    return (_request_of(request_id), job_key, payload_hash)


def request_keys(commands: Iterable[Command], stored: Mapping[Key, StoredJob]) -> dict[tuple[bytes, int], RequestKey]:
    """Return the commands' requests for stored jobs, by the request and the job_key of their rows, if they have any."""
    keys: dict[tuple[bytes, int], RequestKey] = {}
    for command in commands:
        request, key = command.request, (command.tenant, command.id)
        if request is not None and key in stored:
            keys[_request_of(request.value), stored[key].key] = (*key, request.value)
    return keys


def _request_of(request_id: str) -> bytes:
    """Return the bytes of a UUIDv7, a hash of as many of another text.

    The requests of one commit are side by side in an index of UUIDv7s; of others, each changes another page.
    """
    return uuid7_bytes(request_id) or blake2b(request_id.encode(), digest_size=16).digest()


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
    """Return the entry in a row of TRANSITION_COLUMNS."""
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


def read_tombstone(key: Key, revision: int, removed_at: int, now: datetime) -> Tombstone | None:
    """Return the tombstone of a row; None if it is too old to be found at `now`."""
    return Tombstone(*key, revision) if is_remembered(to_instant(removed_at), now) else None


CACHED_JOBS = 20_000
"""The number of jobs that a store keeps in memory: about 1.5 kB each."""

_TENANT, _ID, _REVISION, _UPDATED_AT = map(STORED_COLUMNS.index, ("tenant", "id", "revision", "updated_at"))


class JobCache:
    """The most recently used jobs as they are committed, except jobs with a large result. For one event loop."""

    def __init__(self, max_jobs: int = CACHED_JOBS) -> None:
        self._max_jobs = max_jobs
        self._jobs: OrderedDict[Key, StoredJob] = OrderedDict()
        self._expected: dict[Key, object] = {}

    def get(self, key: Key) -> StoredJob | None:
        """Return the job as last stored here."""
        stored = self._jobs.get(key)
        if stored is not None:
            self._jobs.move_to_end(key)
        return stored

    def find(self, keys: Iterable[Key]) -> tuple[dict[Key, StoredJob], list[Key]]:
        """Return the jobs that are cached, and the keys of the others."""
        jobs = self._jobs
        found: dict[Key, StoredJob] = {}
        missing: dict[Key, None] = {}
        for key in keys:
            stored = jobs.get(key)
            if stored is None:
                missing[key] = None
            else:
                found[key] = stored
        return found, list(missing)

    def put(self, key: Key, stored: StoredJob) -> None:
        """Keep the job as it is committed."""
        if is_large(stored.job):
            self._jobs.pop(key, None)
            return
        self._jobs[key] = stored
        self._jobs.move_to_end(key)
        if len(self._jobs) > self._max_jobs:
            self._jobs.popitem(last=False)

    # For a database that only this process writes: the cache holds the newest state.

    def write(
        self,
        jobs: Mapping[Key, StoredJob],
        removed: Iterable[Key] = (),
        children: Mapping[Key, Children] = MappingProxyType({}),
    ) -> None:
        """Keep the jobs that a commit read and wrote, and drop those that it removed.

        Args:
            jobs: the jobs as they are stored now.
            removed: the keys of those that are not stored any more.
            children: the numbers of children as they are now, of all jobs where they may have changed.
        """
        for key, stored in jobs.items():
            self._expected.pop(key, None)
            self.put(key, stored)
        for key in removed:
            self._expected.pop(key, None)
            self._jobs.pop(key, None)
        for key, numbers in children.items():
            self._expected.pop(key, None)
            if key in self._jobs:
                self._jobs[key] = self._jobs[key]._replace(children=numbers)

    def expect(self, keys: Iterable[Key]) -> object:
        """Return a ticket for `fill`. To be called before the database is read."""
        ticket = object()
        self._expected.update(dict.fromkeys(keys, ticket))
        return ticket

    def fill(self, ticket: object, keys: Iterable[Key], jobs: Mapping[Key, StoredJob]) -> None:
        """Keep the jobs that were read, except those that a commit or a later read has replaced since `expect`.

        Args:
            ticket: from `expect`.
            keys: as given to `expect`; a key that is not in `jobs` was not found.
            jobs: the jobs as they were read.
        """
        for key in keys:
            if self._expected.get(key) is ticket:
                del self._expected[key]
                if key in jobs:
                    self.put(key, jobs[key])

    # For a database that other processes write as well: the cache saves the decoding of rows.

    def get_revision(self, key: Key, revision: int, updated_at: int) -> StoredJob | None:
        """Return the job that reached `revision` at `updated_at`, in microseconds since 1970, if it is cached."""
        stored = self._jobs.get(key)
        # A failover can lose a revision, and its number is used again; but not at the same microsecond.
        if stored is None or stored.job.revision != revision or from_instant(stored.job.updated_at) != updated_at:
            return None
        return stored

    def read(self, row: Sequence[Any]) -> StoredJob:
        """Return the job in a row of STORED_COLUMNS, decoded only if that revision is not cached."""
        key = (row[_TENANT], row[_ID])
        stored = self.get_revision(key, row[_REVISION], row[_UPDATED_AT])
        if stored is None or stored.key != row[0]:
            stored = read_job(row)
            self.put(key, stored)
        return stored
