"""JSON web tokens, verified with the public keys of their issuers. Imported only with [[jwt]] in the auth file."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import jwt

from jobstatus_grpc.address import is_loopback
from jobstatus_grpc.auth.identity import Credentials, Identity, Role, UnknownIdentityError
from jobstatus_grpc.auth.key_sets import ALGORITHMS, FileKeySet, KeySet, KeySource, UrlKeySet, parse_jwks
from jobstatus_grpc.auth.patterns import to_pattern
from jobstatus_grpc.auth.stanzas import MAX_PRINCIPAL_BYTES, read_only, read_role, read_tenant, tenant_violations
from jobstatus_grpc.auth.tokens import bearer_of, digest_of, is_jwt
from jobstatus_grpc.errors import BadIdentityError, IdentityExpiredError, PermissionDeniedError
from jobstatus_grpc.job import DEFAULT_TENANT, JobFilter
from jobstatus_grpc.toml_file import Value

LEEWAY_SECONDS = 60
"""By which the clocks of an issuer and a server may differ."""

CACHE_SECONDS = 300.0
"""How long a verified token is accepted without verifying it again, within its own time."""

MAX_KEYS_TRIED = 3
"""Keys with which a token is verified: all that fit its algorithm if it has no kid, and each costs the event loop up to
0.5 ms. An issuer that rotates its keys has two or three; one with more of an algorithm names them by kid."""

FORGED_SECONDS = 10.0
"""How long a token with a wrong signature is refused without verifying it again."""

MAX_FORGED = 10_000
"""Tokens with a wrong signature that are remembered; each takes about 200 bytes."""

SEPARATORS = "/:"
"""Of the segments in the values of claims: `repo:acme/tools:ref:refs/heads/main`."""

MAX_PREFIX_BYTES = 64
"""Of a principal: the most of it is the claim."""

_SEGMENTS = re.compile(r"[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*")
"""PyJWT ignores other characters in a signature: one token would have any number of spellings, each of which would
take a place among the callers that are remembered."""

_LATEST = datetime(9999, 12, 31, tzinfo=timezone.utc)

Path: TypeAlias = tuple[str, ...]
"""The way to a claim: its name, or the names of objects around it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """A stanza of the file."""

    issuer: str
    audiences: Sequence[str]
    algorithms: Sequence[str]
    keys: KeySet
    principal: Path
    principal_prefix: str
    """Before the claim: names of two issuers, or of an issuer and of the file, may be equal without it."""
    tenant_claim: Path | None
    tenant: str | None
    """Of callers whose token lacks `tenant_claim`. None: they are refused."""
    role_claim: Path | None
    roles: Sequence[tuple[re.Pattern[str], Role]]
    role: Role | None
    """Of callers whose role claim maps to none. None: they are refused."""
    require: Sequence[tuple[Path, Sequence[re.Pattern[str]]]]
    only: JobFilter | None

    async def verify(self, token: str, header: Mapping[str, Any]) -> Identity | None:
        """Return the identity that a token of this issuer gives; None: its signature is wrong."""
        algorithm, kid = str(header.get("alg")), header.get("kid")
        if algorithm not in self.algorithms:
            raise BadIdentityError(f"the token must be signed with {', '.join(self.algorithms)}")
        if "crit" in header:
            raise BadIdentityError("the token has extensions (crit) that are not known here")
        keys = await self.keys.find(kid, algorithm)
        if not keys:
            raise BadIdentityError("the token is signed with a key that its issuer does not publish")
        for key in keys[:MAX_KEYS_TRIED]:
            try:
                return self._identity(self._claims(token, key.public, algorithm))
            except jwt.InvalidSignatureError:
                continue
        return None

    def _claims(self, token: str, key: Any, algorithm: str) -> Mapping[str, Any]:
        try:
            return jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self.audiences,
                issuer=self.issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud"], "verify_sub": False, "verify_jti": False},
            )
        except jwt.InvalidSignatureError:
            raise
        except jwt.ExpiredSignatureError:
            raise IdentityExpiredError("the token has expired; get a new one from its issuer") from None
        except jwt.ImmatureSignatureError:
            raise BadIdentityError(
                "the token is not valid yet; compare the clocks of its issuer and this server"
            ) from None
        except jwt.InvalidAudienceError:
            raise BadIdentityError(
                f"the token was made for another audience; request one for {' or '.join(self.audiences)}"
            ) from None
        except jwt.MissingRequiredClaimError as error:
            raise BadIdentityError(f"the token has no claim {error.claim}") from None
        except _DAMAGES:
            raise _damaged() from None

    def _identity(self, claims: Mapping[str, Any]) -> Identity:
        for path, patterns in self.require:
            if not any(pattern.fullmatch(value) for value in _texts(claims, path) for pattern in patterns):
                raise PermissionDeniedError(
                    f"the token is valid, but its claim {'.'.join(path)} is not one that this server admits"
                )
        return Identity(
            _text(claims, self.principal, prefix=self.principal_prefix),
            tenant=self._tenant(claims),
            role=self._role(claims),
            only=self.only,
            expires_at=_expiry(claims["exp"]),
            leeway_seconds=LEEWAY_SECONDS,
        )

    def _tenant(self, claims: Mapping[str, Any]) -> str:
        path = self.tenant_claim
        if path is None or (self.tenant is not None and _find(claims, path) is None):
            return DEFAULT_TENANT if self.tenant is None else self.tenant
        tenant = _text(claims, path)
        for violation in tenant_violations(tenant):
            raise BadIdentityError(
                f"the token's claim {'.'.join(path)} is no name of a tenant: {violation.description}"
            )
        return tenant

    def _role(self, claims: Mapping[str, Any]) -> Role:
        values = [] if self.role_claim is None else _texts(claims, self.role_claim)
        found = [role for pattern, role in self.roles if any(map(pattern.fullmatch, values))]
        if found:
            return max(found)
        if self.role is None:
            raise PermissionDeniedError(
                f"the token is valid, but its claim {'.'.join(self.role_claim or ())} gives it no role here; the "
                "operator of the server can add it to roles of [[jwt]]"
            )
        return self.role


