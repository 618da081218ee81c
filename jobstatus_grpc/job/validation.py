"""Checks of a command's values against `limits`, before any job is read.

Each check adds to a list of violations, so that a caller gets all of them at once. First whole commands, then the
fields of a job, then single values, which the filter and the watches use too.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeAlias

from jobstatus_grpc.errors import FieldViolation
from jobstatus_grpc.job import limits
from jobstatus_grpc.job.commands import (
    WRITABLE_FIELDS,
    Cancel,
    Create,
    Delete,
    Update,
)
from jobstatus_grpc.job.model import (
    CREATION_STATES,
    ERROR_STATES,
    JobError,
    JobState,
)

Violations: TypeAlias = list[FieldViolation]

STATE_NAMES = ", ".join(state.name for state in JobState)
_WRITABLE_NAMES = ", ".join(sorted(WRITABLE_FIELDS))
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACE_PARENT = re.compile("00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
# Unicode category Cc: C0, DEL and C1.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_CONTROL_BUT_WHITESPACE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def check_create(command: Create, violations: Violations) -> None:
    """Add what is wrong with `command`; its id may be empty."""
    if command.id:
        check_id(command.id, "job.id", violations)
    if command.request is not None:
        check_request_id(command.request.value, violations)
    if command.state not in CREATION_STATES:
        violations.append(FieldViolation("job.state", "a job is created PENDING (the default) or IN_PROGRESS"))
    _check_identity(command.name, command.parent_id, violations)
    check_labels(command.labels, "job.labels", violations)
    for name in ("reason", "progress", "heartbeat_timeout", "result", "trace_parent"):
        _CHECKS[name](getattr(command, name), violations)


def check_update(command: Update, violations: Violations) -> None:
    """Add what is wrong with `command`; a change of a field that is not writable is a violation too."""
    check_id(command.id, "job.id", violations)
    if command.request is not None:
        check_request_id(command.request.value, violations)
    if command.attempt < 0:
        violations.append(FieldViolation("attempt", "must be 0 (not fenced) or above"))
    if command.expected_revision < 0:
        violations.append(FieldViolation("expected_revision", "must be 0 (any) or above"))
    if command.allow_missing:
        _check_identity(command.name, command.parent_id, violations)
        if command.labels_if_missing != command.changes.get("labels"):
            check_labels(command.labels_if_missing, "job.labels", violations)
    for name, value in command.changes.items():
        check = _CHECKS.get(name)
        if check is not None:
            check(value, violations)
        elif name not in WRITABLE_FIELDS:
            what = f"{name[:100]!r} cannot be written; writable are: {_WRITABLE_NAMES}"
            violations.append(FieldViolation("update_mask", what))
    if command.changes.get("error") is not None:
        state = command.changes.get("state")
        if isinstance(state, JobState) and state not in ERROR_STATES:
            allowed = "is allowed in RETRYING, ABORTED, FAILED and CANCELLED only"
            violations.append(FieldViolation("job.error", allowed))


def check_cancel(command: Cancel, violations: Violations) -> None:
    """Add what is wrong with `command`."""
    check_id(command.id, "id", violations)
    check_text(command.reason, limits.MAX_REASON_BYTES, "reason", violations, multiline=True)
    if command.request is not None:
        check_request_id(command.request.value, violations)


def check_delete(command: Delete, violations: Violations) -> None:
    """Add what is wrong with `command`."""
    check_id(command.id, "id", violations)
    if command.expected_revision < 0:
        violations.append(FieldViolation("expected_revision", "must be 0 (any) or above"))


def _check_identity(name: str, parent_id: str, violations: Violations) -> None:
    check_text(name, limits.MAX_NAME_BYTES, "job.name", violations)
    if parent_id:
        check_id(parent_id, "job.parent_id", violations)


def _check_state(value: Any, violations: Violations) -> None:
    if not isinstance(value, JobState):
        was = f", is {value}" if value else ""
        violations.append(FieldViolation("job.state", f"must be one of {STATE_NAMES}{was}"))


def _check_reason(value: str, violations: Violations) -> None:
    check_text(value, limits.MAX_REASON_BYTES, "job.reason", violations, multiline=True)


def _check_progress(value: float | None, violations: Violations) -> None:
    if value is not None:
        check_progress(value, "job.progress", violations)


def _check_error(value: JobError | None, violations: Violations) -> None:
    if value is None:
        return
    if not 1 <= value.code <= limits.MAX_ERROR_CODE:
        what = f"must be a google.rpc.Code from 1 to {limits.MAX_ERROR_CODE}, or 0 for UNKNOWN, is {value.code}"
        violations.append(FieldViolation("job.error.code", what))
    longest = limits.MAX_ERROR_MESSAGE_BYTES
    check_text(value.message, longest, "job.error.message", violations, multiline=True)
    check_text(value.reason, limits.MAX_ERROR_REASON_BYTES, "job.error.reason", violations)


def _check_heartbeat_timeout(value: Any, violations: Violations) -> None:
    if value is not None:
        shortest, longest = limits.MIN_HEARTBEAT_TIMEOUT, limits.MAX_HEARTBEAT_TIMEOUT
        check_duration(value, shortest, longest, "job.heartbeat_timeout", violations)


def _check_labels(value: Mapping[str, str], violations: Violations) -> None:
    check_labels(value, "job.labels", violations)


def _check_result(value: Mapping[str, Any] | None, violations: Violations) -> None:
    if value is not None:
        check_result(value, "job.result", violations)


def _check_trace_parent(value: str, violations: Violations) -> None:
    if value and not is_trace_parent(value):
        what = "must be a W3C traceparent, such as 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        violations.append(FieldViolation("job.trace_parent", what))


_CHECKS: Mapping[str, Callable[[Any, Violations], None]] = {
    "state": _check_state,
    "reason": _check_reason,
    "progress": _check_progress,
    "error": _check_error,
    "heartbeat_timeout": _check_heartbeat_timeout,
    "labels": _check_labels,
    "result": _check_result,
    "trace_parent": _check_trace_parent,
}


def is_trace_parent(value: str) -> bool:
    """Return whether `value` is a W3C traceparent of version 00 whose ids are not all zeros."""
    return _TRACE_PARENT.fullmatch(value) is not None


def check_id(value: str, field: str, violations: Violations) -> None:
    """Add a violation unless `value` is a valid job id."""
    if not _ID.fullmatch(value):
        text = "is required: " if not value else "must be "
        violations.append(FieldViolation(field, f"{text}1 to {limits.MAX_ID_BYTES} characters of A-Z a-z 0-9 . _ : -"))


def check_text(value: str, max_bytes: int, field: str, violations: Violations, *, multiline: bool = False) -> None:
    """Add a violation unless `value` has at most `max_bytes` and no control characters.

    With `multiline`, newlines and tabs are allowed.
    """
    # A character has at most four bytes, so most texts need not be encoded. Row `batch`, with the shortcut below: 2 %.
    if len(value) * 4 > max_bytes and len(value.encode("utf-8", "surrogatepass")) > max_bytes:
        violations.append(FieldViolation(field, f"must be at most {max_bytes} bytes of UTF-8"))
    # Most texts are printable, and isprintable() is much faster than a pattern.
    if not value.isprintable() and (_CONTROL_BUT_WHITESPACE if multiline else _CONTROL).search(value):
        allowed = " other than newline and tab" if multiline else ""
        violations.append(FieldViolation(field, f"must hold no control characters{allowed}"))


# What terminals take as commands: CSI and OSC sequences, then the short ones.
_ESCAPES = re.compile("\x1b(?:\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\)?|[ -/]*[0-~])")


def without_escapes(text: str) -> str:
    """Return `text` without what colours it and moves the cursor."""
    return _ESCAPES.sub("", text)


def clean_text(text: str, max_bytes: int, *, multiline: bool = False) -> str:
    """Return `text` as `check_text` accepts it: without escape sequences, and cut after `max_bytes`.

    CRLF becomes a newline, any other control character a space, and a lone surrogate a question mark.
    """
    if not text.isprintable():
        text = without_escapes(text).replace("\r\n", "\n")
        text = (_CONTROL_BUT_WHITESPACE if multiline else _CONTROL).sub(" ", text)
    if len(text) * 4 <= max_bytes and text.isprintable():
        return text
    return text.encode("utf-8", "replace")[:max_bytes].decode("utf-8", "ignore")


def check_request_id(value: str, violations: Violations) -> None:
    """Add a violation unless `value` is a valid request_id, or empty: none."""
    check_text(value, limits.MAX_REQUEST_ID_BYTES, "request_id", violations)


def check_progress(value: float, field: str, violations: Violations) -> None:
    """Add a violation unless `value` is a percentage; NaN and infinities are violations."""
    if not 0.0 <= value <= 100.0:
        violations.append(FieldViolation(field, f"must be a number from 0 to 100, is {value}"))


def check_labels(labels: Mapping[str, str], field: str, violations: Violations) -> None:
    """Add a violation for each label that is too large, and one if there are too many."""
    if len(labels) > limits.MAX_LABELS:
        violations.append(FieldViolation(field, f"must be at most {limits.MAX_LABELS} labels, are {len(labels)}"))
    for key, value in itertools.islice(labels.items(), limits.MAX_LABELS):
        path = f"{field}[{key[: limits.MAX_LABEL_KEY_BYTES]!r}]"
        if not key:
            violations.append(FieldViolation(path, f"a key must have 1 to {limits.MAX_LABEL_KEY_BYTES} bytes"))
        check_text(key, limits.MAX_LABEL_KEY_BYTES, f"{path} key", violations)
        check_text(value, limits.MAX_LABEL_VALUE_BYTES, path, violations)


def check_duration(
    value: timedelta, shortest: timedelta, longest: timedelta, field: str, violations: Violations
) -> None:
    """Add a violation unless `value` is between the bounds, both included."""
    if not shortest <= value <= longest:
        bounds = f"{shortest.total_seconds():g} s to {longest.total_seconds():g} s"
        violations.append(FieldViolation(field, f"must be {bounds}, is {value.total_seconds():g} s"))


def check_result(value: Mapping[str, Any], field: str, violations: Violations) -> None:
    """Add a violation unless `value` has finite numbers only and is nested at most 32 deep.

    Its size is checked where its serialised form is read.
    """
    deeper: list[tuple[Any, int]] = [(value, 1)]
    while deeper:
        item, depth = deeper.pop()
        if isinstance(item, float) and not math.isfinite(item):
            violations.append(FieldViolation(field, "must hold finite numbers only"))
            return
        if isinstance(item, (Mapping, list)):
            if depth > limits.MAX_RESULT_DEPTH:
                violations.append(FieldViolation(field, f"must be at most {limits.MAX_RESULT_DEPTH} deep"))
                return
            children = item.values() if isinstance(item, Mapping) else item
            deeper.extend((child, depth + 1) for child in children)
