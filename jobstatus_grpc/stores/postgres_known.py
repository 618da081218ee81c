"""Jobs as this process has seen them last: reading one that has not changed since costs no decoding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from jobstatus_grpc.stores.found import is_large
from jobstatus_grpc.stores.rows import JOB_COLUMNS, StoredJob, from_instant, read_job

MAX_JOBS = 20_000

# Within a row that begins with the key.
_REVISION = 1 + JOB_COLUMNS.index("revision")
_UPDATED_AT = 1 + JOB_COLUMNS.index("updated_at")


class KnownJobs:
    """Tells whether a row is of a state that is known. It never says what is stored: rows do."""

    def __init__(self, max_jobs: int = MAX_JOBS) -> None:
        """Begin with nothing."""
        self._max_jobs = max_jobs
        self._jobs: OrderedDict[int, StoredJob] = OrderedDict()

    def read(self, row: Sequence[Any]) -> StoredJob:
        """Return the job of a row that holds the key, then JOB_COLUMNS."""
        known = self._jobs.get(row[0])
        # A revision that a failover has lost may be given out again, but not at the same microsecond.
        if (
            known is not None
            and known.job.revision == row[_REVISION]
            and from_instant(known.job.updated_at) == row[_UPDATED_AT]
        ):
            return known
        stored = read_job(row)
        self.note(stored)
        return stored

    def note(self, stored: StoredJob) -> None:
        """Take a state that is committed."""
        if is_large(stored.job):
            self._jobs.pop(stored.key, None)
            return
        self._jobs[stored.key] = stored
        self._jobs.move_to_end(stored.key)
        if len(self._jobs) > self._max_jobs:
            self._jobs.popitem(last=False)
