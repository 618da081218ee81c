"""`jobstatus create`, `get`, `cancel` and `delete`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import click

from jobstatus_grpc import errors
from jobstatus_grpc.cli import exits, options, output, parsers
from jobstatus_grpc.cli.connection import connected
from jobstatus_grpc.cli.options import flag
from jobstatus_grpc.cli.target import Connection
from jobstatus_grpc.job import CREATION_STATES, JobState


@click.command()
@options.beside_flag("name_argument", "NAME", "name", type=parsers.text)
@flag("--name TEXT", "The name, for people and filters; need not be unique.", default="")
@flag("--id TEXT", "The id. Default: chosen by the service.", default="")
@options.labels()
@options.parent()
@options.state("pending or in_progress.", among=CREATION_STATES, default="pending")
@flag("--in-progress", "The same as --state in_progress: attempt 1 begins at once.")
@flag("--reason TEXT", "Why the job is in this state.", default="")
@flag("--reports-progress", "Announce that the job will report progress.")
@options.progress
@options.eta
@options.heartbeat_timeout(default="off")
@flag("--result JSON", "The result: a JSON object.", type=parsers.json_object)
@flag("--trace-parent TEXT", "The trace that the job belongs to: a W3C traceparent.", default=None)
@options.request_id
@flag("-q --quiet", "Print only the id.")
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
@flag("--reason TEXT", "Why; stored in the job's history.", default="")
@flag("--force", "End the job as CANCELLED if it is stalled: its worker does not report any more.")
@flag("--cascade", "Cancel its children as well, their children, and so on. If that fails, repeat the command.")
@options.as_json
@connected
@click.pass_context
def cancel(
    ctx: click.Context, /, *, connection: Connection, id: str, reason: str, force: bool, cascade: bool, as_json: bool
) -> None:
    """Request a job's cancellation, and print the job as stored.

    A job without a worker is cancelled at once. A worker gets the request with its next report, and ends the job. If
    the worker is gone and the job is stalled, --force ends it. With --cascade, so it is with all jobs below it.
    """
    with connection.open() as client:
        job = client.cancel(id, reason=reason, force=force, cascade=cascade)
    output.show(job, as_json=as_json)
    if job.stalled:
        exits.say(f"job {id} is stalled: its worker may be gone. To end it: jobstatus cancel --force {id}")
    elif force and not job.done:
        exits.say_error(f"job {id} is not stalled: its worker gets the request, and ends the job")
        ctx.exit(exits.FAILED)


@click.command()
@options.job_ids()
@options.expected_revision
@flag("--json", "Print JSON, one line per job: whether it is deleted, or the error.", to="as_json")
@connected
@click.pass_context
def delete(
    ctx: click.Context, /, *, connection: Connection, ids: tuple[str, ...], expected_revision: int, as_json: bool
) -> None:
    """Delete done jobs, and print the ids of the deleted ones.

    One call per job: a refusal does not stop the others. Exits with 0 if all are deleted.
    """
    codes = set()
    with connection.open() as client:
        for job_id in dict.fromkeys(ids):
            error = None
            try:
                client.delete(job_id, expected_revision=expected_revision)
            except errors.JobStatusError as refusal:
                if exits.of_error(refusal) == exits.UNREACHABLE:
                    raise  # the other calls would fail too
                error = refusal
                codes.add(exits.of_error(error))
            _show_deletion(job_id, error, as_json=as_json)
    ctx.exit(next((code for code in (exits.FAILED, exits.NO_SUCH_JOB, exits.USAGE) if code in codes), exits.SUCCEEDED))


def _show_deletion(job_id: str, error: errors.JobStatusError | None, *, as_json: bool) -> None:
    if error is not None:
        exits.say_error(error.message if job_id in error.message else f"{job_id}: {error.message}")
    if as_json:
        details = {"error": {"message": error.message, "reason": error.reason}} if error is not None else {}
        click.echo(output.in_json({"id": job_id, "deleted": error is None, **details}))
    elif error is None:
        click.echo(job_id)