_DAMAGES = (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError)
"""What PyJWT raises for bytes from outside."""


def _damaged() -> BadIdentityError:
    return BadIdentityError("the token is not a valid JWT; send it whole")


def _wrongly_signed() -> BadIdentityError:
    return BadIdentityError("the signature of the token is wrong")


def _expiry(exp: Any) -> datetime:
    """Return when the token ends, without the leeway."""
    try:
        seconds = float(exp)
    except OverflowError:  # PyJWT takes integers of any size
        raise _damaged() from None
    if not math.isfinite(seconds) or seconds > _LATEST.timestamp():
        return _LATEST
    return datetime.fromtimestamp(seconds, timezone.utc)


def _find(claims: Mapping[str, Any], path: Path) -> Any:
    """Return the value of a claim; None: the token lacks it."""
    value: Any = claims
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _texts(claims: Mapping[str, Any], path: Path) -> list[str]:
    """Return the texts of a claim, which may be an array of them; none if it is absent, or of another kind."""
    value = _find(claims, path)
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, str)]


def _text(claims: Mapping[str, Any], path: Path, *, prefix: str = "") -> str:
    if _find(claims, path) is None:
        raise BadIdentityError(f"the token has no claim {'.'.join(path)}")
    found = _texts(claims, path)
    longest = MAX_PRINCIPAL_BYTES - len(prefix.encode())
    if len(found) != 1 or not found[0].isprintable() or not 0 < len(found[0].encode()) <= longest:
        raise BadIdentityError(f"the token's claim {'.'.join(path)} must be one text of 1 to {longest} bytes")
    return prefix + found[0]


class JwtAuthenticator:
    """Knows callers by their JWT."""

    def __init__(self, issuers: Sequence[Issuer], *, seconds: Callable[[], float] = time.monotonic) -> None:
        self._issuers = issuers
        self._seconds = seconds
        self._forged_until: dict[bytes, float] = {}
        """By the digest of a token with a wrong signature; the oldest first."""

    def seconds_kept(self, caller: Identity) -> float:
        """Return how long an identity may be kept at most: its key may be taken back before it expires."""
        return CACHE_SECONDS

    async def authenticate(self, credentials: Credentials) -> Identity | None:
        token = bearer_of(credentials)
        if token is None or not is_jwt(token):
            return None
        if _SEGMENTS.fullmatch(token) is None:
            raise _damaged()
        digest = digest_of(token)
        if self._forged_until.get(digest, 0.0) > self._seconds():
            raise _wrongly_signed()
        try:
            header = jwt.get_unverified_header(token)
            claims = jwt.decode(token, options={"verify_signature": False})
        except _DAMAGES:
            raise _damaged() from None
        ours = [each for each in self._issuers if each.issuer == claims.get("iss")]
        if not ours:
            raise UnknownIdentityError("the token is of an issuer that this server does not admit")
        named = claims.get("aud")
        audiences = named if isinstance(named, list) else [named]
        for_us = [each for each in ours if any(name in each.audiences for name in audiences)]
        identity = await (for_us or ours)[0].verify(token, header)
        if identity is None:
            self._remember_forged(digest)
            raise _wrongly_signed()
        return identity

    def _remember_forged(self, digest: bytes) -> None:
        self._forged_until.pop(digest, None)
        self._forged_until[digest] = self._seconds() + FORGED_SECONDS
        if len(self._forged_until) > MAX_FORGED:
            del self._forged_until[next(iter(self._forged_until))]


