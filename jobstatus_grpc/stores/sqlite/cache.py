"""The jobs that were used last, as they are committed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from jobstatus_grpc.job import is_large
from jobstatus_grpc.stores.interface import Key
from jobstatus_grpc.stores.sql.rows import StoredJob


class JobCache:
    """Answers reads without a thread, and commits without a query. For one event loop."""

    def __init__(self, max_jobs: int) -> None:
        """Begin empty."""
        self._max_jobs = max_jobs
        self._jobs: OrderedDict[Key, StoredJob] = OrderedDict()
        self._expected: dict[Key, object] = {}

    def get(self, key: Key) -> StoredJob | None:
        """Return the job as of the latest commit, if it is here."""
        stored = self._jobs.get(key)
        if stored is not None:
            self._jobs.move_to_end(key)
        return stored

    def find(self, keys: Iterable[Key]) -> tuple[dict[Key, StoredJob], list[Key]]:
        """Return those of the jobs that are here, and the keys of the others."""
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

    def write(self, jobs: Mapping[Key, StoredJob], removed: Iterable[Key] = ()) -> None:
        """Take what a commit read and wrote, then forget what it removed: nothing newer exists."""
        for key, stored in jobs.items():
            self._expected.pop(key, None)
            self._put(key, stored)
        for key in removed:
            self._expected.pop(key, None)
            self._jobs.pop(key, None)

    def expect(self, keys: Iterable[Key]) -> object:
        """Announce a read from the file, before it starts; `fill` takes the ticket."""
        ticket = object()
        self._expected.update(dict.fromkeys(keys, ticket))
        return ticket

    def fill(self, ticket: object, keys: Iterable[Key], jobs: Mapping[Key, StoredJob]) -> None:
        """Take those `jobs` that were read, each unless a commit or another read has come since the announcement.

        Args:
            keys: those that were announced; what is not among `jobs` was not found.
        """
        for key in keys:
            if self._expected.get(key) is ticket:
                del self._expected[key]
                if key in jobs:
                    self._put(key, jobs[key])

    def _put(self, key: Key, stored: StoredJob) -> None:
        if is_large(stored.job):
            self._jobs.pop(key, None)
            return
        self._jobs[key] = stored
        self._jobs.move_to_end(key)
        if len(self._jobs) > self._max_jobs:
            self._jobs.popitem(last=False)
