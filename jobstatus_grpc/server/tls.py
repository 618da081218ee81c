"""The certificate and key of a server, and the CA of its clients: read, checked, and read again when the files change.

Knows nothing of gRPC: `transports/grpcio.py` makes credentials of it, and `metrics.py` the context of an HTTPS server.
Imported only with --tls-cert: `cryptography` comes with the extra `security`.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.files import FollowedFiles, read_file

log = logging.getLogger("jobstatus_grpc.server")

CHECK_SECONDS = 0.4
"""Interval at which the files are looked at. New ones are used at once, bad ones are logged at the second look: a
certificate and its key that are written one after the other do not fit for a moment."""

_CURVES = (ec.SECP256R1, ec.SECP384R1)
"""Curves that gRPC's clients accept in a certificate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Paths of PEM files."""

    cert: str
    """The server's certificate, then the CAs between it and a root."""
    key: str
    client_ca: str | None = None
    """The CAs of the clients' certificates. None: clients are not asked for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What was in the files at one time; its parts fit together."""

    cert: bytes = field(repr=False)
    key: bytes = field(repr=False)
    client_ca: bytes | None = field(repr=False)
    subject: str
    expires_at: datetime
    """The earliest end among the certificate and the CAs after it."""
    begins_at: datetime


def read(files: TlsFiles) -> Identity:
    """Read the files.

    Raises:
        CannotStartError: a file is missing or has something else in it, or the key is not that of the certificate.
    """
    try:
        return _read(files)
    except CannotStartError:
        raise
    except Exception as error:  # cryptography parses most of a certificate only when it is asked for
        raise CannotStartError(f"--tls-cert {files.cert} cannot be used: {error}") from None


def _read(files: TlsFiles) -> Identity:
    cert, key = _bytes_of("--tls-cert", files.cert), _bytes_of("--tls-key", files.key)
    client_ca = None if files.client_ca is None else _bytes_of("--tls-client-ca", files.client_ca)
    chain = _certificates("--tls-cert", files.cert, cert)
    if client_ca is not None:
        _certificates("--tls-client-ca", str(files.client_ca), client_ca)
    _check_pair(files, chain, _private_key(files.key, key))
    return Identity(
        cert=cert,
        key=key,
        client_ca=client_ca,
        subject=chain[0].subject.rfc4514_string() or "without a subject",
        expires_at=min(each.not_valid_after_utc for each in chain),
        begins_at=max(each.not_valid_before_utc for each in chain),
    )


