"""`jobstatus delete`: done jobs, one call each."""

from __future__ import annotations

import click

from jobstatus_grpc import errors
from jobstatus_grpc.cli import exits, flags, output
from jobstatus_grpc.cli.connection import Connection, connected
from jobstatus_grpc.cli.flags import flag


@click.command()
@flags.job_ids()
@flags.expected_revision
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
