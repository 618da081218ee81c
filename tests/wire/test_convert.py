"""Job ⇄ protobuf: nothing is lost on the way."""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone

import pytest
from google.protobuf import duration_pb2, struct_pb2, timestamp_pb2
from hypothesis import given
from hypothesis import strategies as st
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.job import Job, JobError, JobState, evolve, limits, projection_of
from jobstatus_grpc.job.model import TERMINAL_STATES
from jobstatus_grpc.server.responses import field_1, render_job
from jobstatus_grpc.wire import convert
from tests.support.samples import fill

UTC = timezone.utc
FIRST, LAST = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
START = datetime(2026, 1, 1, tzinfo=UTC)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
instants = st.datetimes(FIRST.replace(tzinfo=None), LAST.replace(tzinfo=None), timezones=st.just(UTC))
timeouts = st.timedeltas(limits.MIN_HEARTBEAT_TIMEOUT, limits.MAX_HEARTBEAT_TIMEOUT)
numbers = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)
errors = st.builds(JobError, st.integers(1, 16), texts, texts)


@st.composite
def jobs(draw):
    """Jobs that the rules allow: start with attempt, end with its times."""
    state = draw(st.sampled_from(JobState))
    is_done, is_started = state in TERMINAL_STATES, draw(st.booleans())
    reports_progress = draw(st.booleans())
    return Job(
        id=draw(st.from_regex(r"[A-Za-z0-9._:-]{1,20}", fullmatch=True)),
        state=state,
        created_at=draw(instants),
        updated_at=draw(instants),
        name=draw(texts),
        reason=draw(texts),
        reports_progress=reports_progress,
        progress=draw(st.none() | st.floats(0, 100)) if reports_progress else None,
        estimated_completion=draw(st.none() | instants),
        error=draw(st.none() | errors),
        started_at=START if is_started else None,
        finished_at=draw(instants) if is_done else None,
        attempt=draw(st.integers(1, limits.MAX_INT32)) if is_started else 0,
        cancel_requested=draw(st.booleans()),
        cancel_reason=draw(texts),
        stalled=draw(st.booleans()),
        heartbeat_timeout=draw(st.none() | timeouts),
        revision=draw(st.integers(1, 2**63 - 1)),
        labels=draw(st.dictionaries(texts, texts, max_size=4)),
        parent_id=draw(texts),
        result=draw(st.none() | st.dictionaries(texts, values, max_size=4)),
        expires_at=draw(instants) if is_done else None,
    )


def to_wire(job):
    return pb.JobStatus.FromString(render_job(job))


def close(job):
    """A job with an estimated completion within the years of datetime."""
    return evolve(job, {"updated_at": START + timedelta(seconds=10)})


@given(jobs().map(close))
def test_a_job_is_read_as_it_was_written(job):
    assert convert.job_from_wire(to_wire(job)) == evolve(job, {"projected_completion": projection_of(job)})


@given(jobs().map(close))
def test_what_is_derived_is_on_the_wire_too(job):
    message = to_wire(job)
    assert message.done == job.done


@pytest.mark.parametrize(("first", "projected"), [(80.0, START + timedelta(seconds=5)), (90.0, None)])
def test_a_client_has_the_projection_of_the_server(first, projected):
    since = START - timedelta(seconds=5)
    job = Job(id="a", state=JobState.IN_PROGRESS, created_at=since, updated_at=START, started_at=since, progress=90.0)
    received = convert.job_from_wire(to_wire(evolve(job, {"first_progress": first, "first_progress_at": since})))
    shown = pb.JobStatus()
    convert.job_to_wire(received, shown)
    assert (received.projected_completion, shown.HasField("projected_completion")) == (projected, bool(projected))


@pytest.mark.parametrize("size", [0, 1, 0x7F, 0x80, 0x3FFF, 0x4000, 0x1F_FFFF, 0x20_0000])
def test_a_message_around_a_job_is_what_protobuf_makes_of_it(size):
    whole = pb.GetJobResponse(job=pb.JobStatus(reason="x" * size))
    assert field_1(whole.job.SerializeToString()) == whole.SerializeToString()


