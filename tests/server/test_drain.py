"""SIGTERM, and the age of streams: every watch ends with a retry delay."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.service import end_by_signal

SERVICE = "jobstatus.v1.JobStatusService"


def end_of(refused, stream):
    return refused(lambda: list(stream))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("store", ["memory:", "sqlite"])
def test_a_signal_ends_the_server_with_0_and_its_watches_with_a_retry_delay(serve, refused, tmp_path, number, store):
    service = serve("--drain-grace", "15s", store=store if store == "memory:" else f"sqlite:///{tmp_path}/jobs.db")
    assert end_by_signal(service, refused, number) < 15


def test_health_says_not_serving_while_the_server_drains(serve):
    service = serve("--drain-grace", "5s")
    health: Any = health_pb2_grpc.HealthStub(service.channel)
    watches = [health.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", SERVICE, f"{SERVICE}/write")]
    assert {next(watch).status for watch in watches} == {health_pb2.HealthCheckResponse.SERVING}
    service.process.signal(signal.SIGTERM)
    assert {next(watch).status for watch in watches} == {health_pb2.HealthCheckResponse.NOT_SERVING}
    assert service.process.wait() == 0


def test_a_done_job_is_sent_before_the_server_ends(serve, tmp_path):
    service = serve(store=f"sqlite:///{tmp_path}/jobs.db")
    job = service.job_in("IN_PROGRESS")
    streams = [service.watch(job.id) for _ in range(50)]
    for stream in streams:
        next(stream)
    end = service.update(job.id, state="JOB_STATE_SUCCEEDED")
    service.process.signal(signal.SIGTERM)
    assert [[message.event.job for message in stream] for stream in streams] == [[end]] * 50
    assert service.process.wait() == 0


def test_calls_under_way_at_the_signal_are_answered_or_unavailable(serve, update_of, tmp_path):
    service = serve(store=f"sqlite:///{tmp_path}/jobs.db")
    job = service.job_in("IN_PROGRESS")
    calls = [service.stub.UpdateJob.future(update_of(job.id, reason=str(number))) for number in range(200)]
    calls[0].result()
    service.process.signal(signal.SIGTERM)
    refusals = [call.exception() for call in calls if call.exception() is not None]
    acknowledged = [call.result().job.revision for call in calls if call.exception() is None]
    assert service.process.wait() == 0
    service.process.start()
    assert service.get(job.id).revision >= max(acknowledged)
    assert {refusal.code().name for refusal in refusals} <= {"UNAVAILABLE"}


def test_a_stream_ends_when_it_has_reached_its_age_and_its_client_calls_again(serve, refused):
    service = serve("--max-connection-age", "1s")
    job = service.job_in("IN_PROGRESS")
    for _ in range(2):
        started = time.monotonic()
        stream = service.watch(job.id)
        next(stream)
        refusal = end_of(refused, stream)
        assert refusal.kind == ("UNAVAILABLE", "STREAM_AGE")
        assert refusal.retry_seconds > 0
        assert time.monotonic() - started > 0.8
    end = service.update(job.id, state="JOB_STATE_SUCCEEDED")
    assert [message.event.job for message in service.watch(job.id)] == [end]


def test_calls_go_on_while_connections_reach_their_age(serve):
    service = serve("--max-connection-age", "1s")
    job = service.job_in("IN_PROGRESS")
    started, number = time.monotonic(), 0
    while time.monotonic() - started < 1.8:
        number += 1
        assert service.update(job.id, reason=str(number)).revision == job.revision + number
