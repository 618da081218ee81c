"""JobFilter ⇄ protobuf."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone

from google.protobuf import timestamp_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import limits
from jobstatus_grpc.errors import FieldViolation
from jobstatus_grpc.job_filter import JobFilter
from jobstatus_grpc.limits import Violations
from jobstatus_grpc.state import JobState
from jobstatus_grpc.wire import convert

_MICROSECOND = timedelta(microseconds=1)
_LAST_MICROSECOND = datetime.max.replace(tzinfo=timezone.utc)
_STATE_WORDS = ", ".join(state.name for state in JobState)


def filter_from_wire(message: pb.JobFilter, violations: Violations) -> JobFilter:
    """Return the filter, and add what is wrong with it; values that are wrong are not in it."""
    _check_values(message.ids, limits.MAX_FILTER_IDS, limits.check_id, "filter.ids", violations)
    _check_values(message.names, limits.MAX_FILTER_NAMES, _check_name, "filter.names", violations)
    _check_values(message.states, limits.MAX_FILTER_STATES, _check_state, "filter.states", violations)
    _check_name(message.name_prefix, "filter.name_prefix", violations)
    labels = dict(itertools.islice(message.labels.items(), limits.MAX_LABELS + 1))
    limits.check_labels(labels, "filter.labels", violations)
    if message.parent_id:
        limits.check_id(message.parent_id, "filter.parent_id", violations)
    has_created_after, has_created_before = message.HasField("created_after"), message.HasField("created_before")
    return JobFilter(
        ids=message.ids[: limits.MAX_FILTER_IDS],
        states=_states(message.states[: limits.MAX_FILTER_STATES]),
        names=message.names[: limits.MAX_FILTER_NAMES],
        name_prefix=message.name_prefix,
        labels=labels,
        parent_id=message.parent_id,
        created_after=_bound(message.created_after, "filter.created_after", violations) if has_created_after else None,
        created_before=(
            _bound(message.created_before, "filter.created_before", violations) if has_created_before else None
        ),
        done=message.done if message.HasField("done") else None,
        stalled=message.stalled if message.HasField("stalled") else None,
    )


def filter_to_wire(job_filter: JobFilter) -> pb.JobFilter:
    """Return `job_filter` as a message."""
    message = pb.JobFilter(
        ids=sorted(job_filter.ids),
        states=sorted(int(state) for state in job_filter.states),  # type: ignore[misc]  # the numbers are the enum's
        names=sorted(job_filter.names),
        name_prefix=job_filter.name_prefix,
        labels=job_filter.labels,
        parent_id=job_filter.parent_id,
        done=job_filter.done,
        stalled=job_filter.stalled,
    )
    if job_filter.created_after is not None:
        convert.instant_to_wire(job_filter.created_after, message.created_after)
    if job_filter.created_before is not None:
        convert.instant_to_wire(job_filter.created_before, message.created_before)
    return message


def _check_values(
    values: Sequence[str] | Sequence[int],
    max_values: int,
    check: Callable[..., None],
    field: str,
    violations: Violations,
) -> None:
    """Add a violation for the first value that is wrong, and one where there are too many."""
    if len(values) > max_values:
        violations.append(FieldViolation(field, f"must be at most {max_values} values, are {len(values)}"))
    for number, value in enumerate(values[:max_values], start=1):
        found: Violations = []
        check(value, field, found)
        if found:
            violations.append(FieldViolation(field, f"{found[0].description}; value {number} is not"))
            return


def _check_name(value: str, field: str, violations: Violations) -> None:
    limits.check_text(value, limits.MAX_NAME_BYTES, field, violations)


def _check_state(value: int, field: str, violations: Violations) -> None:
    if not isinstance(convert.to_state(value), JobState):
        violations.append(FieldViolation(field, f"must be one of {_STATE_WORDS}"))


def _states(numbers: Sequence[int]) -> list[JobState]:
    states = (convert.to_state(number) for number in numbers)
    return [state for state in states if isinstance(state, JobState)]


def _bound(message: timestamp_pb2.Timestamp, field: str, violations: Violations) -> datetime | None:
    """Return the first whole microsecond from the instant on: jobs are created at such, and are compared with it."""
    try:
        instant = convert.instant_from_wire(message)
        # Java's greatest Timestamp, by which callers say "ever", lies within the last one there is.
        return instant + _MICROSECOND if message.nanos % 1000 and instant < _LAST_MICROSECOND else instant
    except (ValueError, OverflowError):
        violations.append(FieldViolation(field, "must be in the years 1 to 9999, with nanos of 0 to 999,999,999"))
        return None