def _bytes_of(flag: str, path: str) -> bytes:
    try:
        return read_file(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CannotStartError(f"{flag} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _certificates(flag: str, path: str, data: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        if b"-----BEGIN CERTIFICATE-----" in data:
            why = "has a certificate that is damaged"
        elif b"PRIVATE KEY-----" in data:
            why = "has a private key and no certificate"
        elif data[:1] == b"\x30":
            why = "is not PEM but DER; convert it with openssl x509 -inform der"
        else:
            why = "has no certificate; PEM is expected, which begins with -----BEGIN CERTIFICATE-----"
        raise CannotStartError(f"{flag} {path} {why}") from None


def _private_key(path: str, data: bytes) -> PrivateKeyTypes:
    try:
        return load_pem_private_key(data, None)
    except TypeError:
        why = "is encrypted; a server cannot ask for its passphrase: decrypt it with openssl pkey"
    except Exception:  # ValueError, or UnsupportedAlgorithm
        if b"PRIVATE KEY-----" in data:
            why = "has a private key that is damaged or of an unknown kind"
        elif b"-----BEGIN CERTIFICATE-----" in data:
            why = "has a certificate and no private key"
        else:
            why = "has no private key; PEM is expected, which begins with -----BEGIN PRIVATE KEY-----"
    raise CannotStartError(f"--tls-key {path} {why}") from None


def _check_pair(files: TlsFiles, chain: list[x509.Certificate], key: PrivateKeyTypes) -> None:
    public = key.public_key()
    is_usable = isinstance(key, rsa.RSAPrivateKey) or (
        isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, _CURVES)
    )
    if not is_usable:
        raise CannotStartError(
            f"--tls-key {files.key} is of a kind that gRPC's clients do not accept; "
            "use RSA, or ECDSA with P-256 or P-384"
        )
    fits = [_spki(each.public_key()) == _spki(public) for each in chain]
    if not fits[0]:
        why = (
            "the server's own certificate must be the first in the file, before those of its CAs"
            if any(fits)
            else "the certificate was made for another key"
        )
        raise CannotStartError(f"--tls-key {files.key} does not fit --tls-cert {files.cert}: {why}")


def _spki(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


class Certificates:
    """The newest good contents of `files`, for the time of `follow`."""

    def __init__(self, files: TlsFiles, *, now: Callable[[], datetime] = lambda: datetime.now(timezone.utc)) -> None:
        """Read the files.

        Raises:
            CannotStartError: as of `read`.
        """
        self._files = files
        self._now = now
        self._contexts: dict[bool, ssl.SSLContext] = {}
        self._next_contexts: dict[bool, ssl.SSLContext] = {}
        """Those of what was read last, which is not in use yet, or refused."""
        paths = (files.cert, files.key, files.client_ca)
        self._followed = FollowedFiles(paths, self._read_again, (CannotStartError,))
        self.reloads = Counter({"success": 0, "failure": 0})
        """The changes of the files that were taken, and those that were refused."""

    @property
    def current(self) -> Identity:
        """The newest good contents."""
        return self._followed.current

    def https_context(self, *, asks_clients: bool = False) -> ssl.SSLContext:
        """Return a context for an HTTPS server with the certificate.

        With `asks_clients` clients must have a certificate of the CAs in the files, if there are any; else none is
        asked for.

        Raises:
            CannotStartError: OpenSSL refuses the files, when they are first used for such a context.
        """
        if asks_clients not in self._contexts:
            self._contexts[asks_clients] = self._new_context(self.current, asks_clients=asks_clients)
        return self._contexts[asks_clients]

    def _new_context(self, current: Identity, *, asks_clients: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._files.cert, self._files.key, password="")
            if asks_clients and current.client_ca is not None:
                context.load_verify_locations(cadata=current.client_ca.decode("ascii", "ignore"))
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:
            raise CannotStartError(f"--tls-cert {self._files.cert}: OpenSSL refuses it: {error}") from None
        return context

    async def follow(self) -> None:
        """Read the files again whenever they change, for ever."""
        self._log_dates()
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            await asyncio.to_thread(self.check)  # the files may be on a network

    def check(self) -> None:
        """Read the files again if they have changed since; bad ones are logged, and change nothing."""
        before = self.current
        error = self._followed.check()
        if error is not None:
            self.reloads["failure"] += 1
            log.error(
                "the changed TLS files are not used: %s. The certificate from before stays in use, until %s; "
                "replace the files, a restart is not needed",
                error,
                _spell(self.current.expires_at),
            )
        elif self.current is not before:
            self._contexts = self._next_contexts
            self.reloads["success"] += 1
            self._log_dates()

    def _read_again(self, before: Identity | None) -> Identity:
        """Read the files; an expired certificate does not replace one that is valid."""
        current = read(self._files)
        if before is not None and current.expires_at <= self._now() < before.expires_at:
            raise CannotStartError(f"--tls-cert {self._files.cert} expired at {_spell(current.expires_at)}")
        # Now, and not at the next connection: OpenSSL reads the files itself, which may have something else then.
        self._next_contexts = {each: self._new_context(current, asks_clients=each) for each in self._contexts}
        return current

    def _log_dates(self) -> None:
        current = self.current
        dates = f"is valid from {_spell(current.begins_at)} to {_spell(current.expires_at)}"
        if current.begins_at <= self._now() < current.expires_at:
            log.info("TLS certificate %s %s", current.subject, dates)
        else:
            log.warning(
                "TLS certificate %s %s, which is not now: clients refuse it. Replace --tls-cert and --tls-key; a "
                "restart is not needed",
                current.subject,
                dates,
            )


def _spell(instant: datetime) -> str:
    return instant.strftime("%Y-%m-%d %H:%M UTC")
