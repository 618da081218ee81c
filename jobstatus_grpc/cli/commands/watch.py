"""`jobstatus watch` and `wait`: follow named jobs until all are done, or all jobs that match a filter.

The client's watches are read in threads, so that a time limit and Ctrl-C take effect at once.
"""

from __future__ import annotations

import functools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

from jobstatus_grpc.cli import exits, options, output, parsers, trees
from jobstatus_grpc.cli.connection import connected, connected_without_timeout
from jobstatus_grpc.cli.options import duration_flag, flag
from jobstatus_grpc.cli.target import Connection
from jobstatus_grpc.errors import JobExpiredError, JobStatusError
from jobstatus_grpc.job import JobFilter, limits

if TYPE_CHECKING:
    from jobstatus_grpc.client import JobChange, JobStatusClient
    from jobstatus_grpc.client.watch import JobsWatch, Watch
    from jobstatus_grpc.job import Job, JobState

LONGEST = timedelta(days=3650)

SHORTEST_CHECK_SECONDS = 1.0
"""Time that the server has to answer `wait` at first, also if --timeout is shorter: a slow connection needs it."""

WAIT_UPDATE_INTERVAL_SECONDS = 60.0
"""How often `wait` gets progress at most: it does not print it. Other changes are sent at once."""

MAX_UNREAD = 1000
"""States read from the server but not yet printed. If printing is slower than that, the server keeps only the newest
state of each job."""

T = TypeVar("T")

_give_up = duration_flag(
    "--give-up DURATION",
    "How long to retry when the connection is lost.",
    default="off",
    shortest=timedelta(seconds=1),
    longest=LONGEST,
    or_off=True,
)


@click.command()
@options.job_ids(required=False)
@options.filtered
@flag(
    "--follow/--exit-when-done",
    "Without IDs: wait for the first match, and go on for ever, also once all matches are done; or end then, with the "
    "outcome of the jobs seen done. Default: end then, and say so if there is no match.",
    default=None,
    envvar="JOBSTATUS_FOLLOW",
)
@flag("--tree", f"Follow one job with all jobs below it, at most {trees.MAX_JOBS}, until it is done.", to="as_tree")
@flag("--json", "Print JSON, one line per change: the job, or without IDs an event that may hold one.", to="as_json")
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
    follow: bool | None,
    as_tree: bool,
    as_json: bool,
    give_up: timedelta | None,
) -> None:
    """Follow jobs live until all are done.

    Draws bars on a terminal; otherwise prints a line per change. Exits with the outcome; of several jobs, failed counts
    most.

    Without IDs, follows all jobs that match the filter flags, new ones too, until all are done; with --follow, until
    Ctrl-C.
    """
    if ids and (given := options.filter_flags_given(ctx)):
        raise click.UsageError(f"Give IDs or filter flags, not both: {given[0]}.")
    draws = sys.stdout.isatty() and os.environ.get("TERM") not in (None, "dumb") and not as_json
    if as_tree and len(ids) != 1:
        raise click.UsageError("--tree needs exactly one ID.")
    with connection.open() as client:
        if as_tree:
            code = _watch_tree(client, ids[0], give_up, draws=draws, as_json=as_json)
        elif ids:
            code = _watch_named(client, list(dict.fromkeys(ids)), give_up, draws=draws, as_json=as_json)
        else:
            code = _watch_matches(client, filter, give_up, draws=draws, as_json=as_json, follow=follow)
    ctx.exit(code)


