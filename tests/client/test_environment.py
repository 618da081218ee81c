"""A client that names no server finds it, and the job that the program runs as, by variables."""

from __future__ import annotations

import pytest

from jobstatus_grpc.client.endpoint import Tls
from jobstatus_grpc.client.environment import find_server
from jobstatus_grpc.errors import JobStatusError


def found(address=None, *, token=None, tenant=None, tls=None, insecure=False):
    return find_server(address, token=token, tenant=tenant, tls=tls, insecure=insecure)


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """The variables, set to these values."""
    values = {"ADDRESS": "grpcs://host:1", "TOKEN": "secret", "JOB_ID": "nightly", "CA": "", "CERT": "", "KEY": ""}
    for name, value in values.items():
        monkeypatch.setenv(f"JOBSTATUS_{name}", value)
    return monkeypatch


def test_a_client_without_arguments_has_the_server_the_token_and_the_job_of_the_variables():
    server = found()
    assert (server.endpoint.target, server.endpoint.metadata) == ("host:1", (("authorization", "Bearer secret"),))
    assert server.job_id == "nightly"


@pytest.mark.parametrize(("name", "value"), [("TOKEN_FILE", "{file}"), ("TOKEN_COMMAND", "cat {file}")])
def test_the_token_may_be_in_a_file_or_come_from_a_command(variables, tmp_path, name, value):
    file = tmp_path / "token"
    file.write_text("from-file\n")
    variables.setenv(f"JOBSTATUS_{name}", value.format(file=file))
    with pytest.raises(ValueError, match="give one of the token, the token file and the token command"):
        found()
    variables.delenv("JOBSTATUS_TOKEN")
    assert found().endpoint.metadata == (("authorization", "Bearer from-file"),)


def test_arguments_win(variables):
    assert found(token="mine").endpoint.metadata == (("authorization", "Bearer mine"),)


@pytest.mark.parametrize(("address", "job_id"), [("grpcs://host:1", "nightly"), ("host:2", "")])
def test_a_client_with_an_address_has_no_token_of_the_variables(address, job_id):
    server = found(address)
    assert address.endswith(server.endpoint.target)
    assert (server.endpoint.metadata, server.job_id) == (None, job_id)


def test_without_variables_the_server_is_on_this_machine(variables):
    variables.delenv("JOBSTATUS_ADDRESS")
    assert found().endpoint.target == "127.0.0.1:50051"


def test_a_ca_that_cannot_be_read_is_an_error(variables):
    variables.setenv("JOBSTATUS_CA", "/no/such/file")
    with pytest.raises(OSError, match="/no/such/file"):
        found()


def test_a_token_of_the_variables_is_not_sent_in_the_clear(variables):
    variables.setenv("JOBSTATUS_ADDRESS", "host:1")
    with pytest.raises(ValueError, match="without encryption"):
        found()
    variables.setenv("JOBSTATUS_INSECURE", "true")
    assert found().endpoint.metadata


def test_a_server_name_of_the_variables_means_tls(variables):
    variables.setenv("JOBSTATUS_SERVER_NAME", "jobs.example")
    tls = found().endpoint.tls
    assert tls is not None
    assert tls.tls.server_name == "jobs.example"


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("address", 5, TypeError),
        ("address", b"host:1", TypeError),
        ("address", "\ud800:1", ValueError),
        ("token", 5, TypeError),
        ("token", b"secret", TypeError),
        ("tls", "ca.pem", TypeError),
        ("timeout_seconds", "x", TypeError),
        ("timeout_seconds", None, TypeError),
        ("timeout_seconds", 0, ValueError),
        ("timeout_seconds", float("nan"), ValueError),
    ],
)
def test_both_clients_name_the_argument_that_is_wrong(connect, argument, value, error):
    with pytest.raises(error, match=f"^{argument} must be (?!.*secret)"):
        connect(**{argument: value})


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [("ca_file", 5, TypeError), ("key_file", b"/key", TypeError), ("cert_file", "\0", ValueError)],
)
def test_a_file_of_tls_that_is_wrong_is_named(argument, value, error):
    with pytest.raises(error, match=f"^{argument} must be "):
        Tls(**{argument: value})


def test_both_clients_need_no_argument(variables, connect):
    variables.setenv("JOBSTATUS_ADDRESS", "127.0.0.1:9")
    with pytest.raises(JobStatusError):
        connect(timeout_seconds=0.1).get("x")
