"""What callers pass, as what the wire can hold; what it cannot hold becomes a violation that names it."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from numbers import Real
from pathlib import PurePath
from typing import Any
from uuid import UUID

from google.protobuf.message import Message
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.errors import FieldViolation, InvalidFieldError
from jobstatus_grpc.job import JobError, limits, validation
from jobstatus_grpc.job.validation import Violations
from jobstatus_grpc.wire import convert

MAX_EXACT_INTEGER = 2**53
"""The largest number up to which a double, JSON's and the wire's only number, holds every integer."""

MAX_VALUES_IN_RESULT = limits.MAX_RESULT_BYTES // 2
"""No result with more values fits: each takes two bytes at least. Bounds the time that a huge one takes to refuse."""

MAX_REPR_LENGTH = 60
"""Characters of a value in a violation: enough to recognise it."""

LONGEST_SECONDS = 365 * 86400.0
"""Limit of all timeouts: gRPC's and the threads' own limits are higher."""


def raise_if_any(violations: Violations) -> None:
    """Raise InvalidFieldError with the violations, if there are any."""
    if violations:
        raise InvalidFieldError(violations=violations)


def describe(value: object) -> str:
    """Return `value` and its type for a message, printable, whatever its repr() does."""
    try:
        text = reprlib.repr(value)  # of a large container it looks at the first few items only
    except Exception:
        text = "a value"
    return f"{_shortened(text)} ({type(value).__name__})"


def printable(value: object) -> str:
    """Return a text for the log as it is, and anything else described."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else describe(value)


def describe_key(key: object) -> str:
    """Return a key for a path."""
    try:
        return _shortened(repr(key))
    except Exception:
        return f"a {type(key).__name__}"


def _shortened(text: str) -> str:
    plain = printable(text)
    return plain if len(plain) <= MAX_REPR_LENGTH else f"{plain[:MAX_REPR_LENGTH]}…"


def text_of(value: object, field: str, violations: Violations) -> str:
    """Return str(value); with a violation, "" if that raises."""
    try:
        return str(value)
    except Exception as error:
        violations.append(FieldViolation(field, f"its str() raises {type(error).__name__}"))
        return ""


def check_text(value: object, argument: str, *others: type) -> None:
    """Raise TypeError or ValueError unless an argument of a client is a text, of one of the other types, or None.

    The message does not repeat it: it may be a token.
    """
    if isinstance(value, str):
        if "\0" in value or not _is_encodable(value):
            raise ValueError(f"{argument} must be valid Unicode without null characters")
    elif value is not None and not isinstance(value, others):
        kind = "a string or a path" if others else "a string"
        raise TypeError(f"{argument} must be {kind}, not {type(value).__name__}")


def check_timeout(value: Any, argument: str) -> None:
    """Raise TypeError or ValueError unless an argument of a client is a positive number of seconds."""
    if not isinstance(value, Real):
        raise TypeError(f"{argument} must be a number of seconds, not {type(value).__name__}")
    if not float(value) > 0:  # also if it is no number
        raise ValueError(f"{argument} must be above 0, is {value}")


def seconds(value: Any, argument: str) -> float:
    """Return `value` as a number of seconds; an infinite one is a year, for gRPC takes it for a deadline in the past.

    Raises:
        InvalidFieldError: it is none.
    """
    try:
        number = float(value)
    except Exception:
        number = math.nan
    if isinstance(value, str) or math.isnan(number):
        raise InvalidFieldError(violations=[FieldViolation(argument, f"must be a number, is {describe(value)}")])
    return min(number, LONGEST_SECONDS)


def integer(value: Any, argument: str) -> int:
    """Return `value` as an int.

    Raises:
        InvalidFieldError: it is none.
    """
    try:
        return operator.index(value)
    except Exception:
        what = f"must be an integer, is {describe(value)}"
        raise InvalidFieldError(violations=[FieldViolation(argument, what)]) from None


def seconds_or_none(value: Any, argument: str) -> float | None:
    """As `seconds`; None stays None."""
    return None if value is None else seconds(value, argument)


_KINDS = {
    "string": "must be a string",
    "double": "must be a number",
    "bool": "must be True or False",
    "int": "must be an integer within its range",
}


def set_field(message: Message, field: str, value: object, violations: Violations, argument: str = "") -> bool:
    """Set a scalar field; return whether it can hold `value`."""
    try:
        setattr(message, field, value)
    except Exception as error:  # also what the value's own __float__ or __index__ raises
        if isinstance(error, UnicodeError) and isinstance(value, str):
            what = "must be valid Unicode, has a lone surrogate"
        else:
            descriptor = message.DESCRIPTOR.fields_by_name[field]
            kinds = {descriptor.CPPTYPE_STRING: "string", descriptor.CPPTYPE_DOUBLE: "double"}
            kind = kinds.get(descriptor.cpp_type, "bool" if descriptor.cpp_type == descriptor.CPPTYPE_BOOL else "int")
            what = f"{_KINDS[kind]}, is {describe(value)}"
        violations.append(FieldViolation(argument or field, what))
        return False
    return True


