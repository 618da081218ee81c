"""`jobstatus watch` and `wait`: follow jobs to their end, and exit with their outcome; or all that a filter matches."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from jobstatus_grpc.cli import exits, filters, flags, output, values
from jobstatus_grpc.cli.connection import Connection, connected, connected_without_timeout
from jobstatus_grpc.cli.flags import duration_flag, flag
from jobstatus_grpc.cli.follow import OutOfTimeError, arriving, check_known, follow

if TYPE_CHECKING:
    from jobstatus_grpc.client import JobChange, JobStatusClient
    from jobstatus_grpc.job_filter import JobFilter
    from jobstatus_grpc.record import Job

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
@flags.job_ids(required=False)
@filters.filtered
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
    if ids and (given := filters.typed(ctx)):
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
@flags.job_ids()
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
        check_known(client, names)
        try:
            states = follow(client, names, give_up=give_up, limit=limit, min_update_interval_seconds=SELDOM_SECONDS)
            last = _print_lines((job for job in states if job.done), as_json=as_json)
        except OutOfTimeError:
            exits.say_error(f"not done within {values.spell(limit or timedelta(0))}")
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
    from jobstatus_grpc.cli.matches import Matches

    matches = Matches()
    news = matches.following(changes, until_done=until_done)
    if draws:
        from jobstatus_grpc.cli import bars

        bars.draw_matches(news, matches.jobs)
    else:
        _print_changes(news, as_json=as_json)
    return exits.of_jobs(matches.outcomes)


def _print_changes(news: Iterable[tuple[JobChange, Job | None]], *, as_json: bool) -> None:
    from jobstatus_grpc.cli import matches
    from jobstatus_grpc.client import JobChangeType

    for change, before in news:
        if change.type is JobChangeType.RESET and not as_json:
            exits.say("jobstatus: some changes may be missing; all jobs that match now follow")
        text = matches.to_json(change) if as_json else matches.line(change, before)
        if text:
            print(text, flush=True)


def _print_lines(states: Iterable[Job], *, as_json: bool) -> list[Job]:
    """Print a line for each state; return the last of each job."""
    last = {}
    for job in states:
        last[job.id] = job
        print(output.to_json(job) if as_json else output.line(job), flush=True)
    return list(last.values())
