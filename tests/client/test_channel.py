"""The channel: address, actor, credentials, options."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import JobStatusClient, UnavailableError
from jobstatus_grpc.client.connection import endpoint
from tests.support.scripted_server import ScriptedServer, a_job, reply
from tests.support.servers import ServerProcess
from tests.support.timing import rerun_after_pause

GOT = reply(pb.GetJobResponse(job=a_job()))


@pytest.mark.parametrize(
    "address", ["localhost:50051", "[::1]:1", "dns:///a.b:50051", "dns:a:1", "unix:/run/s", "unix:s"]
)
def test_an_address_is_a_host_and_port_or_a_path(address):
    assert endpoint(address).target == address


@pytest.mark.parametrize(
    "address", ["", "localhost", ":50051", "localhost:", "localhost:http", "a:70000", "http://a:1", "/run/s"]
)
def test_anything_else_is_refused_with_what_to_write(address):
    with pytest.raises(ValueError, match="write HOST:PORT"):
        endpoint(address)


def test_a_server_is_reached_by_name_and_by_socket(connect, tmp_path, memory_address):
    port = memory_address.rpartition(":")[2]
    assert connect(f"dns:///localhost:{port}").create().id
    with ServerProcess(listen=f"unix:{tmp_path}/s"):
        assert connect(f"unix:{tmp_path}/s").create().id


def test_a_token_travels_with_each_call(connect):
    with ScriptedServer(GetJob=[GOT]) as server:
        connect(server.address, token="secret").get("a")
        connect(server.address).get("a")
    assert [call.get("authorization") for call in server.metadata] == ["Bearer secret", None]


@pytest.mark.parametrize("token", ["", "two words", "line\n", "é"])
def test_a_token_that_cannot_travel_is_refused(token):
    with pytest.raises(ValueError, match="token"):
        endpoint("a:1", token=token)


def test_a_certificate_needs_its_key():
    with pytest.raises(ValueError, match="together"):
        endpoint("a:1", cert_file="cert.pem")


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"no\.pem"):
        endpoint("a:1", ca_file="no.pem")


def test_clients_share_no_connection():
    with (
        ScriptedServer(GetJob=[GOT]) as server,
        JobStatusClient(server.address) as first,
        JobStatusClient(server.address) as second,
    ):
        first.get("a")
        second.get("a")
        first.get("a")
    peers = [call["peer"] for call in server.metadata]
    assert peers[0] == peers[2] != peers[1]


def test_a_new_client_says_nothing_to_its_server_before_its_first_call():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        with JobStatusClient(f"127.0.0.1:{listener.getsockname()[1]}"), pytest.raises(BlockingIOError):
            listener.accept()


@pytest.fixture(scope="module")
def pem(tmp_path_factory) -> Callable[[str], str]:
    """`pem("ca.pem")`: files of a CA, and of a certificate for 127.0.0.1 signed by it."""
    folder: Path = tmp_path_factory.mktemp("tls")
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    for command in (
        ["req", "-x509", *new_key, "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem"],
        ["req", "-x509", *new_key, "-subj", "/CN=us", "-addext", "subjectAltName=IP:127.0.0.1",
         "-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", "key.pem", "-out", "cert.pem"],
    ):  # fmt: skip
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True)
    return lambda name: str(folder / name)


def server_credentials(pem: Callable[[str], str], *, mutual: bool) -> grpc.ServerCredentials:
    key, cert, ca = (Path(pem(name)).read_bytes() for name in ("key.pem", "cert.pem", "ca.pem"))
    return grpc.ssl_server_credentials([(key, cert)], ca if mutual else None, mutual)


@rerun_after_pause(0.1)
def test_a_ca_file_means_tls(connect, pem):
    with ScriptedServer(server_credentials(pem, mutual=False), GetJob=[GOT]) as server:
        assert connect(server.address, ca_file=pem("ca.pem"), token="secret").get("a").id == "a"
        with pytest.raises(UnavailableError):
            connect(server.address).get("a", timeout_seconds=0.5)


@rerun_after_pause(0.1)
def test_a_client_certificate_is_presented(connect, pem):
    with ScriptedServer(server_credentials(pem, mutual=True), GetJob=[GOT]) as server:
        ours = {"ca_file": pem("ca.pem"), "cert_file": pem("cert.pem"), "key_file": pem("key.pem")}
        assert connect(server.address, **ours).get("a").id == "a"
        with pytest.raises(UnavailableError):
            connect(server.address, ca_file=pem("ca.pem")).get("a", timeout_seconds=0.5)
