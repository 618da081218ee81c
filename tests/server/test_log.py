"""The log of a whole server, as a log collector reads it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import struct

import grpc
import pytest


def lines_of(path):
    return path.read_text().splitlines()


def frame(kind, stream, payload):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, 4 * (kind == 1)]) + struct.pack(">I", stream) + payload


# A call whose headers HTTP/2 does not allow: gRPC's core logs it.
ODD_CALL = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, b"") + frame(1, 1, b"\0\x02te\x08nonsense")


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
    service = serve("--log-format", "json", log=log)
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


def test_the_log_says_when_the_server_drains(serve, tmp_path):
    log = tmp_path / "log"
    service = serve("--log-format", "text", log=log)
    service.process.terminate()
    assert any("draining" in line for line in lines_of(log))
