"""JSON web tokens: what is accepted, what is refused and why, and what the claims give."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from jwt.algorithms import RSAAlgorithm

from jobstatus_grpc.auth import Credentials, Identity, Role, UnknownIdentityError
from jobstatus_grpc.auth.jwt import FORGED_SECONDS, JwtAuthenticator, JwtReader
from jobstatus_grpc.auth.key_sets import ALGORITHMS, FileKeySet, parse_jwks
from jobstatus_grpc.errors import BadIdentityError, IdentityExpiredError, PermissionDeniedError
from jobstatus_grpc.toml_file import FileError, read_toml
from tests.support.auth import bearer
from tests.support.issuer import (
    AUDIENCE,
    ISSUER,
    KIND_OF,
    base64url,
    jwk_of,
    jwks_of,
    private_key,
    public_pem,
    sign,
    sign_by_hmac,
    unsigned,
)
from tests.support.timing import Clock

STANZA = f"""
[[jwt]]
issuer = "{ISSUER}"
audience = "{AUDIENCE}"
jwks = "keys.json"
"""

KEYS = jwks_of(*(jwk_of(kind, "1") for kind in set(KIND_OF.values())))


@pytest.fixture
def read(tmp_path):
    def read(text=STANZA + 'role = "worker"', keys=KEYS):
        (tmp_path / "keys.json").write_text(keys)
        path = tmp_path / "auth.toml"
        path.write_text(text)
        return read_toml(str(path), {"jwt": JwtReader()})["jwt"][0]

    return read


@pytest.fixture
def ask(read):
    """Read stanzas, and return the identity that they give a token."""

    def ask(token, *text, **settings):
        credentials = Credentials(metadata=bearer(token), peer="ipv4:127.0.0.1:1")
        return asyncio.run(read(*text, **settings).authenticate(credentials))

    return ask


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_is_accepted(ask, algorithm):
    exp = int(time.time()) + 100
    expires_at = datetime.fromtimestamp(exp, timezone.utc)
    assert ask(sign(algorithm, exp=exp)) == Identity("robot", role=Role.WORKER, expires_at=expires_at)


@pytest.mark.parametrize("seconds", [-50, 0])
def test_clocks_may_differ_by_a_minute(ask, seconds):
    now = int(time.time())
    assert ask(sign(exp=now + seconds, nbf=now - seconds, iat=now - seconds)).principal == "robot"


def test_without_a_kid_three_keys_of_the_algorithm_are_tried(ask):
    other_kinds = [jwk_of(kind, kind) for kind in ("rsa", "p384", "ed25519")]
    others = [jwk_of("p256", str(number), f"other {number}") for number in range(3)]
    token = sign("ES256", kid=None)
    keys = jwks_of(*other_kinds, *others[1:], jwk_of("p256", "ours"))
    assert ask(token, keys=keys).principal == "robot"
    with pytest.raises(BadIdentityError, match="the signature of the token is wrong"):
        ask(token, keys=jwks_of(*others, jwk_of("p256", "ours")))


def test_the_newest_forged_tokens_are_not_verified_again_for_a_while(read, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.auth.jwt.MAX_FORGED", 1)
    published, clock = parse_jwks(jwks_of(jwk_of("rsa", "1", "other")).encode()), Clock()
    authenticator = JwtAuthenticator([replace(read()._issuers[0], keys=FileKeySet(published))], seconds=clock)

    def is_admitted(token):
        credentials = Credentials(metadata=bearer(token), peer="ipv4:127.0.0.1:1")
        with contextlib.suppress(BadIdentityError):
            return asyncio.run(authenticator.authenticate(credentials)) is not None
        return False

    old, new = sign(sub="old"), sign(sub="new")
    assert [is_admitted(old), is_admitted(new)] == [False, False]
    published[:] = parse_jwks(KEYS.encode())
    assert [is_admitted(old), is_admitted(new)] == [True, False]
    clock.seconds += FORGED_SECONDS
    assert is_admitted(new)


BAD = {
    "expired": (lambda now: sign(exp=now - 61), IdentityExpiredError, "has expired; get a new one from its issuer"),
    "not yet valid": (lambda now: sign(nbf=now + 100), BadIdentityError, "not valid yet; compare the clocks"),
    "of the future": (lambda now: sign(iat=now + 100), BadIdentityError, "not valid yet"),
    "wrong issuer": (lambda now: sign(iss="https://x.example"), UnknownIdentityError, "an issuer that this server"),
    "no issuer": (lambda now: sign(iss=None), UnknownIdentityError, "an issuer that this server does not admit"),
    "wrong audience": (lambda now: sign(aud="other"), BadIdentityError, "another audience; request one for jobstatus"),
    "wrong audiences": (lambda now: sign(aud=["a", "b"]), BadIdentityError, "another audience"),
    "no audience": (lambda now: sign(aud=None), BadIdentityError, "has no claim aud"),
    "no expiry": (lambda now: sign(exp=None), BadIdentityError, "has no claim exp"),
    "unknown key": (lambda now: sign(kid="2"), BadIdentityError, "signed with a key that its issuer does not publish"),
    "wrong key": (
        lambda now: sign(key=private_key("rsa", "x")),
        BadIdentityError,
        "the signature of the token is wrong",
    ),
    "extension": (lambda now: sign(headers={"crit": ["b64"], "b64": True}), BadIdentityError, "the token"),
    "cut": (lambda now: sign()[:-4], BadIdentityError, "the token"),
    "nonsense": (lambda now: "a.b.c", BadIdentityError, "the token is not a valid JWT; send it whole"),
    "another spelling": (lambda now: f"{sign()}!", BadIdentityError, "the token is not a valid JWT; send it whole"),
    "empty": (lambda now: "..", BadIdentityError, "the token is not a valid JWT"),
    "no principal": (lambda now: sign(sub=None), BadIdentityError, "the token has no claim sub"),
    "long principal": (lambda now: sign(sub="x" * 257), BadIdentityError, "of 1 to 256 bytes"),
    "principal of two lines": (lambda now: sign(sub="a\nb"), BadIdentityError, "claim sub"),
    "two principals": (lambda now: sign(sub=["a", "b"]), BadIdentityError, "claim sub"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_token_says_what_is_wrong(ask, kind):
    make, error, says = BAD[kind]
    token = make(int(time.time()))
    with pytest.raises(error, match=re.escape(says)) as caught:
        ask(token)
    assert type(caught.value) is error
    assert token not in str(caught.value) or len(token) < 10


TENANT_CLAIM = STANZA + 'role = "worker"\nclaims = { tenant = "department" }'


def test_a_token_without_the_tenant_claim_is_in_no_other_tenant(ask):
    with pytest.raises(BadIdentityError, match="the token has no claim department"):
        ask(sign(), TENANT_CLAIM)


def test_the_tenant_of_the_stanza_is_that_of_tokens_without_the_tenant_claim(ask):
    text = TENANT_CLAIM + '\ntenant = "guests"'
    assert (ask(sign(), text).tenant, ask(sign(department="core"), text).tenant) == ("guests", "core")


@pytest.mark.parametrize("department", [["a", "b"], 7, "", "two words", []])
def test_a_tenant_claim_that_is_wrong_is_refused_also_with_a_tenant_in_the_stanza(ask, department):
    with pytest.raises(BadIdentityError, match="the token's claim department"):
        ask(sign(department=department), TENANT_CLAIM + '\ntenant = "guests"')


GOOD: dict[str, Any] = {"iss": ISSUER, "aud": AUDIENCE, "sub": "robot", "exp": 4_000_000_000}


@pytest.mark.parametrize("algorithm", ["none", "NONE", "nOnE", "", None, ["RS256"], "HS256", "ES512", "x"])
def test_none_and_unknown_algorithms_are_refused(ask, algorithm):
    with pytest.raises(BadIdentityError):
        ask(unsigned({"alg": algorithm, "kid": "1"}, GOOD) + ".")


@pytest.mark.parametrize("encoding", ["pem", "jwk"])
def test_hmac_with_the_public_key_is_refused(ask, encoding):
    secret = public_pem("rsa") if encoding == "pem" else json.dumps(jwk_of("rsa", "1")).encode()
    with pytest.raises(BadIdentityError, match="must be signed with"):
        ask(sign_by_hmac(secret, **GOOD))


def test_a_secret_key_in_the_jwks_is_never_used(ask):
    secret = b"0123456789abcdef0123456789abcdef"
    oct_key = {"kty": "oct", "kid": "1", "k": base64url(secret), "alg": "HS256"}
    with pytest.raises(BadIdentityError, match="must be signed with"):
        ask(sign_by_hmac(secret, **GOOD), keys=jwks_of(oct_key, jwk_of("rsa", "2")))


@pytest.mark.parametrize(
    "claims", [{"exp": 1e400}, {"exp": 10**400}, {"exp": "x"}, {"exp": [1]}, {"exp": None}, {"aud": 1}, {"nbf": {}}]
)
def test_claims_of_a_wrong_kind_are_a_damaged_token(ask, claims):
    header = {"alg": "RS256", "kid": "1"}
    body = unsigned(header, {**GOOD, **claims})
    signature = private_key("rsa").sign(body.encode(), PKCS1v15(), SHA256())
    with pytest.raises(BadIdentityError):
        ask(f"{body}.{base64url(signature)}")


def test_a_stanza_may_allow_fewer_algorithms(ask):
    text = STANZA + 'role = "worker"\nalgorithms = ["ES256"]'
    assert ask(sign("ES256"), text).principal == "robot"
    with pytest.raises(BadIdentityError, match="must be signed with ES256"):
        ask(sign("RS256"), text)


def test_claims_give_principal_tenant_and_the_highest_role(ask):
    text = (
        STANZA
        + """