def set_duration(message: Message, field: str, value: Any, violations: Violations, argument: str) -> bool:
    """Set a Duration to a number of seconds; return whether it can hold it."""
    try:
        duration = convert.duration_to_wire(timedelta(seconds=float(value)))
    except Exception:
        violations.append(FieldViolation(argument, f"must be a number of seconds, is {describe(value)}"))
        return False
    getattr(message, field).CopyFrom(duration)
    return True


def set_heartbeat_timeout(job: pb.JobStatus, value: Any, violations: Violations) -> bool:
    """Set the timeout to a number of seconds; return whether it can hold it."""
    return set_duration(job, "heartbeat_timeout", value, violations, "heartbeat_timeout_seconds")


def set_estimated_completion(job: pb.JobStatus, value: Any, violations: Violations) -> bool:
    """Set the estimate to an aware datetime; return whether it can hold it."""
    try:
        convert.instant_to_wire(value, job.estimated_completion)
    except Exception as error:
        what = str(error) if isinstance(value, datetime) else f"must be an aware datetime, is {describe(value)}"
        violations.append(FieldViolation("estimated_completion", what))
        return False
    return True


def set_labels(job: pb.JobStatus, value: Any, violations: Violations) -> bool:
    """Set the labels that can be sent; return whether there are any, or there were none to set."""
    count = len(violations)
    for key, text in _items(value, "labels", violations):
        path = f"labels[{describe_key(key)}]"
        if not isinstance(key, str):
            violations.append(FieldViolation(path, f"a key must be a string, is {describe(key)}"))
            continue
        if not isinstance(text, str):
            violations.append(FieldViolation(path, f"must be a string, is {describe(text)}"))
            continue
        try:
            job.labels[key] = text
        except Exception:
            violations.append(FieldViolation(path, "must be valid Unicode, has a lone surrogate"))
    return bool(job.labels) or len(violations) == count


def set_error(job: pb.JobStatus, value: Any, violations: Violations) -> bool:
    """Set the error to a JobError, or to a text with the code UNKNOWN; return whether it can hold it."""
    error = JobError(limits.UNKNOWN_CODE, value) if isinstance(value, str) else value
    if not isinstance(error, JobError):
        violations.append(FieldViolation("error", f"must be a JobError or a string, is {describe(value)}"))
        return False
    message = pb.JobError()
    count = len(violations)
    for field in ("code", "message", "reason"):
        set_field(message, field, getattr(error, field), violations, f"error.{field}")
    job.error.CopyFrom(message)
    return len(violations) == count


def set_result(job: pb.JobStatus, value: Any, violations: Violations) -> bool:
    """Set the keys of the result that can be sent; return whether there are any, or there were none to set."""
    count = len(violations)
    plain = plain_result(value, violations)
    if not plain and len(violations) > count:
        return False
    job.result.SetInParent()
    job.result.update(plain)
    if job.result.ByteSize() > limits.MAX_RESULT_BYTES:
        job.ClearField("result")
        violations.append(FieldViolation("result", _TOO_LARGE))
        return False
    return True


_TOO_LARGE = f"must be at most {limits.MAX_RESULT_BYTES} bytes; put a large result behind a URL"


def plain_result(value: Any, violations: Violations) -> dict[str, Any]:
    """Return the keys of a result that JSON can hold, as plain values, with a violation for each other."""
    plain: dict[str, Any] = {}
    walk = _Walk()
    for key, item in _items(value, "result", violations):
        path = f"result[{describe_key(key)}]"
        try:
            plain[_checked_key(key, path)] = walk.plain(item, path, depth=2)
        except _TooLargeError:
            violations.append(FieldViolation("result", _TOO_LARGE))
            return {}
        except _TooDeepError:
            what = f"must be at most {limits.MAX_RESULT_DEPTH} deep, and not circular"
            violations.append(FieldViolation(path, what))
        except _UnsendableError as error:
            violations.append(error.violation)
        except Exception as error:  # raised by the methods of the caller's types
            violations.append(FieldViolation(path, f"cannot be read: {type(error).__name__}"))
    return plain


class _TooLargeError(Exception):
    """There are too many values."""


class _TooDeepError(Exception):
    """A value is nested too deep, or circular."""


