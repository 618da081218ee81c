"""Which errors are retried, and that a call always ends in time, with an error of ours."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading
import time
import uuid
from typing import Any

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import AsyncJobStatusClient, JobUpdate
from jobstatus_grpc.client.retry import Backoff, RetryBudget
from jobstatus_grpc.errors import (
    DeadlineExceededError,
    DrainingError,
    InternalError,
    JobStatusError,
    StoreFullError,
    TooManyRequestsError,
    UnavailableError,
)
from jobstatus_grpc.wire import status
from tests.support.scripted_server import ScriptedServer, a_job, fail, refuse, reply
from tests.support.timing import MAX_PAUSE_SECONDS, rerun_after_pause

AWAY = fail(grpc.StatusCode.UNAVAILABLE)
WRITES: dict[str, Any] = {
    "CreateJob": (lambda client: client.create("n"), pb.CreateJobResponse(job=a_job())),
    "UpdateJob": (lambda client: client.update("a", progress=1), pb.UpdateJobResponse(job=a_job())),
    "CancelJob": (lambda client: client.cancel("a"), pb.CancelJobResponse(job=a_job())),
}
PASSING = {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
PERMANENT = [code for code in grpc.StatusCode if code not in PASSING]


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_tried_again_with_the_same_request_id(connect, name):
    write, response = WRITES[name]
    with ScriptedServer(None, **{name: [AWAY, AWAY, reply(response)]}) as server:
        assert write(connect(server.address)).id == "a"
    ids = [request.request_id for request in server.requests[name]]
    assert len(ids) == 3
    assert len(set(ids)) == 1
    assert uuid.UUID(ids[0]).version == 7


def test_each_update_of_a_batch_is_tried_again_with_its_own_request_id(connect):
    response = pb.BatchUpdateJobsResponse(results=[pb.BatchUpdateJobsResult(job=a_job())] * 2)
    with ScriptedServer(BatchUpdateJobs=[AWAY, reply(response)]) as server:
        connect(server.address).batch_update([JobUpdate("a"), JobUpdate("a", request_id="mine")])
    first, second = ([update.request_id for update in sent.updates] for sent in server.requests["BatchUpdateJobs"])
    assert first == second
    assert first[1] == "mine"
    assert first[0] not in ("", "mine")


def test_each_call_has_a_request_id_of_its_own(connect):
    with ScriptedServer(CancelJob=[reply(pb.CancelJobResponse(job=a_job()))]) as server:
        client = connect(server.address)
        for request_id in (None, None, "mine"):
            client.cancel("a", request_id=request_id)
    first, second, third = (request.request_id for request in server.requests["CancelJob"])
    assert first != second
    assert third == "mine"


def test_a_read_is_tried_again(connect):
    with ScriptedServer(GetJob=[AWAY, reply(pb.GetJobResponse(job=a_job(7)))]) as server:
        assert connect(server.address).get("a").revision == 7


def test_a_call_that_the_server_cancelled_is_tried_again(connect):
    answers = [fail(grpc.StatusCode.CANCELLED), reply(pb.GetJobResponse(job=a_job(7)))]
    with ScriptedServer(GetJob=answers) as server:
        assert connect(server.address).get("a").revision == 7


@pytest.mark.parametrize("code", PERMANENT, ids=lambda code: code.name)
def test_other_errors_are_raised_at_once_and_are_ours(connect, code):
    with ScriptedServer(GetJob=[fail(code)]) as server, pytest.raises(JobStatusError, match="as scripted"):
        connect(server.address).get("a")
    assert len(server.requests["GetJob"]) == 1


def test_too_many_requests_is_tried_again_when_the_server_says(connect):
    busy = TooManyRequestsError()
    busy.retry_after_seconds = 0.3
    with ScriptedServer(GetJob=[refuse(busy), reply(pb.GetJobResponse(job=a_job()))]) as server:
        began = time.monotonic()
        connect(server.address).get("a")
    assert time.monotonic() - began >= 0.3


def test_a_full_store_is_for_people_to_see_to(connect):
    with ScriptedServer(GetJob=[refuse(StoreFullError())]) as server, pytest.raises(StoreFullError):
        connect(server.address).get("a")
    assert len(server.requests["GetJob"]) == 1


@rerun_after_pause(0.1)
def test_a_server_that_is_away_for_good_is_unavailable_within_the_deadline(connect, unused_address):
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="refused"):
        connect(unused_address, timeout_seconds=0.8).get("a")
    assert 0.4 <= time.monotonic() - began < 0.8 + MAX_PAUSE_SECONDS


def test_a_silent_server_meets_the_deadline(connect):
    with ScriptedServer(GetJob=[lambda *call: server.silence(*call)]) as server, pytest.raises(DeadlineExceededError):
        connect(server.address, timeout_seconds=0.2).get("a")


def test_a_calls_own_deadline_goes_before_the_clients(connect):
    with ScriptedServer(GetJob=[lambda *call: server.silence(*call)]) as server, pytest.raises(DeadlineExceededError):
        connect(server.address).get("a", timeout_seconds=0.2)


def test_a_call_waits_for_a_server_that_restarts(connect, sqlite_server, background):
    client = connect(sqlite_server.address)
    job = client.create("n")
    sqlite_server.kill()
    reading = background(lambda: client.get(job.id))
    sqlite_server.start()
    assert reading.result() == job


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("body", [b"\xff\xff", pb.GetJobResponse(job=a_job(created=2**60)).SerializeToString()])
def test_a_reply_that_makes_no_sense_is_an_internal_error(connect, body):
    with ScriptedServer(GetJob=[lambda *call: body]) as server, pytest.raises(InternalError):
        connect(server.address).get("a")


def test_a_batch_that_is_not_answered_in_full_is_an_internal_error(connect):
    with ScriptedServer(BatchUpdateJobs=[reply(pb.BatchUpdateJobsResponse())]) as server, pytest.raises(InternalError):
        connect(server.address).batch_update([JobUpdate("a")])


# Before Python 3.11 a task cannot distinguish that from its own cancellation.
CLOSED = (UnavailableError,) if sys.version_info >= (3, 11) else (UnavailableError, concurrent.futures.CancelledError)


def test_closing_the_client_ends_calls_that_are_under_way(connect, background):
    with ScriptedServer(GetJob=[lambda *call: server.silence(*call)]) as server:
        client = connect(server.address)
        reading = background(lambda: client.get("a"))
        server.await_request("GetJob")
        client.close()
        with pytest.raises(CLOSED):
            reading.result()


def test_closing_the_client_ends_calls_that_wait_for_their_next_try(connect, background, monkeypatch, unused_address):
    waiting = threading.Event()

    def long_pause(low: float, high: float) -> float:
        waiting.set()
        return 5.0

    monkeypatch.setattr("random.uniform", long_pause)
    client = connect(unused_address)
    reading = background(lambda: client.get("a"))
    assert waiting.wait(10)
    began = time.monotonic()
    client.close()
    with pytest.raises(UnavailableError, match="closed"):
        reading.result()
    assert time.monotonic() - began < 4


def test_a_closed_client_is_unavailable(connect, memory_address):
    client = connect(memory_address)
    client.close()
    client.close()
    with pytest.raises(UnavailableError, match="closed"):
        client.get("a")


def test_a_cancelled_task_is_cancelled_and_so_is_its_call():
    async def main() -> None:
        async with AsyncJobStatusClient(server.address) as client:
            task = asyncio.create_task(client.get("a"))
            await asyncio.to_thread(server.await_request, "GetJob")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.ended.acquire, timeout=10)

    with ScriptedServer(GetJob=[lambda *call: server.silence(*call)]) as server:
        asyncio.run(main())


class Refused(grpc.RpcError):
    """An attempt that failed as a grpc call does."""

    def __init__(
        self,
        code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE,
        error: JobStatusError | None = None,
        details: str = "refused",
    ) -> None:
        self._code = code
        self._details = details
        self._trailers = status.trailers_of(error) if error else ()

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailers


@pytest.fixture
def longest_jitter(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: high)


def test_pauses_double_from_a_tenth_of_a_second_to_ten_seconds(longest_jitter):
    backoff = Backoff()
    assert [round(backoff.pause_seconds(), 1) for _ in range(9)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]
    backoff.reset()
    assert backoff.pause_seconds() == 0.1


def test_pauses_are_random_down_to_nothing():
    pauses = [Backoff().pause_seconds() for _ in range(1000)]
    assert 0 <= min(pauses) < 0.01
    assert 0.09 < max(pauses) <= 0.1


def test_what_the_server_asks_for_comes_on_top(longest_jitter):
    error = DrainingError()
    assert Backoff().pause_seconds(error) == 0.1  # a default of the class is not the server's word
    error.retry_after_seconds = 2.0
    assert Backoff().pause_seconds(error) == 2.1
    error.retry_after_seconds = 10_000.0
    assert Backoff().pause_seconds(error) == 60.1


def test_the_last_try_begins_a_second_before_the_deadline(longest_jitter):
    now = 0.0
    tries = RetryBudget(10, clock=lambda: now)
    while now < 9.0:
        now += tries.pause_seconds(Refused())
    assert now == 9.0
    with pytest.raises(UnavailableError):
        tries.pause_seconds(Refused())


def test_a_server_that_asks_for_more_time_than_there_is_is_not_tried_again():
    error = DrainingError()
    error.retry_after_seconds = 9.5
    with pytest.raises(DrainingError):
        RetryBudget(10).pause_seconds(Refused(error=error))


def test_a_deadline_met_while_trying_again_says_what_was_wrong_before():
    tries = RetryBudget(10)
    tries.pause_seconds(Refused())
    with pytest.raises(DeadlineExceededError, match="the try before: refused"):
        tries.pause_seconds(Refused(grpc.StatusCode.DEADLINE_EXCEEDED))


TLS_FAILED = "ipv4:127.0.0.1:1: Socket closed"


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ("ipv6:%5B::1%5D:1: Connection refused", "ipv4:127.0.0.1:1: the server closes connections at once"),
        ("ipv4:127.0.0.1:1: Connection refused", "127.0.0.1:1: Connection refused"),
    ],
)
def test_an_address_where_nothing_listens_does_not_hide_that_tls_failed_at_another_one(longest_jitter, last, says):
    now = 0.0
    tries = RetryBudget(10, clock=lambda: now)
    for why in (TLS_FAILED, last, last):
        tries.pause_seconds(Refused(details=f"failed to connect to all addresses; last error: UNKNOWN: {why}"))
    now = 10.0
    with pytest.raises(UnavailableError, match=says):
        tries.pause_seconds(Refused(details=f"failed to connect to all addresses; last error: UNKNOWN: {last}"))
