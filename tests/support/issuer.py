"""An issuer of JSON web tokens: its keys, its JWKS in a file or over HTTP, and tokens that it signs."""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import get_default_algorithms

KIND_OF = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256"), "rsa"),
    **{"ES256": "p256", "ES384": "p384", "EdDSA": "ed25519"},
}
"""The kind of key by algorithm."""


def private_key(kind: str, name: str = "") -> Any:
    """Return a key of a kind: the same one for the same name."""
    return _private_key(kind, name)


@functools.cache
def _private_key(kind: str, name: str) -> Any:
    if kind.startswith("rsa"):
        return rsa.generate_private_key(65537, int(kind.removeprefix("rsa") or 2048))
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key({"p256": ec.SECP256R1(), "p384": ec.SECP384R1(), "p521": ec.SECP521R1()}[kind])


def jwk_of(kind: str, kid: str | None, name: str = "", **more: Any) -> dict[str, Any]:
    """Return the public key as in a JWKS."""
    algorithm = {"rsa": "RS256", "ed2": "EdDSA"}.get(kind[:3], "ES256")
    found = get_default_algorithms()[algorithm].to_jwk(private_key(kind, name).public_key(), as_dict=True)
    return {**found, **({} if kid is None else {"kid": kid}), **more}


def jwks_of(*entries: dict[str, Any]) -> str:
    """Return a JWKS."""
    return json.dumps({"keys": entries})


ISSUER, AUDIENCE = "https://issuer.example", "jobstatus"


def sign(
    algorithm: str = "RS256",
    *,
    kid: str | None = "1",
    key: Any = None,
    headers: dict[str, Any] | None = None,
    **claims: Any,
) -> str:
    """Return a token that is good unless the arguments make it bad; a claim of None is left out."""
    now = int(time.time())
    given = {"iss": ISSUER, "aud": AUDIENCE, "sub": "robot", "exp": now + 600, "iat": now, **claims}
    payload = {name: value for name, value in given.items() if value is not None}
    named = {**({} if kid is None else {"kid": kid}), **(headers or {})}
    return jwt.encode(payload, key or private_key(KIND_OF[algorithm]), algorithm=algorithm, headers=named)


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unsigned(header: dict[str, Any], claims: dict[str, Any]) -> str:
    """Return the first two parts of a token, which PyJWT would not make."""
    return ".".join(base64url(json.dumps(part).encode()) for part in (header, claims))


def sign_by_hmac(secret: bytes, **claims: Any) -> str:
    """Return a token for which a secret is the key."""
    body = unsigned({"alg": "HS256", "kid": "1"}, claims)
    return f"{body}.{base64url(hmac.digest(secret, body.encode(), hashlib.sha256))}"


def public_pem(kind: str) -> bytes:
    """Return the public key as PEM."""
    public: bytes = private_key(kind).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return public


class JwksServer:
    """Serves `body` over HTTP on loopback, and counts the requests; a context manager."""

    def __init__(self, body: str) -> None:
        self.body = body
        self.status = 200
        self.location = ""
        self.requests: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(dict(self.headers))
                self.send_response(outer.status)
                if outer.location:
                    self.send_header("Location", outer.location)
                self.send_header("Content-Length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/jwks"

    def __enter__(self) -> JwksServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
