"""Connections that stay open and pass nothing: the next try uses a new one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from jobstatus_grpc import DeadlineExceededError, JobChangeType, JobFilter, JobState, JobStatusClient
from jobstatus_grpc.client.endpoint import CHANNEL_OPTIONS
from jobstatus_grpc.client.retry import Liveness
from tests.support.tcp_proxy import TcpProxy

pytestmark = pytest.mark.slow  # waits for the timeouts of connections


@pytest.fixture
def proxy(memory_address) -> Iterator[TcpProxy]:
    with TcpProxy(memory_address) as proxy:
        yield proxy


@pytest.fixture
def writer(memory_address) -> Iterator[JobStatusClient]:
    with JobStatusClient(memory_address) as writer:
        yield writer


def test_a_call_after_a_missed_deadline_uses_a_new_connection(connect, proxy, writer):
    job = writer.create()
    client = connect(proxy.address, timeout_seconds=5)
    assert client.get(job.id) == job
    proxy.freeze()
    with pytest.raises(DeadlineExceededError):
        client.get(job.id, timeout_seconds=1.5)
    assert client.get(job.id) == job


def test_a_watch_that_misses_its_heartbeats_uses_a_new_connection(connect, proxy, writer):
    job = writer.create()
    watch = connect(proxy.address).watch(job.id, heartbeat_interval_seconds=1)
    next(watch)
    proxy.freeze()
    began = time.monotonic()
    done = writer.update(job.id, state=JobState.SUCCEEDED)
    assert next(watch) == done
    assert time.monotonic() - began < 15


def test_a_watch_of_many_jobs_uses_a_new_connection_too(connect, proxy, writer):
    job = writer.create()
    watch = connect(proxy.address).watch_jobs(JobFilter(ids=[job.id]), heartbeat_interval_seconds=1)
    while next(watch).type is not JobChangeType.SYNCED:
        pass
    proxy.freeze()
    writer.update(job.id, state=JobState.SUCCEEDED)
    assert next(watch).type is JobChangeType.UPDATED


@pytest.mark.parametrize("settings", [{}, {"heartbeat_interval_seconds": 1}], ids=["default", "long silence"])
def test_a_watch_tries_a_new_connection_before_it_gives_up(connect, proxy, writer, settings):
    job = writer.create()
    watch = connect(proxy.address).watch(job.id, give_up_seconds=2.5, **settings)
    next(watch)
    proxy.freeze()
    done = writer.update(job.id, state=JobState.SUCCEEDED)
    assert next(watch) == done


def test_reports_use_a_new_connection(connect, proxy, writer):
    job = writer.create()
    with connect(proxy.address, timeout_seconds=1.5).reporter() as reporter:
        reporter.update(job.id, state=JobState.IN_PROGRESS, attempt=1)
        reporter.flush()
        proxy.freeze()
        reporter.update(job.id, state=JobState.SUCCEEDED, attempt=1)
        reporter.flush(timeout_seconds=15)
    assert writer.get(job.id).state is JobState.SUCCEEDED


def test_a_dead_connection_is_closed_when_its_last_call_has_ended(proxy, writer):
    job = writer.create()
    with JobStatusClient(proxy.address, timeout_seconds=1.5) as client:
        watch = client.watch(job.id)
        next(watch)
        proxy.freeze()
        with pytest.raises(DeadlineExceededError):
            client.get(job.id)
        client.get(job.id)
        assert len(client._connection._dead_lines) == 1
        watch.close()
        client.get(job.id)
        assert client._connection._dead_lines == []


def test_the_keepalive_ends_a_dead_connection_within_half_a_minute():
    options: dict[str, Any] = dict(CHANNEL_OPTIONS)
    for timeout in ("grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"):
        assert options["grpc.keepalive_time_ms"] + options[timeout] < 30_000


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class FailedCall(grpc.RpcError):
    def __init__(self, code: str) -> None:
        self._code = grpc.StatusCode[code]

    def code(self) -> grpc.StatusCode:
        return self._code


LATE = FailedCall("DEADLINE_EXCEEDED")


@pytest.fixture
def new() -> Callable[..., tuple[Liveness, Clock]]:
    """Return a function that returns a connection's liveness and its clock."""

    def new(before: Liveness | None = None) -> tuple[Liveness, Clock]:
        clock = Clock()
        return Liveness(before, clock), clock

    return new


def late_after(seconds: float, liveness: Liveness, clock: Clock) -> bool:
    """Miss a deadline of `seconds`, and return whether the connection is dead."""
    call = object()
    liveness.begin(call)
    clock.now += seconds
    liveness.failed(LATE)
    liveness.end(call)
    return liveness.is_dead


def test_a_quiet_connection_is_not_dead_after_a_short_deadline(new):
    liveness, clock = new()
    clock.now += 3600
    assert [late_after(0.4, liveness, clock) for _ in range(3)] == [False, False, True]


def test_a_connection_on_which_other_calls_are_answered_is_not_dead(new):
    liveness, clock = new()
    liveness.begin("slow call")
    clock.now += 9.5
    liveness.received()
    clock.now += 0.5
    liveness.failed(LATE)
    liveness.was_silent(5)
    assert not liveness.is_dead


@pytest.mark.parametrize("code", ["NOT_FOUND", "RESOURCE_EXHAUSTED", "INTERNAL"])
def test_a_refusal_is_an_answer(new, code):
    liveness, clock = new()
    assert not late_after(0.9, liveness, clock)
    liveness.failed(FailedCall(code))
    assert not late_after(0.9, liveness, clock)


def test_each_connection_that_dies_makes_the_next_live_longer(new):
    liveness, clock = new()
    seconds = []
    for _ in range(6):
        waited = 0
        while not late_after(1, liveness, clock):
            waited += 1
        seconds.append(waited + 1)
        liveness, clock = new(liveness)
    assert seconds == [1, 2, 4, 8, 16, 16]
    liveness.received()
    assert late_after(1, liveness, clock)
