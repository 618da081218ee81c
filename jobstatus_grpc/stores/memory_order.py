"""The jobs of the memory store in the order of their creation, page by page."""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone

from jobstatus_grpc.job import Job
from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.stores.found import MAX_EXAMINED_ROWS, Cursor, Key, read_cursor, write_cursor
from jobstatus_grpc.stores.interface import Page

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)


class CreationOrder:
    """Keys in the order of creation, the oldest first."""

    def __init__(self) -> None:
        """Begin empty."""
        self._numbers = itertools.count(1)
        self._places: dict[Key, Cursor] = {}
        self._entries: list[tuple[Cursor, Key]] = []

    def add(self, key: Key, job: Job) -> None:
        """Take a new job."""
        place = ((job.created_at - _EPOCH) // _MICROSECOND, next(self._numbers))
        self._places[key] = place
        insort(self._entries, (place, key))

    def remove(self, key: Key) -> None:
        """Forget a job."""
        del self._entries[bisect_left(self._entries, (self._places.pop(key), key))]

    def page(self, jobs: Mapping[Key, Job], tenant: str, job_filter: JobFilter, *, limit: int, cursor: str) -> Page:
        """Return a page; see JobStore."""
        start = bisect_left(self._entries, (read_cursor(cursor), ("", ""))) if cursor else len(self._entries)
        stop = max(start - MAX_EXAMINED_ROWS, 0)
        found: list[Job] = []
        cursors: list[str] = []
        for place, key in reversed(self._entries[stop:start]):
            if key[0] == tenant and job_filter.matches(jobs[key]):
                found.append(jobs[key])
                cursors.append(write_cursor(place))
                if len(found) == limit:
                    stop = bisect_left(self._entries, (place, ("", "")))
                    break
        return Page(found, cursors, write_cursor(self._entries[stop][0]) if stop else "")
