"""`jobstatus history`: what happened to a job."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

from jobstatus_grpc.cli import options, output, parsers
from jobstatus_grpc.cli.connection import Connection, connected
from jobstatus_grpc.cli.options import flag
from jobstatus_grpc.cli.text import one_line
from jobstatus_grpc.job import limits

if TYPE_CHECKING:
    from jobstatus_grpc.client import JobStatusClient
    from jobstatus_grpc.job import Transition


@click.command()
@options.job_id
@flag("--limit N", "Only the newest.", type=parsers.count(limits.MAX_INT32, smallest=1))
@flag("--json", "Print JSON, one line a transition.", to="as_json")
@connected
def history(*, connection: Connection, id: str, limit: int | None, as_json: bool) -> None:
    """Print what happened to a job, the oldest first.

    Draws a table on a terminal, and elsewhere prints a line for each transition, with tabs between time, old state
    (empty for the creation), new state, attempt, actor and reason.
    """
    with connection.open() as client:
        transitions = deque(_all(client, id), maxlen=limit)
    if as_json:
        for transition in transitions:
            click.echo(output.transition_to_json(transition))
    elif sys.stdout.isatty():
        _print_table(transitions)
    else:
        for transition in transitions:
            click.echo(_record(transition))


def _all(client: JobStatusClient, job_id: str) -> Iterator[Transition]:
    token = ""
    while True:
        page = client.history(job_id, page_size=limits.MAX_PAGE_SIZE, page_token=token)
        yield from page.transitions
        token = page.next_page_token
        if not token:
            return


def _record(transition: Transition) -> str:
    return output.record(
        output.instant(transition.transitioned_at),
        transition.from_state.word if transition.from_state else "",
        transition.to_state.word,
        str(transition.attempt),
        transition.actor,
        transition.reason,
    )


def _print_table(transitions: Iterable[Transition]) -> None:
    from rich.text import Text

    from jobstatus_grpc.cli import tables
    from jobstatus_grpc.cli.tables import Column, Table

    table = Table(
        Column(title="when"),
        Column(title="from → to"),
        Column(title="attempt", is_number=True),
        Column(title="actor", longest=24),
        Column(title="reason"),
    )
    table.print(
        (
            Text(output.instant(each.transitioned_at)),
            Text.assemble(f"{each.from_state.word} → " if each.from_state else "", tables.state(each.to_state)),
            Text(str(each.attempt)),
            Text(one_line(each.actor)),
            Text(one_line(each.reason)),
        )
        for each in transitions
    )
