"""`jobstatus watch` and `wait`: follow jobs to their end, and exit with their outcome."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from jobstatus_grpc.cli import exits, flags, output, values
from jobstatus_grpc.cli.connection import Connection, connected, connected_without_timeout
from jobstatus_grpc.cli.flags import duration_flag

if TYPE_CHECKING:
    from jobstatus_grpc.client import JobStatusClient
    from jobstatus_grpc.record import Job

LONGEST = timedelta(days=3650)
SELDOM_SECONDS = 60.0
"""How often `wait` is sent progress, which it does not show."""

_ids = click.argument("ids", metavar="ID...", nargs=-1, required=True, type=values.text)
_give_up = duration_flag(
    "--give-up DURATION",
    "How long to try again when the server is lost.",
    default="off",
    shortest=timedelta(seconds=1),
    longest=LONGEST,
    or_off=True,
)


class OutOfTimeError(Exception):
    """The time that `wait` was given is over."""


@click.command()
@_ids
@flags.as_json
@_give_up
@connected
@click.pass_context
def watch(
    ctx: click.Context, /, *, connection: Connection, ids: tuple[str, ...], as_json: bool, give_up: timedelta | None
) -> None:
    """Follow jobs live until all are done.

    Draws bars on a terminal, and elsewhere prints a line for each change. Exits with the outcome: of several, failed
    counts most.
    """
    names = list(dict.fromkeys(ids))
    with connection.open() as client:
        _check_known(client, names)
        states = follow(client, names, give_up=give_up)
        if as_json or not sys.stdout.isatty() or os.environ.get("TERM") in (None, "dumb"):
            last = _print_lines(states, as_json=as_json)
        else:
            from jobstatus_grpc.cli import bars

            try:
                last = bars.draw(states, names)
            except KeyboardInterrupt:
                ctx.exit(exits.INTERRUPTED)  # without a new line: the bars have ended theirs
    ctx.exit(exits.of_jobs(job.state for job in last))


@click.command()
@_ids
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
@flags.as_json
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
        _check_known(client, names)
        try:
            states = follow(client, names, give_up=give_up, limit=limit, min_update_interval_seconds=SELDOM_SECONDS)
            last = _print_lines((job for job in states if job.done), as_json=as_json)
        except OutOfTimeError:
            exits.say_error(f"not done within {values.spell(limit or timedelta(0))}")
            ctx.exit(exits.TIMED_OUT)
    ctx.exit(exits.of_jobs(job.state for job in last))


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
    deadline = time.monotonic() + limit.total_seconds() if limit is not None else None
    news: queue.SimpleQueue[Job | BaseException | None] = queue.SimpleQueue()

    def follow_one(job_id: str) -> None:
        try:
            for job in client.watch(
                job_id,
                min_update_interval_seconds=min_update_interval_seconds,
                give_up_seconds=give_up.total_seconds() if give_up else None,
            ):
                news.put(job)
            news.put(None)
        except BaseException as error:
            news.put(error)

    for job_id in ids:
        threading.Thread(target=follow_one, args=(job_id,), name=f"watch {job_id}", daemon=True).start()
    open_watches = len(ids)
    while open_watches:
        try:
            item = news.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0))
        except queue.Empty:
            raise OutOfTimeError from None
        if isinstance(item, BaseException):
            raise item
        if item is None:
            open_watches -= 1
        else:
            yield item


def _check_known(client: JobStatusClient, ids: Sequence[str]) -> None:
    """Find out at once, and not by a watch that tries for ever, that a job or the server is not there."""
    for job_id in ids:
        client.get(job_id)


def _print_lines(states: Iterable[Job], *, as_json: bool) -> list[Job]:
    """Print a line for each state; return the last of each job."""
    last = {}
    for job in states:
        last[job.id] = job
        print(output.to_json(job) if as_json else output.line(job), flush=True)
    return list(last.values())
