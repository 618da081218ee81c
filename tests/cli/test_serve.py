"""`jobstatus serve`: one line when it is ready, one line if it cannot start."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
from importlib.metadata import version

import pytest

from tests.support.servers import TRANSPORT, ServerProcess

READY = "listening on "


def one_error_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the only line on stderr; nothing may be on stdout."""
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--retention", "soon"], "'soon' is not a duration"),
        (["--retention", "7"], "'7' has no unit; write 250ms, 90s"),
        (["--drain-grace", "off"], "'off' is not a duration"),
        (["--max-connection-age", "0s"], "is not within 1s to 20d"),
        (["--max-watchers", "0"], "is not a number from 1"),
        (["--max-watchers-per-caller", "none"], "or off"),
        (["--max-requests", "1e3"], "is not a number"),
        (["--log-format", "xml"], "xml"),
        (["--log-level", "loud"], "loud"),
        (["--listen", "50051"], "write HOST:PORT or unix:/path"),
        (["--listen", "127.0.0.1:65536"], "write HOST:PORT or unix:/path"),
        (["--listen", "0.0.0.0:0"], "without encryption (--tls-cert, --tls-key) and without authentication (--auth)"),
        (["--listen", "[::]:0"], "listen on 127.0.0.1 or unix:/path, or add --insecure"),
        (["--listen", "example.com:1"], "--listen example.com:1 would be open to other machines"),
        (["--tls-cert", "c.pem"], "--tls-cert needs --tls-key too"),
        (["--tls-key", "k.pem"], "--tls-key needs --tls-cert too"),
        (["--tls-client-ca", "ca.pem"], "--tls-client-ca needs --tls-cert too"),
        (["--tls-require-client-cert"], "--tls-require-client-cert needs --tls-client-ca too"),
        (
            ["--tls-cert", "c.pem", "--tls-key", "k.pem", "--tls-client-ca", "ca.pem"],
            "--tls-client-ca needs --tls-require-client-cert too",
        ),
        (
            ["--tls-cert", "/no/c.pem", "--tls-key", "k.pem", "--transport", "grpcio"],
            "--tls-cert /no/c.pem cannot be read",
        ),
        (["--tls-cert", "c.pem", "--tls-key", "k.pem", "--transport", "native"], "--transport native has no TLS"),
        (["--metrics-tls", "--metrics", "127.0.0.1:0"], "--metrics-tls needs --tls-cert too"),
        (["--metrics-token-file", "token"], "--metrics-token-file needs --metrics too"),
        (
            ["--metrics-token-file", "/no/token", "--metrics", "127.0.0.1:0"],
            "--metrics-token-file /no/token cannot be read",
        ),
        (["--unix-mode", "rw"], "'rw' is not a mode"),
        (["--unix-mode", "0999"], "'0999' is not a mode"),
        (["--metrics", "9464"], "write HOST:PORT"),
        (["--metrics", "unix:/metrics"], "write HOST:PORT"),
        (["--metrics", "no.such.host.invalid:0"], "choose another --metrics"),
        (["--store", "mongodb://x"], "mongodb"),
        (["--store", "jobs.db"], "jobs.db"),
        (["--store", b"\xff"], "UTF-8"),
        (["--stroe", "memory:"], "--stroe"),
        (["now"], "now"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_2(here, arguments, says):
    done = here("serve", "--store", "memory:", "--listen", "127.0.0.1:0", *arguments)
    assert done.returncode == 2
    assert says in one_error_line(done)


def test_the_variable_that_lets_clients_send_tokens_in_the_clear_opens_no_server(here):
    done = here("serve", "--store", "memory:", "--listen", "0.0.0.0:0", env={"JOBSTATUS_INSECURE": "1"})
    assert done.returncode == 2
    assert "would be open to other machines" in one_error_line(done)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--auth", "/no/auth.toml"],
        ["--tls-cert", "/no/c.pem", "--tls-key", "k.pem", "--transport", "grpcio"],
        ["--metrics", "127.0.0.1:0", "--metrics-token-file", "/no/token"],
    ],
)
def test_settings_that_are_refused_leave_no_store(offline, tmp_path, arguments):
    done = offline("serve", "--store", f"sqlite:///{tmp_path}/jobs.db", "--listen", "127.0.0.1:0", *arguments)
    assert "/no/" in one_error_line(done)
    assert list(tmp_path.glob("jobs.db*")) == []


