"""Tokens: random texts that a caller sends as `authorization: Bearer …`. The auth file has only their SHA-256."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

from jobstatus_grpc.auth.identity import Credentials, Identity, Role, UnknownIdentityError
from jobstatus_grpc.auth.stanzas import MAX_PRINCIPAL_BYTES, read_only, read_role, read_tenant, tenant_violations
from jobstatus_grpc.errors import BadIdentityError, IdentityExpiredError
from jobstatus_grpc.toml_file import Value

PREFIX = "jst_"
"""Of each token that `make_token` makes: scanners for leaked secrets find it by this."""

RANDOM_CHARACTERS, CHECKSUM_CHARACTERS = 43, 6
"""Of a token after its prefix: 256 random bits, and the CRC-32 of their text, so that a scanner knows a token from a
text that looks like one."""

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase


def make_token() -> str:
    """Return a new token."""
    random = "".join(secrets.choice(_BASE62) for _ in range(RANDOM_CHARACTERS))
    checksum, digits = zlib.crc32(random.encode()), ""
    for _ in range(CHECKSUM_CHARACTERS):
        checksum, digit = divmod(checksum, 62)
        digits = _BASE62[digit] + digits
    return PREFIX + random + digits


def digest_of(token: str) -> bytes:
    """Return the SHA-256 of the whole token, which the file has in hexadecimal digits."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def canonical(header: str) -> str:
    """Return the one spelling of all `authorization` headers with the same bearer token; others as they are."""
    scheme, _, token = header.partition(" ")
    return f"Bearer {token.strip(' ')}" if scheme.lower() == "bearer" else header


def bearer_of(credentials: Credentials) -> str | None:
    """Return the token in the `authorization` metadata; None if the call has no such metadata.

    Raises:
        UnknownIdentityError: it is of another scheme.
        BadIdentityError: there are two, or it has no whole token.
    """
    headers = [value for key, value in credentials.metadata if key == "authorization"]
    if not headers:
        return None
    if len(headers) > 1:
        raise BadIdentityError("the call has two authorization headers; send one: authorization: Bearer TOKEN")
    scheme, _, token = canonical(str(headers[0])).partition(" ")
    if scheme != "Bearer":
        raise UnknownIdentityError(
            "the authorization header is not of the scheme Bearer; send authorization: Bearer TOKEN"
        )
    if not token or not token.isascii() or " " in token or not token.isprintable():
        raise BadIdentityError("the authorization header has no token, or one that is damaged; send it whole")
    return token


def is_jwt(token: str) -> bool:
    """Return whether a bearer token has the three parts of a JWT; any other is a token of this module."""
    return not token.startswith(PREFIX) and token.count(".") == 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A stanza of the file."""

    sha256: bytes
    identity: Identity


class TokenAuthenticator:
    """Knows callers by their token."""

    def __init__(self, tokens: Mapping[bytes, Token]) -> None:
        """Take them by their SHA-256."""
        self._tokens = tokens
        self.given_names = frozenset(each.identity.principal for each in tokens.values())

    async def authenticate(self, credentials: Credentials) -> Identity | None:
        token = bearer_of(credentials)
        if token is None or is_jwt(token):
            return None
        digest = digest_of(token)
        # The time of the look-up depends on the digest, which a caller cannot choose.
        found = self._tokens.get(digest)
        if found is None or not hmac.compare_digest(found.sha256, digest):
            raise UnknownIdentityError(
                "the token is not known here, or was revoked; check that it is whole, and meant for this server"
            )
        expires_at = found.identity.expires_at
        if expires_at is not None and expires_at <= datetime.now(timezone.utc):
            raise IdentityExpiredError("the token has expired; get a new one from the operator of the server")
        return found.identity


def read_tokens(section: Value) -> list[TokenAuthenticator]:
    """Read the stanzas `[[tokens]]`."""
    tokens: dict[bytes, Token] = {}
    for stanza in section.stanzas(("name", "sha256", "role"), ("tenant", "expires_at", "only")):
        token = _read_token(stanza)
        if token.sha256 in tokens:
            stanza["sha256"].refuse(f"is that of {tokens[token.sha256].identity.principal} too; a token has one stanza")
        tokens[token.sha256] = token
    return [TokenAuthenticator(tokens)]


def _read_token(stanza: Mapping[str, Value]) -> Token:
    digest = stanza["sha256"].text()
    if re.fullmatch(r"[0-9a-fA-F]{64}", digest) is None:
        # Not repeated in the error: it may be the token itself.
        stanza["sha256"].refuse("must be 64 hexadecimal digits: the SHA-256 of the whole token, never the token itself")
    identity = Identity(
        stanza["name"].text(max_bytes=MAX_PRINCIPAL_BYTES),
        tenant=read_tenant(stanza),
        role=read_role(stanza["role"]),
        only=read_only(stanza),
        expires_at=stanza["expires_at"].instant() if "expires_at" in stanza else None,
    )
    return Token(sha256=bytes.fromhex(digest), identity=identity)


def stanza_of(token: str, name: str, role: Role, *, tenant: str, expires_at: datetime | None) -> str:
    """Return the stanza that makes a server accept `token`.

    Raises:
        ValueError: a server would refuse the name or the tenant.
    """
    if not name or not name.isprintable() or len(name.encode()) > MAX_PRINCIPAL_BYTES:
        raise ValueError(f"a name has 1 to {MAX_PRINCIPAL_BYTES} bytes and no control characters")
    for violation in tenant_violations(tenant):
        raise ValueError(f"a tenant {violation.description}")
    lines = [
        "[[tokens]]",
        f"name = {_quoted(name)}",
        f'sha256 = "{digest_of(token).hex()}"',
        f'role = "{role.name.lower()}"',
        f"tenant = {_quoted(tenant)}",
    ]
    if expires_at is not None:
        lines.append(f"expires_at = {expires_at.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%SZ}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
