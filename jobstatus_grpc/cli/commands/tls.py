"""`jobstatus tls init`: a CA, and a certificate for a server and for a client, to try TLS with."""

from __future__ import annotations

import ipaddress
import os
import shlex
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobstatus_grpc.cli import parsers
from jobstatus_grpc.cli.options import flag
from jobstatus_grpc.errors import CannotStartError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

CA_VALIDITY, VALIDITY = timedelta(days=3650), timedelta(days=365)
"""Of the CA, and of what it signs: long enough for a trial, and short enough that it is no permanent setup."""

FILES = ("ca.crt", "ca.key", "server.crt", "server.key", "client.crt", "client.key")


@click.group()
def tls() -> None:
    """Make certificates for trying TLS."""


def _host(value: str) -> str:
    """Return a host name or an IP address, without a port."""
    try:
        return str(ipaddress.ip_address(value.strip("[]")))
    except ValueError:
        pass
    labels = value.removeprefix("*.").split(".")
    if len(value) > 253 or not all(label.replace("-", "a").isalnum() and label.isascii() for label in labels):
        raise click.BadParameter(f"{value!r} is not a host name or an IP address")
    return value


@tls.command()
@click.argument("folder", metavar="DIR", type=parsers.text)
@flag(
    "--host NAME",
    "A name or IP address of the server. May be repeated. Default: localhost, 127.0.0.1 and ::1.",
    to="hosts",
    type=_host,
    multiple=True,
    envvar=None,
)
@flag("--client NAME", "The common name of the client.", default="client", type=_host, envvar=None)
def init(*, folder: str, hosts: Sequence[str], client: str) -> None:
    """Make a private CA in DIR, and a certificate for a server and for a client.

    The CA is valid for 10 years, the others for a year. With ca.key more certificates can be made that servers and
    clients trust: move it to a safe place. No file is overwritten.
    """
    try:
        made = _make(hosts or ("localhost", "127.0.0.1", "::1"), client)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cryptography":
            raise
        raise CannotStartError("tls init needs an extra; pip install 'jobstatus-grpc[security]'") from None
    _write(Path(folder), made)
    path = {name: shlex.quote(os.path.join(folder, name)) for name in FILES}
    host = f"[{hosts[0]}]" if hosts and ":" in hosts[0] else (hosts or ["localhost"])[0].replace("*.", "any.")
    click.echo(
        f"jobstatus serve --tls-cert {path['server.crt']} --tls-key {path['server.key']} "
        f"--tls-client-ca {path['ca.crt']} --tls-require-client-cert"
    )
    click.echo(
        f"jobstatus list --address {host}:50051 --ca {path['ca.crt']} --cert {path['client.crt']} "
        f"--key {path['client.key']}"
    )


def _make(hosts: Sequence[str], client: str) -> dict[str, bytes]:
    """Return the contents of all FILES."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID

    def pair(name: str, certificate: x509.Certificate, key: EllipticCurvePrivateKey) -> dict[str, bytes]:
        return {
            f"{name}.crt": certificate.public_bytes(Encoding.PEM),
            f"{name}.key": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        }

    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(3)]
    ca_name = f"jobstatus CA {os.urandom(4).hex()}"  # two CAs of one name confuse OpenSSL
    ca = _sign(ca_name, keys[0], ca_name, keys[0])
    names = [_alternative_name(host) for host in hosts]
    server = _sign(hosts[0], keys[1], ca_name, keys[0], names, ExtendedKeyUsageOID.SERVER_AUTH)
    user = _sign(client, keys[2], ca_name, keys[0], [x509.DNSName(client)], ExtendedKeyUsageOID.CLIENT_AUTH)
    return pair("ca", ca, keys[0]) | pair("server", server, keys[1]) | pair("client", user, keys[2])


def _alternative_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _sign(
    name: str,
    key: EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: EllipticCurvePrivateKey,
    names: Sequence[x509.GeneralName] = (),
    purpose: x509.ObjectIdentifier | None = None,
) -> x509.Certificate:
    """Return a certificate; without a purpose that of the CA itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])  # X.509's limit

    now = datetime.now(timezone.utc)
    is_ca = purpose is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # for clocks that are late
        .not_valid_after(now + (CA_VALIDITY if is_ca else VALIDITY))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(_key_usage(is_ca=is_ca), critical=True)
    )
    if purpose is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(folder: Path, made: dict[str, bytes]) -> None:
    """Write all files, or none if one is there already."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if there := [name for name in made if os.path.lexists(folder / name)]:
        raise click.UsageError(f"{folder} has {there[0]} already; nothing is overwritten. Take another DIR.")
    for name, data in made.items():
        mode = 0o600 if name.endswith(".key") else 0o644
        with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
