"""How a job is printed: as lines for people, or as JSON for programs.

The JSON is protobuf's canonical JSON of JobStatus, as grpcurl and Connect print it: lowerCamelCase names, enums by
name, int64 as strings, times in RFC 3339. It is one line per job, in the order of the field numbers, with every field
except unset messages and an unset `progress`: a script may rely on `.done`, `.attempt` and `.reason`. Transitions and
identities are printed in the same way.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import click

from jobstatus_grpc.cli import parsers
from jobstatus_grpc.cli.text import one_line
from jobstatus_grpc.job import JobState

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from jobstatus_grpc.auth import Identity
    from jobstatus_grpc.job import Job, JobError, Transition


def show(job: Job, *, as_json: bool) -> None:
    """Print `job` as JSON or as a summary."""
    click.echo(to_json(job) if as_json else summary(job))


def to_json(job: Job) -> str:
    """Return `job` as one line of JSON."""
    return in_json(to_object(job))


def to_object(job: Job) -> dict[str, Any]:
    """Return the JSON object of `job`."""
    from jobstatus.v1 import job_status_pb2 as pb

    from jobstatus_grpc.wire import convert

    message = pb.JobStatus()
    convert.job_to_wire(job, message)
    return _to_object(message)


def transition_to_json(transition: Transition) -> str:
    """Return `transition` as one line of JSON."""
    from jobstatus_grpc.wire import convert

    return in_json(_to_object(convert.transition_to_wire(transition)))


def identity_to_json(identity: Identity) -> str:
    """Return the identity of a caller as one line of JSON."""
    from jobstatus_grpc.wire import convert

    return in_json(_to_object(convert.identity_to_wire(identity)))


def in_json(value: dict[str, Any]) -> str:
    """Return `value` as one line of JSON."""
    return json.dumps(value, ensure_ascii=False)


def _to_object(message: Message) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    fields: dict[str, Any] = MessageToDict(message, always_print_fields_with_no_presence=True)
    names = [field.json_name for field in message.DESCRIPTOR.fields]
    return {name: fields[name] for name in names if name in fields}


def summary(job: Job) -> str:
    """Return the fields of `job` that are set, one per line."""
    rows = {
        "id": job.id,
        "name": job.name,
        "state": state_words(job),
        "attempt": str(job.attempt) if job.attempt else "",
        "progress": _progress_words(job),
        "reason": job.reason,
        "error": error_words(job.error) if job.error else "",
        "cancel": job.cancel_reason,
        "labels": " ".join(f"{key}={value}" for key, value in sorted(job.labels.items())),
        "parent": job.parent_id,
        "trace": job.trace_parent,
        "children": children_words(job),
        "created": instant(job.created_at),
        "started": instant(job.started_at),
        "updated": instant(job.updated_at),
        "finished": instant(job.finished_at),
        "estimated": instant(job.estimated_completion),
        "projected": instant(job.projected_completion),
        "expires": instant(job.expires_at),
        "heartbeat": instant(job.last_heartbeat_at),
        "stalls": _stall_words(job),
        "revision": str(job.revision),
        "result": json.dumps(job.result, ensure_ascii=False) if job.result is not None else "",
    }
    return "\n".join(f"{name:<10} {one_line(value)}" for name, value in rows.items() if value)


def _progress_words(job: Job) -> str:
    if job.progress is not None:
        return percent(job.progress)
    return "not yet" if job.reports_progress and not job.done else ""


def _stall_words(job: Job) -> str:
    if job.heartbeat_timeout is None or job.done:
        return ""
    return f"after {parsers.spell(job.heartbeat_timeout)} without an update"


def line(job: Job) -> str:
    """Return `job` as one line: time of the last change, id, name, state, percent, reason, error, children."""
    parts = [
        instant(job.updated_at),
        job.id,
        job.name,
        state_words(job),
        percent(job.progress) if job.progress is not None else "",
        job.reason,
        f"error: {error_words(job.error)}" if job.error else "",
        f"children: {children_words(job)}" if job.children else "",
    ]
    return "  ".join(part for part in map(one_line, parts) if part)


def record(*fields: str) -> str:
    """Return fields as one line, separated by tabs; an empty field keeps its place."""
    return "\t".join(map(one_line, fields))


def job_record(job: Job) -> str:
    """Return the record of `job`: id, name, state, percent, time of creation, error message or reason."""
    progress = percent(job.progress) if job.progress is not None else ""
    return record(job.id, job.name, state_words(job), progress, instant(job.created_at), why(job))


def state_words(job: Job) -> str:
    """Return the state and its notes: `in_progress (attempt 2, stalled)`."""
    special = notes(job)
    return f"{job.state.word} ({special})" if special else job.state.word


def notes(job: Job) -> str:
    """Return notes on the state that apply: `attempt 2, cancel requested, stalled`."""
    applicable = [
        f"attempt {job.attempt}" if job.attempt > 1 else "",
        "cancel requested" if job.cancel_requested and not job.done else "",
        "stalled" if job.stalled else "",
    ]
    return ", ".join(note for note in applicable if note)


def children_words(job: Job) -> str:
    """Return the number of children by state, and their mean progress: `3 pending, 1 succeeded (25%)`."""
    if not job.children:
        return ""
    counts = ", ".join(
        f"{job.children[word]} {word}" for word in [state.word for state in JobState] if word in job.children
    )
    return f"{counts} ({percent(job.children_progress or 0.0)})"


def why(job: Job) -> str:
    """Return the error's message, or else the reason."""
    return job.error.message if job.error and job.error.message else job.reason


def error_words(error: JobError) -> str:
    """Return message, code and reason: `exit code 3 (UNKNOWN, EXIT_CODE_3)`."""
    from google.rpc.code_pb2 import Code

    code = Code.Name(error.code) if error.code in Code.values() else str(error.code)
    words = ", ".join(word for word in (code, error.reason) if word)
    return f"{error.message} ({words})" if error.message else words


def percent(value: float) -> str:
    """Return `42%` or `42.5%`, rounded down: less than 100 is never printed as 100."""
    tenths = int(value * 10) / 10
    return f"{tenths:g}%"


def remaining(job: Job, now: datetime | None = None) -> timedelta | None:
    """Return the remaining time by the worker's estimate, or else projected from the progress; None if unknown."""
    if job.done:
        return None
    end = job.estimated_completion or job.projected_completion
    return max(end - (now or datetime.now(timezone.utc)), timedelta(0)) if end else None


def age(job: Job) -> str:
    """Return how long ago `job` was created, in its largest unit: `3m`, `12d`."""
    seconds = max(int((datetime.now(timezone.utc) - job.created_at).total_seconds()), 0)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def instant(value: datetime | None) -> str:
    """Return `value` in RFC 3339, to the second; empty if None."""
    return f"{value:%Y-%m-%dT%H:%M:%SZ}" if value else ""