class JwtReader:
    """Reads the stanzas `[[jwt]]`. Keeps the keys of a URL from one reading of the file to the next."""

    def __init__(self) -> None:
        self._key_sets: dict[KeySource, UrlKeySet] = {}

    def __call__(self, section: Value) -> list[JwtAuthenticator]:
        """Return the authenticator of the section."""
        issuers: list[Issuer] = []
        optional = (
            "algorithms",
            "jwks_ca",
            "jwks_token_file",
            "claims",
            "principal_prefix",
            "roles",
            "role",
            "tenant",
            "require",
            "only",
        )
        for stanza in section.stanzas(("issuer", "audience", "jwks"), optional):
            issuer = self._issuer(stanza)
            for other in issuers:
                if other.issuer == issuer.issuer and set(other.audiences) & set(issuer.audiences):
                    stanza["audience"].refuse("another stanza has this issuer and audience; write one, with roles")
            issuers.append(issuer)
        return [JwtAuthenticator(issuers)]

    def _issuer(self, stanza: Mapping[str, Value]) -> Issuer:
        claims = stanza["claims"].table(optional=("principal", "tenant", "role")) if "claims" in stanza else {}
        if ("role" in claims) != ("roles" in stanza):
            (claims.get("role") or stanza["roles"]).refuse(
                'claims = { role = "CLAIM" } and roles = { "VALUE" = "worker" } need each other'
            )
        if "role" not in claims and "role" not in stanza:
            stanza["issuer"].refuse('the stanza gives no role; add role = "worker", or claims.role and roles')
        roles = stanza["roles"].entries() if "roles" in stanza else {}
        return Issuer(
            issuer=stanza["issuer"].text(),
            audiences=stanza["audience"].texts(),
            algorithms=_algorithms(stanza),
            keys=self._keys(stanza),
            principal=_path(claims["principal"]) if "principal" in claims else ("sub",),
            principal_prefix=(
                stanza["principal_prefix"].text(max_bytes=MAX_PREFIX_BYTES) if "principal_prefix" in stanza else ""
            ),
            tenant_claim=_path(claims["tenant"]) if "tenant" in claims else None,
            tenant=read_tenant(stanza) if "tenant" in stanza else None,
            role_claim=_path(claims["role"]) if "role" in claims else None,
            roles=[(to_pattern(key, separators=SEPARATORS), read_role(value)) for key, value in roles.items()],
            role=read_role(stanza["role"]) if "role" in stanza else None,
            require=list(_requirements(stanza["require"], ())) if "require" in stanza else [],
            only=read_only(stanza),
        )

    def _keys(self, stanza: Mapping[str, Value]) -> KeySet:
        place = stanza["jwks"].text()
        if "://" not in place:
            for name in ("jwks_ca", "jwks_token_file"):
                if name in stanza:
                    stanza[name].refuse("is for a URL in jwks only")
            try:
                return FileKeySet(parse_jwks(stanza["jwks"].read_file()))
            except ValueError as error:
                stanza["jwks"].refuse(str(error))
        try:
            url = urlsplit(place)
            is_whole = (
                bool(url.hostname) and url.port != 0 and place.isascii() and place.isprintable() and " " not in place
            )
        except ValueError:
            is_whole = False
        if not is_whole:
            stanza["jwks"].refuse("is not a URL: https://HOST/PATH, in ASCII without spaces")
        if "@" in url.netloc:
            stanza["jwks"].refuse(
                "must have no user and password in the URL; jwks_token_file has the URL's bearer token"
            )
        if url.scheme != "https" and not (url.scheme == "http" and is_loopback(url.hostname or "")):
            stanza["jwks"].refuse("must be a file, or a URL with https; http only for this machine")
        source = KeySource(
            url=place,
            ca_file=_existing(stanza.get("jwks_ca")),
            token_file=_existing(stanza.get("jwks_token_file")),
        )
        return self._key_sets.setdefault(source, UrlKeySet(source))


def _existing(value: Value | None) -> str | None:
    """Return the path of a file that exists; it is read each time that it is used."""
    if value is None:
        return None
    path = value.path()
    if not path.is_file():
        value.refuse("there is no such file")
    return str(path)


def _algorithms(stanza: Mapping[str, Value]) -> Sequence[str]:
    if "algorithms" not in stanza:
        return ALGORITHMS
    values = stanza["algorithms"]
    return [each.choice({name: name for name in ALGORITHMS}) for each in values.items()] or values.refuse(
        "must not be empty"
    )


def _path(value: Value) -> Path:
    """Return the way to a claim: a text is its name, dots included; an array has the names of objects around it."""
    return value.texts()


def _requirements(value: Value, path: Path) -> Iterator[tuple[Path, Sequence[re.Pattern[str]]]]:
    """Yield the claims of a table and what they must be; a table in it stands for an object in the claims."""
    for name, each in value.entries().items():
        if isinstance(each.plain(), dict):
            yield from _requirements(each, (*path, name))
        else:
            yield (*path, name), [to_pattern(text, separators=SEPARATORS) for text in each.texts()]
