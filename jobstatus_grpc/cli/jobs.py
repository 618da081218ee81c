"""`jobstatus create`, `get` and `cancel`: one call each."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import click

from jobstatus_grpc.cli import flags, output, values
from jobstatus_grpc.cli.connection import Connection, connected
from jobstatus_grpc.cli.flags import flag
from jobstatus_grpc.state import CREATION_STATES, JobState


@click.command()
@flag("--name TEXT", "For people and filters; need not be unique.", default="")
@flag("--id TEXT", "Default: the service chooses one.", default="")
@flags.labels()
@flags.parent
@flags.state("pending or in_progress.", among=CREATION_STATES, default="pending")
@flag("--in-progress", "As --state in_progress: attempt 1 begins at once.")
@flag("--reason TEXT", "Why it is in this state.", default="")
@flag("--has-progress", "Say that it will report progress.")
@flags.progress
@flags.eta
@flags.heartbeat_timeout(default="off")
@flag("--result JSON", "A JSON object.", type=values.json_object)
@flags.request_id
@flag("-q --quiet", "Print the id only.")
@flags.as_json
@connected
def create(
    *,
    connection: Connection,
    labels: tuple[tuple[str, str], ...],
    state: JobState,
    in_progress: bool,
    heartbeat_timeout: timedelta | None,
    request_id: str,
    quiet: bool,
    as_json: bool,
    **fields: Any,
) -> None:
    """Create a job and print it as stored."""
    with connection.open() as client:
        job = client.create(
            state=JobState.IN_PROGRESS if in_progress else state,
            labels=dict(labels),
            heartbeat_timeout_seconds=heartbeat_timeout.total_seconds() if heartbeat_timeout else None,
            request_id=request_id or None,
            **fields,
        )
    if quiet:
        click.echo(job.id)
    else:
        output.show(job, as_json=as_json)


@click.command()
@flags.job_id
@flags.as_json
@connected
def get(*, connection: Connection, id: str, as_json: bool) -> None:
    """Print a job as it is now."""
    with connection.open() as client:
        job = client.get(id)
    output.show(job, as_json=as_json)


@click.command()
@flags.job_id
@flag("--reason TEXT", "Why; kept in the job's history.", default="")
@flags.as_json
@connected
def cancel(*, connection: Connection, id: str, reason: str, as_json: bool) -> None:
    """Ask for a job's end and print it as stored.

    A job that no worker is on is cancelled at once. A worker is asked, and ends the job when it heeds that.
    """
    with connection.open() as client:
        job = client.cancel(id, reason=reason)
    output.show(job, as_json=as_json)
