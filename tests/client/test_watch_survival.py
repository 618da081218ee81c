"""Which ends of a stream a watch survives, which messages it passes on: everything that a healthy server never does."""

from __future__ import annotations

import asyncio
import logging
import socket
import time

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import AsyncJobStatusClient, JobState, TooManyWatchersError, UnavailableError
from jobstatus_grpc.errors import JobStatusError, StreamAgeError
from tests.client.scripted import ScriptedServer, a_done_job, a_job, a_stream, an_event, fail, refuse
from tests.peace import in_peace

FULL = TooManyWatchersError()
FULL.retry_after_seconds = 0.05
ENDS = {
    "UNAVAILABLE": a_stream(an_event(a_job(1)), then=fail(grpc.StatusCode.UNAVAILABLE)),
    "INTERNAL": a_stream(an_event(a_job(1)), then=fail(grpc.StatusCode.INTERNAL)),
    "UNKNOWN": a_stream(an_event(a_job(1)), then=fail(grpc.StatusCode.UNKNOWN)),
    "CANCELLED": a_stream(an_event(a_job(1)), then=fail(grpc.StatusCode.CANCELLED)),
    "RESOURCE_EXHAUSTED once opened": a_stream(an_event(a_job(1)), then=refuse(FULL)),
    "OK without a done job": a_stream(an_event(a_job(1))),
    "a message that is no message": a_stream(an_event(a_job(1)), b"\xff\xff"),
    "a job that makes no sense": a_stream(an_event(a_job(1)), an_event(a_job(2, created=2**60))),
}
OPENINGS = {
    "UNAVAILABLE": fail(grpc.StatusCode.UNAVAILABLE),
    "INTERNAL": fail(grpc.StatusCode.INTERNAL),
    "UNKNOWN": fail(grpc.StatusCode.UNKNOWN),
    "CANCELLED": fail(grpc.StatusCode.CANCELLED),
    "OK without anything": a_stream(),
}
RAISED = [
    code
    for code in grpc.StatusCode
    if code is not grpc.StatusCode.OK and code.name not in ("UNAVAILABLE", "INTERNAL", "UNKNOWN", "CANCELLED")
]
EXHAUSTED = "RESOURCE_EXHAUSTED"
THE_END = a_stream(an_event(a_job(2)), an_event(a_done_job(3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("end", ENDS)
def test_a_watch_goes_on_after(connect, end):
    with ScriptedServer(WatchJob=[ENDS[end], THE_END]) as server:
        assert [job.revision for job in connect(server.address).watch("a")] == [1, 2, 3]


@pytest.mark.parametrize("opening", OPENINGS)
def test_a_watch_opens_in_the_end_after(connect, opening):
    with ScriptedServer(WatchJob=[OPENINGS[opening], THE_END]) as server:
        assert [job.revision for job in connect(server.address).watch("a")] == [2, 3]


@pytest.mark.parametrize("code", RAISED, ids=lambda code: code.name)
def test_a_watch_raises_what_does_not_pass(connect, code):
    with ScriptedServer(WatchJob=[fail(code)]) as server, pytest.raises(JobStatusError, match="as told"):
        next(connect(server.address).watch("a"))
    assert len(server.requests["WatchJob"]) == 1


@pytest.mark.parametrize(
    "code", [code for code in RAISED if code.name != "RESOURCE_EXHAUSTED"], ids=lambda code: code.name
)
def test_a_watch_raises_what_does_not_pass_also_once_opened(connect, code):
    with ScriptedServer(WatchJob=[a_stream(an_event(a_job()), then=fail(code))]) as server:
        watch = connect(server.address).watch("a")
        next(watch)
        with pytest.raises(JobStatusError, match="as told"):
            next(watch)


def test_a_watch_that_is_refused_a_place_at_its_opening_raises(connect):
    with ScriptedServer(WatchJob=[refuse(FULL)]) as server, pytest.raises(TooManyWatchersError):
        next(connect(server.address).watch("a"))


def test_a_watch_leaves_a_server_that_says_nothing(connect):
    with ScriptedServer(WatchJob=[]) as server:
        silent = a_stream(an_event(a_job(1)), then=server.silence)
        server.script("WatchJob", server.silent_stream, silent, THE_END)
        watch = connect(server.address).watch("a", heartbeat_interval_seconds=0.1)
        assert [job.revision for job in watch] == [1, 2, 3]
        for _ in range(3):
            assert server.ended.acquire(timeout=10)


@in_peace(0.1)
def test_heartbeats_keep_a_watch_on_its_stream(connect):
    beat = an_event(a_job(1), pb.JobEventType.JOB_EVENT_TYPE_HEARTBEAT)

    def slow(request, context):
        for message in [an_event(a_job(1)), beat, beat, beat, beat, beat, an_event(a_done_job(2))]:
            yield message
            time.sleep(0.1)

    with ScriptedServer(WatchJob=[slow]) as server:
        watch = connect(server.address).watch("a", heartbeat_interval_seconds=0.1)
        assert [job.revision for job in watch] == [1, 2]
    assert len(server.requests["WatchJob"]) == 1


def test_what_was_seen_last_is_not_seen_again(connect):
    first = a_stream(an_event(a_job(1)), an_event(a_job(2)), an_event(a_job(2)))
    again = a_stream(an_event(a_job(2), pb.JobEventType.JOB_EVENT_TYPE_SNAPSHOT))
    with ScriptedServer(WatchJob=[first, again, THE_END]) as server:
        assert [job.revision for job in connect(server.address).watch("a")] == [1, 2, 3]


def test_a_job_whose_store_was_put_back_is_shown_as_it_is_now(connect):
    with ScriptedServer(WatchJob=[a_stream(an_event(a_job(1)), an_event(a_job(7))), THE_END]) as server:
        assert [job.revision for job in connect(server.address).watch("a")] == [1, 7, 2, 3]


def test_a_job_that_was_made_anew_is_news(connect):
    with ScriptedServer(
        WatchJob=[a_stream(an_event(a_job(3))), a_stream(an_event(a_job(3, created=2))), THE_END]
    ) as server:
        assert [job.revision for job in connect(server.address).watch("a")] == [3, 3, 2, 3]


def test_events_of_other_kinds_are_passed_over(connect):
    others = [type for type in range(10) if type not in (1, 2, 5)]
    messages = [an_event(a_job(revision), type) for revision, type in enumerate(others, 1)]
    empty = pb.WatchJobResponse().SerializeToString()
    with ScriptedServer(WatchJob=[a_stream(empty, *messages, an_event(a_done_job(99)))]) as server:
        assert [job.revision for job in connect(server.address).watch("a")] == [99]


def test_a_done_job_ends_a_watch_whatever_the_server_does(connect, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.client.watch.END_SECONDS", 0.1)
    with ScriptedServer(WatchJob=[]) as server:
        server.script("WatchJob", a_stream(an_event(a_done_job()), then=server.silence))
        assert [job.state for job in connect(server.address).watch("a")] == [JobState.SUCCEEDED]
        assert server.ended.acquire(timeout=10)


def test_a_done_job_of_a_state_from_the_future_ends_a_watch(connect):
    with ScriptedServer(WatchJob=[a_stream(an_event(a_job(state=99, done=True)))]) as server:
        (job,) = connect(server.address).watch("a")
    assert job.done


def test_a_watch_asks_for_what_it_was_told(connect):
    with ScriptedServer(WatchJob=[THE_END]) as server:
        client = connect(server.address)
        list(client.watch("a"))
        list(client.watch("a", heartbeat_interval_seconds=2, min_update_interval_seconds=0))
    first, second = server.requests["WatchJob"]
    assert not first.HasField("heartbeat_interval")
    assert not first.HasField("min_update_interval")
    assert (second.heartbeat_interval.seconds, second.HasField("min_update_interval")) == (2, True)


def test_a_watch_waits_as_long_as_the_server_asks(connect):
    aged = StreamAgeError()
    aged.retry_after_seconds = 0.4
    with ScriptedServer(WatchJob=[refuse(aged), THE_END]) as server:
        began = time.monotonic()
        list(connect(server.address).watch("a"))
    assert time.monotonic() - began >= 0.4


def test_a_watch_gives_up_when_told_to(connect, unused_address):
    began = time.monotonic()
    with pytest.raises(UnavailableError, match=r"nothing was heard from the server for 0\.5 s"):
        next(connect(unused_address).watch("a", give_up_seconds=0.5))
    assert 0.5 <= time.monotonic() - began < 10


def test_a_watch_gives_up_on_a_host_that_does_not_answer(connect):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(UnavailableError, match="silent"):
            next(connect(address).watch("a", give_up_seconds=0.5))


@in_peace(1)
def test_a_watch_that_hears_of_its_server_does_not_give_up(connect):
    cut = [a_stream(an_event(a_job(revision)), then=fail(grpc.StatusCode.UNAVAILABLE)) for revision in range(10, 19)]
    with ScriptedServer(WatchJob=[*cut, THE_END]) as server:
        assert len(list(connect(server.address).watch("a", give_up_seconds=3))) == 11


def test_a_row_of_failures_is_logged_once(connect, caplog, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: low)
    caplog.set_level(logging.WARNING, "jobstatus_grpc.client")
    with ScriptedServer(WatchJob=[fail(grpc.StatusCode.UNAVAILABLE)] * 4 + [THE_END]) as server:
        list(connect(server.address).watch("a"))
    assert [record.getMessage().split("(")[0] for record in caplog.records] == [
        "the watch of job a was cut ",
        "the watch of job a goes on",
    ]


def test_a_watch_cancelled_while_its_server_is_silent_is_cancelled():
    async def main() -> None:
        async with AsyncJobStatusClient(server.address) as client:
            reading = asyncio.ensure_future(anext(client.watch("a")))
            await asyncio.to_thread(server.await_request, "WatchJob")
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading

    with ScriptedServer(WatchJob=[]) as server:
        server.script("WatchJob", server.silent_stream)
        asyncio.run(main())
