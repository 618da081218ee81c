"""Whether a command's values are within the limits, before any job is read. Every violation is reported at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jobstatus_grpc import limits
from jobstatus_grpc.commands import WRITABLE_FIELDS, Cancel, Create, Delete, Update
from jobstatus_grpc.errors import FieldViolation
from jobstatus_grpc.limits import Violations
from jobstatus_grpc.record import JobError
from jobstatus_grpc.state import CREATION_STATES, ERROR_STATES, JobState

_WRITABLE_WORDS = ", ".join(sorted(WRITABLE_FIELDS))
_STATE_WORDS = ", ".join(state.name for state in JobState)


def check_create(command: Create, violations: Violations) -> None:
    """Add what is wrong with `command`; an empty id is fine, the tracker chooses one."""
    if command.id:
        limits.check_id(command.id, "job.id", violations)
    if command.request is not None:
        limits.check_request_id(command.request.value, violations)
    if command.state not in CREATION_STATES:
        violations.append(FieldViolation("job.state", "a job is created PENDING (the default) or IN_PROGRESS"))
    _check_identity(command.name, command.parent_id, violations)
    limits.check_labels(command.labels, "job.labels", violations)
    for name in ("reason", "progress", "heartbeat_timeout", "result"):
        _CHECKS[name](getattr(command, name), violations)


def check_update(command: Update, violations: Violations) -> None:
    """Add what is wrong with `command`; a name in its changes that is not writable is a violation too."""
    limits.check_id(command.id, "job.id", violations)
    if command.request is not None:
        limits.check_request_id(command.request.value, violations)
    if command.attempt < 0:
        violations.append(FieldViolation("attempt", "must be 0 (not fenced) or above"))
    if command.expected_revision < 0:
        violations.append(FieldViolation("expected_revision", "must be 0 (any) or above"))
    if command.allow_missing:
        _check_identity(command.name, command.parent_id, violations)
        if command.labels_if_missing != command.changes.get("labels"):
            limits.check_labels(command.labels_if_missing, "job.labels", violations)
    for name, value in command.changes.items():
        check = _CHECKS.get(name)
        if check is not None:
            check(value, violations)
        elif name not in WRITABLE_FIELDS:
            what = f"{name[:100]!r} cannot be written; writable are: {_WRITABLE_WORDS}"
            violations.append(FieldViolation("update_mask", what))
    if command.changes.get("error") is not None:
        state = command.changes.get("state")
        if isinstance(state, JobState) and state not in ERROR_STATES:
            allowed = "is allowed in RETRYING, ABORTED, FAILED and CANCELLED only"
            violations.append(FieldViolation("job.error", allowed))


def check_cancel(command: Cancel, violations: Violations) -> None:
    """Add what is wrong with `command`."""
    limits.check_id(command.id, "id", violations)
    limits.check_text(command.reason, limits.MAX_REASON_BYTES, "reason", violations, multiline=True)
    if command.request is not None:
        limits.check_request_id(command.request.value, violations)


def check_delete(command: Delete, violations: Violations) -> None:
    """Add what is wrong with `command`."""
    limits.check_id(command.id, "id", violations)
    if command.expected_revision < 0:
        violations.append(FieldViolation("expected_revision", "must be 0 (any) or above"))


def _check_identity(name: str, parent_id: str, violations: Violations) -> None:
    limits.check_text(name, limits.MAX_NAME_BYTES, "job.name", violations)
    if parent_id:
        limits.check_id(parent_id, "job.parent_id", violations)


def _check_state(value: Any, violations: Violations) -> None:
    if not isinstance(value, JobState):
        was = f", is {value}" if value else ""
        violations.append(FieldViolation("job.state", f"must be one of {_STATE_WORDS}{was}"))


def _check_reason(value: str, violations: Violations) -> None:
    limits.check_text(value, limits.MAX_REASON_BYTES, "job.reason", violations, multiline=True)


def _check_progress(value: float | None, violations: Violations) -> None:
    if value is not None:
        limits.check_progress(value, "job.progress", violations)


def _check_error(value: JobError | None, violations: Violations) -> None:
    if value is None:
        return
    if not 1 <= value.code <= limits.MAX_ERROR_CODE:
        what = f"must be a google.rpc.Code from 1 to {limits.MAX_ERROR_CODE}, or 0 for UNKNOWN, is {value.code}"
        violations.append(FieldViolation("job.error.code", what))
    longest = limits.MAX_ERROR_MESSAGE_BYTES
    limits.check_text(value.message, longest, "job.error.message", violations, multiline=True)
    limits.check_text(value.reason, limits.MAX_ERROR_REASON_BYTES, "job.error.reason", violations)


def _check_heartbeat_timeout(value: Any, violations: Violations) -> None:
    if value is not None:
        shortest, longest = limits.MIN_HEARTBEAT_TIMEOUT, limits.MAX_HEARTBEAT_TIMEOUT
        limits.check_duration(value, shortest, longest, "job.heartbeat_timeout", violations)


def _check_labels(value: Mapping[str, str], violations: Violations) -> None:
    limits.check_labels(value, "job.labels", violations)


def _check_result(value: Mapping[str, Any] | None, violations: Violations) -> None:
    if value is not None:
        limits.check_result(value, "job.result", violations)


_CHECKS: Mapping[str, Callable[[Any, Violations], None]] = {
    "state": _check_state,
    "reason": _check_reason,
    "progress": _check_progress,
    "error": _check_error,
    "heartbeat_timeout": _check_heartbeat_timeout,
    "labels": _check_labels,
    "result": _check_result,
}
