"""A client that does not read costs no other call anything, and leaves nothing behind."""

from __future__ import annotations

import socket
import struct
import time

import grpc
import psutil
import pytest
from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb

from tests.support.timing import MAX_PAUSE_SECONDS, within_a_second

READERS = 20
PLACES = READERS + 3
"""One host gets READERS + 1 of them."""
LARGE = {"text": "x" * 60_000}
MIB = 1024 * 1024
NONE = duration_pb2.Duration()


@pytest.fixture(scope="module")
def service(serve_module):
    return serve_module("--max-watchers", str(PLACES))


@pytest.fixture
def running(service, new_id):
    return service.job_in("IN_PROGRESS", id=new_id(), result=LARGE)


def text(value):
    return bytes([len(value)]) + value.encode()


def frame(kind, flags, stream, payload):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


class DeafReader:
    """A client of WatchJob with the largest flow-control window, which reads nothing from its socket."""

    def __init__(self, address, job_id):
        host, port = address.split(":")
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.connect((host, int(port)))
        headers = {
            ":method": "POST", ":scheme": "http", ":path": "/jobstatus.v1.JobStatusService/WatchJob",
            ":authority": address, "te": "trailers", "content-type": "application/grpc",
        }  # fmt: skip
        encoded = b"".join(b"\0" + text(name) + text(value) for name, value in headers.items())
        body = pb.WatchJobRequest(id=job_id, min_update_interval=NONE).SerializeToString()
        self._socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + frame(4, 0, 0, struct.pack(">HI", 4, 2**31 - 1))  # SETTINGS: the window of a stream
            + frame(8, 0, 0, struct.pack(">I", 2**31 - 65536))  # WINDOW_UPDATE of the connection
            + frame(1, 4, 1, encoded)  # HEADERS
            + frame(0, 1, 1, b"\0" + struct.pack(">I", len(body)) + body)  # DATA, the last
        )

    def is_answered(self):
        """Whether the first bytes have arrived; they stay unread."""
        return bool(self._socket.recv(1, socket.MSG_PEEK))

    def close(self):
        self._socket.close()


def deaf_readers(service, job):
    readers = [DeafReader(service.address, job.id) for _ in range(READERS)]
    assert all(reader.is_answered() for reader in readers)
    wait_until_full(service, job)
    return readers


class IdleReader:
    """A client that takes the first message and asks for no other: HTTP/2's flow control holds the rest back."""

    def __init__(self, service, job):
        self._stream = service.watch(job.id, min_update_interval=NONE, timeout=60)
        next(self._stream)

    def close(self):
        self._stream.cancel()


def idle_readers(service, job):
    return [IdleReader(service, job) for _ in range(READERS)]


def wait_until_full(service, job):
    """Wait until there is room for one watch."""
    while places(service, job, 2) == 2:
        pass


def places(service, job, wanted):
    """Open up to `wanted` watches, cancel them, and return how many were admitted."""
    admitted = []
    for stream in [service.watch(job.id) for _ in range(wanted)]:
        try:
            next(stream)
            admitted.append(stream)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
    for stream in admitted:
        stream.cancel()
    return len(admitted)


def watch_in_the_last_place(service, job):
    """Watch as soon as a place is free; begin with the second message."""
    while True:
        stream = service.watch(job.id, min_update_interval=NONE)
        try:
            next(stream)
            return stream
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise


def memory(service):
    return psutil.Process(service.process.pid).memory_info().rss


def is_free_within_a_second(service, job):
    return within_a_second(lambda: places(service, job, READERS + 1) == READERS + 1)


@pytest.mark.parametrize("open_readers", [idle_readers, deaf_readers])
def test_readers_that_do_not_read_cost_the_others_nothing(service, running, open_readers):
    readers = open_readers(service, running)
    before = memory(service)
    keen = watch_in_the_last_place(service, running)
    started = time.monotonic()
    for number in range(150):
        job = service.update(running.id, labels={"n": str(number)})
        while next(keen).event.job.revision < job.revision:
            pass
    assert time.monotonic() - started < 15
    # A queue for each would hold 150 messages of 60 kB for each of 20 readers: 172 MiB.
    assert memory(service) - before < 40 * MIB
    service.update(running.id, state="JOB_STATE_SUCCEEDED")
    assert list(keen)[-1].event.job.done
    for reader in readers:
        reader.close()
    assert is_free_within_a_second(service, service.job_in("IN_PROGRESS"))


def test_a_reader_that_reads_again_skips_to_the_newest_and_gets_the_end(service, running):
    stream = service.watch(running.id, min_update_interval=NONE)
    next(stream)
    # More than its connection's window, which grows to 8 MiB or so, holds of them.
    for number in range(600):
        service.update(running.id, labels={"n": str(number)})
    end = service.update(running.id, state="JOB_STATE_SUCCEEDED")
    jobs = [message.event.job for message in stream]
    assert jobs[-1] == end
    assert len(jobs) < 400
    assert [job.revision for job in jobs] == sorted({job.revision for job in jobs})


def test_readers_that_do_not_read_do_not_hold_up_the_end_of_the_server(serve, new_id):
    service = serve("--drain-grace", "1s", "--max-watchers", str(PLACES))
    job = service.job_in("IN_PROGRESS", id=new_id(), result=LARGE)
    readers = deaf_readers(service, job)
    for number in range(100):
        service.update(job.id, labels={"n": str(number)})
    started = time.monotonic()
    assert service.process.terminate() == 0
    assert time.monotonic() - started < 1 + 5 + MAX_PAUSE_SECONDS
    for reader in readers:
        reader.close()


@pytest.mark.slow
def test_a_reader_that_stalls_for_ever_is_thrown_out_by_the_age_of_its_connection(serve, new_id):
    service = serve("--max-connection-age", "1s", "--max-watchers", str(PLACES))
    job = service.job_in("IN_PROGRESS", id=new_id(), result=LARGE)
    readers = idle_readers(service, job)
    for number in range(100):
        service.update(job.id, labels={"n": str(number)})
    deadline = time.monotonic() + 1.1 + 30 + 5 + MAX_PAUSE_SECONDS
    while places(service, job, READERS + 1) < READERS + 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for reader in readers:
        reader.close()
