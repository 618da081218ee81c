"""`jobstatus watch` and `wait`: follow jobs to their end, and exit with their outcome; or all that a filter matches."""

from __future__ import annotations

import functools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

from jobstatus_grpc.cli import exits, options, output, parsers
from jobstatus_grpc.cli.connection import Connection, connected, connected_without_timeout
from jobstatus_grpc.cli.options import duration_flag, flag
from jobstatus_grpc.errors import JobExpiredError
from jobstatus_grpc.job import JobFilter, limits

if TYPE_CHECKING:
    from jobstatus_grpc.client import JobChange, JobStatusClient
    from jobstatus_grpc.job import Job, JobFilter, JobState


class Matches:
    """The jobs that match, kept up to date by `take`."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.outcomes: set[JobState] = set()
        """Of all jobs that were seen done."""
        self._is_synced = False
        self._open: set[str] = set()

    def following(self, changes: Iterable[JobChange], *, until_done: bool) -> Iterator[tuple[JobChange, Job | None]]:
        """Take `changes`, and yield each with the job as it was known before.

        Args:
            until_done: end once all jobs are known, and none of those that match is open.
        """
        for change in changes:
            before = self.jobs.get(change.id)
            self.take(change)
            yield change, before
            if until_done and self._is_synced and not self._open:
                return

    def take(self, change: JobChange) -> None:
        """Note what happened."""
        from jobstatus_grpc.client import JobChangeType

        if change.type is JobChangeType.RESET:
            self.jobs.clear()
            self._open.clear()
            self._is_synced = False
        elif change.type is JobChangeType.SYNCED:
            self._is_synced = True
        self._open.discard(change.id)
        if change.type is JobChangeType.REMOVED:
            self.jobs.pop(change.id, None)
        elif change.job is not None:
            self.jobs[change.id] = change.job
            if not change.job.done:
                self._open.add(change.id)
        if change.job is not None and change.job.done:
            self.outcomes.add(change.job.state)


def to_json(change: JobChange) -> str:
    """Return one line of JSON: `{"event": "updated", "job": {…}}`."""
    from jobstatus_grpc.client import JobChangeType

    event: dict[str, Any] = {"event": change.type.name.lower()}
    if change.type is JobChangeType.REMOVED:
        event |= {"id": change.id, "revision": str(change.revision)}
    if change.job is not None:
        event["job"] = output.to_object(change.job)
    return output.in_json(event)


def line(change: JobChange, before: Job | None) -> str:
    """Return the news in one line; empty where they are about no job.

    Args:
        before: the job as it was known until now.
    """
    from jobstatus_grpc.client import JobChangeType

    if change.type is not JobChangeType.REMOVED:
        return output.line(change.job) if change.job is not None else ""
    if change.job is not None:
        return f"{output.line(change.job)}  removed: matches no longer"
    return f"{output.line(before) if before is not None else change.id}  removed: deleted or expired"


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


LONGEST = timedelta(days=3650)

SELDOM_SECONDS = 60.0
"""How often `wait` is sent progress, which it does not show."""

_give_up = duration_flag(
    "--give-up DURATION",
    "How long to try again when the server is lost.",
    default="off",
    shortest=timedelta(seconds=1),
    longest=LONGEST,
    or_off=True,
)


@click.command()
@options.job_ids(required=False)
@options.filtered
@flag("--exit-when-done", "Without IDs: end once no job that matches is open, with the outcome of those seen.")
@flag("--json", "Print JSON, a line a change: the job, or without IDs an event that may hold one.", to="as_json")
@_give_up
@connected
@click.pass_context
def watch(
    ctx: click.Context,
    /,
    *,
    connection: Connection,
    ids: tuple[str, ...],
    filter: JobFilter,
    exit_when_done: bool,
    as_json: bool,
    give_up: timedelta | None,
) -> None:
    """Follow jobs live until all are done.

    Draws bars on a terminal, and elsewhere prints a line for each change. Exits with the outcome: of several, failed
    counts most.

    Without IDs it follows all jobs that match the flags, as they come and change and go, until Ctrl-C.
    """
    if ids and (given := options.typed(ctx)):
        raise click.UsageError(f"Name jobs, or filter them: {given[0]} does not go with IDs.")
    draws = sys.stdout.isatty() and os.environ.get("TERM") not in (None, "dumb") and not as_json
    with connection.open() as client:
        if ids:
            code = _watch_named(client, list(dict.fromkeys(ids)), give_up, draws=draws, as_json=as_json)
        else:
            changes = _changes(client, filter, give_up)
            code = _watch_matches(changes, draws=draws, as_json=as_json, until_done=exit_when_done)
    ctx.exit(code)


@click.command()
@options.job_ids()
@duration_flag(
    "--timeout DURATION",
    "How long to wait; exits with 124 when it is over.",
    default="off",
    longest=LONGEST,
    or_off=True,
    or_seconds=True,
    to="limit",
    envvar="JOBSTATUS_WAIT_TIMEOUT",
)
@options.as_json
@_give_up
@connected_without_timeout
@click.pass_context
def wait(
    ctx: click.Context,
    /,
    *,
    connection: Connection,
    ids: tuple[str, ...],
    limit: timedelta | None,
    as_json: bool,
    give_up: timedelta | None,
) -> None:
    """Wait until jobs are done, and print them.

    Exits with the outcome: of several, failed counts most.
    """
    names = list(dict.fromkeys(ids))
    with connection.open() as client:
        check_known(client, names)
        try:
            states = follow(client, names, give_up=give_up, limit=limit, min_update_interval_seconds=SELDOM_SECONDS)
            last = _print_lines((job for job in states if job.done), as_json=as_json)
        except OutOfTimeError:
            exits.say_error(f"not done within {parsers.spell(limit or timedelta(0))}")
            ctx.exit(exits.TIMED_OUT)
    ctx.exit(exits.of_jobs(job.state for job in last))


def _watch_named(
    client: JobStatusClient, ids: list[str], give_up: timedelta | None, *, draws: bool, as_json: bool
) -> int:
    check_known(client, ids)
    states = follow(client, ids, give_up=give_up)
    if draws:
        from jobstatus_grpc.cli import bars

        last = bars.draw(states, ids)
    else:
        last = _print_lines(states, as_json=as_json)
    return exits.of_jobs(job.state for job in last)


def _changes(client: JobStatusClient, filter: JobFilter, give_up: timedelta | None) -> Iterator[JobChange]:
    """Return what happens to the jobs that match, for ever."""
    client.list(filter, page_size=1)  # finds out at once whether the server is there, and likes the filter
    give_up_seconds = give_up.total_seconds() if give_up else None
    return arriving(lambda: client.watch_jobs(filter, give_up_seconds=give_up_seconds))


def _watch_matches(changes: Iterator[JobChange], *, draws: bool, as_json: bool, until_done: bool) -> int:
    pass

    matches = Matches()
    news = matches.following(changes, until_done=until_done)
    if draws:
        from jobstatus_grpc.cli import bars

        bars.draw_matches(news, matches.jobs)
    else:
        _print_changes(news, as_json=as_json)
    return exits.of_jobs(matches.outcomes)


def _print_changes(news: Iterable[tuple[JobChange, Job | None]], *, as_json: bool) -> None:
    from jobstatus_grpc.client import JobChangeType

    for change, before in news:
        if change.type is JobChangeType.RESET and not as_json:
            exits.say("jobstatus: some changes may be missing; all jobs that match now follow")
        text = to_json(change) if as_json else line(change, before)
        if text:
            print(text, flush=True)


def _print_lines(states: Iterable[Job], *, as_json: bool) -> list[Job]:
    """Print a line for each state; return the last of each job."""
    last = {}
    for job in states:
        last[job.id] = job
        print(output.to_json(job) if as_json else output.line(job), flush=True)
    return list(last.values())
