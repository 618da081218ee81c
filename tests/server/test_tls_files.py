"""The files of --tls-cert, --tls-key and --tls-client-ca: one line says what is wrong with them, changes are taken."""

from __future__ import annotations

import contextlib
import logging
import ssl
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509 import load_pem_x509_certificate

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.server.config import ServerConfig
from jobstatus_grpc.server.tls import Certificates, TlsFiles, read
from tests.support.certificates import EXPIRED, Authority, Mount

AUTHORITY = Authority()
PAIR, OTHER = AUTHORITY.issue(), AUTHORITY.issue()


def encrypted(key):
    secret = BestAvailableEncryption(b"secret")
    return load_pem_private_key(key, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret)


def der(cert):
    return load_pem_x509_certificate(cert).public_bytes(Encoding.DER)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("cert", None, "--tls-cert {path} cannot be read: No such file or directory"),
        ("key", None, "--tls-key {path} cannot be read: No such file or directory"),
        ("client_ca", None, "--tls-client-ca {path} cannot be read: No such file or directory"),
        ("cert", b"", "--tls-cert {path} has no certificate; PEM is expected"),
        ("cert", PAIR.key, "--tls-cert {path} has a private key and no certificate"),
        ("cert", PAIR.cert[:200], "--tls-cert {path} has a certificate that is damaged"),
        ("client_ca", PAIR.cert.replace(b"\nM", b"\nA", 1), "--tls-client-ca {path} has a certificate that is damaged"),
        ("cert", der(PAIR.cert), "--tls-cert {path} is not PEM but DER"),
        ("client_ca", b"\xff\x00", "--tls-client-ca {path} has no certificate"),
        ("key", PAIR.cert, "--tls-key {path} has a certificate and no private key"),
        ("key", b"secret", "--tls-key {path} has no private key; PEM is expected"),
        ("key", PAIR.key[:100], "--tls-key {path} has a private key that is damaged"),
        ("key", encrypted(PAIR.key), "--tls-key {path} is encrypted"),
        ("key", OTHER.key, "--tls-key {path} does not fit --tls-cert {cert}: the certificate was made for another key"),
        ("cert", AUTHORITY.pem + PAIR.cert, "the server's own certificate must be the first in the file"),
    ],
    ids=lambda value: "data" if isinstance(value, bytes) else None,
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, data, says):
    cert, key = PAIR.write(tmp_path, "server")
    files = {"cert": cert, "key": key, "client_ca": AUTHORITY.write(tmp_path), name: str(tmp_path / "wrong")}
    if data is not None:
        (tmp_path / "wrong").write_bytes(data)
    with pytest.raises(CannotStartError) as caught:
        read(TlsFiles(**files))
    assert says.format(path=tmp_path / "wrong", cert=cert) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP521R1())], ids=["Ed25519", "P-521"]
)
def test_a_kind_of_key_that_clients_do_not_accept_is_refused(tmp_path, key):
    cert, key_file = AUTHORITY.issue(key=key).write(tmp_path, "server")
    with pytest.raises(CannotStartError, match="use RSA, or ECDSA with P-256 or P-384"):
        read(TlsFiles(cert=cert, key=key_file))


@pytest.mark.parametrize(
    "key", [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())], ids=["RSA", "P-384"]
)
def test_other_kinds_of_keys_are_accepted(tmp_path, key):
    cert, key_file = AUTHORITY.issue(key=key).write(tmp_path, "server")
    assert read(TlsFiles(cert=cert, key=key_file)).key == (tmp_path / "server.key").read_bytes()


@pytest.fixture
def mount(tmp_path):
    return Mount(tmp_path, PAIR, AUTHORITY.pem)


@pytest.fixture
def certificates(mount, caplog):
    caplog.set_level(logging.INFO)
    return Certificates(TlsFiles(cert=mount.cert, key=mount.key, client_ca=mount.ca))


def test_the_key_is_not_in_the_repr_of_what_was_read(certificates):
    assert PAIR.key.decode().split("\n")[1] not in repr(certificates.current)


def test_swapped_files_are_taken_at_the_next_check(certificates, mount):
    other = Authority()
    mount.swap(OTHER, other.pem)
    certificates.check()
    assert (certificates.current.cert, certificates.current.client_ca) == (OTHER.cert, other.pem)
    assert certificates.reloads == {"success": 1, "failure": 0}


@pytest.mark.parametrize("bad", [b"", b"-----BEGIN PRIVATE KEY-----", OTHER.key], ids=["empty", "half", "another"])
def test_a_bad_new_key_is_logged_and_counted_once_and_changes_nothing(certificates, mount, caplog, bad):
    mount.swap(type(PAIR)(cert=PAIR.cert, key=bad), AUTHORITY.pem)
    for _ in range(5):
        certificates.check()
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert error.startswith(f"the changed TLS files are not used: --tls-key {mount.key} ")
    assert certificates.current.key == PAIR.key
    assert certificates.reloads == {"success": 0, "failure": 1}


def test_each_bad_change_is_logged_and_the_next_good_one_is_taken(certificates, mount, caplog):
    for _ in range(2):
        mount.swap(type(PAIR)(cert=PAIR.cert, key=OTHER.key), AUTHORITY.pem)
        certificates.check()
        certificates.check()
    mount.swap(OTHER, AUTHORITY.pem)
    certificates.check()
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR", "INFO"]
    assert certificates.current.key == OTHER.key


def test_a_certificate_and_its_key_may_be_replaced_one_after_the_other(certificates, mount, caplog):
    for name in ("tls.crt", "tls.key"):
        (mount.folder / "..data" / name).write_bytes(OTHER.cert if name == "tls.crt" else OTHER.key)
        certificates.check()
    assert certificates.current.cert == OTHER.cert
    assert certificates.reloads == {"success": 1, "failure": 0}


def test_files_that_are_gone_for_a_while_change_nothing(certificates, mount):
    (mount.folder / "..data").rename(mount.folder / "away")
    certificates.check()
    certificates.check()
    (mount.folder / "away").rename(mount.folder / "..data")
    certificates.check()
    assert certificates.current.cert == PAIR.cert
    assert certificates.reloads["failure"] == 1


def test_an_expired_certificate_does_not_replace_a_valid_one(certificates, mount, caplog):
    mount.swap(AUTHORITY.issue(ends=EXPIRED), AUTHORITY.pem)
    certificates.check()
    certificates.check()
    assert f"--tls-cert {mount.cert} expired at " in caplog.text
    assert certificates.current.cert == PAIR.cert


def presented(server_context):
    """Return the certificate that a server with this context shows in a handshake."""
    client_context = ssl._create_unverified_context()
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server)
    for side in (client, server, client):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return ssl.DER_cert_to_PEM_cert(client.getpeercert(binary_form=True) or b"").encode()


def test_https_has_the_certificate_that_is_in_use_and_not_what_is_in_the_files_later(certificates, mount):
    assert presented(certificates.https_context()) == PAIR.cert
    mount.swap(OTHER, AUTHORITY.pem)
    certificates.check()
    mount.swap(AUTHORITY.issue(ends=EXPIRED), AUTHORITY.pem)
    certificates.check()
    certificates.check()
    assert certificates.current.cert == presented(certificates.https_context()) == OTHER.cert


def test_tls_without_its_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.delitem(sys.modules, "jobstatus_grpc.server.tls")
    with pytest.raises(CannotStartError, match=r"pip install 'jobstatus-grpc\[security\]'"):
        ServerConfig(tls_cert="server.pem", tls_key="server.key").check()
