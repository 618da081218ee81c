"""Arguments become values, or one clear error message."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import click
import pytest

from jobstatus_grpc.cli import parsers
from jobstatus_grpc.job import JobState


@pytest.mark.parametrize(
    ("typed", "seconds"),
    [("250ms", 0.25), ("90s", 90), ("10m", 600), ("1h", 3600), ("7d", 604_800), ("1h30m", 5400), ("0.5s", 0.5)],
)
def test_a_duration_has_a_unit(typed, seconds):
    assert parsers.duration()(typed) == timedelta(seconds=seconds)


@pytest.mark.parametrize("typed", ["", "-1s", "1 s", "s", "1y", "off", "nan", "1e3s", "١s", "10m junk"])
def test_what_is_no_duration_is_refused(typed):
    with pytest.raises(click.BadParameter, match="is not a duration"):
        parsers.duration()(typed)


@pytest.mark.parametrize("typed", ["10", "2.5", "0"])
def test_a_number_without_a_unit_is_refused(typed):
    with pytest.raises(click.BadParameter, match=f"'{typed}' has no unit; write 250ms, 90s"):
        parsers.duration()(typed)


def test_off_is_understood_where_that_is_said():
    assert parsers.duration(or_off=True)("off") is None


@pytest.mark.parametrize("typed", ["999ms", "8d", "99999999999999d"])
def test_a_duration_keeps_its_bounds(typed):
    with pytest.raises(click.BadParameter, match="is not within 1s to 7d"):
        parsers.duration(shortest=timedelta(seconds=1), longest=timedelta(days=7))(typed)


@pytest.mark.parametrize("spelled", ["250ms", "0s", "90s", "10m", "1h", "7d", "61m"])
def test_a_duration_is_spelled_as_it_would_be_typed(spelled):
    assert parsers.spell(parsers.duration()(spelled) or timedelta(0)) == spelled


@pytest.mark.parametrize("typed", ["in_progress", "in-progress", "IN_PROGRESS", "JOB_STATE_IN_PROGRESS"])
def test_a_state_has_a_short_name(typed):
    assert parsers.state(typed) is JobState.IN_PROGRESS


@pytest.mark.parametrize("typed", ["", "done", "2", "unspecified"])
def test_an_unknown_state_is_refused_with_the_known_ones(typed):
    with pytest.raises(click.BadParameter, match="pending, in_progress, retrying, succeeded"):
        parsers.state(typed)


@pytest.mark.parametrize(
    "typed",
    [
        "localhost:50051",
        "[::1]:1",
        "unix:/run/jobs.sock",
        "unix:jobs.sock",
        "dns:///jobs:50051",
        "grpcs://jobs",
        "grpc://[::1]:1/",
    ],
)
def test_an_address_is_host_and_port_or_a_socket(typed):
    assert parsers.address(typed) == typed


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "localhost",
        ":50051",
        "localhost:",
        "a:0",
        "a:65536",
        "a:b",
        "unix:",
        "http://a:1",
        "a b:1",
        "a:١",
        "grpcs://",
        "grpcs://a/b",
        "dns:jobs:1#/localhost",
    ],
)
def test_what_is_no_address_is_refused(typed):
    with pytest.raises(click.BadParameter, match="write HOST:PORT, grpcs://HOST:PORT"):
        parsers.address(typed)


def test_a_label_is_split_at_the_first_equals_sign():
    assert parsers.label("query=a=b") == ("query", "a=b")


@pytest.mark.parametrize("typed", ["", "team", "=core"])
def test_what_is_no_label_is_refused(typed):
    with pytest.raises(click.BadParameter, match="write KEY=VALUE"):
        parsers.label(typed)


@pytest.mark.parametrize("typed", ["-1", "101", "nan", "inf", "", "4 2"])
def test_a_percentage_is_from_0_to_100(typed):
    with pytest.raises(click.BadParameter):
        parsers.percent(typed)


def test_an_instant_is_rfc_3339():
    at = datetime(2026, 1, 31, 12, 30, tzinfo=timezone.utc)
    assert parsers.instant("2026-01-31T12:30:00Z") == at
    assert parsers.instant("2026-01-31T14:30:00.000+02:00") == at


def test_an_instant_is_a_duration_from_now():
    now = datetime.now(timezone.utc)
    assert timedelta(minutes=9) < parsers.instant("10m") - now < timedelta(minutes=11)


def test_a_past_instant_is_a_duration_before_now():
    now = datetime.now(timezone.utc)
    assert timedelta(minutes=9) < now - parsers.past_instant("10m") < timedelta(minutes=11)
    assert parsers.past_instant("2026-01-31T12:30:00Z") == parsers.instant("2026-01-31T12:30:00Z")


@pytest.mark.parametrize("typed", ["", "yesterday", "2026-01-31", "9999999d"])
def test_what_is_no_past_instant_is_refused(typed):
    with pytest.raises(click.BadParameter, match=r"such as 10m|year 1"):
        parsers.past_instant(typed)


@pytest.mark.parametrize("typed", ["tomorrow", "2026-01-31", "2026-01-31T12:30:00", "99999999d", "off"])
def test_what_is_no_instant_is_refused(typed):
    with pytest.raises(click.BadParameter):
        parsers.instant(typed)


@pytest.mark.parametrize(("typed", "number"), [("14", 14), ("unavailable", 14), ("DEADLINE-EXCEEDED", 4)])
def test_an_error_code_is_a_name_or_a_number(typed, number):
    assert parsers.error_code(typed) == number


@pytest.mark.parametrize("typed", ["0", "OK", "17", "oops", "-1"])
def test_what_is_no_error_code_is_refused(typed):
    with pytest.raises(click.BadParameter):
        parsers.error_code(typed)


@pytest.mark.parametrize("typed", ["", "{", "[1]", "3", '{"a": NaN}', '{"a": "\\ud800"}', "[" * 100_000])
def test_what_is_no_json_object_is_refused(typed):
    with pytest.raises(click.BadParameter, match="is not"):
        parsers.json_object(typed)