@click.command()
@options.job_ids()
@duration_flag(
    "--timeout DURATION",
    "How long to wait at most; the exit code is 124 then.",
    default="off",
    longest=LONGEST,
    or_off=True,
    to="limit",
    envvar=("JOBSTATUS_WAIT_TIMEOUT", "JOBSTATUS_TIMEOUT"),
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

    Exits with the outcome; of several jobs, failed counts most.
    """
    names = list(dict.fromkeys(ids))
    if limit is not None:
        check_seconds = max(limit.total_seconds(), SHORTEST_CHECK_SECONDS)
        connection = replace(connection, timeout_seconds=min(connection.timeout_seconds, check_seconds))
    began_at = time.monotonic()
    with connection.open() as client:
        check_exist(client, names)
        if limit is not None:
            # A job that is done is printed also if the check took all the time.
            shortest = min(limit, timedelta(seconds=SHORTEST_CHECK_SECONDS))
            left = max(limit - timedelta(seconds=time.monotonic() - began_at), shortest)
        else:
            left = None
        try:
            interval = WAIT_UPDATE_INTERVAL_SECONDS
            states = follow(client, names, give_up=give_up, limit=left, min_update_interval_seconds=interval)
            last = _print_states((job for job in states if job.done), as_json=as_json)
        except TimeLimitError:
            exits.say_error(f"not done within {parsers.spell(limit or timedelta(0))}")
            ctx.exit(exits.TIMED_OUT)
    ctx.exit(exits.of_jobs(job.state for job in last))


def _watch_named(
    client: JobStatusClient, ids: list[str], give_up: timedelta | None, *, draws: bool, as_json: bool
) -> int:
    check_exist(client, ids)
    watches: list[Watch | JobsWatch] = []
    states = follow(client, ids, give_up=give_up, watches=watches)
    if draws:
        from jobstatus_grpc.cli import bars

        last = bars.draw(states, ids, functools.partial(_are_connected, watches))
    else:
        last = _print_states(states, as_json=as_json)
    return exits.of_jobs(job.state for job in last)


def _watch_tree(client: JobStatusClient, root_id: str, give_up: timedelta | None, *, draws: bool, as_json: bool) -> int:
    tree = trees.JobTree(client.get(root_id))
    states = follow_tree(client, tree, give_up=give_up)
    if draws:
        trees.draw_live(states, tree, lambda: click.exceptions.Exit(exits.INTERRUPTED))
    else:
        _print_states(states, as_json=as_json)
    return exits.of_jobs([tree.root.state])


def follow_tree(client: JobStatusClient, tree: trees.JobTree, *, give_up: timedelta | None) -> Iterator[Job]:
    """Yield the states of the root and of the jobs below it as they arrive, and keep `tree` up to date, until the root
    is done. The children of a job are watched once it has some. What the watches have not brought by the end of the
    root is read, and yielded before it.

    Raises:
        JobStatusError: the first error of a watch.
    """
    from jobstatus_grpc.client import JobChange, JobChangeType

    give_up_seconds = give_up.total_seconds() if give_up else None

    def children_of(parent_id: str) -> Iterator[JobChange | Job]:
        job_filter = JobFilter(parent_id=parent_id)
        with client.watch_jobs(job_filter, give_up_seconds=give_up_seconds) as changes:
            yield from changes

    watched: set[str] = set()
    revisions: dict[str, int] = {}
    later: list[Callable[[], Iterable[JobChange | Job]]] = []
    root_watch = client.watch(tree.root_id, give_up_seconds=give_up_seconds)
    for item in merge(lambda: root_watch, later=later):
        job = item.job if isinstance(item, JobChange) else item
        if isinstance(item, JobChange) and item.type is JobChangeType.REMOVED:
            tree.remove(item.id)
            continue
        if job is None or (job.id == tree.root_id) is isinstance(item, JobChange) or not tree.put(job):
            continue
        if job.children and job.id not in watched:
            watched.add(job.id)
            later.append(functools.partial(children_of, job.id))
        if job.id == tree.root_id and job.done:
            yield from _read_the_rest(client, tree, revisions)
            yield job
            return
        revisions[job.id] = job.revision
        yield job


def _read_the_rest(client: JobStatusClient, tree: trees.JobTree, revisions: Mapping[str, int]) -> Iterator[Job]:
    """Bring `tree` up to date, and yield the states of the jobs below its root that are not in `revisions`."""
    try:
        newest = trees.read_tree(client, tree.root_id, limit=trees.MAX_JOBS)
    except JobStatusError as error:
        exits.say(f"jobstatus: states of jobs below {tree.root_id} may be missing: {error}")
        return
    if not newest.root.done:  # it was deleted, and created again
        return
    for row in newest.rows():
        job = row.job
        if job and tree.put(job) and job.id != tree.root_id and job.revision != revisions.get(job.id):
            yield job


def check_exist(client: JobStatusClient, ids: Sequence[str]) -> None:
    """Raise the error of the first job that does not exist, or of a server that does not answer.

    A watch would retry for ever instead.
    """
    known: set[str] = set()
    if len(ids) > 1:
        for part in _parts(ids):
            known.update(job.id for job in client.list_all(JobFilter(ids=part)))
    for job_id in ids:
        if job_id not in known:
            client.get(job_id)  # raises the error


def follow(
    client: JobStatusClient,
    ids: Sequence[str],
    *,
    give_up: timedelta | None,
    limit: timedelta | None = None,
    min_update_interval_seconds: float | None = None,
    watches: list[Watch | JobsWatch] | None = None,
) -> Iterator[Job]:
    """Yield the states of all these jobs as they arrive, until all are done; add the client's watches to `watches`.

    Raises:
        JobStatusError: the first error of a watch.
        TimeLimitError: the jobs are not done within `limit`.
    """
    give_up_seconds = give_up.total_seconds() if give_up else None
    opened = [] if watches is None else watches

    def watch(part: Sequence[str]) -> Iterator[Job]:
        if len(ids) == 1:
            job_watch = client.watch(
                part[0], min_update_interval_seconds=min_update_interval_seconds, give_up_seconds=give_up_seconds
            )
            opened.append(job_watch)
            return job_watch
        changes = client.watch_jobs(
            JobFilter(ids=part),
            min_update_interval_seconds=min_update_interval_seconds,
            give_up_seconds=give_up_seconds,
        )
        opened.append(changes)
        return _until_done(changes, part)

    return merge(*(functools.partial(watch, part) for part in _parts(ids)), limit=limit)


def _are_connected(watches: Sequence[Watch | JobsWatch]) -> bool:
    return all(watch.is_connected for watch in list(watches))


def _parts(ids: Sequence[str]) -> list[Sequence[str]]:
    """Return `ids` in parts that fit in a filter."""
    return [ids[start : start + limits.MAX_FILTER_IDS] for start in range(0, len(ids), limits.MAX_FILTER_IDS)]


def _until_done(watch: AbstractContextManager[Iterable[JobChange]], ids: Sequence[str]) -> Iterator[Job]:
    """Yield the states of existing jobs until all are done."""
    from jobstatus_grpc.client import JobChangeType

    open_ids, seen = set(ids), set[str]()
    with watch as changes:
        for change in changes:
            if change.type is JobChangeType.RESET:
                seen.clear()
            elif change.type is JobChangeType.SYNCED:
                _check_none_vanished(open_ids - seen)
            elif change.job is None:
                _check_none_vanished(open_ids & {change.id})
            elif change.id in open_ids:
                seen.add(change.id)
                if change.job.done:
                    open_ids.remove(change.id)
                yield change.job
            if not open_ids:
                return


def _check_none_vanished(ids: set[str]) -> None:
    if ids:
        raise JobExpiredError(f"job {min(ids)!r} was deleted or has expired before it was seen done")


def _print_states(states: Iterable[Job], *, as_json: bool) -> list[Job]:
    """Print a line for each state; return the last state of each job."""
    last = {}
    for job in states:
        last[job.id] = job
        print(output.to_json(job) if as_json else output.line(job), flush=True)
    return list(last.values())


def _watch_matches(
    client: JobStatusClient,
    filter: JobFilter,
    give_up: timedelta | None,
    *,
    draws: bool,
    as_json: bool,
    follow: bool | None,
) -> int:
    client.list(filter, page_size=1)  # raises at once if the server does not answer or refuses the filter
    give_up_seconds = give_up.total_seconds() if give_up else None
    changes_watch = client.watch_jobs(filter, give_up_seconds=give_up_seconds)
    changes = merge(lambda: changes_watch)
    matches = Matches()
    followed = matches.following(changes, until_done=not follow)
    if draws:
        from jobstatus_grpc.cli import bars

        bars.draw_matches(followed, matches.jobs, functools.partial(_are_connected, [changes_watch]))
    else:
        _print_changes(followed, as_json=as_json)
    if follow is None and not matches.has_seen_any:
        exits.say("no job matches; --follow waits for the first")
    return exits.of_jobs(matches.outcomes)


class Matches:
    """The jobs that match a filter, kept up to date by `take`."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.outcomes: set[JobState] = set()
        """The final states of all jobs that were seen done, removed ones included."""
        self.has_seen_any = False
        self._is_synced = False
        self._open: set[str] = set()

    def following(self, changes: Iterable[JobChange], *, until_done: bool) -> Iterator[tuple[JobChange, Job | None]]:
        """Take `changes`, and yield each with the job as it was before it.

        Args:
            until_done: end once all matching jobs are known and none of them is open.
        """
        for change in changes:
            before = self.jobs.get(change.id)
            self.take(change)
            yield change, before
            if until_done and self._is_synced and not self._open:
                return

    def take(self, change: JobChange) -> None:
        """Apply a change."""
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
            self.has_seen_any = True
            self.jobs[change.id] = change.job
            if not change.job.done:
                self._open.add(change.id)
        if change.job is not None and change.job.done:
            self.outcomes.add(change.job.state)


def _print_changes(followed: Iterable[tuple[JobChange, Job | None]], *, as_json: bool) -> None:
    from jobstatus_grpc.client import JobChangeType

    for change, before in followed:
        if change.type is JobChangeType.RESET and not as_json:
            exits.say("jobstatus: some changes may be missing; all jobs that match now follow")
        text = _to_json(change) if as_json else _line(change, before)
        if text:
            print(text, flush=True)


def _to_json(change: JobChange) -> str:
    """Return one line of JSON: `{"event": "updated", "job": {…}}`."""
    from jobstatus_grpc.client import JobChangeType

    event: dict[str, Any] = {"event": change.type.name.lower()}
    if change.type is JobChangeType.REMOVED:
        event |= {"id": change.id, "revision": str(change.revision)}
    if change.job is not None:
        event["job"] = output.to_object(change.job)
    return output.in_json(event)


def _line(change: JobChange, before: Job | None) -> str:
    """Return the change as one line; empty if it is not about a job.

    Args:
        before: the job as it was before the change.
    """
    from jobstatus_grpc.client import JobChangeType

    if change.type is not JobChangeType.REMOVED:
        return output.line(change.job) if change.job is not None else ""
    if change.job is not None:
        return f"{output.line(change.job)}  removed: matches no longer"
    return f"{output.line(before) if before is not None else change.id}  removed: deleted or expired"


class TimeLimitError(Exception):
    """The time limit of `wait` is over."""


def merge(
    *sources: Callable[[], Iterable[T]],
    limit: timedelta | None = None,
    later: list[Callable[[], Iterable[T]]] | None = None,
) -> Iterator[T]:
    """Yield the items of all sources as they arrive, until all have ended. Each source is read in its own thread.

    Args:
        sources: the sources.
        limit: how long to wait for their end.
        later: sources that the caller adds while it reads the items.

    Raises:
        Exception: the first error of a source.
        TimeLimitError: the sources have not ended within `limit`.
    """
    deadline = time.monotonic() + limit.total_seconds() if limit is not None else None
    unread: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(MAX_UNREAD)

    def read(source: Callable[[], Iterable[T]]) -> None:
        try:
            for item in source():
                unread.put((item,))
            unread.put(None)
        except BaseException as error:
            unread.put(error)

    waiting = later if later is not None else []
    waiting.extend(sources)
    still_open = 0
    while still_open or waiting:
        while waiting:
            threading.Thread(target=read, args=(waiting.pop(),), name="watch", daemon=True).start()
            still_open += 1
        try:
            item = unread.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0))
        except queue.Empty:
            raise TimeLimitError from None
        if isinstance(item, BaseException):
            raise item
        if item is None:
            still_open -= 1
        else:
            yield item[0]
