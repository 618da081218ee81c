"""`jobstatus token`."""

from __future__ import annotations

import asyncio
import hashlib
import json
from datetime import datetime, timedelta, timezone

import pytest

from jobstatus_grpc.auth import Credentials, Role
from jobstatus_grpc.auth.tokens import read_tokens
from jobstatus_grpc.toml_file import read_toml
from tests.support.auth import bearer


def test_it_prints_the_token_on_stdout_and_the_stanza_on_stderr(offline_cli, tmp_path):
    done = offline_cli("token", "new", "ci", "--role", "worker", "--tenant", "acme", "--expires", "90d")
    token = done.stdout.removesuffix("\n")
    (tmp_path / "auth.toml").write_text(done.stderr.partition("\n")[2])
    (tokens,) = read_toml(str(tmp_path / "auth.toml"), {"tokens": read_tokens})["tokens"]
    caller = asyncio.run(tokens.authenticate(Credentials(metadata=bearer(token), peer="")))
    in_90_days = datetime.now(timezone.utc) + timedelta(days=90)
    assert (done.returncode, caller.principal, caller.role, caller.tenant) == (0, "ci", Role.WORKER, "acme")
    assert abs(caller.expires_at - in_90_days) < timedelta(minutes=1)
    assert token not in done.stderr


def test_json_has_all_in_one_object(offline_cli):
    done = offline_cli("token", "new", "ci", "--role", "watcher", "--json")
    made = json.loads(done.stdout)
    assert (done.stderr, sorted(made)) == ("", ["sha256", "stanza", "token"])
    assert made["sha256"] == hashlib.sha256(made["token"].encode()).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ci"], "--role"),
        (["ci", "--role", "king"], "'king' is not one of"),
        (["", "--role", "worker"], "a name has 1 to 256 bytes"),
        (["a\nb", "--role", "worker"], "no control characters"),
        (["ci", "--role", "worker", "--tenant", "x" * 129], "a tenant must be 1 to 128 characters of"),
        (["ci", "--role", "worker", "--expires", "soon"], "'soon' is not a duration"),
    ],
)
def test_wrong_usage_prints_no_token(offline_cli, arguments, says):
    done = offline_cli("token", "new", *arguments)
    assert (done.returncode, done.stdout, says in done.stderr) == (2, "", True)
