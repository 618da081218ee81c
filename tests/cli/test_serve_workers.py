"""`jobstatus serve --workers`: its output and its errors."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import socket
import urllib.request

import psutil
import pytest

from tests.support import shared_store
from tests.support.servers import ServerProcess

READY = "listening on "
ANYWHERE = "127.0.0.1:0"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of an installed store for workers that can be made to fail. Request it before a command line."""
    shared_store.install(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def refusal(folder, offline_cli):
    """Serve with workers, which must fail, and return the only line on stderr."""

    def serve(*arguments, store="shared:"):
        done = offline_cli("serve", "--store", store, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        return done.stderr.removeprefix("error: ").removesuffix("\n")

    return serve


@pytest.fixture
def start_workers(folder, start):
    return lambda *arguments, **settings: start("serve", "--store", "shared:", "--workers", "2", *arguments, **settings)


def taken(*options, port=0):
    """A port in use, with these socket options."""
    listener = socket.socket()
    for option in options:
        listener.setsockopt(socket.SOL_SOCKET, option, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    return contextlib.closing(listener)


def two_free_ports():
    """The first of two free ports in a row, below the ephemeral range, from which other processes get theirs."""
    while True:
        port = random.randrange(10_000, 32_000, 2)
        with contextlib.suppress(OSError), taken(port=port), taken(port=port + 1):
            return port


def address_of(listener):
    return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("store", ["memory:", "sqlite:///jobs.db"])
def test_a_store_that_cannot_be_shared_is_refused(refusal, store):
    says = "--workers needs a store that several processes can share; use --store postgresql://…"
    assert refusal("--workers", "2", store=store) == says


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--listen", ANYWHERE, "--listen", "unix:/tmp/x"], "--listen unix:/tmp/x cannot be shared"),
        (["--metrics", "127.0.0.1:65534"], "--metrics 127.0.0.1:65534 leaves no port for worker 2"),
        (["--health", "127.0.0.1:65534"], "--health 127.0.0.1:65534 leaves no port for worker 2"),
        (["--listen", "0.0.0.0:0"], "--insecure"),
        (["--listen", "192.0.2.1:0", "--insecure"], "cannot listen on 192.0.2.1:0"),
        (["--listen", f"{'x' * 70}:0", "--insecure"], "no host has this name"),
        (["--workers", "0"], "is not a number from 1 to"),
    ],
)
def test_what_workers_cannot_share_is_one_line_and_exit_2(refusal, arguments, says):
    assert says in refusal("--workers", "3", *arguments)


def test_a_port_that_another_program_has_is_refused(refusal):
    for options in ([], [socket.SO_REUSEADDR], [socket.SO_REUSEPORT]):
        with taken(*options) as listener:
            says = f"cannot listen on {address_of(listener)}: another server listens there"
            assert refusal("--workers", "2", "--listen", address_of(listener)) == says


def test_a_port_that_another_server_has_is_refused(refusal):
    with ServerProcess() as server:
        assert "another server listens there" in refusal("--workers", "2", "--listen", server.address)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_of_workers_is_refused_to_another_server(start_workers, refusal, workers):
    server = start_workers("--listen", ANYWHERE)
    address = server.stdout.readline().removeprefix(READY).strip()
    assert "another server listens there" in refusal("--workers", workers, "--listen", address)


def test_a_taken_port_for_metrics_is_one_line_and_exit_2(refusal):
    port = two_free_ports()
    with taken(port=port + 1) as listener:
        first = f"127.0.0.1:{port}"
        says = refusal("--workers", "2", "--listen", ANYWHERE, "--metrics", first, "--log-level", "error")
        assert f"cannot serve metrics on {address_of(listener)}" in says


@pytest.mark.parametrize(
    ("trouble", "says"), [("refuse", "the store is away; bring it back"), ("crash", "has ended with exit code 3")]
)
def test_workers_that_cannot_start_are_one_line_and_exit_2(refusal, folder, trouble, says):
    (folder / trouble).touch()
    assert says in refusal("--workers", "3", "--listen", ANYWHERE)


def test_where_it_listens_is_printed_once_when_all_answer(start_workers, cli_of):
    server = start_workers("--listen", ANYWHERE, "--listen", "localhost:0")
    first, second = server.stdout.readline(), server.stdout.readline()
    assert re.fullmatch(r"listening on 127\.0\.0\.1:\d+\n", first)
    assert re.fullmatch(r"listening on localhost:\d+\n", second)
    assert {cli_of(line.split()[-1])("health").returncode for line in (first, second)} == {0}
    server.send_signal(signal.SIGTERM)
    assert server.communicate()[0] == ""
    assert server.returncode == 0


def test_each_serves_its_metrics_on_the_port_after_the_last_ones(start_workers):
    port = two_free_ports()
    server = start_workers("--listen", ANYWHERE, "--metrics", f"127.0.0.1:{port}", "--log-format", "text")
    server.stdout.readline()
    for each in (port, port + 1):
        with urllib.request.urlopen(f"http://127.0.0.1:{each}/metrics") as answer:
            assert b"jobstatus_jobs" in answer.read()
    server.send_signal(signal.SIGTERM)
    output = re.findall(r"worker=(\d) metrics on http://127.0.0.1:(\d+)/", server.communicate()[1])
    assert sorted(output) == [("0", f"{port}"), ("1", f"{port + 1}")]


def test_each_line_of_a_text_log_names_its_process(start_workers):
    server = start_workers("--listen", ANYWHERE, "--log-format", "text", "--metrics", ANYWHERE)
    server.stdout.readline()
    server.send_signal(signal.SIGTERM)
    output = [line.split(maxsplit=2)[2] for line in server.communicate()[1].splitlines()]
    assert sorted(line for line in output if "draining" in line) == [
        "draining 2 workers",
        "worker=0 draining",
        "worker=1 draining",
    ]
    assert sorted(line.partition(" on ")[0] for line in output if "metrics" in line) == [
        "worker=0 metrics",
        "worker=1 metrics",
    ]


def test_a_signal_before_all_answer_ends_it_with_0(start_workers):
    server = start_workers("--listen", ANYWHERE)
    supervisor = psutil.Process(server.pid)
    while len(workers := supervisor.children()) < 2:
        assert server.poll() is None
    server.send_signal(signal.SIGTERM)
    output, log = server.communicate()
    assert (output, server.returncode) == ("", 0)
    assert "Traceback" not in log
    assert [worker for worker in workers if worker.is_running()] == []


def test_no_setting_shows_in_the_process_list(folder, offline_cli, start):
    offline_cli.environment["JOBSTATUS_STORE"] = "shared://me:secret@host/jobs"
    server = start("serve", "--workers", "2", "--listen", ANYWHERE, by=offline_cli)
    server.stdout.readline()
    commands = [" ".join(process.cmdline()) for process in psutil.Process(server.pid).children(recursive=True)]
    assert len(commands) == 2
    assert "secret" not in " ".join(commands)
