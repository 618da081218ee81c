"""`jobstatus update`: flags → one UpdateJob call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from jobstatus_grpc import errors
from jobstatus_grpc.cli import options, output, parsers
from jobstatus_grpc.cli.connection import connected
from jobstatus_grpc.cli.options import flag
from jobstatus_grpc.cli.target import Connection
from jobstatus_grpc.job import JobError, JobState, limits

if TYPE_CHECKING:
    from jobstatus_grpc.client import JobStatusClient

ATTEMPT = parsers.count(limits.MAX_INT32)

CLEARABLE = {
    "reason": "reason",
    "reports-progress": "reports_progress",
    "progress": "progress",
    "eta": "estimated_completion",
    "error": "error",
    "heartbeat-timeout": "heartbeat_timeout_seconds",
    "label": "labels",
    "result": "result",
    "trace-parent": "trace_parent",
}
"""The values of --clear, named as the flags that set the fields → the client's argument names."""


def _field_to_clear(value: str) -> str:
    field = CLEARABLE.get(value.replace("_", "-"))
    if field is None:
        raise click.BadParameter(f"{value!r} cannot be cleared; these can: {', '.join(CLEARABLE)}")
    return field


@click.command()
@options.job_id
@options.beside_flag("percent", "PERCENT", "progress", type=parsers.percent)
@options.state("The new state, such as succeeded, failed or retrying.")
@flag("--claim", "Begin the next attempt: sets the state in_progress; refused if another worker was faster.")
@options.progress
@flag("--reports-progress", "Announce that the job will report progress.", default=None)
@flag("--reason TEXT", "Why the job is in this state.")
@options.eta
@flag("--error --error-message TEXT", "What went wrong.", to="error_message")
@flag("--error-code CODE", "A google.rpc.Code, such as UNAVAILABLE or 14.", type=parsers.error_code)
@flag("--error-reason TEXT", "What went wrong, for programs, such as OUT_OF_MEMORY.")
@options.heartbeat_timeout()
@options.labels("Replaces all labels. May be repeated.")
@flag("--result JSON", "Replaces the result: a JSON object.", type=parsers.json_object)
@flag("--trace-parent TEXT", "The trace that the job belongs to from now on: a W3C traceparent.")
@flag(
    "--clear FIELD",
    f"Clear a field: {', '.join(CLEARABLE)}. May be repeated.",
    to="cleared",
    type=_field_to_clear,
    multiple=True,
)
@flag(
    "--attempt N",
    "Refuse the call unless this is the job's attempt, or with --claim the next one.",
    type=ATTEMPT,
    default=0,
)
@options.expected_revision
@flag("--allow-missing", "Create the job first if it does not exist.")
@flag("--name TEXT", "With --allow-missing: the name of the created job.", default="")
@options.parent("With --allow-missing: the parent of the created job.")
@options.request_id
@flag("-q --quiet", "Print nothing.")
@options.as_json
@connected
@click.pass_context
def update(
    ctx: click.Context,
    /,
    *,
    connection: Connection,
    id: str,
    claim: bool,
    cleared: tuple[str, ...],
    attempt: int,
    request_id: str,
    quiet: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Update a job, and print it as stored.

    Only the given fields change. Without any flag it is a heartbeat.
    """
    how = {name: given.pop(name) for name in ("expected_revision", "allow_missing", "name", "parent_id")}
    changes = _changes(given, cleared)
    # `jobstatus run` sets JOBSTATUS_ATTEMPT for its own job; its command may update others, or claim.
    is_variable = ctx.get_parameter_source("attempt") is ParameterSource.ENVIRONMENT
    if is_variable and (claim or os.environ.get("JOBSTATUS_JOB_ID", id) != id):
        attempt = 0
    with connection.open() as client:
        if claim:
            if changes.setdefault("state", JobState.IN_PROGRESS) is not JobState.IN_PROGRESS:
                raise click.UsageError("--claim sets the state in_progress; leave --state out.")
            attempt = attempt or _next_attempt(client, id, allow_missing=how["allow_missing"])
        job = client.update(id, **changes, **how, attempt=attempt, request_id=request_id or None)
    if not quiet:
        output.show(job, as_json=as_json)


def _changes(given: dict[str, Any], cleared: tuple[str, ...]) -> dict[str, Any]:
    """Return the changes as the client's arguments: None clears a field; a field that is left out stays unchanged."""
    error = _error(given.pop("error_message"), given.pop("error_code"), given.pop("error_reason"))
    labels = dict(given.pop("labels"))
    heartbeat_timeout: timedelta | None = given.pop("heartbeat_timeout")
    fields: Mapping[str, Any] = {
        **given,
        "error": error,
        "labels": labels or None,
        "heartbeat_timeout_seconds": heartbeat_timeout.total_seconds() if heartbeat_timeout else None,
    }
    changes = {name: value for name, value in fields.items() if value is not None}
    both = [flag_name for flag_name, field in CLEARABLE.items() if field in changes and field in cleared]
    if both:
        raise click.UsageError(f"--clear {both[0]} contradicts the flag that sets it.")
    return {**changes, **dict.fromkeys(cleared)}


def _error(message: str | None, code: int | None, reason: str | None) -> JobError | None:
    if message is None and code is None and reason is None:
        return None
    return JobError(code or limits.UNKNOWN_CODE, message or "", reason or "")


def _next_attempt(client: JobStatusClient, job_id: str, *, allow_missing: bool) -> int:
    """Return the number of the next attempt; another worker may still claim it first."""
    try:
        return client.get(job_id).attempt + 1
    except errors.JobNotFoundError:
        if not allow_missing:
            raise
        return 1
