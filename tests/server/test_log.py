"""The log of a whole server, as a log collector reads it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import re
import signal
import socket
import struct
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.job import Command, Create, JobState, Update
from jobstatus_grpc.server.app import DescriptorCheck
from jobstatus_grpc.server.logs import MAX_PENDING_BYTES, Allowance, JsonFormatter, LogWriter, TextFormatter
from jobstatus_grpc.stores.batch import apply_all
from jobstatus_grpc.stores.interface import Silence
from tests.support.auth import TRANSPORTS, AuthText


def lines_of(path):
    return path.read_text().splitlines()


def frame(kind, stream, payload):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, 4 * (kind == 1)]) + struct.pack(">I", stream) + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# A call whose headers HTTP/2 does not allow: gRPC's core logs it.
ODD_CALL = PREFACE + frame(4, 0, b"") + frame(1, 1, b"\0\x02te\x08nonsense")


def provoke(service, new_id):
    """Make calls that may be logged."""
    chance = random.Random(3)
    host, port = service.address.split(":")
    for data in (*(chance.randbytes(size) for size in (1, 9, 24, 500, 5000)), ODD_CALL):
        with socket.create_connection((host, int(port))) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(data)
            connection.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                while connection.recv(1000):
                    pass
    job = service.job_in("IN_PROGRESS", id=new_id())
    service.watch(job.id).cancel()
    for method in ("GetJob", "Nothing\n", "BatchUpdateJobs"):
        with contextlib.suppress(grpc.RpcError):
            service.send(method, b"\xff" * 100)
    with contextlib.suppress(grpc.RpcError):
        service.send("GetJob", bytes(5 * 1024 * 1024))


def test_every_line_of_a_json_log_is_an_object_with_time_level_and_message(serve, tmp_path, new_id):
    log = tmp_path / "log"
    service = serve("--log-format", "json", "--log-level", "debug", log=log, store=f"sqlite:///{tmp_path}/jobs.db")
    provoke(service, new_id)
    assert service.process.terminate() == 0
    entries = [json.loads(line) for line in lines_of(log)]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in entries)
    assert "CreateJob" in {line.get("method") for line in entries}


def test_the_last_calls_before_the_end_are_in_the_log(serve, tmp_path, new_id):
    log = tmp_path / "log"
    service = serve("--log-format", "json", "--log-calls", log=log)
    job = service.create(id=new_id())
    service.process.terminate()
    methods = [json.loads(line).get("method") for line in lines_of(log)]
    assert methods.count("CreateJob") == 1
    assert job.revision == 1


@pytest.mark.parametrize("level", ["warning", "error"])
def test_calls_are_not_logged_where_only_trouble_is_asked_for(serve, tmp_path, level):
    log = tmp_path / "log"
    service = serve("--log-level", level, log=log)
    service.create()
    assert service.process.terminate() == 0
    assert lines_of(log) == []


JOB_FIELDS = ("from", "to", "attempt", "revision", "reason", "error", "request_id")


@pytest.mark.parametrize("store", ["memory:", "sqlite"])
def test_the_log_says_what_happened_to_a_job(serve, tmp_path, new_id, store):
    log = tmp_path / "log"
    store = f"sqlite:///{tmp_path}/jobs.db" if store == "sqlite" else store
    service = serve("--log-format", "json", log=log, store=store)
    job = service.create(id=new_id(), request_id="made-1")
    service.update(job.id, state="JOB_STATE_IN_PROGRESS", reason="began")
    service.update(job.id, progress=40)
    service.cancel(job.id, reason="too slow")
    service.update(job.id, state="JOB_STATE_FAILED", error={"message": "disk full"})
    service.stub.DeleteJob(pb.DeleteJobRequest(id=job.id))
    service.process.terminate()
    entries = [json.loads(line) for line in lines_of(log)]
    lines = [entry for entry in entries if entry.get("job") == job.id]
    assert {(line["level"], line["logger"]) for line in lines} == {("info", "jobstatus_grpc.jobs")}
    assert all(line["actor"].startswith("ipv4:127.0.0.1:") for line in lines)
    assert [{key: line[key] for key in JOB_FIELDS if key in line} for line in lines] == [
        {"to": "pending", "attempt": 0, "revision": 1, "request_id": "made-1"},
        {"from": "pending", "to": "in_progress", "attempt": 1, "revision": 2, "reason": "began"},
        {
            "from": "in_progress",
            "to": "in_progress",
            "attempt": 1,
            "revision": 4,
            "reason": "cancel requested: too slow",
        },
        {
            "from": "in_progress",
            "to": "failed",
            "attempt": 1,
            "revision": 5,
            "reason": "disk full",
            "error": "disk full",
        },
        {"to": "deleted", "revision": 6},
    ]
    assert [entry for entry in entries if "method" in entry] == []


def call_with(service, token):
    """Call GetCallerIdentity with any bytes as the token, which grpc's clients refuse to send; wait for the answer."""
    values = {
        ":method": b"POST", ":scheme": b"http", ":path": b"/jobstatus.v1.JobStatusService/GetCallerIdentity",
        ":authority": b"x", "te": b"trailers", "content-type": b"application/grpc", "authorization": b"Bearer " + token,
    }  # fmt: skip
    headers = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value for name, value in values.items()
    )
    end_of_request = b"\0\0\5\0\1\0\0\0\1" + bytes(5)  # DATA with an empty message
    host, port = service.address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(PREFACE + frame(4, 0, b"") + frame(1, 1, headers) + end_of_request)
        answer = connection.makefile("rb")
        kind = None
        while kind != 1:  # HEADERS
            head = answer.read(9)
            kind = head[3]
            answer.read(int.from_bytes(head[:3], "big"))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_token_that_is_not_utf8_is_not_in_the_log(serve, tmp_path, transport):
    auth, log = AuthText(tmp_path / "auth.toml"), tmp_path / "log"
    auth.admit("ci")
    service = serve("--auth", str(auth.path), "--log-calls", "--transport", transport, log=log)
    for _ in range(3):
        call_with(service, b"SECRET\xe9")
    assert service.process.terminate() == 0
    lines = lines_of(log)
    assert sum("BAD_IDENTITY" in line for line in lines) == 3
    assert not [line for line in lines if "SECRET" in line or "Traceback" in line]
    assert sum("metadata that is not UTF-8" in line for line in lines) == (transport == "grpcio")


