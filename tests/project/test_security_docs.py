"""The stanzas and the code in docs/security.md are real."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from jobstatus_grpc.auth import Credentials, Identity, Role
from jobstatus_grpc.auth.chain import SECTIONS, readers
from jobstatus_grpc.toml_file import read_toml

FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount/"


@pytest.fixture
def blocks(root, tmp_path):
    """The TOML of the page, with the files of a pod in a folder of the test."""
    text = (root / "docs" / "security.md").read_text()
    for name in ("token", "ca.crt"):
        (tmp_path / name).write_text("x")
    # What is different each time, in output that is shown.
    for shown, found in (FOLDER, f"{tmp_path}/"), ('"…"', f'"{"0" * 64}"'), ("2027-…", "2027-02-26T19:40:00Z"):
        text = text.replace(shown, found)
    return re.findall(r"```toml\n(.*?)```", text, re.DOTALL)


def test_every_stanza_is_read(blocks, tmp_path):
    ours = [block for block in blocks if re.match(r"\[\[(tokens|jwt|certificates)\]\]", block)]
    path = tmp_path / "auth.toml"
    for block in ours:
        path.write_text(block)
        assert read_toml(str(path), readers())
    assert len(ours) >= len(SECTIONS)


def test_the_authenticator_works(root):
    (code,) = re.findall(r"```python\n(.*?authenticate.*?)```", (root / "docs" / "security.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    authenticator = names["AcmeSso"]({"callers": {"k-1": "robot"}})
    credentials = Credentials(metadata=[("x-api-key", "k-1")], peer="ipv4:127.0.0.1:1")
    assert asyncio.run(authenticator.authenticate(credentials)) == Identity("robot", tenant="acme", role=Role.WORKER)
