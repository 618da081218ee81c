"""All kinds of credentials in one file: two callers never have one name by accident."""

from __future__ import annotations

import asyncio

import pytest

from jobstatus_grpc.auth import Credentials
from jobstatus_grpc.auth.chain import Chain, readers
from jobstatus_grpc.errors import PermissionDeniedError
from jobstatus_grpc.toml_file import read_toml
from tests.auth.test_certificates import certificate, stanza
from tests.auth.test_jwt import KEYS, STANZA
from tests.support.auth import bearer
from tests.support.issuer import sign

JWT = STANZA + 'role = "worker"\n'


@pytest.fixture
def name_of(auth, tmp_path):
    """Return the principal of a caller by a file with the token of `robot`, and these stanzas."""
    (tmp_path / "keys.json").write_text(KEYS)
    robot = auth.admit("robot")

    def name_of(*stanzas, token=robot, pem=None):
        auth.add("more", "\n".join(stanzas))
        metadata = [] if token is None else bearer(token)
        credentials = Credentials(metadata=metadata, peer="ipv4:127.0.0.1:1", certificate=pem)
        caller, _ = asyncio.run(Chain(read_toml(str(auth.path), readers())).identify(credentials))
        return caller.principal

    return name_of


def test_a_jwt_with_the_name_of_a_stanza_is_refused(name_of):
    assert (name_of(JWT), name_of(JWT, token=sign(sub="other"))) == ("robot", "other")
    with pytest.raises(PermissionDeniedError, match=r"their name 'robot' is that of another caller.* principal_prefix"):
        name_of(JWT, token=sign(sub="robot"))
    assert name_of(JWT + 'principal_prefix = "acme:"', token=sign(sub="robot")) == "acme:robot"


def test_a_certificate_with_the_name_of_a_stanza_is_refused_unless_a_stanza_gives_it_that_name(name_of):
    pem = certificate(cn=["robot"])
    with pytest.raises(PermissionDeniedError, match="rename the stanza"):
        name_of(stanza('cn = "*"'), token=None, pem=pem)
    assert name_of(stanza('cn = "*"') + 'name = "robot"', token=None, pem=pem) == "robot"