def record_of(before, after):
    record = logging.LogRecord("jobstatus_grpc.jobs", logging.INFO, "", 0, "job", (), None)
    record.fields = {"job": "0" * 36, "from": before, "to": after, "actor": "ipv4:127.0.0.1:50000", "revision": 1}
    return record


def test_an_hour_of_sixteen_jobs_a_second_is_a_24th_of_100_megabytes():
    now = [0.0]
    allowance = Allowance(seconds=lambda: now[0])
    records = [record_of(None, "pending"), record_of("pending", "in_progress"), record_of("in_progress", "succeeded")]
    lines = [JsonFormatter().format(record) for record in records]
    written = 0
    for job in range(16 * 3600):
        now[0] = job / 16
        for line in lines:
            if allowance.admits():
                allowance.written(line)
                written += len(line)
    assert 2_000_000 < written < 100_000_000 / 24


def test_once_routine_lines_are_left_out_all_else_is_logged(monkeypatch, caplog):
    monkeypatch.setattr("jobstatus_grpc.stores.batch._admits_routine", lambda: False)
    caplog.set_level(logging.INFO, "jobstatus_grpc.jobs")
    now = datetime.now(timezone.utc)
    states = [JobState.PENDING, JobState.IN_PROGRESS, JobState.RETRYING, JobState.IN_PROGRESS, JobState.SUCCEEDED]
    commands: list[Command] = [Create(id="a"), *(Update(id="a", changes={"state": state}) for state in states[1:])]
    apply_all(
        commands, {}, now=now, retention=timedelta(days=1), silence_of=lambda key: Silence(timedelta(0), None)
    ).log()
    moves = [(record.fields.get("from"), record.fields["to"]) for record in caplog.records]
    assert moves == [("in_progress", "retrying"), ("retrying", "in_progress")]