def test_a_job_that_changed_is_rendered_anew():
    job = Job(id="a", state=JobState.PENDING, created_at=START, updated_at=START)
    assert render_job(job) is render_job(job)
    assert to_wire(evolve(job, {"reason": "r"})).reason == "r"


def test_every_field_of_the_api_is_written():
    job = convert.job_from_wire(fill(pb.JobStatus()))
    assert {field.name for field, _ in to_wire(job).ListFields()} == {f.name for f in pb.JobStatus.DESCRIPTOR.fields}


@given(instants)
def test_an_instant_keeps_its_microseconds(instant):
    message = timestamp_pb2.Timestamp()
    convert.instant_to_wire(instant, message)
    assert message.ToDatetime(tzinfo=UTC) == instant
    assert convert.instant_from_wire(message) == instant


def test_the_epoch_is_an_instant_like_any_other():
    message = pb.JobStatus()
    convert.instant_to_wire(convert.EPOCH, message.estimated_completion)
    assert message.HasField("estimated_completion")
    assert convert.instant_from_wire(message.estimated_completion) == convert.EPOCH


@given(st.timedeltas(timedelta(days=-3_650_000), timedelta(days=3_650_000)))
def test_a_duration_keeps_its_microseconds(duration):
    assert convert.duration_from_wire(convert.duration_to_wire(duration)) == duration


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**31), 2**31 - 1))
def test_a_timestamp_is_read_right_or_refused(seconds, nanos):
    message = timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos)
    try:
        message.ToJsonString()
    except ValueError:
        with pytest.raises(ValueError):
            convert.instant_from_wire(message)
    else:
        assert convert.instant_from_wire(message) == message.ToDatetime(tzinfo=UTC)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**31), 2**31 - 1))
def test_a_duration_is_read_right_or_refused(seconds, nanos):
    message = duration_pb2.Duration(seconds=seconds, nanos=nanos)
    try:
        message.ToJsonString()
    except ValueError:
        with pytest.raises(ValueError):
            convert.duration_from_wire(message)
    else:
        assert abs(convert.duration_from_wire(message) - message.ToTimedelta()) <= timedelta(microseconds=1)


@pytest.mark.parametrize("state", list(JobState))
def test_the_numbers_of_the_states_are_the_apis(state):
    assert pb.JobState.Value(f"JOB_STATE_{state.name}") == state
    assert convert.to_state(int(state)) is state


@pytest.mark.parametrize(("done", "state"), [(True, JobState.ABORTED), (False, JobState.IN_PROGRESS)])
def test_a_state_of_a_later_version_is_read_as_the_nearest(done, state):
    message = to_wire(Job(id="a", state=JobState.PENDING, created_at=START, updated_at=START))
    message.state, message.done = 99, done
    job = convert.job_from_wire(message)
    assert (job.state, job.done) == (state, done)


def test_an_instant_without_a_time_zone_is_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"must be aware: write datetime\.now\(timezone\.utc\)"):
        convert.instant_to_wire(START.replace(tzinfo=None), pb.JobStatus().created_at)


def test_a_value_without_a_kind_is_null():
    struct = struct_pb2.Struct()
    struct.fields["a"].SetInParent()
    assert convert.result_from_wire(struct) == {"a": None}


def test_numbers_of_a_result_are_what_json_has():
    struct = struct_pb2.Struct()
    struct.update({"whole": 3, "large": 2.0**53, "small": 5e-324, "minus": -0.0})
    read = convert.result_from_wire(struct)
    assert read == {"whole": 3.0, "large": 2.0**53, "small": 5e-324, "minus": 0.0}
    assert math.copysign(1, read["minus"]) == -1


def test_an_error_without_a_code_is_unknown():
    assert convert.error_from_wire(pb.JobError(message="m")) == JobError(2, "m", "")
