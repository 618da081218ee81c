"""The limit of watches, and that watches and other calls do not starve each other."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from tests.support.raw_http2 import INITIAL_WINDOW_SIZE, PREFACE, RawConnection, call, message, settings
from tests.support.timing import admitted_within_a_second

SPARE_BYTES = 8
"""More than two first messages differ by, since each has the time."""

TOO_MANY = ("RESOURCE_EXHAUSTED", "TOO_MANY_WATCHERS")


def admitted(service, job):
    return admitted_within_a_second(lambda: service.watch(job.id))


def opened(service, job, count):
    return [admitted(service, job) for _ in range(count)]


def refused_watch(refused, service, job):
    return refused(lambda: list(service.watch(job.id)))


@pytest.fixture(scope="module")
def limited(serve_module):
    """A server that admits three watches."""
    return serve_module("--max-watchers", "3", "--max-requests", "100")


@pytest.fixture
def running(limited, new_id):
    return limited.job_in("IN_PROGRESS", id=new_id())


def test_one_watch_too_many_is_refused_with_a_retry_delay(limited, refused, running):
    streams = opened(limited, running, 3)
    refusal = refused_watch(refused, limited, running)
    assert refusal.kind == TOO_MANY
    assert refusal.retry_seconds > 0
    limited.update(running.id, state="JOB_STATE_SUCCEEDED")
    assert [len(list(stream)) for stream in streams] == [1, 1, 1]


def test_other_calls_are_answered_while_no_watch_is(limited, refused, new_id, running):
    streams = opened(limited, running, 3)
    for _ in range(5):
        assert refused_watch(refused, limited, running).kind == TOO_MANY
        assert limited.update(limited.create(id=new_id()).id, reason="x").revision == 2
    limited.cancel(running.id)
    limited.update(running.id, state="JOB_STATE_CANCELLED")
    assert all(list(stream)[-1].event.job.done for stream in streams)


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_watch_whose_client_has_gone_is_free_within_a_second(limited, running, how):
    for _ in range(3):
        leaver = type(limited)(limited.address)
        streams = opened(leaver, running, 3)
        if how == "cancel":
            for stream in streams:
                stream.cancel()
        else:
            leaver.close()
        streams = [admitted(limited, running) for _ in range(3)]
        leaver.close()
        for stream in streams:
            stream.cancel()
        admitted(limited, running).cancel()


def test_a_watch_that_has_ended_or_was_refused_takes_no_place(limited, refused, running, new_id):
    done = limited.job_in("SUCCEEDED", id=new_id())
    first = admitted(limited, running)
    for _ in range(10):
        assert len(list(limited.watch(done.id))) == 1
        assert refused(lambda: list(limited.watch(new_id()))).reason == "JOB_NOT_FOUND"
        assert refused(lambda: list(limited.watch("/"))).reason == "INVALID_FIELD"
    rest = opened(limited, running, 2)
    assert refused_watch(refused, limited, running).kind == TOO_MANY
    for stream in (first, *rest):
        stream.cancel()


def test_a_watch_keeps_its_place_until_its_last_message_is_read(serve, refused, new_id):
    async def read_only_the_first_messages():
        opening = PREFACE + settings((INITIAL_WINDOW_SIZE, len(message(first)) + SPARE_BYTES))
        connection = await RawConnection.open(service.address, opening=opening)
        request = pb.WatchJobRequest(id=running.id)
        await connection.send(b"".join(call(stream, "WatchJob", request) for stream in (1, 3, 5)))
        await connection.receive(3 * len(message(first)))
        await asyncio.to_thread(end_of_the_job)
        await connection.send(settings((INITIAL_WINDOW_SIZE, 65_535)))
        await asyncio.to_thread(opened, service, other, 3)
        await connection.close()

    def end_of_the_job():
        ended = opened(service, running, 1)
        service.update(running.id, state="JOB_STATE_SUCCEEDED", reason="x" * 1000)
        assert len(list(ended[0])) == 1
        streams.extend(opened(service, other, 1))
        assert refused(lambda: next(service.watch(other.id))).kind == TOO_MANY

    # The native front takes a message that is not read, and bounds what it keeps itself.
    service = serve("--max-watchers", "4", "--transport", "grpcio")
    running, other = (service.job_in("IN_PROGRESS", id=new_id()) for _ in range(2))
    first, streams = next(service.watch(running.id)), []
    asyncio.run(asyncio.wait_for(read_only_the_first_messages(), 20))


def test_a_caller_has_a_limit_of_its_own_over_all_its_connections(serve, refused, new_id):
    service = serve("--max-watchers-per-caller", "2")
    job = service.job_in("IN_PROGRESS", id=new_id())
    other = type(service)(service.address)
    streams = [*opened(service, job, 1), *opened(other, job, 1)]
    for caller in (service, other):
        refusal = refused_watch(refused, caller, job)
        assert refusal.kind == TOO_MANY
        assert refusal.retry_seconds > 0
    streams[0].cancel()
    streams.append(admitted(other, job))
    service.update(job.id, state="JOB_STATE_SUCCEEDED")
    assert [len(list(stream)) for stream in streams[1:]] == [1, 1]
    other.close()


def test_one_host_gets_at_most_eight_of_nine_places(serve, refused, new_id):
    service = serve("--max-watchers", "18")
    job = service.job_in("IN_PROGRESS", id=new_id())
    streams = opened(service, job, 16)
    assert refused_watch(refused, service, job).kind == TOO_MANY
    streams[0].cancel()
    admitted(service, job).cancel()


def test_under_a_storm_of_watches_every_call_is_answered(limited, running):
    def storm(number):
        codes = set()
        for _ in range(30):
            stream = limited.watch(running.id)
            try:
                next(stream)
                stream.cancel()
            except grpc.RpcError as error:
                codes.add(error.code())
        return codes

    with ThreadPoolExecutor(8) as pool:
        storms = [pool.submit(storm, number) for number in range(8)]
        for number in range(100):
            assert limited.update(running.id, labels={"n": str(number)}).labels["n"] == str(number)
        codes = set().union(*(one.result() for one in storms))
    assert codes <= {grpc.StatusCode.RESOURCE_EXHAUSTED}
    admitted(limited, running).cancel()
