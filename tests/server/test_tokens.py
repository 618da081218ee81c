"""A token is valid for the request that it was made for, and for no other."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobstatus_grpc.errors import InvalidTokenError
from jobstatus_grpc.job import JobFilter, JobState
from jobstatus_grpc.server.tokens import filter_scope, job_scope, read_token, write_token
from jobstatus_grpc.stores.interface import MAX_POSITION_CHARACTERS
from jobstatus_grpc.stores.paging import write_cursor

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
FILTER = JobFilter(
    ids=["a", "b"], states=[JobState.PENDING, JobState.FAILED], names=["n", "m"], name_prefix="p",
    labels={"k": "v", "l": "w"}, parent_id="q", created_after=START, created_before=START, done=False, stalled=False,
)  # fmt: skip
OTHERS = [
    JobFilter(),
    replace(FILTER, ids=["a"]),
    replace(FILTER, states=[JobState.PENDING]),
    replace(FILTER, names=["n", "o"]),
    replace(FILTER, name_prefix=""),
    replace(FILTER, labels={"k": "v"}),
    replace(FILTER, labels={"k": "w", "l": "v"}),
    replace(FILTER, parent_id=""),
    replace(FILTER, created_after=None),
    replace(FILTER, created_before=START + timedelta(microseconds=1)),
    replace(FILTER, done=None),
    replace(FILTER, done=True),
    replace(FILTER, stalled=None),
]
SCOPE = filter_scope("ours", FILTER)
TOKEN = write_token("resume", SCOPE, "0a1b-17")
payloads = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@given(payloads)
def test_a_token_gives_back_its_payload(payload):
    text = write_token("page", SCOPE, payload)
    assert read_token("page", SCOPE, text) == payload
    assert text.replace("-", "").replace("_", "").isalnum()


def test_tokens_have_at_most_512_characters():
    cursor = write_cursor((10**18 - 1, 10**18 - 1))
    payload = json.dumps([cursor, "x" * MAX_POSITION_CHARACTERS])
    assert len(write_token("page", SCOPE, payload)) <= 512


def test_the_order_of_values_does_not_matter():
    again = replace(
        FILTER, ids=("b", "a", "a"), states=[JobState.FAILED, JobState.PENDING], names={"m", "n"},
        labels={"l": "w", "k": "v"}, created_after=START.astimezone(timezone(timedelta(hours=1))),
    )  # fmt: skip
    assert read_token("resume", filter_scope("ours", again), TOKEN) == "0a1b-17"


@pytest.mark.parametrize("other", OTHERS)
def test_another_filter_is_refused(other):
    with pytest.raises(InvalidTokenError):
        read_token("resume", filter_scope("ours", other), TOKEN)


@pytest.mark.parametrize(
    ("kind", "scope"),
    [
        ("page", SCOPE),
        ("history", SCOPE),
        ("resume", filter_scope("theirs", FILTER)),
        ("resume", job_scope("ours", "a")),
    ],
)
def test_another_use_or_tenant_is_refused(kind, scope):
    with pytest.raises(InvalidTokenError):
        read_token(kind, scope, TOKEN)


def test_a_history_token_is_of_one_job():
    token = write_token("history", job_scope("ours", "a"), "7")
    assert read_token("history", job_scope("ours", "a"), token) == "7"
    for scope in (job_scope("ours", "b"), job_scope("theirs", "a"), filter_scope("ours", JobFilter(ids=["a"]))):
        with pytest.raises(InvalidTokenError):
            read_token("history", scope, token)


@given(st.text(max_size=100) | st.binary(max_size=100).map(lambda data: base64.urlsafe_b64encode(data).decode()))
def test_garbage_is_refused(text):
    with pytest.raises(InvalidTokenError):
        read_token("resume", SCOPE, text)


@given(st.integers(0, len(TOKEN) - 1), st.characters(exclude_categories=["Cs"]))
def test_a_token_with_one_character_changed_is_refused(index, character):
    if TOKEN[index] != character:
        with pytest.raises(InvalidTokenError):
            read_token("resume", SCOPE, TOKEN[:index] + character + TOKEN[index + 1 :])


@pytest.mark.parametrize("text", [TOKEN + "=", TOKEN + "==", TOKEN + "\n", f" {TOKEN}", TOKEN[:-1], TOKEN + "A", ""])
def test_a_token_has_one_spelling(text):
    with pytest.raises(InvalidTokenError):
        read_token("resume", SCOPE, text)


def test_garbage_of_any_length_costs_little():
    garbage = "A" * 4_000_000
    started = time.thread_time()
    for _ in range(1000):
        with pytest.raises(InvalidTokenError):
            read_token("resume", SCOPE, garbage)
    assert time.thread_time() - started < 0.5