def test_a_line_of_text_has_the_fields_of_the_job():
    record = record_of("pending", "in_progress")
    record.fields["reason"] = 'two words, a "quote" and job=other'
    line = TextFormatter().format(record)
    assert line.endswith(
        f"info    job job={'0' * 36} from=pending to=in_progress actor=ipv4:127.0.0.1:50000 revision=1 "
        r'reason="two words, a \"quote\" and job=other"'
    )


def test_a_log_without_a_reader_fails_no_call(serve, tmp_path, new_id):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    service = serve(log=pipe)
    job = service.job_in("IN_PROGRESS", id=new_id())
    stream = service.watch(job.id)
    next(stream)
    os.close(reader)
    for number in range(1500):
        assert service.update(job.id, labels={"n": str(number)}).revision == job.revision + number + 1
    end = service.update(job.id, state="JOB_STATE_SUCCEEDED")
    assert [message.event.job for message in stream][-1] == end
    service.process.signal(signal.SIGTERM)
    assert service.process.wait() == 0


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_a_log_on_a_full_disk_fails_no_call_and_no_end(serve, new_id, transport):
    service = serve("--transport", transport, log=Path("/dev/full"))
    job = service.job_in("IN_PROGRESS", id=new_id())
    for number in range(1500):
        assert service.update(job.id, labels={"n": str(number)}).revision == job.revision + number + 1
    assert service.process.terminate() == 0


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_a_reader_of_the_log_that_stops_stops_nothing_and_lines_are_counted(serve, tmp_path, new_id, transport):
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    fill(pipe)
    service = serve("--transport", transport, "--metrics", "127.0.0.1:0", log=pipe)
    job = service.job_in("IN_PROGRESS", id=new_id())
    for number in range(1500):
        assert service.update(job.id, labels={"n": str(number)}).revision == job.revision + number + 1
    assert service.process.terminate() == 0
    os.close(reader)


def fill(pipe):
    """Fill a named pipe, as a reader that has stopped leaves it."""
    writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"\n" * 4096)
    os.close(writer)


def test_lines_beyond_the_bound_are_dropped_and_counted_and_their_number_is_logged(caplog):
    read_end, write_end = os.pipe()
    writer = LogWriter(write_end)
    line = "x" * 1023 + "\n"
    for _ in range(2 * MAX_PENDING_BYTES // len(line)):
        writer.write(line)
    assert 4000 < writer.lines_dropped < 4200
    with open(read_end, "rb") as reader:
        draining = threading.Thread(target=reader.read)
        draining.start()
        writer.close(20)
        os.close(write_end)
        draining.join(20)
    ends_at = time.monotonic() + 10
    while logged_drops(caplog) != writer.lines_dropped:
        assert time.monotonic() < ends_at
        time.sleep(0.01)


def logged_drops(caplog):
    return sum(map(int, re.findall(r"(\d+) lines of this log were dropped", caplog.text)))


def test_a_line_cut_by_a_full_disk_spoils_no_other_line():
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    writer = LogWriter(write_end)
    os.write(write_end, b"x" * 4095 + b"\n")
    writer.write("a\nb\n")
    writer.close()
    with open(read_end, "rb", buffering=0) as reader:
        assert reader.read(65536).endswith(b"\na\nb\n")
    os.close(write_end)


def test_the_log_says_when_the_server_drains(serve, tmp_path):
    log = tmp_path / "log"
    service = serve("--log-format", "text", log=log)
    service.process.terminate()
    assert any("draining" in line for line in lines_of(log))


def test_a_lack_of_file_descriptors_is_logged_once_a_minute_and_so_is_its_end(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    now = [0.0]
    check = DescriptorCheck(seconds=lambda: now[0])
    opened = os.open

    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    for now[0], state in ((0, refuse), (0.5, refuse), (59, opened), (59.5, refuse), (61, refuse)):
        monkeypatch.setattr("os.open", state)
        check.run()
    monkeypatch.setattr("os.open", opened)
    levels = [(record.levelname, record.message.partition(" are ")[0]) for record in caplog.records]
    assert levels == [
        ("ERROR", "no file descriptors"), ("INFO", "file descriptors"), ("ERROR", "no file descriptors"),
    ]  # fmt: skip
    assert "raise it (ulimit -n" in caplog.text
