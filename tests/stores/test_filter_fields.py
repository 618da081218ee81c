"""No field of a filter is forgotten, by the SQL stores or by the filters that the lists of every store are tried on."""

from __future__ import annotations

import dataclasses

import pytest

from jobstatus_grpc.job import JobFilter
from jobstatus_grpc.stores.sql.criteria import check_fields
from tests.stores.contract.lists import FILTERS
from tests.support.stores import ALL

FIELDS = [field.name for field in dataclasses.fields(JobFilter)]


def fields_of(job_filter: JobFilter) -> list[str]:
    return [name for name in FIELDS if getattr(job_filter, name) != getattr(ALL, name)]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_tried_alone_and_leaves_some_jobs_out(field):
    """`FILTERS` is run on the memory store, which asks `JobFilter.matches`, and on each SQL store."""
    lists = [ids for job_filter, ids in FILTERS.values() if fields_of(job_filter) == [field]]
    assert any(ids != FILTERS["nothing"][1] for ids in lists), f"FILTERS has no filter by {field} alone"


def test_a_field_without_a_criterion_is_named():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wider(JobFilter):
        not_in_sql: int | None = None

    with pytest.raises(TypeError, match=r"no criterion for Wider\.not_in_sql"):
        check_fields(Wider)
