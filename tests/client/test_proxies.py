"""Proxies that the environment names, as for web traffic: a token is sent through one with TLS only."""

from __future__ import annotations

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import JobStatusError
from jobstatus_grpc.client.endpoint import Tls
from tests.support.certificates import Authority
from tests.support.recording_proxy import RecordingProxy
from tests.support.scripted_server import ScriptedServer, a_job, reply

GOT = reply(pb.GetJobResponse(job=a_job()))
ELSEWHERE = "192.0.2.1:50051"
"""An address for documentation, which no machine has."""


@pytest.fixture
def proxy():
    with RecordingProxy() as proxy:
        yield proxy


@pytest.fixture(params=["http_proxy", "https_proxy", "grpc_proxy", "GRPC_ADDRESS_HTTP_PROXY"], autouse=True)
def variable(request, proxy, monkeypatch):
    """A variable that names the proxy, for all addresses."""
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    scheme = "" if request.param.isupper() else "http://"
    monkeypatch.setenv(request.param, f"{scheme}{proxy.address}")
    monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES", "0.0.0.0/0")


@pytest.mark.parametrize("form", ["{}", "dns:///{}"])
def test_calls_within_the_machine_go_through_no_proxy(connect, proxy, form):
    with ScriptedServer(GetJob=[GOT]) as server:
        assert connect(form.format(server.address), token="secret").get("a").id == "a"
    assert proxy.received == []


def test_calls_within_the_machine_go_through_no_proxy_with_tls_either(connect, proxy, tmp_path):
    authority = Authority()
    authority.write(tmp_path)
    pair = authority.issue()
    with ScriptedServer(grpc.ssl_server_credentials([(pair.key, pair.cert)]), GetJob=[GOT]) as server:
        assert connect(server.address, tls=Tls(ca_file=tmp_path / "ca.pem")).get("a").id == "a"
    assert proxy.received == []


def test_a_token_without_tls_is_sent_through_no_proxy_even_if_insecure(connect, proxy):
    with pytest.raises(JobStatusError):
        connect(ELSEWHERE, token="secret", insecure=True, timeout_seconds=0.5).get("a")
    assert proxy.received == []


@pytest.mark.parametrize("settings", [{"token": "secret", "tls": True}, {}])
def test_other_calls_to_another_machine_go_through_the_proxy(connect, proxy, settings):
    with pytest.raises(JobStatusError):
        connect(ELSEWHERE, timeout_seconds=0.5, **settings).get("a")
    assert proxy.received[0].startswith(f"CONNECT {ELSEWHERE} HTTP/1.".encode())
