"""Certificates made for a test: CAs, what they sign, and folders that change as a secret that Kubernetes mounts."""

from __future__ import annotations

import ipaddress
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A certificate and its key, as PEM."""

    cert: bytes
    key: bytes

    def write(self, folder: Path, name: str) -> tuple[str, str]:
        """Write NAME.pem and NAME.key, and return their paths."""
        cert, key = folder / f"{name}.pem", folder / f"{name}.key"
        cert.write_bytes(self.cert)
        key.write_bytes(self.key)
        return str(cert), str(key)


class Authority:
    """A CA of a test's own."""

    def __init__(self, name: str = "test CA") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        usage = x509.BasicConstraints(ca=True, path_length=None)
        builder = _builder(self._name, self._name, self._key, timedelta(days=2))
        self.pem = (
            builder.add_extension(usage, critical=True).sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)
        )

    def write(self, folder: Path, name: str = "ca") -> str:
        """Write NAME.pem, and return its path."""
        path = folder / f"{name}.pem"
        path.write_bytes(self.pem)
        return str(path)

    def issue(
        self,
        *,
        name: str = "localhost",
        addresses: Sequence[str] = ("127.0.0.1",),
        uris: Sequence[str] = (),
        ends: timedelta = timedelta(days=1),
        key: CertificateIssuerPrivateKeyTypes | None = None,
    ) -> Pair:
        """Sign a certificate for a DNS name, addresses and URIs, valid until this time from now."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        names = [
            x509.DNSName(name),
            *(x509.IPAddress(ipaddress.ip_address(each)) for each in addresses),
            *(x509.UniformResourceIdentifier(each) for each in uris),
        ]
        builder = _builder(_named(name), self._name, key, ends)
        signed = builder.add_extension(x509.SubjectAlternativeName(names), critical=False).sign(
            self._key, hashes.SHA256()
        )
        return Pair(
            cert=signed.public_bytes(Encoding.PEM),
            key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        )


EXPIRED = timedelta(hours=-1)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: CertificateIssuerPrivateKeyTypes,
    ends: timedelta,
) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + min(ends, timedelta(0)) - timedelta(days=1))
        .not_valid_after(now + ends)
    )


class Mount:
    """A folder with tls.crt, tls.key and ca.crt, which are links that kubelet swaps together."""

    def __init__(self, folder: Path, pair: Pair, ca: bytes) -> None:
        self.folder = folder
        self.cert, self.key, self.ca = (str(folder / name) for name in ("tls.crt", "tls.key", "ca.crt"))
        self.swap(pair, ca)
        for path in (self.cert, self.key, self.ca):
            os.symlink(f"..data/{os.path.basename(path)}", path)

    def swap(self, pair: Pair, ca: bytes) -> None:
        """Replace all files at once."""
        version = f"..{next(_numbers)}"
        (self.folder / version).mkdir()
        for name, data in {"tls.crt": pair.cert, "tls.key": pair.key, "ca.crt": ca}.items():
            (self.folder / version / name).write_bytes(data)
        os.symlink(version, self.folder / "..data_tmp")
        os.replace(self.folder / "..data_tmp", self.folder / "..data")
