"""The limits of requests: one table, and the checks that read it. Sizes are UTF-8 bytes unless named otherwise."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from jobstatus_grpc.errors import FieldViolation

MAX_ID_BYTES = 128
MAX_NAME_BYTES = 256
MAX_REASON_BYTES = 4096
MAX_ERROR_MESSAGE_BYTES = 4096
MAX_ERROR_REASON_BYTES = 128
MAX_LABELS = 64
MAX_LABEL_KEY_BYTES = 63
MAX_LABEL_VALUE_BYTES = 256
MAX_RESULT_BYTES = 64 * 1024
MAX_RESULT_DEPTH = 32
MAX_REQUEST_ID_BYTES = 64
MAX_BATCH_UPDATES = 500
MAX_MASK_PATHS = 100
MAX_PAGE_SIZE = 1000
MAX_FILTER_IDS = 1000
MAX_FILTER_NAMES = 100
MAX_FILTER_STATES = 100
MAX_REQUEST_BYTES = 4 * 1024 * 1024
MAX_RESPONSE_BYTES = 1024 * 1024
MAX_INT32 = 2**31 - 1
MIN_HEARTBEAT_TIMEOUT = timedelta(seconds=1)
MAX_HEARTBEAT_TIMEOUT = timedelta(days=7)
MIN_HEARTBEAT_INTERVAL = timedelta(seconds=1)
MAX_WATCH_INTERVAL = timedelta(days=1)
REQUEST_IDS_KEPT = 16
TRANSITIONS_KEPT = 1000
MAX_ERROR_CODE = 16

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Unicode category Cc: C0, DEL and C1. Texts for people may hold newlines and tabs.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_CONTROL_BUT_WHITESPACE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Violations = list[FieldViolation]


def check_id(value: str, field: str, violations: Violations) -> None:
    """Add a violation unless `value` can be a job's id."""
    if not _ID.fullmatch(value):
        text = "is required: " if not value else "must be "
        violations.append(FieldViolation(field, f"{text}1 to {MAX_ID_BYTES} characters of A-Z a-z 0-9 . _ : -"))


def check_text(value: str, max_bytes: int, field: str, violations: Violations, *, multiline: bool = False) -> None:
    """Add a violation unless `value` is at most `max_bytes` long and free of control characters.

    With `multiline`, newlines and tabs are allowed.
    """
    # A character is at most four bytes: most texts need no encoding to be measured.
    if len(value) * 4 > max_bytes and len(value.encode("utf-8", "surrogatepass")) > max_bytes:
        violations.append(FieldViolation(field, f"must be at most {max_bytes} bytes of UTF-8"))
    # Such texts are all printable, but for those that the patterns look for; isprintable() is much the faster.
    if not value.isprintable() and (_CONTROL_BUT_WHITESPACE if multiline else _CONTROL).search(value):
        allowed = " other than newline and tab" if multiline else ""
        violations.append(FieldViolation(field, f"must hold no control characters{allowed}"))


def check_request_id(value: str, violations: Violations) -> None:
    """Add a violation unless `value` can be a request_id; empty is none."""
    check_text(value, MAX_REQUEST_ID_BYTES, "request_id", violations)


def check_progress(value: float, field: str, violations: Violations) -> None:
    """Add a violation unless `value` is a percentage; NaN and infinities are none."""
    if not 0.0 <= value <= 100.0:
        violations.append(FieldViolation(field, f"must be a number from 0 to 100, is {value}"))


def check_labels(labels: Mapping[str, str], field: str, violations: Violations) -> None:
    """Add a violation for each label that is too large, and one where there are too many."""
    if len(labels) > MAX_LABELS:
        violations.append(FieldViolation(field, f"must be at most {MAX_LABELS} labels, are {len(labels)}"))
    for key, value in itertools.islice(labels.items(), MAX_LABELS):
        path = f"{field}[{key[:MAX_LABEL_KEY_BYTES]!r}]"
        if not key:
            violations.append(FieldViolation(path, f"a key must have 1 to {MAX_LABEL_KEY_BYTES} bytes"))
        check_text(key, MAX_LABEL_KEY_BYTES, f"{path} key", violations)
        check_text(value, MAX_LABEL_VALUE_BYTES, path, violations)


def check_duration(
    value: timedelta, shortest: timedelta, longest: timedelta, field: str, violations: Violations
) -> None:
    """Add a violation unless `value` is between the two, both included."""
    if not shortest <= value <= longest:
        bounds = f"{shortest.total_seconds():g} s to {longest.total_seconds():g} s"
        violations.append(FieldViolation(field, f"must be {bounds}, is {value.total_seconds():g} s"))


def check_result(value: Mapping[str, Any], field: str, violations: Violations) -> None:
    """Add a violation unless `value` holds finite numbers only, nested at most 32 deep. Its size is the wire's."""
    deeper: list[tuple[Any, int]] = [(value, 1)]
    while deeper:
        item, depth = deeper.pop()
        if isinstance(item, float) and not math.isfinite(item):
            violations.append(FieldViolation(field, "must hold finite numbers only"))
            return
        if isinstance(item, (Mapping, list)):
            if depth > MAX_RESULT_DEPTH:
                violations.append(FieldViolation(field, f"must be at most {MAX_RESULT_DEPTH} deep"))
                return
            children = item.values() if isinstance(item, Mapping) else item
            deeper.extend((child, depth + 1) for child in children)
