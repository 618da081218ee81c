"""`jobstatus serve --tls-…`: what a handshake needs, rotation without a failed call, a listener that is replaced."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.x509 import load_pem_x509_certificate

from jobstatus_grpc.server.tls import Certificates, TlsFiles
from jobstatus_grpc.server.transports.grpcio import tls_credentials
from tests.support.certificates import EXPIRED, Authority, Mount
from tests.support.listener import echo, ends, listening, logged, make_the_accept_loop_fail, ticks
from tests.support.loop import run
from tests.support.servers import TRANSPORT, ServerProcess

pytestmark = pytest.mark.skipif(TRANSPORT == "native", reason="the native transport has no TLS")

AUTHORITY = Authority()
CLIENT = AUTHORITY.issue(name="client")
ALONE = [("grpc.use_local_subchannel_pool", 1)]
SERVING = b"\x08\x01"
MAX_WAIT_SECONDS = 10.0


@pytest.fixture
def mount(tmp_path):
    return Mount(tmp_path, AUTHORITY.issue(), AUTHORITY.pem)


@pytest.fixture
def flags(mount):
    """The flags of a server with TLS."""
    return ["--tls-cert", mount.cert, "--tls-key", mount.key]


@pytest.fixture
def mutual_flags(flags, mount):
    return [*flags, "--tls-client-ca", mount.ca, "--tls-require-client-cert"]


def credentials(pair=None, ca=AUTHORITY.pem):
    return grpc.ssl_channel_credentials(ca, *([pair.key, pair.cert] if pair else []))


def check(channel):
    method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
    return method(b"", timeout=MAX_WAIT_SECONDS)


def is_healthy(address, pair=None, ca=AUTHORITY.pem):
    """Make a call on a new connection, and return whether it is answered."""
    with grpc.secure_channel(address, credentials(pair, ca), ALONE) as channel:
        try:
            return check(channel) == SERVING
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False


def handshake(address, version):
    """Return the version and the protocol that are agreed on."""
    context = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
    context.set_alpn_protocols(["http/1.1", "h2"])
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # which TLS 1.1 needs
    context.minimum_version = context.maximum_version = version
    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port)), MAX_WAIT_SECONDS) as raw,
        context.wrap_socket(raw, server_hostname=host) as secure,
    ):
        return secure.version(), secure.selected_alpn_protocol()


def presented(address):
    """Return the certificate that a new connection gets, as PEM."""
    host, port = address.split(":")
    return ssl.get_server_certificate((host, int(port)), timeout=MAX_WAIT_SECONDS)


def wait_until(condition):
    """Wait for something in another process."""
    ends_at = time.monotonic() + MAX_WAIT_SECONDS
    while not condition():
        assert time.monotonic() < ends_at
        time.sleep(0.02)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_tls_1_2_and_1_3_are_spoken_with_http_2_and_nothing_older(flags):
    with ServerProcess(*flags) as server:
        assert handshake(server.address, ssl.TLSVersion.TLSv1_2) == ("TLSv1.2", "h2")
        assert handshake(server.address, ssl.TLSVersion.TLSv1_3) == ("TLSv1.3", "h2")
        with pytest.raises(ssl.SSLError):
            handshake(server.address, ssl.TLSVersion.TLSv1_1)
        with grpc.insecure_channel(server.address, ALONE) as channel, pytest.raises(grpc.RpcError):
            check(channel)


def test_a_required_client_certificate_must_be_valid_and_of_the_client_ca(mutual_flags):
    with ServerProcess(*mutual_flags) as server:
        assert is_healthy(server.address, CLIENT)
        assert not is_healthy(server.address)
        assert not is_healthy(server.address, Authority().issue(name="client"))
        assert not is_healthy(server.address, AUTHORITY.issue(name="client", ends=EXPIRED))


@contextlib.contextmanager
def open_stream(address):
    with grpc.secure_channel(address, credentials(), ALONE) as channel:
        watch: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream("/grpc.health.v1.Health/Watch")
        stream: Any = watch(b"")
        assert next(stream) == SERVING
        yield stream
        stream.cancel()


def test_a_swapped_certificate_is_presented_and_cuts_no_stream(flags, mount):
    with ServerProcess(*flags) as server, open_stream(server.address) as stream:
        other = Authority()
        mount.swap(other.issue(), other.pem)
        wait_until(lambda: is_healthy(server.address, ca=other.pem))
        assert not is_healthy(server.address)
        assert stream.is_active()


def test_a_bad_new_certificate_is_logged_once_and_the_old_one_stays(flags, mount, tmp_path):
    with ServerProcess(*flags, log=tmp_path / "log") as server:
        before = presented(server.address)
        mount.swap(type(CLIENT)(cert=CLIENT.cert, key=b"no key"), AUTHORITY.pem)
        wait_until(lambda: "are not used" in (tmp_path / "log").read_text())
        assert presented(server.address) == before
        mount.swap(CLIENT, AUTHORITY.pem)
        wait_until(lambda: presented(server.address) == CLIENT.cert.decode())
    assert (tmp_path / "log").read_text().count("are not used") == 1


def test_a_swapped_client_ca_admits_its_clients_and_no_others(mutual_flags, mount):
    with ServerProcess(*mutual_flags) as server:
        other = Authority("other CA")
        mount.swap(AUTHORITY.issue(), other.pem)
        wait_until(lambda: is_healthy(server.address, other.issue(name="client")))
        assert not is_healthy(server.address, CLIENT)


def test_a_hundred_rotations_under_load_fail_no_call(mount):
    async def scenario():
        certificates = Certificates(TlsFiles(cert=mount.cert, key=mount.key, client_ca=mount.ca))
        over = asyncio.Event()
        opened = 0

        async def call_on(channel):
            while not over.is_set():
                await echo(channel)

        async def call_on_new_connections(address):
            nonlocal opened
            while not over.is_set():
                async with connected(address) as channel:
                    await echo(channel)
                    opened += 1

        async with (
            listening(open_credentials=lambda: tls_credentials(certificates)) as (_, _, address),
            connected(address) as channel,
        ):
            stream = ticks(channel)
            load = [asyncio.create_task(call_on(channel)) for _ in range(4)]
            load += [asyncio.create_task(call_on_new_connections(address)) for _ in range(2)]
            for _ in range(100):
                before = opened
                mount.swap(AUTHORITY.issue(), AUTHORITY.pem)
                await asyncio.to_thread(certificates.check)
                while opened < before + 2 and not any(task.done() for task in load):  # noqa: ASYNC110
                    await asyncio.sleep(0)
                assert await stream.read() == b"tick"
            over.set()
            await asyncio.gather(*load)  # raises what failed
            stream.cancel()
        assert certificates.reloads == {"success": 100, "failure": 0}

    asyncio.run(scenario())


def connected(address):
    return grpc.aio.secure_channel(address, credentials(CLIENT), ALONE)


def test_a_listener_that_requires_client_certificates_is_probed_and_replaced(mount, caplog):
    async def scenario():
        certificates = Certificates(TlsFiles(cert=mount.cert, key=mount.key, client_ca=mount.ca))
        async with (
            listening(open_credentials=lambda: tls_credentials(certificates), tick_seconds=0.02) as (
                service,
                _,
                address,
            ),
            connected(address) as channel,
        ):
            stream = ticks(channel)
            await stream.read()
            await service.checked.wait()
            await make_the_accept_loop_fail(address)
            await logged(caplog)
            async with connected(address) as new:
                assert await echo(new) == b"hello"
            assert await stream.read() == b"tick"
            stream.cancel()

    run(scenario)


def test_an_unanswered_health_check_replaces_a_listener_with_tls(mount, caplog):
    async def scenario():
        certificates = Certificates(TlsFiles(cert=mount.cert, key=mount.key, client_ca=mount.ca))
        settings = {"tick_seconds": 0.02, "silence_ticks": 10}
        async with listening(open_credentials=lambda: tls_credentials(certificates), **settings) as (
            service,
            _,
            address,
        ):
            await service.checked.wait()
            service.healthy.clear()
            await logged(caplog)
            async with connected(address) as channel:
                assert await echo(channel) == b"hello"

    run(scenario)
    assert "health checks are unanswered" in ends(caplog)[0]


def test_all_workers_use_the_certificate(mutual_flags, tmp_path, monkeypatch):
    from tests.support import shared_store

    shared_store.install(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with ServerProcess(*mutual_flags, "--workers", "2", store="shared:") as server:
        assert all(is_healthy(server.address, CLIENT) for _ in range(10))
        assert not is_healthy(server.address)


def test_a_unix_socket_beside_a_port_with_tls_uses_none(mutual_flags, tmp_path):
    with ServerProcess(*mutual_flags, "--listen", f"unix:{tmp_path}/s") as server:
        assert is_healthy(server.address, CLIENT)
        with grpc.insecure_channel(f"unix:{tmp_path}/s") as channel:
            assert check(channel) == SERVING


def test_an_expired_certificate_is_a_warning_at_the_start(mount, flags, tmp_path):
    mount.swap(AUTHORITY.issue(ends=EXPIRED), AUTHORITY.pem)
    with ServerProcess(*flags, log=tmp_path / "log") as server:
        assert not is_healthy(server.address)
        wait_until(lambda: "clients refuse it" in (tmp_path / "log").read_text())
    (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if "clients refuse it" in line]
    assert json.loads(line)["level"] == "warning"


@pytest.fixture
def metrics(tmp_path, flags):
    """Start a server with flags for metrics, and return their URL."""
    with contextlib.ExitStack() as stack:

        def start(*more):
            log = tmp_path / "log"
            stack.enter_context(ServerProcess(*flags, "--metrics", "127.0.0.1:0", *more, log=log))
            wait_until(lambda: "metrics on " in log.read_text())
            (url,) = re.findall(r"metrics on (\S+?/metrics)", log.read_text())
            return url

        yield start


def scrape(url, token=None):
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    context = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), context=context, timeout=20) as response:
        return response.read().decode()


def value_of(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.rpartition(" ")[2])


def test_metrics_say_when_the_certificate_expires_and_how_often_it_was_changed(metrics, mount):
    url = metrics()
    assert value_of(scrape(url), 'jobstatus_tls_reloads_total{result="success"}') == 0
    mount.swap(AUTHORITY.issue(), AUTHORITY.pem)
    wait_until(lambda: value_of(scrape(url), 'jobstatus_tls_reloads_total{result="success"}') == 1)
    expires_at = load_pem_x509_certificate(Path(mount.cert).read_bytes()).not_valid_after_utc
    assert value_of(scrape(url), "jobstatus_tls_certificate_expires_at_seconds") == expires_at.timestamp()


def test_metrics_over_https_use_the_newest_certificate(metrics, mount):
    url = metrics("--metrics-tls")
    assert url.startswith("https://")
    assert "jobstatus_watchers" in scrape(url)
    mount.swap(CLIENT, AUTHORITY.pem)
    address = url.removeprefix("https://").removesuffix("/metrics")
    wait_until(lambda: presented(address) == CLIENT.cert.decode())


def test_a_client_that_is_silent_in_the_handshake_delays_no_scrape(metrics):
    url = metrics("--metrics-tls")
    host, port = url.removeprefix("https://").removesuffix("/metrics").split(":")
    with socket.create_connection((host, int(port))):
        assert "jobstatus_watchers" in scrape(url)


def test_metrics_need_the_token_of_the_file_which_may_change(metrics, tmp_path):
    file: Path = tmp_path / "token"
    file.write_text("first\n")
    url = metrics("--metrics-token-file", str(file))
    assert "jobstatus_watchers" in scrape(url, "first")
    for wrong in (None, "second", "firs", "é"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            scrape(url, wrong)
    file.write_text("second")
    assert "jobstatus_watchers" in scrape(url, "second")
    file.unlink()
    assert "jobstatus_watchers" in scrape(url, "second")


GRPCURL = Path(sys.executable).with_name("grpcurl")


@pytest.mark.skipif(not GRPCURL.exists(), reason="PyPI has grpcurl for Linux on x86-64 only")
def test_grpcurl_lists_the_service_with_a_ca_and_a_client_certificate(mutual_flags, mount, tmp_path):
    cert, key = CLIENT.write(tmp_path, "client")
    with ServerProcess(*mutual_flags) as server:
        command = [GRPCURL, "-cacert", mount.ca, "-cert", cert, "-key", key, server.address, "list"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert "jobstatus.v1.JobStatusService" in done.stdout.split()
