"""`jobstatus tree`: a job, its children, their children and so on, as they are now."""

from __future__ import annotations

import sys

import click

from jobstatus_grpc.cli import options, output, parsers, trees
from jobstatus_grpc.cli.connection import connected
from jobstatus_grpc.cli.options import flag
from jobstatus_grpc.cli.target import Connection
from jobstatus_grpc.job import limits


@click.command()
@options.job_id
@flag(
    "--limit N",
    f"Draw at most N jobs, and count the others. Default: {trees.MAX_JOBS}.",
    type=parsers.count(limits.MAX_INT32, smallest=1),
)
@flag("--json", 'Print JSON, one line: {"job": …, "children": […], "leftOut": N}.', to="as_json")
@connected
def tree(*, connection: Connection, id: str, limit: int | None, as_json: bool) -> None:
    """Draw a job and all jobs below it: state, progress, name and id of each.

    Of a large tree the jobs next to the root are drawn; of the others it says how many children each has. With --json
    it prints at most 100 levels.
    """
    with connection.open() as client:
        found = trees.read_tree(client, id, limit=limit or trees.MAX_JOBS)
    if as_json:
        click.echo(output.in_json(found.to_object()))
    elif sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False)
        for row in found.rows():
            console.print(row.styled)
    else:
        for row in found.rows():
            click.echo(row.text)
