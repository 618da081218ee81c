"""deploy/proxies/envoy-native.yaml: Envoy in front of the native transport, with TLS, by the command of its section."""

from __future__ import annotations

import re
import subprocess

import pytest

from jobstatus_grpc import JobState, JobStatusClient, Tls, UnauthenticatedError
from tests.support.certificates import Authority
from tests.support.servers import ServerProcess

SOCKET = "/run/jobstatus/socket"

pytestmark = pytest.mark.interop


@pytest.fixture
def authority(tmp_path):
    """A CA, and the certificate and key that Envoy reads."""
    made = Authority()
    pair = made.issue()
    (tmp_path / "tls.crt").write_bytes(pair.cert)
    (tmp_path / "tls.key").write_bytes(pair.key)
    return made


@pytest.fixture
def envoy(root, program, free_port, tmp_path, auth, authority):
    """Start the server and Envoy as the document does, in a folder of the test, and return Envoy's address."""
    text = (root / "deploy/proxies/envoy-native.yaml").read_text()
    port = free_port()
    for name, value in {"/etc/jobstatus/tls": tmp_path, SOCKET: tmp_path / "socket", "50051": port}.items():
        text = text.replace(name, str(value))
    (tmp_path / "envoy.yaml").write_text(text)
    section = (root / "docs/deployment.md").read_text().partition("### Envoy and the native transport")[2]
    command = re.search(r"^\$ jobstatus serve (.*)$", section, re.MULTILINE)
    assert command is not None
    flags = command[1].replace(SOCKET, f"{tmp_path}/socket").replace("auth.toml", str(auth.path)).split()
    run = [program("envoy"), "-c", tmp_path / "envoy.yaml", "--disable-hot-restart", "--log-level", "warning"]
    with ServerProcess(*flags), subprocess.Popen(run) as proxy:
        yield f"localhost:{port}"
        proxy.terminate()


@pytest.fixture
def token(auth):
    return auth.admit("robot")


def test_a_job_is_followed_through_envoy_with_tls_and_a_token(token, envoy, authority, tmp_path):
    tls = Tls(ca_file=authority.write(tmp_path))
    with JobStatusClient(envoy, tls=tls, token=token, timeout_seconds=20) as client:
        assert client.whoami().principal == "robot"
        job = client.create("through Envoy")
        states = []
        for seen in client.watch(job.id):
            states.append(seen.state)
            if not seen.done:
                client.update(job.id, state="succeeded")
        assert states == [JobState.PENDING, JobState.SUCCEEDED]
    with JobStatusClient(envoy, tls=tls) as client, pytest.raises(UnauthenticatedError):
        client.get(job.id)
