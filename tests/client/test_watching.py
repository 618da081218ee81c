"""A watch's patience, by an injected clock."""

from __future__ import annotations

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.client.watch import Watching
from jobstatus_grpc.errors import DeadlineExceededError, InternalError, UnavailableError
from tests.client.scripted import a_job, an_event

CUT = UnavailableError("cut")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    return Clock()


def message(revision: int = 1) -> pb.WatchJobResponse:
    return pb.WatchJobResponse.FromString(an_event(a_job(revision)))


def test_pauses_grow_until_a_stream_delivers(clock):
    watching = Watching("a", clock=clock)
    assert [watching.ended(CUT), watching.ended(None), watching.ended(CUT)] == [0.1, 0.2, 0.4]
    watching.begin()
    watching.take(message())
    assert watching.ended(CUT) == 0.1


def test_a_heartbeat_delivers_too(clock):
    watching = Watching("a", clock=clock)
    watching.take(message())
    watching.ended(CUT)
    watching.ended(CUT)
    watching.begin()
    assert watching.take(message()) is None
    assert watching.ended(CUT) == 0.1


def test_a_message_that_makes_no_sense_delivers_nothing(clock):
    watching = Watching("a", clock=clock)
    watching.ended(CUT)
    with pytest.raises(InternalError):
        watching.take(None)
    assert watching.ended(InternalError()) == 0.2


def test_three_heartbeat_intervals_are_silence(clock):
    assert Watching("a", clock=clock).silence_seconds == 90
    assert Watching("a", heartbeat_interval_seconds=5, clock=clock).silence_seconds == 15


def test_who_gives_up_soon_asks_for_heartbeats_that_are_soon_enough(clock):
    assert Watching("a", give_up_seconds=12, clock=clock).request.heartbeat_interval.seconds == 4
    assert Watching("a", give_up_seconds=1, clock=clock).request.heartbeat_interval.seconds == 1
    assert Watching("a", give_up_seconds=3600, clock=clock).request.heartbeat_interval.seconds == 30


def test_a_quiet_stream_is_no_reason_to_give_up(clock):
    watching = Watching("a", heartbeat_interval_seconds=30, give_up_seconds=10, clock=clock)
    watching.begin()
    assert watching.silence_seconds == 10
    watching.take(message())
    assert watching.silence_seconds == 90


def test_patience_begins_anew_with_each_message(clock):
    watching = Watching("a", give_up_seconds=10, clock=clock)
    for _ in range(5):
        clock.now += 9
        watching.begin()
        watching.take(message())
        assert watching.ended(CUT) == 0.1
    clock.now += 9.95
    assert watching.ended(CUT) == pytest.approx(0.05)
    clock.now += 0.05
    with pytest.raises(UnavailableError, match="cut"):
        watching.ended(CUT)


def test_without_give_up_a_watch_tries_for_ever(clock):
    watching = Watching("a", clock=clock)
    for _ in range(1000):
        clock.now += watching.ended(CUT)
    assert watching.ended(CUT) == 10


def test_a_wait_ends_at_its_deadline_and_not_before(clock):
    watching = Watching("a", timeout_seconds=0.25, clock=clock)
    assert watching.begin() == 0.25
    clock.now += watching.ended(CUT)
    clock.now += watching.ended(CUT)
    assert watching.begin() == 0
    with pytest.raises(DeadlineExceededError):
        watching.ended(CUT)
