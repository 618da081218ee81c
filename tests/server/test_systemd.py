"""The messages to a service manager: sd_notify(3) over a real socket, from the process that systemd would start."""

from __future__ import annotations

import os
import signal
import socket
import threading

import psutil
import pytest

from tests.support import shared_store
from tests.support.servers import TRANSPORT

WATCHDOG_SECONDS = 1.2


@pytest.fixture
def manager(request, tmp_path, monkeypatch):
    """The socket that systemd listens on, for servers that it watches."""
    name = getattr(request, "param", "{}/notify").format(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0", 1))
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("WATCHDOG_USEC", str(int(WATCHDOG_SECONDS * 1e6)))
        yield manager


def received(manager):
    return manager.recv(4096).decode()


def assert_silent(manager):
    """Read what is there, and then nothing for the time of the watchdog."""
    manager.settimeout(WATCHDOG_SECONDS)
    with pytest.raises(TimeoutError):
        list(iter(lambda: received(manager), ""))
    manager.settimeout(20)


@pytest.mark.parametrize("manager", ["{}/notify", "@{}/notify"], indirect=True)
def test_readiness_signs_of_life_and_the_end_are_sent(serve, manager):
    service = serve()
    assert [received(manager) for _ in range(4)] == ["READY=1", *["WATCHDOG=1"] * 3]
    assert service.process.terminate() == 0
    assert set(iter(lambda: received(manager), "STOPPING=1")) <= {"WATCHDOG=1"}


@pytest.mark.skipif(TRANSPORT == "native", reason="the native transport does not wait for a request to be complete")
def test_a_drain_may_take_longer_than_the_time_of_the_watchdog(serve, manager):
    service = serve("--drain-grace", "3s")
    never_sent = threading.Event()
    unfinished = service.channel.stream_unary("/jobstatus.v1.JobStatusService/GetJob")
    call = unfinished.future(iter(never_sent.wait, True))
    service.create()  # on the same connection, so that the server has the first call too
    service.process.signal(signal.SIGTERM)
    assert set(iter(lambda: received(manager), "STOPPING=1")) == {"READY=1", "WATCHDOG=1"}
    assert [received(manager) for _ in range(3)] == ["WATCHDOG=1"] * 3
    never_sent.set()
    call.cancel()


def test_a_process_that_hangs_sends_no_sign_of_life(serve, manager):
    service = serve()
    assert received(manager) == "READY=1"
    service.process.signal(signal.SIGSTOP)
    assert_silent(manager)
    service.process.signal(signal.SIGCONT)
    assert received(manager) == "WATCHDOG=1"


def test_no_sign_of_life_is_sent_if_another_process_is_watched(serve, manager, monkeypatch):
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    serve()
    assert received(manager) == "READY=1"
    assert_silent(manager)


def test_a_worker_that_hangs_is_killed_and_replaced(serve, manager, tmp_path, monkeypatch):
    folder = tmp_path / "installed"
    folder.mkdir()
    shared_store.install(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    service = serve("--workers", "2", store="shared:", log=tmp_path / "log")
    assert received(manager) == "READY=1"
    hanging, other = psutil.Process(service.process.pid).children()
    hanging.suspend()
    hanging.wait(20)
    assert received(manager) == "WATCHDOG=1"
    assert other.is_running()
    assert service.process.terminate() == 0  # by then the log is written
    assert "hangs; it is killed" in (tmp_path / "log").read_text()