claims = { principal = "name", tenant = ["org.example", "unit"], role = "groups" }
roles = { "job-readers" = "watcher", "team:*" = "operator", "staff" = "worker" }
"""
    )
    claims: dict[str, Any] = {"name": "Ada", "org.example": {"unit": "acme"}, "groups": ["job-readers", "team:a", "x"]}
    found = ask(sign(**claims), text)
    assert (found.principal, found.tenant, found.role) == ("Ada", "acme", Role.OPERATOR)
    with pytest.raises(PermissionDeniedError, match="its claim groups gives it no role here"):
        ask(sign(**{**claims, "groups": "team:a:b"}), text)
    assert ask(sign(**{**claims, "groups": []}), text + 'role = "watcher"').role == Role.WATCHER


def test_a_stanza_may_require_claims(ask):
    text = (
        STANZA + 'role = "worker"\nrequire = { repository = ["acme/*", "me/tools"], "k8s.io" = { namespace = "ci" } }'
    )
    good: dict[str, Any] = {"repository": "acme/web", "k8s.io": {"namespace": "ci"}}
    assert ask(sign(**good), text).principal == "robot"
    bads: list[dict[str, Any]] = [
        {"repository": "evil/web"},
        {"repository": "acme/a/b"},
        {"k8s.io": "ci"},
        {"k8s.io": {}},
    ]
    for bad in bads:
        with pytest.raises(PermissionDeniedError, match="is not one that this server admits"):
            ask(sign(**{**good, **bad}), text)


def test_a_stanza_may_set_a_prefix_before_its_principals(ask):
    text = STANZA + 'role = "worker"\nprincipal_prefix = "acme:"'
    assert ask(sign(), text).principal == "acme:robot"
    with pytest.raises(BadIdentityError, match="claim sub must be one text of 1 to 251 bytes"):
        ask(sign(sub="x" * 252), text)


def test_two_stanzas_of_an_issuer_differ_by_audience(ask):
    text = STANZA + 'role = "worker"\n' + STANZA.replace(AUDIENCE, "admin") + 'role = "admin"'
    assert ask(sign(), text).role == Role.WORKER
    assert ask(sign(aud=["x", "admin"]), text).role == Role.ADMIN


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (STANZA, 'line 3: jwt.issuer: the stanza gives no role; add role = "worker"'),
        (STANZA + 'role = "worker"' + STANZA + 'role = "worker"', "another stanza has this issuer and audience"),
        (STANZA + 'role = "worker"\nalgorithms = ["HS256"]', "line 7: jwt.algorithms: 'HS256' is not known"),
        (STANZA + 'role = "worker"\nalgorithms = ["none"]', "'none' is not known"),
        (STANZA + 'role = "worker"\nalgorithms = []', "must not be empty"),
        (STANZA + 'claims = { role = "x" }', "need each other"),
        (STANZA + 'roles = { x = "worker" }', "need each other"),
        (STANZA + 'roles = { x = "king" }\nclaims = { role = "x" }', "jwt.roles.x: 'king' is not known"),
        (STANZA + 'role = "worker"\nclaims = { tennant = "x" }', "did you mean tenant?"),
        (STANZA + 'role = "worker"\njwks_ca = "x"', "is for a URL in jwks only"),
        (STANZA.replace("keys.json", "no.json") + 'role = "worker"', "line 5: jwt.jwks: cannot be read: No such file"),
        (STANZA.replace("keys.json", "http://a.example/x") + 'role = "worker"', "must be a file, or a URL with https"),
        (STANZA.replace("keys.json", "ftp://a.example/x") + 'role = "worker"', "must be a file, or a URL with https"),
        (STANZA.replace("keys.json", "https://a/x") + 'role = "worker"\njwks_ca = "x"', "there is no such file"),
        *(
            (STANZA.replace("keys.json", url) + 'role = "worker"', "line 5: jwt.jwks: is not a URL: https://HOST/PATH")
            for url in ("https:///x", "https://[a/x", "https://a:key/x", "https://a/x?key=a b", "https://a/\u00e4")
        ),
    ],
)
def test_a_bad_stanza_is_an_error_with_its_line(read, text, says):
    with pytest.raises(FileError, match=re.escape(says)):
        read(text)


@pytest.mark.parametrize("user", ["me:secret@", "secret@", ":secret@"])
def test_a_url_with_a_password_is_refused_without_repeating_it(read, user):
    with pytest.raises(FileError, match="must have no user and password in the URL; jwks_token_file") as caught:
        read(STANZA.replace("keys.json", f"https://{user}a.example/x") + 'role = "worker"')
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("", 'is not a JWKS: JSON with "keys"'),
        ("[]", "is not a JWKS"),
        ('{"keys": [1]}', "is not a JWKS"),
        ('{"keys": []}', "has no public key for RS256"),
        (jwks_of({"kty": "oct", "k": "AAAA"}), "has no public key"),
        (jwks_of(jwk_of("rsa1024", "1")), "has no public key"),
        (jwks_of(jwk_of("rsa", "1", use="enc")), "has no public key"),
        (jwks_of(jwk_of("rsa", "1", alg="RSA-OAEP")), "has no public key"),
        (jwks_of({**jwk_of("p256", "1"), "x": "AAAA"}), "has no public key"),
    ],
)
def test_a_jwks_without_a_key_to_verify_with_is_an_error(read, keys, says):
    with pytest.raises(FileError, match=re.escape(says)):
        read(keys=keys)


def test_a_key_that_names_an_algorithm_is_used_for_no_other(ask):
    with pytest.raises(BadIdentityError, match="does not publish"):
        ask(sign("RS256"), keys=jwks_of(jwk_of("rsa", "1", alg="PS256")))


def test_a_private_key_in_a_jwks_verifies_as_its_public_one():
    entry = RSAAlgorithm.to_jwk(private_key("rsa"), as_dict=True)
    (key,) = parse_jwks(json.dumps({"keys": [{**entry, "key_ops": ["verify"]}]}).encode())
    assert key.public == private_key("rsa").public_key()
