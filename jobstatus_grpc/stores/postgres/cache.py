"""Jobs as this process has seen them last: reading one that has not changed since costs no decoding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from jobstatus_grpc.job import is_large
from jobstatus_grpc.stores.interface import Key
from jobstatus_grpc.stores.sql.rows import JOB_COLUMNS, StoredJob, from_instant, read_job

MAX_JOBS = 20_000


# Within a row that begins with the key.
_TENANT, _ID, _REVISION, _UPDATED_AT = (
    1 + JOB_COLUMNS.index(name) for name in ("tenant", "id", "revision", "updated_at")
)


class KnownJobs:
    """Tells whether a row is of a state that is known. It never says what is stored: rows do."""

    def __init__(self, max_jobs: int = MAX_JOBS) -> None:
        """Begin with nothing."""
        self._max_jobs = max_jobs
        self._jobs: OrderedDict[Key, StoredJob] = OrderedDict()

    def find(self, key: Key, revision: int, updated_at: int) -> StoredJob | None:
        """Return the job that reached `revision` at `updated_at`, in microseconds since 1970, if that is known."""
        known = self._jobs.get(key)
        # A revision that a failover has lost may be given out again, but not at the same microsecond.
        if known is None or known.job.revision != revision or from_instant(known.job.updated_at) != updated_at:
            return None
        return known

    def read(self, row: Sequence[Any]) -> StoredJob:
        """Return the job of a row that holds the key, then JOB_COLUMNS."""
        known = self.find((row[_TENANT], row[_ID]), row[_REVISION], row[_UPDATED_AT])
        if known is not None and known.key == row[0]:
            return known
        stored = read_job(row)
        self.note(stored)
        return stored

    def note(self, stored: StoredJob) -> None:
        """Take a state that is committed."""
        key = (stored.job.tenant, stored.job.id)
        if is_large(stored.job):
            self._jobs.pop(key, None)
            return
        self._jobs[key] = stored
        self._jobs.move_to_end(key)
        if len(self._jobs) > self._max_jobs:
            self._jobs.popitem(last=False)