class _UnsendableError(Exception):
    """A value that JSON cannot hold."""

    def __init__(self, path: str, description: str) -> None:
        super().__init__()
        self.violation = FieldViolation(path, description)


class _Walk:
    """Makes plain values; counts them, so that a huge or circular result ends early."""

    def __init__(self) -> None:
        self.values = 0

    def plain(self, value: Any, path: str, depth: int) -> Any:
        self.values += 1
        if self.values > MAX_VALUES_IN_RESULT:
            raise _TooLargeError
        if isinstance(value, Enum):
            value = value.value
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return _checked_text(value, path)
        if isinstance(value, int):
            return _checked_integer(int(value), path)
        if isinstance(value, float):
            return _checked_float(float(value), path)
        if isinstance(value, (Mapping, list, tuple)):
            return self._container(value, path, depth)
        if isinstance(value, Decimal):
            return _decimal(value, path)
        if isinstance(value, (datetime, date, time)):
            return value.isoformat()
        if isinstance(value, (PurePath, UUID)):
            return _checked_text(str(value), path)
        return self._scalar_of_a_library(value, path, depth)

    def _container(self, value: Any, path: str, depth: int) -> Any:
        if depth > limits.MAX_RESULT_DEPTH:
            raise _TooDeepError
        if not isinstance(value, Mapping):
            return [self.plain(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
        plain = {}
        for key, item in value.items():
            inner = f"{path}[{describe_key(key)}]"
            plain[_checked_key(key, inner)] = self.plain(item, inner, depth + 1)
        return plain

    def _scalar_of_a_library(self, value: Any, path: str, depth: int) -> Any:
        """Return what `item()` gives: numpy's and other libraries' numbers have no dimensions and this method."""
        if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
            item = value.item()
            if type(item) is type(value):  # numpy's longdouble is its own item
                item = float(value)
            return self.plain(item, path, depth)
        what = "must be None, a bool, number, string, list or mapping"
        raise _UnsendableError(path, f"{what}, is {describe(value)}")


def _items(value: Any, field: str, violations: Violations) -> list[tuple[Any, Any]]:
    if not isinstance(value, Mapping):
        violations.append(FieldViolation(field, f"must be a mapping with strings as keys, is {describe(value)}"))
        return []
    try:
        return list(value.items())
    except Exception as error:  # a mapping of the caller's, or one that another thread changes
        violations.append(FieldViolation(field, f"cannot be read: {type(error).__name__}"))
        return []


def _checked_key(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise _UnsendableError(path, f"a key must be a string, is {describe(key)}")
    return _checked_text(key, path)


def _checked_text(text: str, path: str) -> str:
    if not _is_encodable(text):
        raise _UnsendableError(path, "must be valid Unicode, has a lone surrogate")
    return text


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


def _checked_integer(number: int, path: str) -> int:
    if abs(number) > MAX_EXACT_INTEGER:
        what = "an integer beyond ±2^53 would be rounded: send it as a string"
        raise _UnsendableError(path, what)
    return number


def _checked_float(number: float, path: str) -> float:
    if not math.isfinite(number):
        raise _UnsendableError(path, f"must be a finite number, is {number}")
    return number


def _decimal(value: Decimal, path: str) -> float:
    number = _checked_float(float(value), path)
    if Decimal(repr(number)) != value:
        raise _UnsendableError(path, "has more digits than a double holds: send it as a string")
    return number


def code_of(value: Any) -> int:
    """Return a google.rpc.Code for an error; UNKNOWN for what is none."""
    try:
        code = operator.index(value)
    except Exception:
        return limits.UNKNOWN_CODE
    return code if 1 <= code <= limits.MAX_ERROR_CODE else limits.UNKNOWN_CODE


def leave_out_what_is_refused(job: pb.JobStatus, violations: Violations) -> None:
    """Take out of `job` labels, parent_id and trace_parent that the service would refuse together with all the rest."""
    kept = 0
    for key, value in sorted(job.labels.items()):
        found: Violations = []
        validation.check_labels({key: value}, "labels", found)
        if kept == limits.MAX_LABELS and not found:
            found.append(FieldViolation(f"labels[{describe_key(key)}]", f"must be at most {limits.MAX_LABELS} labels"))
        if found:
            del job.labels[key]
            violations.extend(found)
        else:
            kept += 1
    if job.trace_parent and not validation.is_trace_parent(job.trace_parent):
        violations.append(FieldViolation("trace_parent", f"must be a W3C traceparent, is {describe(job.trace_parent)}"))
        job.ClearField("trace_parent")
    if job.parent_id:
        count = len(violations)
        validation.check_id(job.parent_id, "parent_id", violations)
        if len(violations) > count:
            job.ClearField("parent_id")
