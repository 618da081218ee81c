"""`jobstatus list`: the newest jobs that match a filter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import click

from jobstatus_grpc.cli import exits, options, output, parsers
from jobstatus_grpc.cli.connection import connected
from jobstatus_grpc.cli.options import flag
from jobstatus_grpc.cli.target import Connection
from jobstatus_grpc.cli.text import one_line
from jobstatus_grpc.job import JobFilter, limits

if TYPE_CHECKING:
    from jobstatus_grpc.client import JobStatusClient
    from jobstatus_grpc.job import Job

DEFAULT_LIMIT = 50

Show: TypeAlias = "Callable[[Sequence[Job]], object]"


@click.command("list")
@options.filtered
@flag("--limit N", f"Print at most N jobs. Default: {DEFAULT_LIMIT}.", type=parsers.count(limits.MAX_INT32, smallest=1))
@flag("--all", "Print all jobs, without a limit.", to="has_no_limit")
@options.as_json
@connected
def list_jobs(
    *, connection: Connection, filter: JobFilter, limit: int | None, has_no_limit: bool, as_json: bool
) -> None:
    """List jobs, newest first.

    Draws a table on a terminal; otherwise prints a line per job: id, name, state, percent, time of creation and reason,
    separated by tabs.
    """
    if limit and has_no_limit:
        raise click.UsageError("--limit contradicts --all.")
    most = None if has_no_limit else limit or DEFAULT_LIMIT
    on_terminal = sys.stdout.isatty() and not as_json
    show = _as_table() if on_terminal else _as_json if as_json else _as_lines
    with connection.open() as client:
        count, are_all = _show_pages(client, filter, most, show)
    if not are_all and limit is None:
        exits.say(f"only the newest {count}: --limit N or --all shows more")
    elif on_terminal and not count:
        exits.say("no job matches" if filter != JobFilter() else "there are no jobs")


def _show_pages(client: JobStatusClient, filter: JobFilter, limit: int | None, show: Show) -> tuple[int, bool]:
    """Show the newest jobs, page by page; return their number, and whether these are all jobs that match."""
    shown, token = 0, ""
    while True:
        left = None if limit is None else limit - shown
        # Ask for one more job than is shown: a next page token does not mean that there are more.
        size = limits.MAX_PAGE_SIZE if left is None else min(left + 1, limits.MAX_PAGE_SIZE)
        page = client.list(filter, page_size=size, page_token=token)
        jobs = page.jobs[:left]
        if jobs:
            show(jobs)
            sys.stdout.flush()
        if page.unreachable:
            exits.say(f"left out, because they are damaged: {', '.join(id or '(unknown)' for id in page.unreachable)}")
        shown += len(jobs)
        token = page.next_page_token
        if len(jobs) < len(page.jobs) or not token:
            return shown, len(jobs) == len(page.jobs)


def _as_json(jobs: Sequence[Job]) -> None:
    for job in jobs:
        print(output.to_json(job))


def _as_lines(jobs: Sequence[Job]) -> None:
    for job in jobs:
        print(output.job_record(job))


def _as_table() -> Show:
    from rich.text import Text

    from jobstatus_grpc.cli import tables
    from jobstatus_grpc.cli.tables import Column, Table

    table = Table(
        Column(title="id"),
        Column(title="name", longest=24),
        Column(title="state"),
        Column(title="%", is_number=True),
        Column(title="age", is_number=True),
        Column(title="reason"),
    )

    def show(jobs: Sequence[Job]) -> None:
        table.print(
            (
                Text(job.id),
                Text(one_line(job.name)),
                tables.state(job.state),
                tables.percent(job),
                Text(output.age(job)),
                tables.words(job),
            )
            for job in jobs
        )

    return show
