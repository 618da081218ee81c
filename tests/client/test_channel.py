"""The channel: address, actor, credentials, options."""

from __future__ import annotations

import socket
import traceback

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import JobStatusClient, TokenCommand, UnauthenticatedError
from jobstatus_grpc.auth.tokens import make_token
from jobstatus_grpc.client.endpoint import endpoint
from jobstatus_grpc.client.retry import ClientClosedError
from tests.support.auth import AuthText
from tests.support.scripted_server import ScriptedServer, a_job, reply
from tests.support.servers import ServerProcess

GOT = reply(pb.GetJobResponse(job=a_job()))


@pytest.mark.parametrize(
    "address",
    ["localhost:50051", "[::1]:1", "dns:///a.b:50051", "dns:a:1", "unix:/run/s", "unix:s", "[fe80::1%25eth0]:1"],
)
def test_an_address_is_a_host_and_port_or_a_path(address):
    assert endpoint(address).target == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost",
        ":50051",
        "localhost:",
        "localhost:http",
        "a:70000",
        "http://a:1",
        "/run/s",
        "grpcs://",
        "grpcs://a:b",
        "grpcs://a:70000",
        "grpcs://a/b",
        "grpcs://::1",
        "grpcs://user@a",
        "grpc+tls://a:1",
        "ipv4:10.1.2.3:1/127.0.0.1",
        "ipv4:10.1.2.3:1#/127.0.0.1:1",
        "ipv4:10.1.2.3:1?/127.0.0.1:1",
        "ipv4:%31%30.1.2.3:1",
        "ipv6:[fd00::1]:1?/[::1]:1",
        "dns:jobs:1#/localhost",
        "dns:jobs:1%23/localhost",
        "dns:jobs:1%2Flocalhost",
        "dns:///jobs:1?/localhost",
        "dns:///jobs:1/localhost",
        "vsock:2:1/localhost",
        "xds:///jobs?/localhost",
        "localhost:1?a:1",
        "localhost%2e:1",
        "::1:1",
        "a:0",
        "unix:",
        "unix://host/s",
    ],
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
        endpoint("localhost:1", token=token)


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


def with_variables(error):
    """What an error tracker sends: the traceback of an error and its causes, with the local variables."""
    lines = list(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    # Not of this file, which has the token.
    return "".join(line for line in lines if __file__ not in line)


CALLS = {
    "get": lambda client: client.get("x"),
    "list": lambda client: client.list(),
    "update": lambda client: client.update("x", reason="r"),
    "wait": lambda client: client.wait("x", 5),
    "watch": lambda client: next(iter(client.watch("x"))),
    "watch_jobs": lambda client: next(iter(client.watch_jobs())),
}


@pytest.fixture(scope="module")
def closed_server(tmp_path_factory):
    auth = AuthText(tmp_path_factory.mktemp("auth") / "auth.toml")
    auth.admit("anna")
    with ServerProcess("--auth", str(auth.path)) as process:
        yield process


@pytest.mark.parametrize("call", CALLS)
def test_no_variable_of_a_traceback_has_the_token(closed_server, connect, call):
    token = make_token()
    client = connect(closed_server.address, token=token)
    with pytest.raises(UnauthenticatedError) as caught:
        CALLS[call](client)
    text = with_variables(caught.value)
    assert "BadIdentityError" in text
    assert token not in text + repr(client)


@pytest.mark.parametrize("is_file", [True, False], ids=["file", "command"])
def test_no_variable_of_a_traceback_has_a_token_that_cannot_be_used(connect, tmp_path, is_file):
    token, path = make_token(), tmp_path / "token"
    path.write_text(f"warning: expires soon {token}")
    with pytest.raises(ValueError, match="without spaces") as caught:
        connect("localhost:1", token=path if is_file else TokenCommand(["cat", str(path)]))
    assert token not in with_variables(caught.value)


@pytest.mark.parametrize("is_closed", [True, False], ids=["by close", "otherwise"])
def test_a_call_that_meets_a_closed_channel_says_so_without_the_token(closed_server, is_closed):
    token = make_token()
    with JobStatusClient(closed_server.address, token=token) as client:
        line = client._connection._line()
        if is_closed:
            client.close()
        line.channel.close()
        with pytest.raises(ClientClosedError if is_closed else ValueError, match="closed") as caught:
            client._connection._send(line, "GetJob", pb.GetJobRequest(id="x"), 5)
    assert token not in with_variables(caught.value)