def test_the_help_names_the_variable_that_is_not_named_like_its_flag(offline):
    assert "JOBSTATUS_SERVE_INSECURE" in offline("serve", "--help").stdout


def test_a_port_in_use_is_one_line_and_exit_2(offline_cli):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = offline_cli("serve", "--store", "memory:", "--listen", address)
    assert done.returncode == 2
    assert address in one_error_line(done)


def test_a_port_for_metrics_in_use_is_one_line_and_exit_2(offline_cli):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = offline_cli(
            "serve", "--store", "memory:", "--listen", "127.0.0.1:0", "--metrics", address, "--log-level", "error"
        )
    assert done.returncode == 2
    assert f"cannot serve metrics on {address}: Address already in use" in one_error_line(done)


def test_the_address_of_the_metrics_is_in_the_log_alone(start):
    server = start("serve", "--store", "memory:", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
    assert server.stdout.readline().startswith(READY)
    server.send_signal(signal.SIGTERM)
    output, log = server.communicate()
    assert (output, server.returncode) == ("", 0)
    messages = [json.loads(line)["message"] for line in log.splitlines()]
    started = messages.pop(1)
    assert [message.partition(":")[0] for message in messages] == ["metrics on http", "draining"]
    assert started.startswith("jobstatus ")


def test_a_store_in_no_folder_is_one_line_and_exit_2(offline_cli, tmp_path):
    (tmp_path / "file").touch()
    done = offline_cli("serve", "--store", f"sqlite:///{tmp_path}/file/jobs.db", "--listen", "127.0.0.1:0")
    assert done.returncode == 2
    assert str(tmp_path) in one_error_line(done)


def test_a_store_that_another_server_has_is_one_line_and_exit_2(offline_cli, serve, tmp_path):
    store = f"sqlite:///{tmp_path}/jobs.db"
    serve(store=store)
    done = offline_cli("serve", "--store", store, "--listen", "127.0.0.1:0")
    assert done.returncode == 2
    assert "jobs.db" in one_error_line(done)


def test_a_store_of_a_newer_version_is_one_line_and_exit_2(offline_cli, tmp_path):
    with sqlite3.connect(tmp_path / "jobs.db") as database:
        database.execute("PRAGMA user_version = 9999")
    database.close()
    done = offline_cli("serve", "--store", f"sqlite:///{tmp_path}/jobs.db", "--listen", "127.0.0.1:0")
    assert done.returncode == 2
    assert "newer" in one_error_line(done)


def test_it_prints_a_line_for_each_listener_once_it_answers(start, cli_of, tmp_path):
    path = f"unix:{tmp_path}/jobs.sock"
    server = start("serve", "--store", "memory:", "--listen", "127.0.0.1:0", "--listen", path)
    lines = [server.stdout.readline().removeprefix(READY).strip() for _ in range(2)]
    assert lines[0].startswith("127.0.0.1:")
    assert lines[1] == path
    assert [cli_of(address)("health").returncode for address in lines] == [0, 0]
    server.send_signal(signal.SIGTERM)
    assert server.communicate()[0] == ""
    assert server.returncode == 0


def test_it_logs_its_version_store_listeners_and_transport_when_it_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ServerProcess("--listen", f"unix:{tmp_path}/s", store="sqlite:///jobs.db", log=tmp_path / "log") as server:
        assert server.terminate() == 0
    first = json.loads((tmp_path / "log").read_text().splitlines()[0])
    store, listeners = f"sqlite:///{tmp_path}/jobs.db", f"{server.address}, unix:{tmp_path}/s"
    assert first["message"] == (
        f"jobstatus {version('jobstatus-grpc')} serves the store {store} on {listeners}; transport {TRANSPORT}"
    )


def test_settings_come_from_variables_too_and_flags_win(start, offline_cli):
    offline_cli.environment |= {"JOBSTATUS_LISTEN": "nonsense", "JOBSTATUS_STORE": "memory:"}
    server = start("serve", "--listen", "127.0.0.1:0", by=offline_cli)
    assert server.stdout.readline().startswith(READY)
    done = offline_cli("serve")
    assert "nonsense" in one_error_line(done)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGHUP, 0)])
