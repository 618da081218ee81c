"""Clients, tracked jobs and reporters in forked children, and pickled into spawned ones."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import AsyncJobStatusClient, JobState, JobStatusClient, Tls
from tests.support.certificates import Authority
from tests.support.scripted_server import ScriptedServer, a_job, reply
from tests.support.servers import ServerProcess

PRELUDE = """
import asyncio, multiprocessing, os, sys, threading, time, warnings
from jobstatus_grpc import (
    AsyncJobStatusClient, DeadlineExceededError, JobNotFoundError, JobState, JobStatusClient, UnavailableError
)
warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
address = sys.argv[1]

def fork(work):
    pid = os.fork()
    if pid == 0:
        work()
        sys.exit(0)
    return pid

def join(pid):
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, status
            return
        time.sleep(0.02)
    os.kill(pid, 9)
    raise AssertionError("the child hangs")

client = JobStatusClient(address)
job = client.create(state=JobState.IN_PROGRESS)
"""
SCRIPTS = {
    "a client, while the parent watches": """
watch = client.watch(job.id)
next(watch)
states = []
reading = threading.Thread(target=lambda: states.extend(job.state for job in watch))
reading.start()
time.sleep(0.2)
def work():
    assert client.get(job.id).id == job.id
    try:
        client.get("no-such-job")
    except JobNotFoundError:
        pass
    else:
        raise AssertionError
for _ in range(3):
    join(fork(work))
client.update(job.id, state=JobState.SUCCEEDED)
reading.join(10)
assert states == [JobState.SUCCEEDED]
""",
    "a watch that the parent reads too": """
watch = client.watch(job.id, min_update_interval_seconds=0)
next(watch)
pid = fork(lambda: next(watch))
assert client.update(job.id, progress=5).progress == next(watch).progress
time.sleep(0.2)
client.update(job.id, progress=50)
join(pid)
client.update(job.id, state=JobState.SUCCEEDED)
assert list(watch)[-1].done
""",
    "a deadline": """
import socket
mute = socket.create_server(("127.0.0.1", 0))
other = JobStatusClient(f"127.0.0.1:{mute.getsockname()[1]}")
def work():
    began = time.monotonic()
    try:
        other.get("a", timeout_seconds=0.5)
    except (DeadlineExceededError, UnavailableError):
        assert time.monotonic() - began < 8
    else:
        raise AssertionError
join(fork(work))
""",
    "a client that is closed by the child": """
with client:
    watch = client.watch(job.id)
    next(watch)
    join(fork(client.close))
    client.update(job.id, state=JobState.SUCCEEDED)
    assert next(watch).done
""",
    "a tracked job": """
with client.track("in a pool", strict=True) as tracked:
    tracked.progress(10)
    join(fork(lambda: tracked.progress(42, "in the child")))
    seen = client.get(tracked.id)
    assert (seen.progress, seen.reason, seen.state) == (42, "in the child", JobState.IN_PROGRESS), seen
assert client.get(tracked.id).state is JobState.SUCCEEDED
""",
    "a tracked job whose lock was held": """
with client.track(strict=True) as tracked:
    with tracked._state._lock:
        pid = os.fork()
    if pid == 0:
        tracked.progress(42)
        sys.exit(0)
    join(pid)
    assert client.get(tracked.id).progress == 42
    assert client.get(tracked.id).state is JobState.IN_PROGRESS
""",
    "a tracked job in a pool": """
def work(number):
    tracked.progress(number * 10)
with client.track(strict=True) as tracked:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(work, range(1, 5))
        pool.close()
        pool.join()
    assert client.get(tracked.id).progress == 40
""",
    "a reporter": """
refused = []
with client.reporter(on_error=lambda *refusal: refused.append(refusal)) as reporter:
    reporter.update(job.id, progress=10, attempt=1)
    reporter.flush()
    other = client.create(state=JobState.IN_PROGRESS)
    join(fork(lambda: reporter.update(other.id, progress=42, attempt=1)))
    assert client.get(other.id).progress == 42
    reporter.update(job.id, state=JobState.SUCCEEDED, attempt=1)
assert client.get(job.id).state is JobState.SUCCEEDED and refused == []
""",
    "a reporter that begins to send": """
for number in range(4):
    with JobStatusClient(address) as other, other.reporter(flush_interval_seconds=0) as reporter:
        reporter.update(job.id, reason=f"fork {number}")
        for pid in [fork(lambda: None) for _ in range(4)]:
            join(pid)
""",
    "a block that the child begins": """
tracked = client.track("in the child", strict=True)
def work():
    with tracked:
        tracked.progress(42)
join(fork(work))
assert client.get(tracked.id).state is JobState.SUCCEEDED
""",
    "an asyncio client of a parent that has not used it": """
other = AsyncJobStatusClient(address)
async def use():
    assert (await other.get(job.id)).id == job.id
join(fork(lambda: asyncio.run(use())))
""",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_forked_child_inherits(script, memory_address):
    command = [sys.executable, "-W", "error", "-c", PRELUDE + SCRIPTS[script], memory_address]
    ended = subprocess.run(command, timeout=50, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_child_leaves_without_what_it_cannot_send():
    script = """
with client.track() as tracked:
    tracked.wait_claimed(10)
    os.kill(int(sys.argv[2]), 19)
    began = time.monotonic()
    client._connection.timeout_seconds = 1
    tracked._state.call_timeout_seconds = 1
    join(fork(lambda: tracked.progress(42)))
    os.kill(int(sys.argv[2]), 18)
"""
    with ServerProcess() as server:
        command = [sys.executable, "-c", PRELUDE + script, server.address, str(server.pid)]
        ended = subprocess.run(command, timeout=50, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("kind", [JobStatusClient, AsyncJobStatusClient])
def test_a_pickled_client_keeps_its_address_and_credentials(kind, tmp_path):
    ca = Authority().write(tmp_path)
    client = kind("server:1", token="secret", tls=Tls(ca_file=ca), timeout_seconds=7)
    os.unlink(ca)
    copy = pickle.loads(pickle.dumps(client))
    assert type(copy) is kind
    assert copy._connection._endpoint == client._connection._endpoint
    assert copy._connection.timeout_seconds == 7


def test_a_pickled_client_works():
    got = reply(pb.GetJobResponse(job=a_job()))
    with ScriptedServer(GetJob=[got]) as server, JobStatusClient(server.address, token="secret") as client:
        client.get("a")
        with pickle.loads(pickle.dumps(client)) as copy:
            assert copy.get("a").id == "a"
    assert [call["authorization"] for call in server.metadata] == ["Bearer secret"] * 2


def test_a_pickled_tracked_job_reports_progress(memory_address):
    with JobStatusClient(memory_address) as client, client.track(strict=True) as tracked:
        with pickle.loads(pickle.dumps(tracked)) as copy:
            assert (copy.id, copy.attempt) == (tracked.id, tracked.attempt)
            copy.progress(42, "elsewhere")
        seen = client.get(tracked.id)
        assert (seen.progress, seen.reason, seen.state) == (42, "elsewhere", JobState.IN_PROGRESS)
        copy.progress(50)
        deadline = time.monotonic() + 10
        while client.get(tracked.id).progress != 50 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert client.get(tracked.id).progress == 50


def test_a_tracked_job_is_pickled_once_it_is_claimed(unused_address):
    with JobStatusClient(unused_address) as client, pytest.raises(pickle.PicklingError, match="wait_claimed"):
        pickle.dumps(client.track())
