"""`jobstatus tls init`: what it makes works at once, as it says."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from datetime import datetime, timedelta, timezone

import pytest
from cryptography import x509

from jobstatus_grpc.cli.commands import tls
from tests.support.servers import TRANSPORT

DEFAULT_PORT = ":50051"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "certs"


def certificate(folder, name):
    return x509.load_pem_x509_certificate((folder / name).read_bytes())


def names(folder):
    found = certificate(folder, "server.crt").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in found}


@pytest.mark.skipif(TRANSPORT == "native", reason="the native transport has no TLS")
def test_the_two_commands_that_it_prints_run(offline_cli, cli_of, start, folder):
    serve, listing = (shlex.split(line)[1:] for line in offline_cli("tls", "init", str(folder)).stdout.splitlines())
    server = start(*serve, "--listen", "127.0.0.1:0", "--store", "memory:", by=offline_cli)
    port = server.stdout.readline().strip().rpartition(":")[2]
    here = [each.replace(DEFAULT_PORT, f":{port}") for each in listing]
    done = offline_cli(*here)
    assert (done.returncode, done.stderr) == (0, "")
    without = [each for each in here if not each.endswith((".key", "client.crt")) and each not in ("--cert", "--key")]
    assert offline_cli(*without, "--timeout", "300ms").returncode == 4


def test_keys_are_for_their_user_alone(offline, folder):
    assert offline("tls", "init", str(folder)).returncode == 0
    modes = {path.name: stat.S_IMODE(os.stat(path).st_mode) for path in folder.iterdir()}
    assert modes == {name: 0o600 if name.endswith(".key") else 0o644 for name in tls.FILES}
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700


def test_the_certificates_are_valid_as_long_as_is_documented(offline, folder):
    offline("tls", "init", str(folder))
    for name, validity in {"ca.crt": tls.CA_VALIDITY, "server.crt": tls.VALIDITY, "client.crt": tls.VALIDITY}.items():
        left = certificate(folder, name).not_valid_after_utc - datetime.now(timezone.utc)
        assert validity - timedelta(minutes=5) < left <= validity


def test_the_server_has_the_names_that_are_given(offline, folder, tmp_path):
    offline("tls", "init", str(folder), "--host", "jobs.example", "--host", "10.0.0.1", "--host", "[fd00::1]")
    assert names(folder) == {"jobs.example", "10.0.0.1", "fd00::1"}
    offline("tls", "init", str(tmp_path / "default"))
    assert names(tmp_path / "default") == {"localhost", "127.0.0.1", "::1"}


def test_a_certificate_is_for_one_purpose(offline, folder):
    offline("tls", "init", str(folder))
    usages = [
        certificate(folder, name).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        for name in ("server.crt", "client.crt")
    ]
    assert [[usage._name for usage in each] for each in usages] == [["serverAuth"], ["clientAuth"]]


@pytest.mark.parametrize("name", tls.FILES)
def test_no_file_is_overwritten(offline, folder, name):
    folder.mkdir()
    (folder / name).write_text("mine")
    done = offline("tls", "init", str(folder))
    assert (done.returncode, f"has {name} already" in done.stderr) == (2, True)
    assert [path.read_text() for path in folder.iterdir()] == ["mine"]


@pytest.mark.parametrize("host", ["a b", "host:50051", "", "a..b", "https://x"])
def test_what_is_no_host_is_refused(offline, folder, host):
    done = offline("tls", "init", str(folder), "--host", host)
    assert (done.returncode, "is not a host name" in done.stderr, folder.exists()) == (2, True, False)


def test_a_missing_extra_is_one_line(offline, folder, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    done = offline("tls", "init", str(folder))
    assert (done.returncode, folder.exists()) == (2, False)
    assert done.stderr == "error: tls init needs an extra; pip install 'jobstatus-grpc[security]'\n"
