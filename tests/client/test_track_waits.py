"""What a worker waits for on its tracked job, how it learns of failing reports, and how it bounds its end."""

from __future__ import annotations

import inspect
import logging
import socket
import time
from typing import Any

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import JobState, StaleAttemptError, UnavailableError
from tests.support.scripted_server import ScriptedServer, a_job, a_stream, fail, reply
from tests.support.timing import MAX_PAUSE_SECONDS

CREATED = reply(pb.CreateJobResponse(job=a_job(attempt=1)))
ALIVE = reply(pb.UpdateJobResponse(job=a_job(attempt=1)))


def result_of(client: Any, wait: Any) -> Any:
    """Return what a wait of either client returns."""
    return client.run(wait) if inspect.isawaitable(wait) else wait


def test_a_cancel_is_learnt_at_once_and_ends_the_block_cancelled(client, background):
    with client.track(heartbeat_timeout_seconds=3600) as tracked:
        waiting = background(lambda: result_of(client, tracked.wait_cancelled()))
        client.cancel(tracked.id)
        assert waiting.result() is True
        assert tracked.job.cancel_requested
    assert client.get(tracked.id).state is JobState.CANCELLED


def test_a_cancel_that_was_waited_for_makes_an_abort_a_cancellation(client, background):
    with client.track(heartbeat_timeout_seconds=3600) as tracked:
        waiting = background(lambda: result_of(client, tracked.wait_cancelled()))
        client.cancel(tracked.id)
        assert waiting.result() is True
        tracked.abort()
    assert client.get(tracked.id).state is JobState.CANCELLED


@pytest.mark.parametrize("change", [{"state": JobState.ABORTED}, {"state": JobState.IN_PROGRESS, "attempt": 2}])
def test_a_lost_job_ends_the_wait_for_a_cancel_at_once(client, background, change):
    with client.track(heartbeat_timeout_seconds=3600) as tracked:
        waiting = background(lambda: result_of(client, tracked.wait_cancelled()))
        client.update(tracked.id, **change)
        assert waiting.result() is True
        assert (tracked.lost, tracked.cancelled) == (True, False)


def test_a_cancel_that_was_not_requested_is_waited_for_no_longer_than_the_timeout(client, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.client.track.WATCH_AGAIN_SECONDS", 15)
    with client.track() as tracked:
        began = time.monotonic()
        assert result_of(client, tracked.wait_cancelled(0.1)) is False
        assert time.monotonic() - began < 5 + MAX_PAUSE_SECONDS
    assert client.get(tracked.id).state is JobState.SUCCEEDED


def test_the_end_of_the_block_ends_the_wait_for_a_cancel(client, background):
    with client.track() as tracked:
        waiting = background(lambda: result_of(client, tracked.wait_cancelled()))
        time.sleep(0.1)
    assert waiting.result() is False
    assert client.get(tracked.id).state is JobState.SUCCEEDED


def test_the_watch_for_a_cancel_survives_errors_without_a_word_in_the_log(connect, background, caplog, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.client.track.WATCH_AGAIN_SECONDS", 0.01)
    caplog.set_level(logging.WARNING, "jobstatus_grpc.client")
    cancelled = pb.WatchJobResponse(
        event=pb.JobEvent(type=pb.JobEventType.JOB_EVENT_TYPE_UPDATED, job=a_job(2, attempt=1, cancel_requested=True))
    )
    streams = [*[fail(grpc.StatusCode.UNAVAILABLE)] * 4, fail(grpc.StatusCode.PERMISSION_DENIED)]
    with ScriptedServer(
        CreateJob=[CREATED], UpdateJob=[ALIVE], WatchJob=[*streams, a_stream(cancelled.SerializeToString())]
    ) as server:
        client = connect(server.address)
        with client.track() as tracked:
            assert background(lambda: result_of(client, tracked.wait_cancelled())).result() is True
    assert caplog.records == []


def test_a_strict_block_that_does_not_begin_ends_the_waits(connect, unused_address, background):
    client = connect(unused_address, timeout_seconds=0.5)
    tracks = client.track(strict=True)
    tracked = getattr(tracks, "_block", tracks)
    waiting = background(lambda: result_of(client, tracked.wait_cancelled()))
    with pytest.raises(UnavailableError), tracks:
        raise AssertionError
    assert waiting.result() is False


def test_an_end_without_a_limit_is_reported(client):
    with client.track(finish_timeout_seconds=float("inf")) as tracked:
        pass
    assert client.get(tracked.id).state is JobState.SUCCEEDED


def test_a_claim_is_waited_for(connect, sqlite_server, background):
    sqlite_server.kill()
    client = connect(sqlite_server.address)
    with client.track() as tracked:
        waiting = background(lambda: result_of(client, tracked.wait_claimed()))
        assert result_of(client, tracked.wait_claimed(0.01)) is False
        sqlite_server.start()
        assert waiting.result() is True
        assert tracked.attempt == 1


def test_a_job_that_cannot_be_claimed_is_not_waited_for(client):
    with client.track(id="no-such-job") as tracked:
        assert result_of(client, tracked.wait_claimed()) is False
        assert result_of(client, tracked.wait_cancelled()) is True


def test_on_report_error_is_called_instead_of_the_log(client, caplog):
    caplog.set_level(logging.WARNING, "jobstatus_grpc.client")
    problems: list[tuple[str, Exception]] = []
    with client.track(on_report_error=lambda text, error: problems.append((text, error))) as tracked:
        client.update(tracked.id, state=JobState.IN_PROGRESS, attempt=2)
        tracked.progress(10)
        assert result_of(client, tracked.wait_cancelled()) is True
    [(text, error)] = problems
    assert type(error) is StaleAttemptError
    assert text.startswith(f"job {tracked.id}: no longer reported: ")
    assert caplog.records == []


def test_on_report_error_is_called_once_when_reports_begin_to_fail_and_once_at_the_end(connect, unused_address):
    errors: list[Exception] = []
    tracks = connect(unused_address).track(
        finish_timeout_seconds=0.3, on_report_error=lambda text, error: errors.append(error)
    )
    with tracks as tracked:
        assert tracked.attempt == 0
    assert [type(error) for error in errors] == [UnavailableError] * 2


def test_on_report_error_may_use_the_job_and_may_raise(connect, unused_address, caplog):
    def report(text: str, error: Exception) -> None:
        tracked.progress(1)
        raise ValueError("broken")

    with connect(unused_address).track(finish_timeout_seconds=0.1, on_report_error=report) as tracked:
        pass
    assert "broken" in caplog.text


def test_the_end_can_be_shortened_while_a_call_is_under_way(connect, monkeypatch, caplog):
    monkeypatch.setattr("jobstatus_grpc.client.track.START_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = connect(f"127.0.0.1:{mute.getsockname()[1]}", timeout_seconds=30)
        began = time.monotonic()
        with client.track(finish_timeout_seconds=30) as tracked:
            tracked.finish_timeout_seconds = 0.1
        assert time.monotonic() - began < 5 + MAX_PAUSE_SECONDS
    assert "SUCCEEDED could not be reported" in caplog.text


def test_an_abandoned_end_costs_no_time(connect, unused_address):
    with connect(unused_address).track() as tracked:
        tracked.finish_timeout_seconds = 0
        began = time.monotonic()
    assert time.monotonic() - began < 1 + MAX_PAUSE_SECONDS
