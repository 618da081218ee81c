"""How a job is shown: as lines for people, or as JSON for programs.

The JSON is the canonical one of JobStatus, as grpcurl and Connect print it: lowerCamelCase names, enums by name,
int64 as strings, times in RFC 3339. It is one line a job, in the order of the field numbers, and every field is in it
but messages and `progress` where they are unset: a script may rely on `.done`, `.attempt` and `.reason`.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import click

from jobstatus_grpc.cli import values
from jobstatus_grpc.cli.text import one_line

if TYPE_CHECKING:
    from jobstatus_grpc.record import Job, JobError


def show(job: Job, *, as_json: bool) -> None:
    """Print `job`, for programs or for people."""
    click.echo(to_json(job) if as_json else summary(job))


def to_json(job: Job) -> str:
    """Return one line of JSON."""
    from google.protobuf.json_format import MessageToDict
    from jobstatus.v1 import job_status_pb2 as pb

    from jobstatus_grpc.wire import convert

    message = pb.JobStatus()
    convert.job_to_wire(job, message)
    fields: dict[str, Any] = MessageToDict(message, always_print_fields_with_no_presence=True)
    names = [field.json_name for field in pb.JobStatus.DESCRIPTOR.fields]
    return json.dumps({name: fields[name] for name in names if name in fields}, ensure_ascii=False)


def summary(job: Job) -> str:
    """Return what is known of `job`, a field a line; what is unset is left out."""
    rows = {
        "id": job.id,
        "name": job.name,
        "state": state_words(job),
        "progress": percent(job.progress) if job.progress is not None else "not yet" if job.has_progress else "",
        "reason": job.reason,
        "error": error_words(job.error) if job.error else "",
        "labels": " ".join(f"{key}={value}" for key, value in sorted(job.labels.items())),
        "parent": job.parent_id,
        "created": _instant(job.created_at),
        "started": _instant(job.started_at),
        "updated": _instant(job.updated_at),
        "finished": _instant(job.finished_at),
        "estimated": _instant(job.estimated_completion),
        "projected": _instant(job.projected_completion),
        "expires": _instant(job.expires_at),
        "heartbeat": values.spell(job.heartbeat_timeout) if job.heartbeat_timeout else "",
        "revision": str(job.revision),
        "result": json.dumps(job.result, ensure_ascii=False) if job.result is not None else "",
    }
    return "\n".join(f"{name:<10} {one_line(value)}" for name, value in rows.items() if value)


def line(job: Job) -> str:
    """Return the news of `job` in one line: when, which, state, percent, why."""
    parts = [
        _instant(job.updated_at),
        job.id,
        job.name,
        state_words(job),
        percent(job.progress) if job.progress is not None else "",
        job.reason,
        f"error: {error_words(job.error)}" if job.error else "",
    ]
    return "  ".join(part for part in map(one_line, parts) if part)


def state_words(job: Job) -> str:
    """Return the state and what is special about it: `in_progress (attempt 2, stalled)`."""
    special = notes(job)
    return f"{job.state.word} ({special})" if special else job.state.word


def notes(job: Job) -> str:
    """Return what is special about the job's state: `attempt 2, stalled`."""
    special = [
        f"attempt {job.attempt}" if job.attempt > 1 else "",
        "cancel requested" if job.cancel_requested and not job.done else "",
        "stalled" if job.stalled else "",
    ]
    return ", ".join(note for note in special if note)


def error_words(error: JobError) -> str:
    """Return what went wrong: `exit code 3 (UNKNOWN, EXIT_CODE_3)`."""
    from google.rpc.code_pb2 import Code

    code = Code.Name(error.code) if error.code in Code.values() else str(error.code)
    words = ", ".join(word for word in (code, error.reason) if word)
    return f"{error.message} ({words})" if error.message else words


def percent(value: float) -> str:
    """Return `42%` or `42.5%`; what is not yet 100 is not shown as 100."""
    tenths = int(value * 10) / 10
    return f"{tenths:g}%"


def remaining(job: Job) -> timedelta | None:
    """Return how long `job` will still take, by its worker's estimate, else by its pace; None where nobody knows."""
    if job.done:
        return None
    end = job.estimated_completion or job.projected_completion
    return max(end - datetime.now(timezone.utc), timedelta(0)) if end else None


def _instant(value: datetime | None) -> str:
    return f"{value:%Y-%m-%dT%H:%M:%SZ}" if value else ""
