"""Public keys of the issuers of JSON web tokens: a JWKS (RFC 7517) from a file, or from a URL that is read again."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt import PyJWK, PyJWKError, PyJWTError

from jobstatus_grpc.address import is_loopback
from jobstatus_grpc.auth.check_limit import CheckLimit
from jobstatus_grpc.errors import IdentityUnavailableError
from jobstatus_grpc.files import read_file

log = logging.getLogger("jobstatus_grpc.server")

PublicKey: TypeAlias = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey | Ed448PublicKey

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA")
"""Those with which a token may be signed: no others, whatever the token or the key set says."""

MIN_RSA_BITS = 2048

REFRESH_SECONDS = 300.0
"""Age of the keys of a URL from which they are read again: a key that the issuer removes is refused after this."""

UNKNOWN_KEY_SECONDS = 60.0
"""Between two reads of a URL because of an unknown key, which any caller can name."""

RETRY_SECONDS = 2.0
"""Between two reads of a URL that has never answered."""

FETCH_SECONDS = 10.0
"""Time for an answer of a URL."""

MAX_JWKS_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey:
    """A public key of a JWKS."""

    kid: str | None
    public: PublicKey
    algorithms: Sequence[str]
    """Those that are used with it; never HMAC, whose key would not be public."""


def parse_jwks(data: bytes) -> list[SigningKey]:
    """Return the keys of a JWKS with which tokens can be verified; others, such as keys of HMAC, are left out.

    Raises:
        ValueError: it is not a JWKS, or has no such key.
    """
    try:
        entries = json.loads(data)["keys"]
        keys = [key for entry in entries if (key := _signing_key(entry)) is not None]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError('is not a JWKS: JSON with "keys"') from None
    if not keys:
        raise ValueError(f"has no public key for {', '.join(ALGORITHMS)}")
    return keys


def _signing_key(entry: dict[str, Any]) -> SigningKey | None:
    if entry.get("kty") not in ("RSA", "EC", "OKP") or entry.get("use", "sig") != "sig":
        return None
    usable = _algorithms_of(entry)
    if not usable:
        return None
    try:
        # The algorithm only selects how PyJWT reads the key.
        key = PyJWK({name: value for name, value in entry.items() if name != "alg"}, algorithm=usable[0]).key
    except (PyJWTError, PyJWKError, ValueError, TypeError):
        return None
    public = key if isinstance(key, PublicKey) else key.public_key()  # a private key, published by mistake
    if isinstance(public, RSAPublicKey) and public.key_size < MIN_RSA_BITS:
        return None
    kid = entry.get("kid")
    return SigningKey(kid=None if kid is None else str(kid), public=public, algorithms=usable)


def _algorithms_of(entry: dict[str, Any]) -> list[str]:
    of_curve = {"P-256": ["ES256"], "P-384": ["ES384"], "Ed25519": ["EdDSA"], "Ed448": ["EdDSA"]}
    rsa = ["RS256", "RS384", "RS512", "PS256"]
    fitting = rsa if entry["kty"] == "RSA" else of_curve.get(entry.get("crv", ""), [])
    named = entry.get("alg")
    return [each for each in fitting if named is None or each == named]


class KeySet(Protocol):
    """The keys of an issuer."""

    async def find(self, kid: str | None, algorithm: str) -> list[SigningKey]:
        """Return the keys that fit a token; without `kid` all of the algorithm.

        Raises:
            IdentityUnavailableError: the keys have never been read, and cannot be now.
        """
        ...


def _fitting(keys: Sequence[SigningKey], kid: str | None, algorithm: str) -> list[SigningKey]:
    return [key for key in keys if algorithm in key.algorithms and (kid is None or key.kid == kid)]


class FileKeySet:
    """The keys in a file, which were read with the file of --auth."""

    def __init__(self, keys: Sequence[SigningKey]) -> None:
        self._keys = keys

    async def find(self, kid: str | None, algorithm: str) -> list[SigningKey]:
        return _fitting(self._keys, kid, algorithm)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySource:
    """Where the keys of a URL are, and how they are asked for."""

    url: str
    ca_file: str | None = None
    """Path of the CAs of the URL's certificate (PEM). None: those of the system."""
    token_file: str | None = None
    """Path of a bearer token for the URL, read each time, as Kubernetes renews it."""

    def fetch(self) -> list[SigningKey]:
        """Return the keys; blocks for FETCH_SECONDS at most.

        Raises:
            OSError, ValueError: the URL cannot be reached, or answers something else.
        """
        ends_at = time.monotonic() + FETCH_SECONDS
        request = urllib.request.Request(self.url, headers={"Accept": "application/json"})
        if self.token_file is not None:
            request.add_header("Authorization", f"Bearer {read_file(self.token_file).decode().strip()}")
        # Read here: OpenSSL would wait for the writer of a FIFO. Only comments between certificates are not ASCII.
        ca = None if self.ca_file is None else read_file(self.ca_file).decode("ascii", errors="ignore")
        context = ssl.create_default_context(cadata=ca)
        opener = urllib.request.build_opener(
            # A proxy would answer plain HTTP itself, with keys of its own.
            urllib.request.ProxyHandler({} if is_loopback(urlsplit(self.url).hostname or "") else None),
            urllib.request.HTTPSHandler(context=context),
            _NoRedirect,
        )
        try:
            opened = opener.open(request, timeout=FETCH_SECONDS / 2)
        except urllib.error.HTTPError as error:
            error.close()  # it has the connection
            raise
        with opened as answer:
            data = b""
            while piece := answer.read1(65536):
                data += piece
                if len(data) > MAX_JWKS_BYTES or time.monotonic() > ends_at:
                    raise ValueError("answers too much, or too slowly")
        return parse_jwks(data)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: one could lead to a host, or to plain HTTP, that the operator has not named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class UrlKeySet:
    """The keys of a URL: read again every REFRESH_SECONDS of use, and for an unknown key; kept if that fails."""

    def __init__(self, source: KeySource, *, seconds: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._seconds = seconds
        self._keys: Sequence[SigningKey] | None = None
        self._tried_at = float("-inf")
        self._fetching: asyncio.Task[None] | None = None
        self._is_failing = False
        self._check_limit = CheckLimit()

    async def find(self, kid: str | None, algorithm: str) -> list[SigningKey]:
        if self._keys is None:
            if self._fetching is not None or self._seconds() - self._tried_at >= RETRY_SECONDS:
                await self._wait_for_refresh()
            if self._keys is None:
                raise IdentityUnavailableError(
                    "the keys of the token's issuer cannot be read now, so the token cannot be checked; try again later"
                )
        found = _fitting(self._keys, kid, algorithm)
        age_seconds = self._seconds() - self._tried_at
        if not found and (self._fetching is not None or age_seconds >= UNKNOWN_KEY_SECONDS):
            await self._wait_for_refresh()
            return _fitting(self._keys, kid, algorithm)
        if age_seconds >= REFRESH_SECONDS:
            self._refresh()
        return found

    async def _wait_for_refresh(self) -> None:
        with self._check_limit:
            await asyncio.shield(self._refresh())

    def _refresh(self) -> asyncio.Task[None]:
        if self._fetching is None:
            self._tried_at = self._seconds()
            self._fetching = asyncio.create_task(self._fetch())
        return self._fetching

    async def _fetch(self) -> None:
        url = self._source.url.partition("?")[0]  # a query may have a key
        try:
            self._keys = await asyncio.to_thread(self._source.fetch)
            if self._is_failing:
                log.info("the keys of %s are read again", url)
            self._is_failing = False
        except Exception as error:
            if not self._is_failing:
                then = "tokens of its issuer are refused" if self._keys is None else "the keys from before stay in use"
                why = getattr(error, "reason", None) or error
                log.error("the keys of %s cannot be read: %s; %s, and it is tried again", url, why, then)
            self._is_failing = True
        finally:
            self._fetching = None
