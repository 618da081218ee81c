"""Several server processes on one port, and the supervisor that keeps them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from jobstatus_grpc.server.logs import LogWriter
from tests.support import shared_store
from tests.support.service import Service

ANYWHERE = "127.0.0.1:0"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder of an installed store for workers that can be made to fail."""
    folder = tmp_path / "installed"
    folder.mkdir()
    shared_store.install(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def serve_with(serve, folder, log):
    """Serve with workers; the log is JSON."""
    settings = {"store": "shared:", "log": log}
    return lambda *flags, **others: serve("--log-format", "json", "--log-calls", *flags, **settings | others)


def workers_of(service):
    return psutil.Process(service.process.pid).children()


def lines_of(log, **fields):
    """Return the log's lines that have these fields."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if fields.items() <= line.items()]


def messages_of(log):
    return [line["message"] for line in lines_of(log, logger="jobstatus_grpc.server")]


def logged(log, pattern):
    """Wait until a message matches, and return the match."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for message in messages_of(log):
            if found := re.search(pattern, message):
                return found
        time.sleep(0.05)
    raise AssertionError(f"{pattern!r} is not in the log:\n{log.read_text()}")


def call_anew(service, count=1):
    """Make calls, each on a connection of its own, which the kernel gives to any of the workers."""
    for _ in range(count):
        with contextlib.closing(Service(service.address)) as caller:
            caller.create()


def test_all_answer_on_one_port(serve_with, log):
    service = serve_with("--workers", "3")
    assert len(workers_of(service)) == 3
    call_anew(service, 60)
    assert service.process.terminate() == 0
    answers = Counter(line["worker"] for line in lines_of(log, method="CreateJob"))
    assert answers.keys() == {0, 1, 2}
    assert answers.total() == 60


def test_a_killed_worker_is_replaced_and_calls_go_on(serve_with, log):
    service = serve_with("--workers", "2")
    before = {worker.pid for worker in workers_of(service)}
    killed = workers_of(service)[0]
    killed.kill()
    killed.wait()
    call_anew(service, 20)
    assert logged(log, rf"worker 0 \(process {killed.pid}\) has ended with SIGKILL; it is started again at once")
    successor = int(logged(log, r"worker 0 serves again, as process (\d+)")[1])
    assert {worker.pid for worker in workers_of(service)} == before - {killed.pid} | {successor}
    call_anew(service, 40)
    service.process.terminate()
    replaced_at = lines_of(log, message=f"worker 0 serves again, as process {successor}")[0]["time"]
    later = [line for line in lines_of(log, method="CreateJob") if line["time"] > replaced_at]
    assert {line["worker"] for line in later} == {0, 1}


def test_a_worker_that_gets_sigterm_drains_and_is_replaced(serve_with, log):
    service = serve_with("--workers", "2")
    workers_of(service)[1].terminate()
    assert logged(log, "worker 1 .* has ended with exit code 0")
    assert logged(log, "worker 1 serves again")
    assert lines_of(log, worker=1, message="draining")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_all_and_exits_with_0(serve_with, refused, log, number):
    service = serve_with("--workers", "3", "--drain-grace", "5s")
    workers = workers_of(service)
    callers = [Service(service.address) for _ in range(12)]
    streams = [caller.watch(caller.create().id) for caller in callers]
    for stream in streams:
        next(stream)
    service.process.signal(number)
    refusals = {refused(lambda stream=stream: list(stream)).kind for stream in streams}
    assert service.process.wait() == 0
    assert refusals == {("UNAVAILABLE", "DRAINING")}
    assert [worker for worker in workers if worker.is_running()] == []
    for caller in callers:
        caller.close()


def test_ctrl_c_reaches_every_process_and_ends_them_as_well(serve_with, log):
    service = serve_with("--workers", "3")
    for worker in workers_of(service):
        worker.send_signal(signal.SIGINT)
    service.process.signal(signal.SIGINT)
    assert service.process.wait() == 0
    assert len(lines_of(log, message="draining")) == 3
    assert lines_of(log, level="error") == []


def test_workers_drain_and_end_when_their_supervisor_is_killed(serve_with, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(temporary := tmp_path / "temporary"))
    temporary.mkdir()
    service = serve_with("--workers", "2")
    workers = workers_of(service)
    streams = [service.watch(service.create().id) for _ in range(3)]
    for stream in streams:
        next(stream)
    service.process.signal(signal.SIGKILL)
    assert {refused(lambda stream=stream: list(stream)).kind for stream in streams} == {("UNAVAILABLE", "DRAINING")}
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    assert list(temporary.iterdir()) == []


def test_a_worker_that_keeps_dying_is_started_more_and_more_seldom(serve_with, folder, log):
    service = serve_with("--workers", "2")
    (folder / "crash").touch()
    workers_of(service)[0].kill()
    for pause in ("at once", r"in 0\.1 s", r"in 0\.2 s", r"in 0\.4 s"):
        logged(log, f"worker 0 .* it is started again {pause}$")
    call_anew(service, 20)
    (folder / "crash").unlink()
    assert logged(log, "worker 0 serves again")
    assert {worker.is_running() for worker in workers_of(service)} == {True}


def test_a_worker_that_cannot_start_again_says_why_and_is_tried_again(serve_with, folder, log):
    service = serve_with("--workers", "2")
    (folder / "refuse").touch()
    workers_of(service)[0].kill()
    logged(log, "worker 0 cannot start: the store is away; bring it back; it is started again")
    (folder / "refuse").unlink()
    assert logged(log, "worker 0 serves again")


def test_no_line_of_one_is_torn_apart_by_anothers():
    read_end, write_end = os.pipe2(os.O_DIRECT)  # a read returns one write, up to PIPE_BUF
    lines = [f"{number} {'x' * (number * 37 % 700)}\n" for number in range(60)]
    with open(read_end, "rb", buffering=0) as reader:
        with open(write_end, "w") as writer:
            log_writer = LogWriter(writer.fileno())
            log_writer.write("".join(lines))
            log_writer.close()
        pieces = list(iter(lambda: reader.read(65536), b""))
    assert b"".join(pieces).decode() == "".join(lines)
    assert {piece[-1:] for piece in pieces} == {b"\n"}
    assert 4 < len(pieces) < 12


@pytest.mark.slow
def test_a_worker_that_does_not_end_is_killed(serve_with, log):
    service = serve_with("--workers", "2", "--drain-grace", "0s")
    stuck = workers_of(service)[0]
    stuck.suspend()
    assert service.process.terminate() == 0
    assert not stuck.is_running()
    assert logged(log, "worker 0 has not ended within 10 s; it is killed")


def test_modules_of_the_current_folder_are_none_of_a_workers(folder, tmp_path):
    (tmp_path / "pickle.py").write_text("raise SystemExit('not me')")
    script = Path(sys.executable).with_name("jobstatus")
    command = [str(script), "serve", "--store", "shared:", "--workers", "2", "--listen", ANYWHERE]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("listening on ")
        server.terminate()
