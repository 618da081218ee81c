"""`jobstatus history`: the transitions of a job."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

from jobstatus_grpc.cli import options, output, parsers
from jobstatus_grpc.cli.connection import connected
from jobstatus_grpc.cli.options import flag
from jobstatus_grpc.cli.target import Connection
from jobstatus_grpc.cli.text import one_line
from jobstatus_grpc.job import limits

if TYPE_CHECKING:
    from jobstatus_grpc.client import JobStatusClient
    from jobstatus_grpc.job import Transition


@click.command()
@options.job_id
@flag("--limit N", "Print only the newest N transitions.", type=parsers.count(limits.MAX_INT32, smallest=1))
@flag("--json", "Print JSON, one line per transition.", to="as_json")
@connected
def history(*, connection: Connection, id: str, limit: int | None, as_json: bool) -> None:
    """Print the state changes of a job, oldest first.

    Draws a table on a terminal; otherwise prints a line per transition: time, old state (empty for the creation), new
    state, attempt, actor and reason, separated by tabs.
    """
    with connection.open() as client:
        transitions = deque(_transitions(client, id), maxlen=limit)
    if as_json:
        for transition in transitions:
            click.echo(output.transition_to_json(transition))
    elif sys.stdout.isatty():
        _print_table(transitions)
    else:
        for transition in transitions:
            click.echo(_record(transition))


def _transitions(client: JobStatusClient, job_id: str) -> Iterator[Transition]:
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
