"""Tokens and their stanzas."""

from __future__ import annotations

import asyncio
import hashlib
import re
import zlib
from datetime import datetime, timedelta, timezone

import pytest

from jobstatus_grpc.auth import Credentials, Identity, Role
from jobstatus_grpc.auth.tokens import is_jwt, make_token, read_tokens, stanza_of
from jobstatus_grpc.errors import BadIdentityError, IdentityExpiredError
from jobstatus_grpc.job import JobFilter
from jobstatus_grpc.toml_file import FileError, read_toml
from tests.support.auth import bearer

TOKEN = make_token()


@pytest.fixture
def ask(tmp_path):
    """Read stanzas, and return the identity that they give a call."""

    def ask(stanzas, metadata):
        path = tmp_path / "auth.toml"
        path.write_text(stanzas)
        (authenticator,) = read_toml(str(path), {"tokens": read_tokens})["tokens"]
        credentials = Credentials(metadata=metadata, peer="ipv4:127.0.0.1:1")
        return asyncio.run(authenticator.authenticate(credentials))

    return ask


def stanza(name="ci", role=Role.WORKER, tenant="default", expires_at=None):
    return stanza_of(TOKEN, name, role, tenant=tenant, expires_at=expires_at)


def test_a_token_has_its_prefix_256_random_bits_and_a_checksum():
    ((random, checksum),) = re.findall("^jst_([0-9A-Za-z]{43})([0-9A-Za-z]{6})$", TOKEN)
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    value = sum(digits.index(each) * 62**place for place, each in enumerate(reversed(checksum)))
    assert value == zlib.crc32(random.encode())
    assert len({make_token() for _ in range(1000)}) == 1000


def test_the_stanza_gives_the_identity_and_has_only_the_digest(ask):
    expires_at = datetime(2199, 1, 31, tzinfo=timezone.utc)
    text = stanza('a "b" \\', tenant="acme", expires_at=expires_at)
    assert (TOKEN in text, hashlib.sha256(TOKEN.encode()).hexdigest() in text) == (False, True)
    identity = Identity('a "b" \\', tenant="acme", role=Role.WORKER, expires_at=expires_at)
    assert ask(text, bearer(TOKEN)) == identity


def test_only_narrows_the_caller(ask):
    text = stanza() + 'only = { labels = { team = "core" }, name_prefix = "nightly-" }'
    assert ask(text, bearer(TOKEN)).only == JobFilter(labels={"team": "core"}, name_prefix="nightly-")


def test_a_token_may_be_any_text_that_is_no_jwt(ask):
    text = stanza().replace(hashlib.sha256(TOKEN.encode()).hexdigest(), hashlib.sha256(b"my own").hexdigest())
    text = text.replace(hashlib.sha256(b"my own").hexdigest(), hashlib.sha256(b"a.b").hexdigest())
    assert ask(text, bearer("a.b")).principal == "ci"


@pytest.mark.parametrize(
    ("token", "expected"), [("a.b.c", True), ("a.b", False), ("a", False), ("jst_a.b.c", False), ("a.b.c.d", False)]
)
def test_three_parts_are_a_jwt(token, expected):
    assert is_jwt(token) is expected


def test_a_call_without_a_token_is_left_to_others(ask):
    assert ask(stanza(), ()) is None
    assert ask(stanza(), bearer("a.b.c")) is None


def test_an_expired_token_says_so(ask):
    text = stanza(expires_at=datetime.now(timezone.utc) - timedelta(seconds=1))
    with pytest.raises(IdentityExpiredError, match="the token has expired; get a new one"):
        ask(text, bearer(TOKEN))


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (bearer(make_token()), "the token is not known here"),
        (bearer("x"), "the token is not known here"),
        ((("authorization", f"Basic {TOKEN}"),), "not of the scheme Bearer; send authorization: Bearer TOKEN"),
        ((("authorization", TOKEN),), "not of the scheme Bearer"),
        ((("authorization", ""),), "not of the scheme Bearer"),
        ((("authorization", "Bearer"),), "has no token"),
        ((("authorization", "Bearer  "),), "has no token"),
        ((("authorization", f"Bearer {TOKEN} more"),), "damaged"),
        ((("authorization", "Bearer ä"),), "damaged"),
        (bearer(TOKEN) * 2, "two authorization headers; send one"),
    ],
)
def test_bad_credentials_say_what_to_do(ask, metadata, says):
    with pytest.raises(BadIdentityError, match=f"(?i){re.escape(says)}") as caught:
        ask(stanza(), metadata)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_the_scheme_is_of_any_case(ask, scheme):
    assert ask(stanza(), (("authorization", f"{scheme} {TOKEN}"),)).principal == "ci"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (stanza() + stanza("other"), "line 8: tokens.sha256: is that of ci too"),
        (stanza().replace('role = "worker"', ""), "line 1: tokens: role missing"),
        (stanza().replace("worker", "wroker"), "line 4: tokens.role: 'wroker' is not known; did you mean worker?"),
        (stanza().replace('sha256 = "', 'sha256 = "0'), "must be 64 hexadecimal digits: the SHA-256 of the whole"),
        (stanza() + "expires = 1", "line 6: tokens.expires: there is no such setting; did you mean expires_at?"),
        (stanza() + "only = {}", "line 6: tokens.only: names no labels and no name_prefix"),
        (stanza() + "only = { labels = { a = 1 } }", "tokens.only.labels.a: must be a text"),
        (stanza() + 'only = { ids = ["a"] }', "tokens.only.ids: there is no such setting"),
        (stanza(tenant="core").replace("core", "c o r e"), "line 5: tokens.tenant: must be 1 to 128 characters of A-Z"),
        (stanza(name="x" * 256).replace("xx", "xxx"), "line 2: tokens.name: must be at most 256 bytes"),
    ],
)
def test_a_bad_stanza_is_an_error_with_its_line(ask, text, says):
    with pytest.raises(FileError, match=re.escape(says)):
        ask(text, ())


def test_a_token_in_the_place_of_its_digest_is_not_repeated(ask):
    text = stanza().replace(hashlib.sha256(TOKEN.encode()).hexdigest(), TOKEN)
    with pytest.raises(FileError, match="never the token itself") as caught:
        ask(text, ())
    assert TOKEN not in str(caught.value)
