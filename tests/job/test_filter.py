"""JobFilter: which jobs may have matched before; filters that are joined."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobstatus_grpc.job import JobFilter, evolve
from jobstatus_grpc.job.filter import NOTHING
from tests.stores.contract import machine
from tests.support.jobs import START, S, job_in

VALUES: dict[str, Any] = {
    "ids": frozenset("a"),
    "states": frozenset({S.FAILED}),
    "names": frozenset("n"),
    "name_prefix": "n",
    "labels": {"k": "v"},
    "parent_id": "a",
    "created_after": START,
    "created_before": START,
    "done": False,
    "stalled": False,
}
"""A value of each field."""

jobs = st.builds(
    lambda state, fields: evolve(job_in(state), fields),
    st.sampled_from(S),
    st.fixed_dictionaries(
        {
            "id": machine.ids,
            "name": machine.names,
            "labels": machine.labels,
            "parent_id": st.sampled_from(["", "a"]),
            "stalled": st.booleans(),
        }
    ),
)


@given(jobs, machine.filters_of_few_fields, machine.filters_of_few_fields)
def test_a_job_matches_the_join_of_two_filters_if_it_matches_both(job, first, second):
    assert (first & second).matches(job) == (first.matches(job) and second.matches(job))


@given(machine.filters)
def test_a_filter_joined_with_itself_or_with_one_that_matches_all_is_itself(job_filter):
    assert job_filter & job_filter == job_filter & JobFilter() == JobFilter() & job_filter == job_filter


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (JobFilter(labels={"team": "core"}), JobFilter(labels={"team": "web"})),
        (JobFilter(name_prefix="core-"), JobFilter(name_prefix="web-")),
        (JobFilter(ids={"a"}), JobFilter(ids={"b"})),
        (JobFilter(names={"a"}), JobFilter(names={"b"})),
        (JobFilter(states={S.FAILED}), JobFilter(states={S.PENDING})),
        (JobFilter(parent_id="a"), JobFilter(parent_id="b")),
        (JobFilter(done=True), JobFilter(done=False)),
        (JobFilter(stalled=True), JobFilter(stalled=False)),
    ],
)
def test_filters_that_exclude_each_other_match_nothing(first, second):
    assert first & second == second & first == NOTHING
    assert not NOTHING.possible_states


@pytest.mark.parametrize("field", dataclasses.fields(JobFilter), ids=lambda field: field.name)
def test_each_field_is_joined(field):
    job_filter = JobFilter()
    object.__setattr__(job_filter, field.name, VALUES[field.name])
    assert JobFilter() & job_filter == job_filter & JobFilter() == job_filter != JobFilter()


CASES = [
    (JobFilter(done=True), {S.SUCCEEDED, S.ABORTED, S.FAILED, S.CANCELLED}),
    (JobFilter(done=False), set(S)),
    (JobFilter(states=[S.FAILED]), {S.FAILED}),
    (JobFilter(states=[S.PENDING]), set(S)),
    (JobFilter(states=[S.RETRYING, S.FAILED]), set(S) - {S.PENDING}),
    (JobFilter(stalled=True), set(S) - {S.PENDING}),
    (JobFilter(labels={"color": "red"}), set(S)),
    (JobFilter(names=["another"]), set()),
]


@pytest.mark.parametrize(("job_filter", "expected"), CASES)
def test_a_job_may_have_matched_in_the_states_that_lead_to_its_own(job_filter, expected):
    assert {state for state in S if job_filter.may_have_matched(job_in(state, name="one"))} == expected
