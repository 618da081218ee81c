"""The flags of TLS on the command line, against a server that requires client certificates."""

from __future__ import annotations

import re
import sys

import pytest

from tests.support.certificates import Authority
from tests.support.servers import TRANSPORT, ServerProcess

pytestmark = pytest.mark.skipif(TRANSPORT == "native", reason="the native transport has no TLS")

AUTHORITY = Authority()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files of a CA, of a server and of a client."""
    made = tmp_path_factory.mktemp("tls")
    AUTHORITY.write(made)
    AUTHORITY.issue().write(made, "server")
    AUTHORITY.issue(name="client").write(made, "client")
    return made


@pytest.fixture(scope="module")
def address(folder):
    files = [f"--tls-cert={folder}/server.pem", f"--tls-key={folder}/server.key", f"--tls-client-ca={folder}/ca.pem"]
    with ServerProcess(*files, "--tls-require-client-cert") as server:
        yield server.address


@pytest.fixture
def flags(folder):
    return [f"--ca={folder}/ca.pem", f"--cert={folder}/client.pem", f"--key={folder}/client.key"]


def test_a_job_is_created_with_a_client_certificate_and_a_token(run_here, address, flags):
    done = run_here(address)("create", "backup", "--token", "secret", *flags)
    assert (done.returncode, done.stderr) == (0, "")


def test_health_uses_the_flags_too(run_here, address, flags):
    done = run_here(f"grpcs://{address}")("health", *flags)
    assert (done.returncode, done.stdout) == (0, "serving\n")


def test_a_missing_client_certificate_is_one_line_that_says_so(run_here, address, folder):
    done = run_here(address)("list", f"--ca={folder}/ca.pem", "--timeout", "2s")
    assert done.returncode == 4
    assert done.stderr.startswith(f"error: no answer from {address}: ")
    assert f"cannot connect to ipv4:{address}: the server closes connections at once" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("level", "is_one_line"), [({}, True), ({"GRPC_VERBOSITY": "info"}, False)])
def test_grpc_logs_to_stderr_only_if_the_user_has_set_its_level(cli, level, is_one_line):
    done = cli("get", "x", f"--address=grpcs://{cli.address}", "--timeout=1s", env=level)
    assert (done.stderr.count("\n") == 1) is is_one_line
    assert "the server does not use TLS" in done.stderr


def test_the_command_of_run_gets_the_level_of_grpc_only_if_the_user_has_set_it(cli):
    show = ["run", "-q", "--", "sh", "-c", "echo ${GRPC_VERBOSITY-unset}"]
    assert [cli(*show, env=level).stdout for level in ({}, {"GRPC_VERBOSITY": "error"})] == ["unset\n", "error\n"]


def test_run_says_too_that_the_server_may_require_tls(run_here, address):
    done = run_here(address)("run", "--", "true")
    assert done.returncode == 0
    assert re.search(f"no answer from {address}: .*may require TLS.*; the command runs anyway\n", done.stderr)


@pytest.mark.parametrize("command", [["list"], ["health"], ["watch", "id"]])
def test_a_token_is_not_sent_in_the_clear_to_another_machine(run_here, command):
    done = run_here("jobs.example:1")(*command, env={"JOBSTATUS_TOKEN": "secret"})
    assert done.returncode == 2
    assert "the token would be sent to jobs.example:1 without encryption" in done.stderr
    assert "secret" not in done.stderr


def test_insecure_allows_to_send_the_token_in_the_clear(run_here):
    done = run_here("jobs.invalid:1")("health", "--token=secret", "--insecure", "--timeout=200ms")
    assert done.returncode == 4


def test_the_command_of_run_finds_the_server_by_the_variables_of_tls(cli_of, address, flags):
    get = ["sh", "-c", 'exec "$0" -m jobstatus_grpc get "$JOBSTATUS_JOB_ID"', sys.executable]
    done = cli_of(address)("run", *flags, "--server-name=localhost", "--", *get)
    assert done.returncode == 0
    assert "in_progress" in done.stdout
