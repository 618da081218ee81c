"""`jobstatus delete`: done jobs, one call each."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import click

from jobstatus_grpc import errors
from jobstatus_grpc.cli import exits, options, output, parsers
from jobstatus_grpc.cli.connection import Connection, connected
from jobstatus_grpc.cli.options import flag
from jobstatus_grpc.job import CREATION_STATES, JobState


@click.command()
@flag("--name TEXT", "For people and filters; need not be unique.", default="")
@flag("--id TEXT", "Default: the service chooses one.", default="")
@options.labels()
@options.parent
@options.state("pending or in_progress.", among=CREATION_STATES, default="pending")
@flag("--in-progress", "As --state in_progress: attempt 1 begins at once.")
@flag("--reason TEXT", "Why it is in this state.", default="")
@flag("--has-progress", "Say that it will report progress.")
@options.progress
@options.eta
@options.heartbeat_timeout(default="off")
@flag("--result JSON", "A JSON object.", type=parsers.json_object)
@options.request_id
@flag("-q --quiet", "Print the id only.")
@options.as_json
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
@options.job_id
@options.as_json
@connected
def get(*, connection: Connection, id: str, as_json: bool) -> None:
    """Print a job as it is now."""
    with connection.open() as client:
        job = client.get(id)
    output.show(job, as_json=as_json)


@click.command()
@options.job_id
@flag("--reason TEXT", "Why; kept in the job's history.", default="")
@options.as_json
@connected
def cancel(*, connection: Connection, id: str, reason: str, as_json: bool) -> None:
    """Ask for a job's end and print it as stored.

    A job that no worker is on is cancelled at once. A worker is asked, and ends the job when it heeds that.
    """
    with connection.open() as client:
        job = client.cancel(id, reason=reason)
    output.show(job, as_json=as_json)


@click.command()
@options.job_ids()
@options.expected_revision
@flag("--json", "Print JSON, one line a job: whether it is deleted, and the error where it is not.", to="as_json")
@connected
@click.pass_context
def delete(
    ctx: click.Context, /, *, connection: Connection, ids: tuple[str, ...], expected_revision: int, as_json: bool
) -> None:
    """Delete done jobs, and print the ids of those that are gone.

    Each is deleted or refused by itself. Exits with 0 if all are deleted.
    """
    codes = set()
    with connection.open() as client:
        for job_id in dict.fromkeys(ids):
            error = None
            try:
                client.delete(job_id, expected_revision=expected_revision)
            except errors.JobStatusError as refusal:
                if exits.of_error(refusal) == exits.UNREACHABLE:
                    raise  # nobody is there to ask about the others
                error = refusal
                codes.add(exits.of_error(error))
            _show(job_id, error, as_json=as_json)
    ctx.exit(next((code for code in (exits.FAILED, exits.USAGE) if code in codes), exits.SUCCEEDED))


def _show(job_id: str, error: errors.JobStatusError | None, *, as_json: bool) -> None:
    if error is not None:
        exits.say_error(error.message if job_id in error.message else f"{job_id}: {error.message}")
    if as_json:
        why = {"error": {"message": error.message, "reason": error.reason}} if error is not None else {}
        click.echo(output.in_json({"id": job_id, "deleted": error is None, **why}))
    elif error is None:
        click.echo(job_id)
