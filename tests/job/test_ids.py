"""Generated ids are UUIDs as in RFC 9562."""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

from jobstatus_grpc.job.ids import derived_job_id, new_uuid7

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
NOW = datetime(2026, 5, 4, 3, 2, 1, 987_654, tzinfo=timezone.utc)


@given(st.integers(0, 253_402_300_799_999).map(lambda number: EPOCH + timedelta(milliseconds=number)))
def test_a_new_id_is_a_uuid_of_version_7_that_holds_its_millisecond(now):
    text = new_uuid7(now)
    made = uuid.UUID(text)
    assert (str(made), made.version, made.variant) == (text, 7, uuid.RFC_4122)
    assert abs((made.int >> 80) - (now - EPOCH) // timedelta(milliseconds=1)) <= 1


def test_later_ids_sort_behind_earlier_ones():
    ids = [new_uuid7(NOW + timedelta(milliseconds=number)) for number in range(1000)]
    assert ids == sorted(ids)


def test_ids_of_one_millisecond_differ():
    assert len({new_uuid7(NOW) for _ in range(10_000)}) == 10_000


@given(st.text(), st.text())
def test_a_derived_id_is_a_uuid_of_version_8_and_always_the_same(tenant, request_id):
    text = derived_job_id(tenant, request_id)
    made = uuid.UUID(text)
    assert (str(made), made.version, made.variant) == (text, 8, uuid.RFC_4122)
    assert derived_job_id(tenant, request_id) == text


def test_a_derived_id_never_changes_from_version_to_version():
    assert derived_job_id("default", "request-1") == "e0f27a1a-203d-832a-b251-3f71cd6754ba"


def test_another_tenant_or_request_has_another_id():
    pairs = [("a", "b"), ("b", "a"), ("ab", ""), ("", "ab"), ("a", ""), ("", "a"), ("default", "r1"), ("default", "r2")]
    assert len({derived_job_id(*pair) for pair in pairs}) == len(pairs)
