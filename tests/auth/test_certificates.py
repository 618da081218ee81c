"""Client certificates: which names admit a caller."""

from __future__ import annotations

import asyncio
import re
from datetime import datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from jobstatus_grpc.auth import Credentials, Identity, Role, UnknownIdentityError
from jobstatus_grpc.auth.certificates import read_certificates
from jobstatus_grpc.errors import BadIdentityError, IdentityExpiredError
from jobstatus_grpc.toml_file import FileError, read_toml
from tests.support.auth import bearer
from tests.support.issuer import private_key

ENDS_AT = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=1)


def certificate(*, uris=(), names=(), cn=(), ends_at=ENDS_AT):
    """Return a certificate (PEM) with these names; the server has it verified by TLS."""
    key = private_key("p256")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in cn])
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(ends_at - timedelta(days=2)).not_valid_after(ends_at)
    alternative = [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, names)]
    if alternative:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternative), critical=False)
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


@pytest.fixture
def ask(tmp_path):
    def ask(stanzas, pem, metadata=()):
        path = tmp_path / "auth.toml"
        path.write_text(stanzas)
        (authenticator,) = read_toml(str(path), {"certificates": read_certificates})["certificates"]
        credentials = Credentials(metadata=metadata, peer="ipv4:127.0.0.1:1", certificate=pem)
        return asyncio.run(authenticator.authenticate(credentials))

    return ask


def stanza(line, role="worker"):
    return f'[[certificates]]\n{line}\nrole = "{role}"\n'


SPIFFE = "spiffe://acme.example/ns/ci/sa/robot"


def test_a_uri_is_the_principal_and_the_certificates_end_the_expiry(ask):
    found = ask(stanza(f'uri = "{SPIFFE}"'), certificate(uris=[SPIFFE]))
    assert found == Identity(SPIFFE, role=Role.WORKER, expires_at=ENDS_AT)


def test_a_stanza_may_name_the_principal_its_tenant_and_its_jobs(ask):
    text = stanza('cn = "robot"') + 'name = "ci"\ntenant = "acme"\nonly = { name_prefix = "x" }'
    found = ask(text, certificate(cn=["robot"]))
    assert (found.principal, found.tenant, found.only.name_prefix) == ("ci", "acme", "x")


@pytest.mark.parametrize(
    ("line", "made", "admitted"),
    [
        ('uri = "spiffe://acme.example/ns/*/sa/robot"', {"uris": [SPIFFE]}, True),
        ('uri = "spiffe://acme.example/ns/*/sa/ro*"', {"uris": [SPIFFE]}, True),
        ('uri = "spiffe://acme.example/ns/*"', {"uris": [SPIFFE]}, False),
        ('uri = "spiffe://acme.example/*/robot"', {"uris": [SPIFFE]}, False),
        ('uri = "spiffe://acme.example/ns/*/sa/robot"', {"uris": ["spiffe://acme.example/ns//sa/robot"]}, False),
        ('uri = "spiffe://ACME.example/ns/ci/sa/robot"', {"uris": [SPIFFE]}, False),
        ('uri = "spiffe://acme.example/ns/ci/sa/robot"', {"uris": [SPIFFE + "2"]}, False),
        ('dns = "*.ci.example"', {"names": ["a.ci.example"]}, True),
        ('dns = "*.ci.example"', {"names": ["A.CI.example"]}, True),
        ('dns = "*.ci.example"', {"names": ["a.b.ci.example"]}, False),
        ('dns = "*.ci.example"', {"names": [".ci.example"]}, False),
        ('dns = "*.ci.example"', {"names": ["*.ci.example"]}, False),
        ('dns = "*.CI.example"', {"names": ["a.ci.example"]}, True),
        ('dns = "a.ci.example"', {"names": ["axci.example"]}, False),
        ('dns = "a.ci.example"', {"cn": ["a.ci.example"]}, False),
        ('dns = "b"', {"names": ["a", "b"]}, True),
        ('cn = "worker-*"', {"cn": ["worker-7"]}, True),
        ('cn = "worker-*"', {"cn": ["worker-7.evil"]}, False),
        ('cn = "robot"', {"names": ["robot"]}, False),
        ('cn = "robot"', {"cn": ["x", "robot"]}, False),
    ],
)
def test_a_wildcard_is_one_segment(ask, line, made, admitted):
    if admitted:
        assert ask(stanza(line), certificate(**made)).role == Role.WORKER
    else:
        with pytest.raises(UnknownIdentityError, match="are not admitted here, and the call has no token"):
            ask(stanza(line), certificate(**made))


@pytest.mark.parametrize(("name", "alike"), [("kiwi", "\u212aiwi"), ("indigo", "\u0131ndigo")])
def test_a_dns_name_with_a_letter_that_only_unicode_takes_for_ours_does_not_fit(ask, name, alike):
    in_place = "x" * len(alike.encode())  # x509.DNSName refuses such a name, and reads it from a certificate
    der = x509.load_pem_x509_certificate(certificate(names=[in_place])).public_bytes(Encoding.DER)
    pem = x509.load_der_x509_certificate(der.replace(in_place.encode(), alike.encode())).public_bytes(Encoding.PEM)
    with pytest.raises(UnknownIdentityError):
        ask(stanza(f'dns = "{name}"') + stanza('dns = "*"'), pem)


def test_the_principal_from_a_dns_name_is_in_lower_case(ask):
    assert ask(stanza('dns = "*.ci.example"'), certificate(names=["A.CI.example"])).principal == "a.ci.example"


def test_the_first_stanza_that_fits_decides(ask):
    text = stanza('cn = "robot"', "watcher") + stanza('cn = "*"', "admin")
    assert ask(text, certificate(cn=["robot"])).role == Role.WATCHER


def test_a_token_is_what_counts_and_no_certificate_is_left_to_others(ask):
    assert ask(stanza('cn = "*"'), certificate(cn=["robot"]), bearer("jst_x")) is None
    assert ask(stanza('cn = "*"'), None) is None


def test_a_certificate_that_has_expired_since_the_connection_began_says_so(ask):
    past = datetime.now(timezone.utc) - timedelta(seconds=1)
    with pytest.raises(IdentityExpiredError, match="renew it, and connect again"):
        ask(stanza('cn = "*"'), certificate(cn=["robot"], ends_at=past))


def test_names_that_cannot_be_read_are_refused(ask):
    with pytest.raises(BadIdentityError, match="cannot be read"):
        ask(stanza('cn = "*"'), b"nonsense")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[[certificates]]\nrole = "worker"', "line 2: certificates.role: a stanza of [[certificates]] has one of"),
        (stanza('uri = "spiffe://a/b"\ncn = "x"'), "has one of uri, dns and cn"),
        (stanza('uri = "spiffe://*/b"'), "with * only in its path"),
        (stanza('uri = "*"'), "must be a URI such as"),
        (stanza('dns = "b\u00fccher.example"'), "of an international one, its xn-- form"),
        (stanza('dns = "a.B"') + stanza('dns = "A.b"'), "certificates.dns: another stanza has the same name"),
        (stanza('cn = "x"') + stanza('cn = "x"'), "line 5: certificates.cn: another stanza has the same name"),
        (stanza('cn = ""'), "must not be empty"),
        (stanza('cn = "x"', "king"), "'king' is not known"),
    ],
)
def test_a_bad_stanza_is_an_error_with_its_line(ask, text, says):
    with pytest.raises(FileError, match=re.escape(says)):
        ask(text, None)
