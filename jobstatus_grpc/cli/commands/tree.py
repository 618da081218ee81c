"""`jobstatus tree`: a job, its children, their children and so on, as they are now."""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING

import click

from jobstatus_grpc.cli import options, output, parsers, trees
from jobstatus_grpc.cli.connection import connected
from jobstatus_grpc.cli.options import flag
from jobstatus_grpc.cli.target import Connection
from jobstatus_grpc.job import JobFilter, limits

if TYPE_CHECKING:
    from jobstatus_grpc.client import JobStatusClient


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
        found = read_tree(client, id, limit=limit or trees.MAX_JOBS)
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


def read_tree(client: JobStatusClient, root_id: str, *, limit: int) -> trees.JobTree:
    """Return a job with at most `limit` jobs of those below it, level by level, the newest children of each."""
    root = client.get(root_id)
    found = trees.JobTree(root, limit=limit)
    parents = deque([root] if root.children else [])
    while parents and found.room > 0:
        parent, token = parents.popleft().id, ""
        while found.room > 0:
            size = min(found.room, limits.MAX_PAGE_SIZE)
            page = client.list(JobFilter(parent_id=parent), page_size=size, page_token=token)
            for job in page.jobs:
                is_new = job.id not in found
                if is_new and found.put(job) and job.children:
                    parents.append(job)
            token = page.next_page_token
            if not token:
                break
    return found
