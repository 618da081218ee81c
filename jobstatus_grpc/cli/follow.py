"""Jobs followed to their end: one by its own watch, several by watches of many jobs."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from jobstatus_grpc import limits
from jobstatus_grpc.errors import JobExpiredError
from jobstatus_grpc.job_filter import JobFilter

if TYPE_CHECKING:
    from jobstatus_grpc.client import JobChange, JobStatusClient
    from jobstatus_grpc.record import Job

T = TypeVar("T")

MOST_WAITING = 1000
"""What nobody reads is left to the server, which keeps the newest of each job only."""


class OutOfTimeError(Exception):
    """The time that `wait` was given is over."""


def check_known(client: JobStatusClient, ids: Sequence[str]) -> None:
    """Find out at once, and not by a watch that tries for ever, that a job or the server is not there."""
    known: set[str] = set()
    if len(ids) > 1:
        for some in _parts(ids):
            known.update(job.id for job in client.list_all(JobFilter(ids=some)))
    for job_id in ids:
        if job_id not in known:
            client.get(job_id)  # tells why


def follow(
    client: JobStatusClient,
    ids: Sequence[str],
    *,
    give_up: timedelta | None,
    limit: timedelta | None = None,
    min_update_interval_seconds: float | None = None,
) -> Iterator[Job]:
    """Yield the states of all these jobs as they come; end once all are done.

    Raises:
        JobStatusError: the first that a watch raised.
        OutOfTimeError: `limit` is over.
    """
    give_up_seconds = give_up.total_seconds() if give_up else None

    def watch(some: Sequence[str]) -> Iterator[Job]:
        if len(ids) == 1:
            return client.watch(
                some[0], min_update_interval_seconds=min_update_interval_seconds, give_up_seconds=give_up_seconds
            )
        changes = client.watch_jobs(
            JobFilter(ids=some),
            min_update_interval_seconds=min_update_interval_seconds,
            give_up_seconds=give_up_seconds,
        )
        return _until_done(changes, some)

    return arriving(*(functools.partial(watch, some) for some in _parts(ids)), limit=limit)


def arriving(*sources: Callable[[], Iterable[T]], limit: timedelta | None = None) -> Iterator[T]:
    """Yield what all of these yield, as it comes; end when all have ended. Each is read in a thread of its own.

    Raises:
        Exception: the first that one of them raised.
        OutOfTimeError: `limit` is over.
    """
    deadline = time.monotonic() + limit.total_seconds() if limit is not None else None
    news: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(MOST_WAITING)

    def read(source: Callable[[], Iterable[T]]) -> None:
        try:
            for item in source():
                news.put((item,))
            news.put(None)
        except BaseException as error:
            news.put(error)

    for source in sources:
        threading.Thread(target=read, args=(source,), name="watch", daemon=True).start()
    still_open = len(sources)
    while still_open:
        try:
            item = news.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0))
        except queue.Empty:
            raise OutOfTimeError from None
        if isinstance(item, BaseException):
            raise item
        if item is None:
            still_open -= 1
        else:
            yield item[0]


def _until_done(watch: AbstractContextManager[Iterable[JobChange]], ids: Sequence[str]) -> Iterator[Job]:
    """Yield the states of jobs that exist, until all of them are done."""
    from jobstatus_grpc.client import JobChangeType

    not_done, told = set(ids), set[str]()
    with watch as changes:
        for change in changes:
            if change.type is JobChangeType.RESET:
                told.clear()
            elif change.type is JobChangeType.SYNCED:
                _check_there(not_done - told)
            elif change.job is None:
                _check_there(not_done & {change.id})
            elif change.id in not_done:
                told.add(change.id)
                if change.job.done:
                    not_done.remove(change.id)
                yield change.job
            if not not_done:
                return


def _check_there(vanished: set[str]) -> None:
    """Raise where a job has vanished that was not done when it was seen last."""
    if vanished:
        raise JobExpiredError(f"job {min(vanished)!r} was deleted or has expired before it was seen done")


def _parts(ids: Sequence[str]) -> list[Sequence[str]]:
    """Return `ids` in parts that a filter takes."""
    return [ids[start : start + limits.MAX_FILTER_IDS] for start in range(0, len(ids), limits.MAX_FILTER_IDS)]