def test_it_exits_with_0_after_a_signal(start, number, code):
    server = start("serve", "--store", "memory:", "--listen", "127.0.0.1:0", "--log-format", "json")
    server.stdout.readline()
    server.send_signal(number)
    _, log = server.communicate()
    assert server.returncode == code
    assert [json.loads(line)["level"] for line in log.splitlines()] == ["info", "info"]


def test_it_serves_although_its_first_line_is_not_read(start, cli_of, tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    address = f"unix:{tmp_path}/jobs.sock"
    server = start("serve", "--store", "memory:", "--listen", address, stdout=write_end)
    os.close(write_end)
    assert cli_of(address)("create", "--timeout", "20s").returncode == 0  # tries until it is there
    server.send_signal(signal.SIGTERM)
    assert "Traceback" not in server.communicate()[1]
    assert server.returncode == 0


TRANSPORTS = pytest.mark.parametrize("transport", ["grpcio", "native"])


def test_under_nohup_a_hangup_ends_nothing(start, tmp_path):
    address = f"unix:{tmp_path}/s"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which a process inherits
    try:
        server = start("serve", "--store", "memory:", "--listen", address)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert server.stdout.readline() == f"{READY}{address}\n"
    server.send_signal(signal.SIGHUP)
    server.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait(1)
    server.terminate()
    assert server.wait(20) == 0


@TRANSPORTS
@pytest.mark.parametrize("name", ["a%20b", "100%", "a?b#c"])
def test_a_path_of_any_characters_is_the_path_of_the_socket(start, cli_of, offline_cli, tmp_path, transport, name):
    flags = ("serve", "--store", "memory:", "--transport", transport, "--listen", f"unix:{tmp_path}/{name}")
    server = start(*flags)
    assert server.stdout.readline() == f"{READY}unix:{tmp_path}/{name}\n"
    assert sorted(os.listdir(tmp_path)) == [name, f"{name}.lock"]
    assert cli_of(f"unix:{tmp_path}/{name}")("health").returncode == 0
    assert "another server listens there" in one_error_line(offline_cli(*flags))
    server.terminate()
    assert server.wait(20) == 0
    assert os.listdir(tmp_path) == []


@TRANSPORTS
def test_of_two_servers_that_start_at_once_on_a_path_one_serves(start, cli_of, tmp_path, transport):
    address = f"unix:{tmp_path}/s"
    flags = ("serve", "--store", "memory:", "--transport", transport, "--listen", address)
    servers = [start(*flags) for _ in range(3)]
    lines = [server.stdout.readline() for server in servers]
    assert sorted(lines) == ["", "", f"{READY}{address}\n"]
    assert [server.wait(20) for server, line in zip(servers, lines, strict=True) if not line] == [2, 2]
    assert cli_of(address)("health").returncode == 0


@TRANSPORTS
def test_a_long_tmpdir_stops_no_server(start, offline_cli, tmp_path, transport):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    offline_cli.environment["TMPDIR"] = str(folder)
    server = start("serve", "--store", "memory:", "--transport", transport, "--listen", "127.0.0.1:0", by=offline_cli)
    assert server.stdout.readline().startswith(READY)


def test_a_path_too_long_for_a_socket_is_one_line(offline_cli):
    done = offline_cli("serve", "--store", "memory:", "--listen", f"unix:/tmp/{'x' * 200}")
    assert done.returncode == 2
    assert "is a path of 205 bytes; a Unix socket's has at most 107" in one_error_line(done)
