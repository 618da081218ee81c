"""Envoy in front of the native transport, with TLS, by the commands and the YAML of docs/security.md."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jobstatus_grpc import JobState, JobStatusClient, Tls, UnauthenticatedError
from tests.support.certificates import Authority
from tests.support.servers import ServerProcess

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
SOCKET = "/run/jobstatus/socket"

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(sys.platform != "linux", reason="PyPI has Envoy for Linux only"),
]


def block(text: str, kind: str) -> str:
    """The first block of a kind below "Behind Envoy"."""
    found = re.search(rf"^### Behind Envoy$.*?```{kind}\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture
def authority(tmp_path):
    """A CA, and the certificate and key that Envoy reads."""
    made = Authority()
    pair = made.issue()
    (tmp_path / "tls.crt").write_bytes(pair.cert)
    (tmp_path / "tls.key").write_bytes(pair.key)
    return made


@pytest.fixture
def envoy(tmp_path, auth, authority):
    """Start the server and Envoy as the document does, in a folder of the test, and return Envoy's address."""
    text = DOCUMENT.read_text().replace(SOCKET, f"{tmp_path}/socket")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve, run = (line.removeprefix("$ ").split() for line in block(text, "console").splitlines())
    assert (serve[:2], run[0]) == (["jobstatus", "serve"], "envoy")
    (tmp_path / run[-1]).write_text(block(text, "yaml").replace("50051", str(port)).replace("0.0.0.0", "127.0.0.1"))
    program = shutil.which("envoy", path=str(Path(sys.executable).parent))
    assert program is not None, "Envoy is missing: make interop installs it"
    with (
        ServerProcess(*serve[2:], "--auth", str(auth.path)),
        subprocess.Popen([program, *run[1:], "--disable-hot-restart", "--log-level", "warning"], cwd=tmp_path) as proxy,
    ):
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
