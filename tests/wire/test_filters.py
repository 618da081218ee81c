"""Filters ⇄ protobuf, and every violation of one."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest
from google.protobuf import timestamp_pb2
from hypothesis import given
from hypothesis import strategies as st
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.job import JobFilter, JobState, validation
from jobstatus_grpc.wire.convert import filter_from_wire, filter_to_wire

ids = st.from_regex(r"[A-Za-z0-9._:-]{1,20}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
instants = st.datetimes(timezones=st.just(timezone.utc))
filters = st.builds(
    JobFilter,
    ids=st.frozensets(ids, max_size=3),
    states=st.frozensets(st.sampled_from(JobState)),
    names=st.frozensets(texts, max_size=3),
    name_prefix=texts,
    labels=st.dictionaries(texts.filter(bool), texts, max_size=3),
    parent_id=st.just("") | ids,
    created_after=st.none() | instants,
    created_before=st.none() | instants,
    done=st.none() | st.booleans(),
    stalled=st.none() | st.booleans(),
)

TOO_LARGE = timestamp_pb2.Timestamp(seconds=10**12)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a bad id": ({"ids": ["a", "/"]}, "filter.ids"),
    "an empty id": ({"ids": [""]}, "filter.ids"),
    "1001 ids": ({"ids": [str(number) for number in range(1001)]}, "filter.ids"),
    "101 names": ({"names": [str(number) for number in range(101)]}, "filter.names"),
    "a long name": ({"names": ["x" * 257]}, "filter.names"),
    "a name with a newline": ({"names": ["x\n"]}, "filter.names"),
    "a long prefix": ({"name_prefix": "x" * 257}, "filter.name_prefix"),
    "an unknown state": ({"states": [1, 8]}, "filter.states"),
    "no state": ({"states": [0]}, "filter.states"),
    "101 states": ({"states": [1] * 101}, "filter.states"),
    "65 labels": ({"labels": {str(number): "" for number in range(65)}}, "filter.labels"),
    "an empty label": ({"labels": {"": "x"}}, "filter.labels['']"),
    "a bad parent": ({"parent_id": "/"}, "filter.parent_id"),
    "an instant beyond the years": ({"created_after": TOO_LARGE}, "filter.created_after"),
    "bad nanos": ({"created_before": timestamp_pb2.Timestamp(nanos=-1)}, "filter.created_before"),
    "after all years": (
        {"created_before": timestamp_pb2.Timestamp(seconds=253_402_300_800)},
        "filter.created_before",
    ),
}


def read(message):
    violations: validation.Violations = []
    return filter_from_wire(message, violations), [violation.field for violation in violations]


@given(filters)
def test_a_filter_survives_the_wire(job_filter):
    message = pb.JobFilter.FromString(filter_to_wire(job_filter).SerializeToString())
    assert read(message) == (job_filter, [])


def test_an_unset_filter_is_empty():
    assert read(pb.JobFilter()) == (JobFilter(), [])


@pytest.mark.parametrize("name", BAD)
def test_a_repeated_violation_is_reported_once(name):
    fields, path = BAD[name]
    assert read(pb.JobFilter(**fields))[1] == [path]


def test_all_violations_are_reported_at_once():
    fields = {key: value for values, _ in BAD.values() for key, value in values.items()}
    fields |= {"ids": [*fields["ids"], "/"], "created_after": TOO_LARGE}
    paths = {path for _, path in BAD.values()} - {"filter.labels"}
    assert set(read(pb.JobFilter(**fields))[1]) == paths


def test_as_much_as_is_allowed_is_taken():
    message = pb.JobFilter(
        ids=[f"{number:0128}" for number in range(1000)],
        names=[f"{number:0256}" for number in range(100)],
        labels={f"{number:063}": "x" * 256 for number in range(64)},
        name_prefix="é" * 128,
    )
    assert read(message)[1] == []


def test_a_bound_between_two_microseconds_leaves_out_what_was_before_it():
    instant = timestamp_pb2.Timestamp(seconds=1, nanos=1001)
    job_filter, _ = read(pb.JobFilter(created_after=instant, created_before=instant))
    expected = datetime(1970, 1, 1, 0, 0, 1, 2, tzinfo=timezone.utc)
    assert (job_filter.created_after, job_filter.created_before) == (expected, expected)


def test_the_last_nanosecond_of_all_years_is_a_bound():
    message = pb.JobFilter(created_before=timestamp_pb2.Timestamp(seconds=253_402_300_799, nanos=999_999_999))
    assert read(message) == (JobFilter(created_before=datetime.max.replace(tzinfo=timezone.utc)), [])


def test_bounds_at_the_epoch_are_bounds():
    epoch = timestamp_pb2.Timestamp()
    job_filter, _ = read(pb.JobFilter(created_after=epoch))
    assert job_filter.created_after == datetime(1970, 1, 1, tzinfo=timezone.utc)
    assert filter_to_wire(job_filter).HasField("created_after")
