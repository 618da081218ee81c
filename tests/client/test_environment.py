"""A client that names no server finds it, and the job that the program runs as, by variables."""

from __future__ import annotations

import pytest

from jobstatus_grpc.client.environment import find_server
from jobstatus_grpc.errors import JobStatusError

NONE = {"token": None, "ca_file": None, "cert_file": None, "key_file": None}


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """The variables, set to these values."""
    values = {"ADDRESS": "host:1", "TOKEN": "secret", "JOB_ID": "nightly", "CA": "", "CERT": "", "KEY": ""}
    for name, value in values.items():
        monkeypatch.setenv(f"JOBSTATUS_{name}", value)
    return monkeypatch


def test_a_client_without_arguments_has_the_server_the_token_and_the_job_of_the_variables():
    found = find_server(None, **NONE)
    assert (found.endpoint.target, found.endpoint.metadata) == ("host:1", (("authorization", "Bearer secret"),))
    assert found.job_id == "nightly"


def test_arguments_win(variables):
    assert find_server(None, **NONE | {"token": "mine"}).endpoint.metadata == (("authorization", "Bearer mine"),)


@pytest.mark.parametrize(("address", "job_id"), [("host:1", "nightly"), ("host:2", "")])
def test_a_client_with_an_address_has_no_token_of_the_variables(address, job_id):
    found = find_server(address, **NONE)
    assert (found.endpoint.target, found.endpoint.metadata, found.job_id) == (address, None, job_id)


def test_without_variables_the_server_is_on_this_machine(variables):
    variables.delenv("JOBSTATUS_ADDRESS")
    assert find_server(None, **NONE).endpoint.target == "127.0.0.1:50051"


def test_a_ca_that_cannot_be_read_is_an_error(variables):
    variables.setenv("JOBSTATUS_CA", "/no/such/file")
    with pytest.raises(OSError, match="/no/such/file"):
        find_server(None, **NONE)


def test_both_clients_need_no_argument(variables, connect):
    variables.setenv("JOBSTATUS_ADDRESS", "127.0.0.1:9")
    with pytest.raises(JobStatusError):
        connect(timeout_seconds=0.1).get("x")
