"""Around every call: unforeseen errors, the limit of calls in flight, and a line in the log."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import re
import shlex
import uuid
from datetime import timedelta
from typing import Any

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.server import logs
from jobstatus_grpc.server.held_refusals import HOLD_SECONDS, REFUSED_AT_ONCE
from jobstatus_grpc.server.logs import JsonFormatter, RequestLog, TextFormatter
from jobstatus_grpc.stores.memory import MemoryStore
from tests.support.loop import run
from tests.support.servers import serving


class OddStore(MemoryStore):
    """Raises an exception that no store may raise."""

    async def get(self, tenant, job_id, *, only=None):
        raise ZeroDivisionError("password=hunter2\nsecond line")

    async def commit(self, commands):
        raise KeyError("password=hunter2")


class HeldStore(MemoryStore):
    """Commits once `go_on` is set."""

    def __init__(self):
        super().__init__()
        self.go_on = asyncio.Event()
        self.is_asked = asyncio.Event()

    async def commit(self, commands):
        self.is_asked.set()
        await self.go_on.wait()
        return await super().commit(commands)


async def refused(call, refusal):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal(caught.value)


def calls_of(stub):
    """One call of each kind on a job that need not exist."""
    return {
        "CreateJob": lambda: stub.CreateJob(pb.CreateJobRequest()),
        "GetJob": lambda: stub.GetJob(pb.GetJobRequest(id="a")),
        "UpdateJob": lambda: stub.UpdateJob(pb.UpdateJobRequest(job=pb.JobStatus(id="a"))),
        "BatchUpdateJobs": lambda: stub.BatchUpdateJobs(
            pb.BatchUpdateJobsRequest(updates=[pb.UpdateJobRequest(job=pb.JobStatus(id="a"))])
        ),
        "CancelJob": lambda: stub.CancelJob(pb.CancelJobRequest(id="a")),
        "WatchJob": lambda: read_all(stub.WatchJob(pb.WatchJobRequest(id="a"))),
    }


async def read_all(stream):
    return [message async for message in stream]


@pytest.mark.parametrize("method", ["CreateJob", "GetJob", "UpdateJob", "BatchUpdateJobs", "CancelJob", "WatchJob"])
def test_an_unforeseen_error_is_internal_with_an_id_that_the_log_explains(refusal, caplog, method):
    async def scenario():
        async with serving(OddStore()) as stub:
            return await refused(calls_of(stub)[method](), refusal)

    error = run(scenario)
    assert (error.code, error.domain) == (grpc.StatusCode.INTERNAL, "jobstatus.v1")
    error_id = error.metadata["error_id"]
    assert uuid.UUID(error_id).hex == error_id
    assert error_id in error.message
    assert "hunter2" not in f"{error}"
    (record,) = [record for record in caplog.records if error_id in record.getMessage()]
    assert (record.levelname, method in record.getMessage()) == ("ERROR", True)
    assert "hunter2" in logging.Formatter().format(record)
    assert "Traceback" in logging.Formatter().format(record)


def test_the_server_goes_on_after_it(refusal, caplog):
    async def scenario():
        async with serving(OddStore()) as stub:
            ids = {(await refused(calls_of(stub)["GetJob"](), refusal)).metadata["error_id"] for _ in range(10)}
            assert len(ids) == 10
            assert (await refused(stub.GetJob(pb.GetJobRequest(id="/")), refusal)).reason == "INVALID_FIELD"

    run(scenario)


def test_one_call_too_many_is_refused_while_watches_go_on(refusal):
    async def scenario():
        store = HeldStore()
        async with serving(store, max_requests=2) as stub:
            store.go_on.set()
            await stub.CreateJob(pb.CreateJobRequest(job=pb.JobStatus(id="a")))
            store.go_on.clear()
            calls = [asyncio.ensure_future(calls_of(stub)["CreateJob"]()) for _ in range(2)]
            error = await refused_once_full(calls_of(stub)["GetJob"], refusal)
            assert error.kind == ("RESOURCE_EXHAUSTED", "TOO_MANY_REQUESTS")
            assert error.retry_seconds > 0
            stream = stub.WatchJob(pb.WatchJobRequest(id="a"))
            message: Any = await stream.read()
            assert message.event.job.id == "a"
            store.go_on.set()
            assert len({reply.job.id for reply in await asyncio.gather(*calls)}) == 2
            assert (await calls_of(stub)["GetJob"]()).job.id == "a"
            stream.cancel()

    run(scenario)


def test_when_many_calls_are_refused_most_refusals_are_sent_late(refusal):
    async def scenario():
        store, lines = HeldStore(), io.StringIO()
        log = RequestLog(log_format="json", stream=lines)
        async with serving(store, max_requests=1, request_log=log) as stub:
            waiting = asyncio.ensure_future(calls_of(stub)["CreateJob"]())
            await store.is_asked.wait()
            calls = [refused(calls_of(stub)["GetJob"](), refusal) for _ in range(5 * REFUSED_AT_ONCE)]
            assert {error.reason for error in await asyncio.gather(*calls)} == {"TOO_MANY_REQUESTS"}
            log.flush()
            assert max(json.loads(line)["duration_ms"] for line in lines.getvalue().splitlines()) >= HOLD_SECONDS * 1000
            store.go_on.set()
            await waiting

    run(scenario)


async def refused_once_full(call, refusal):
    """Call until the calls before it have arrived, and return the error."""
    while True:
        try:
            await call()
        except grpc.aio.AioRpcError as error:
            return refusal(error)


def test_a_call_that_was_cancelled_is_in_flight_no_more():
    async def scenario():
        store = HeldStore()
        async with serving(store, max_requests=1) as stub:
            call = stub.CreateJob(pb.CreateJobRequest())
            waiting = asyncio.ensure_future(read_reply(call))
            await store.is_asked.wait()
            call.cancel()
            await waiting
            while True:
                try:
                    await calls_of(stub)["GetJob"]()
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.NOT_FOUND:
                        break
            store.go_on.set()

    run(scenario)


async def read_reply(call):
    with pytest.raises(asyncio.CancelledError):
        await call


def test_calls_that_run_when_the_server_is_stopped_finish(refusal):
    async def scenario():
        store = HeldStore()
        async with serving(store, drain_grace=timedelta(seconds=15)) as stub:
            call = asyncio.ensure_future(calls_of(stub)["CreateJob"]())
            await store.is_asked.wait()
            asyncio.get_running_loop().call_later(0.3, store.go_on.set)
        assert (await call).job.revision == 1

    run(scenario)


def test_a_call_that_outlasts_the_grace_is_cut_off_and_does_not_hold_up_the_end():
    async def scenario():
        store = HeldStore()
        async with serving(store, drain_grace=timedelta(seconds=0.5)) as stub:
            call = asyncio.ensure_future(calls_of(stub)["CreateJob"]())
            await store.is_asked.wait()
            asyncio.get_running_loop().call_later(10, store.go_on.set)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert not store.go_on.is_set()

    run(scenario)


def logged(log_format, scenario):
    """Run a scenario on a stub, and return the lines that the server wrote."""
    stream = io.StringIO()

    async def with_log():
        log = RequestLog(log_format=log_format, stream=stream)
        async with serving(MemoryStore(), request_log=log) as stub:
            await scenario(stub)

    run(with_log)
    return stream.getvalue().splitlines()


async def one_of_each(stub):
    for call in calls_of(stub).values():
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call()


def test_each_call_is_one_line_of_json():
    lines = [json.loads(line) for line in logged("json", one_of_each)]
    codes = {line["method"]: line["code"] for line in lines}
    assert len(lines) == len(codes)
    assert codes == {
        "CreateJob": "OK", "GetJob": "NOT_FOUND", "UpdateJob": "NOT_FOUND", "BatchUpdateJobs": "OK",
        "CancelJob": "NOT_FOUND", "WatchJob": "NOT_FOUND",
    }  # fmt: skip
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert 0 < line["duration_ms"] < 20_000
        assert line["caller"].startswith("ipv4:127.0.0.1:")
        assert (line["level"], line["message"]) == ("info", "request")


def test_each_call_is_one_line_of_text():
    lines = logged("text", one_of_each)
    assert [re.findall(r"method=(\w+) code=(\w+)", line)[0] for line in lines] == [
        ("CreateJob", "OK"), ("GetJob", "NOT_FOUND"), ("UpdateJob", "NOT_FOUND"), ("BatchUpdateJobs", "OK"),
        ("CancelJob", "NOT_FOUND"), ("WatchJob", "NOT_FOUND"),
    ]  # fmt: skip


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_request_is_logged_under_its_callers_id_or_one_made_for_it(log_format):
    async def scenario(stub):
        for metadata in [(("x-request-id", 'mine "1" \\'),), (("x-request-id", "x" * 5000),), (), ()]:
            await stub.CreateJob(pb.CreateJobRequest(), metadata=metadata)

    lines = logged(log_format, scenario)
    if log_format == "json":
        ids = [json.loads(line)["x_request_id"] for line in lines]
    else:
        texts = [line.partition("x_request_id=")[2] for line in lines]
        ids = [json.loads(text) if text.startswith('"') else text for text in texts]
    assert ids[0] == 'mine "1" \\'
    assert re.fullmatch("x{64,512}", ids[1])
    assert all(re.fullmatch("[0-9a-f]{16,}", made) for made in ids[2:])
    assert ids[2] != ids[3]


def test_a_watch_is_logged_once_and_when_it_ends():
    async def scenario(stub):
        await stub.CreateJob(pb.CreateJobRequest(job=pb.JobStatus(id="a")))
        stream = stub.WatchJob(pb.WatchJobRequest(id="a"))
        await stream.read()
        await asyncio.sleep(0.2)
        await stub.CancelJob(pb.CancelJobRequest(id="a"))
        message: Any = await stream.read()
        assert message.event.job.done
        assert await stream.read() is grpc.aio.EOF

    (line,) = [json.loads(line) for line in logged("json", scenario) if '"WatchJob"' in line]
    assert (line["code"], line["duration_ms"] >= 200) == ("OK", True)


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_the_line_of_a_call_names_the_job_the_requests_id_and_the_errors_reason(log_format):
    async def scenario(stub):
        await stub.CreateJob(pb.CreateJobRequest(job=pb.JobStatus(id="a"), request_id="made 1"))
        made = await stub.CreateJob(pb.CreateJobRequest())
        assert made.job.id
        for method, request in (
            (stub.UpdateJob, pb.UpdateJobRequest(job=pb.JobStatus(id="b"), request_id="u")),
            (stub.GetJob, pb.GetJobRequest(id="c")),
            (stub.CreateJob, pb.CreateJobRequest(job=pb.JobStatus(id="a"))),
        ):
            with pytest.raises(grpc.aio.AioRpcError):
                await method(request)
        await stub.BatchUpdateJobs(pb.BatchUpdateJobsRequest())

    lines = logged(log_format, scenario)
    if log_format == "text":
        words = [dict(word.split("=") for word in shlex.split(line.partition("request ")[2])) for line in lines]
    else:
        words = [json.loads(line) for line in lines]
    fields = [(line.get("job", ""), line.get("request_id"), line.get("reason")) for line in words]
    assert fields[1][0] != ""
    assert [fields[0], *fields[2:]] == [
        ("a", "made 1", None), ("b", "u", "JOB_NOT_FOUND"), ("c", None, "JOB_NOT_FOUND"),
        ("a", None, "JOB_ALREADY_EXISTS"), ("", None, None),
    ]  # fmt: skip


class StreamThatFailsOnce(io.StringIO):
    has_failed = False

    def write(self, text):
        if not self.has_failed:
            self.has_failed = True
            raise OSError("no space left on device")
        return super().write(text)


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_a_log_that_fails_changes_no_calls_outcome(transport, monkeypatch, caplog):
    monkeypatch.setattr(logs, "MAX_GATHERED_LINES", 1)

    async def scenario():
        log = RequestLog(log_format="json", stream=StreamThatFailsOnce())
        async with serving(MemoryStore(), request_log=log, transport=transport) as stub:
            for number in range(3):
                reply = await stub.CreateJob(pb.CreateJobRequest(job=pb.JobStatus(id=f"a{number}")))
                assert reply.job.revision == 1

    run(scenario)
    assert "the call itself is not affected" in caplog.text


HARD_TO_TELL = ["two\nlines", "\r\n\x1b[31m", 'quote " and \\', "ünïcode ✓", "\u2028"]


@pytest.mark.parametrize("message", HARD_TO_TELL)
@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_a_message_is_one_line_whatever_it_holds(formatter, message):
    record = logging.LogRecord("jobstatus_grpc.server", logging.WARNING, "", 0, "%s", (message,), None)
    line = formatter.format(record)
    assert line.splitlines() == [line]
    assert line.isprintable()
    if isinstance(formatter, JsonFormatter):
        assert json.loads(line)["message"] == message


def test_a_traceback_is_part_of_its_json_object():
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    line = JsonFormatter().format(logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), info))
    assert "\n" not in line
    assert "ValueError: two\nlines" in json.loads(line)["traceback"]
