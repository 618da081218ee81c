"""JSON web tokens and authenticators of other distributions, through a server."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from typing import Any

import grpc
import jwt
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import check_limit
from jobstatus_grpc.auth.chain import readers
from jobstatus_grpc.auth.jwt import LEEWAY_SECONDS
from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.server import auth_file, open_watches
from jobstatus_grpc.server.auth_file import AuthFile
from jobstatus_grpc.stores.memory import MemoryStore
from tests.support.auth import TRANSPORTS, bearer
from tests.support.issuer import AUDIENCE, ISSUER, JwksServer, jwk_of, jwks_of, private_key, sign
from tests.support.servers import serving
from tests.support.service import read_refusal

JWT = f"""
[[jwt]]
issuer = "{ISSUER}"
audience = "{AUDIENCE}"
jwks = "JWKS"
claims = {{ tenant = "unit" }}
role = "operator"
"""

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "company-sso"
version = "1.0"
[project.entry-points."jobstatus_grpc.authenticators"]
company-sso = "company_sso:open_authenticator"
[tool.hatch.build.targets.wheel]
packages = ["company_sso.py"]
"""

PLUGIN = '''
import asyncio
from datetime import datetime, timedelta, timezone
from pathlib import Path
from jobstatus_grpc.auth import Identity, Role
from jobstatus_grpc.errors import BadIdentityError, IdentityUnavailableError

class CompanySso:
    """Knows callers by an API key; the file of keys stands for a service of the company."""

    def __init__(self, keys):
        self.keys, self.asked = keys, 0

    async def authenticate(self, credentials):
        self.asked += 1
        key = dict(credentials.metadata).get("x-api-key")
        if key is None:
            return None
        known = dict(line.split() for line in Path(self.keys).read_text().splitlines())
        if known.get(key) == "fails":
            raise RuntimeError(f"no luck with {key}")
        if known.get(key) == "hangs":
            await asyncio.Event().wait()
        if known.get(key) == "away":
            raise IdentityUnavailableError
        if key not in known:
            raise BadIdentityError("the API key is not known; ask IT for one")
        soon = datetime.now(timezone.utc) + timedelta(days=1)
        return Identity(known[key], role=Role.WORKER, expires_at=soon if known[key] == "lasting" else None)

opened = []

def open_authenticator(settings):
    if set(settings) != {"keys"}:
        raise ValueError("keys = FILE is needed, and nothing else")
    opened.append(CompanySso(**settings))
    return opened[-1]
'''


@pytest.fixture(params=TRANSPORTS)
def run(request, auth, monkeypatch):
    """Run a scenario on the stub of a server with the test's auth file, at which it looks often."""
    monkeypatch.setattr(auth_file, "CHECK_SECONDS", 0.03)
    monkeypatch.setattr(open_watches, "CHECK_SECONDS", 0.1)

    def run(scenario):
        async def main():
            async with serving(MemoryStore(), auth=str(auth.path), transport=request.param) as stub:
                return await scenario(stub)

        return asyncio.run(asyncio.wait_for(main(), 30))

    return run


async def outcome_of(stub, metadata):
    """Return OK, or how a call with this metadata was refused."""
    try:
        await stub.ListJobs(pb.ListJobsRequest(), metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return read_refusal(error).kind
    return "OK"


async def until(stub, metadata, expected):
    while await outcome_of(stub, metadata) != expected:  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.05)


async def end_of(watch):
    async def read():
        while await watch.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(read(), 8)
    return read_refusal(caught.value).kind


def test_a_jwt_gives_the_actor_and_the_tenant(auth, run, tmp_path):
    (tmp_path / "keys.json").write_text(jwks_of(jwk_of("p256", "1")))
    auth.add("jwt", JWT.replace("JWKS", "keys.json"))
    ours, others = (bearer(sign("ES256", unit=unit)) for unit in ("acme", "other"))

    async def scenario(stub):
        await stub.CreateJob(pb.CreateJobRequest(job=pb.JobStatus(id="a")), metadata=ours)
        history = await stub.ListJobTransitions(pb.ListJobTransitionsRequest(id="a"), metadata=ours)
        seen = await stub.ListJobs(pb.ListJobsRequest(), metadata=others)
        return [entry.actor for entry in history.transitions], len(seen.jobs)

    assert run(scenario) == (["robot"], 0)


def test_the_log_names_the_file_that_has_changed(auth, run, tmp_path, caplog):
    path = tmp_path / "keys.json"
    path.write_text(jwks_of(jwk_of("p256", "1")))
    auth.add("jwt", JWT.replace("JWKS", "keys.json"))

    async def scenario(stub):
        path.write_text(jwks_of(jwk_of("ed25519", "2")))
        await until(stub, bearer(sign("EdDSA", kid="2", unit="a")), "OK")

    with caplog.at_level("INFO", "jobstatus_grpc.server"):
        run(scenario)
    assert f"{path} has changed and is in use for --auth" in caplog.messages


def test_a_key_that_is_taken_out_of_the_file_is_refused_and_its_watches_end(auth, run, tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(jwks_of(jwk_of("p256", "1"), jwk_of("ed25519", "2")))
    auth.add("jwt", JWT.replace("JWKS", "keys.json"))
    old, new = bearer(sign("ES256", unit="a")), bearer(sign("EdDSA", kid="2", unit="a"))

    async def scenario(stub):
        watch = stub.WatchJobs(pb.WatchJobsRequest(), metadata=old)
        await watch.read()
        path.write_text(jwks_of(jwk_of("ed25519", "2")))
        return await end_of(watch), await outcome_of(stub, old), await outcome_of(stub, new)

    refused = ("UNAUTHENTICATED", "BAD_IDENTITY")
    assert run(scenario) == (refused, refused, "OK")


def test_a_watch_ends_when_its_jwt_expires(auth, run, tmp_path):
    (tmp_path / "keys.json").write_text(jwks_of(jwk_of("p256", "1")))
    auth.add("jwt", JWT.replace("JWKS", "keys.json"))

    async def scenario(stub):
        token = sign("ES256", unit="a", exp=time.time() + 2 - LEEWAY_SECONDS)
        watch = stub.WatchJobs(pb.WatchJobsRequest(), metadata=bearer(token))
        await watch.read()
        return await end_of(watch), await outcome_of(stub, bearer(token))

    assert run(scenario) == (("UNAUTHENTICATED", "IDENTITY_EXPIRED"),) * 2


def test_a_jwt_in_its_leeway_is_verified_once_and_shows_its_own_expiry(auth, run, tmp_path, monkeypatch):
    (tmp_path / "keys.json").write_text(jwks_of(jwk_of("p256", "1")))
    auth.add("jwt", JWT.replace("JWKS", "keys.json"))
    exp, decode = int(time.time()) - 20, jwt.decode
    decoded: list[Any] = []

    def counted(*args, **settings):
        decoded.append(args)
        return decode(*args, **settings)

    monkeypatch.setattr(jwt, "decode", counted)

    async def scenario(stub):
        caller = bearer(sign("ES256", unit="a", exp=exp))
        counts = [len(decoded) for _ in range(3) if await outcome_of(stub, caller) == "OK"]
        reply = await stub.GetCallerIdentity(pb.GetCallerIdentityRequest(), metadata=caller)
        return len(counts), len(set(counts)), reply.identity.expires_at.seconds

    assert run(scenario) == (3, 1, exp)


def test_an_issuer_that_is_away_is_unavailable_until_it_answers(auth, run):
    with JwksServer(jwks_of(jwk_of("p256", "1"))) as issuer:
        issuer.status = 503
        auth.add("jwt", JWT.replace("JWKS", issuer.url))
        auth.admit("ci")
        caller = bearer(sign("ES256", unit="a"))

        async def scenario(stub):
            first = await outcome_of(stub, caller)
            others = await outcome_of(stub, bearer(auth.tokens["ci"]))
            issuer.status = 200
            await until(stub, caller, "OK")
            return first, others

        assert run(scenario) == (("UNAVAILABLE", "IDENTITY_UNAVAILABLE"), "OK")


@pytest.mark.slow
def test_a_slow_issuer_delays_no_other_caller(auth, run):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        auth.add("jwt", JWT.replace("JWKS", f"http://127.0.0.1:{silent.getsockname()[1]}/"))
        auth.admit("ci")

        async def scenario(stub):
            slow = asyncio.ensure_future(outcome_of(stub, bearer(sign("ES256", unit="a"))))
            await asyncio.sleep(0)
            return await outcome_of(stub, bearer(auth.tokens["ci"])), slow.done(), slow.cancel()

        assert run(scenario) == ("OK", False, True)


async def outcomes_beside(stub, waiting, others):
    """Return how the first call beyond MAX_CHECKS = 3 of the callers that wait ends, and the calls of others then."""
    calls = [asyncio.ensure_future(outcome_of(stub, waiting)) for _ in range(4)]
    done, pending = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    outcomes = [await outcome_of(stub, other) for other in others]
    return [call.result() for call in done], outcomes, [call.cancel() for call in pending]


LIMITED = [("UNAVAILABLE", "IDENTITY_UNAVAILABLE")]


@pytest.mark.slow
def test_the_calls_that_wait_for_an_issuer_are_limited_and_no_others(auth, run, monkeypatch, tmp_path):
    monkeypatch.setattr(check_limit, "MAX_CHECKS", 3)
    (tmp_path / "keys.json").write_text(jwks_of(jwk_of("p256", "1")))
    other = "https://other.example"
    auth.add("other", JWT.replace("JWKS", "keys.json").replace(ISSUER, other))
    others = [bearer(auth.admit("ci")), bearer(sign("ES256", iss=other, unit="a"))]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        auth.add("jwt", JWT.replace("JWKS", f"http://127.0.0.1:{silent.getsockname()[1]}/"))
        waiting = bearer(sign("ES256", unit="a"))
        assert run(lambda stub: outcomes_beside(stub, waiting, others)) == (LIMITED, ["OK", "OK"], [True] * 3)


def test_a_token_signed_with_the_key_of_another_is_refused(auth, run, tmp_path):
    (tmp_path / "keys.json").write_text(jwks_of(jwk_of("p256", "1")))
    auth.add("jwt", JWT.replace("JWKS", "keys.json"))
    forged = bearer(sign("ES256", key=private_key("p256", "mine"), unit="a"))
    assert run(lambda stub: outcome_of(stub, forged)) == ("UNAUTHENTICATED", "BAD_IDENTITY")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the installed distribution `company-sso`."""
    project, folder = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    (project / "pyproject.toml").write_text(PROJECT)
    (project / "company_sso.py").write_text(PLUGIN)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(folder), str(project)], check=True)
    return folder


@pytest.fixture
def sso(auth, site, tmp_path, monkeypatch):
    """A function that writes the keys of the company's service, by which `company-sso` knows callers."""
    monkeypatch.syspath_prepend(str(site))
    path = tmp_path / "keys"

    def write(**keys):
        path.write_text("".join(f"{key} {name}\n" for key, name in keys.items()))

    auth.add("sso", f'[authenticators.company-sso]\nmetadata = ["x-api-key"]\ncache = "1s"\nkeys = "{path}"')
    return write


def opened() -> list[Any]:
    import company_sso  # type: ignore[import-not-found]

    return company_sso.opened


def test_an_installed_authenticator_admits_and_refuses_callers(auth, run, sso):
    sso(k1="robot", k2="fails", k3="away")
    token = auth.admit("ci")

    async def scenario(stub):
        keys = [(("x-api-key", key),) for key in ("k1", "k2", "k3", "k4")]
        return [await outcome_of(stub, metadata) for metadata in (*keys, (), bearer(token), bearer("jst_x"))]

    assert run(scenario) == [
        "OK",
        ("UNAVAILABLE", "IDENTITY_UNAVAILABLE"),
        ("UNAVAILABLE", "IDENTITY_UNAVAILABLE"),
        ("UNAUTHENTICATED", "BAD_IDENTITY"),
        ("UNAUTHENTICATED", "NO_IDENTITY"),
        "OK",
        ("UNAUTHENTICATED", "BAD_IDENTITY"),
    ]


def test_the_calls_that_wait_for_an_authenticator_are_limited_and_no_others(auth, run, sso, monkeypatch, tmp_path):
    monkeypatch.setattr(check_limit, "MAX_CHECKS", 3)
    sso(k1="hangs")
    (tmp_path / "keys.json").write_text(jwks_of(jwk_of("p256", "1")))
    auth.add("jwt", JWT.replace("JWKS", "keys.json"))
    others = [bearer(auth.admit("ci")), bearer(sign("ES256", unit="a"))]
    waiting = (("x-api-key", "k1"),)
    assert run(lambda stub: outcomes_beside(stub, waiting, others)) == (LIMITED, ["OK", "OK"], [True] * 3)


def test_what_an_authenticator_fails_with_is_logged_without_the_credentials(auth, run, sso, caplog):
    sso(secret="fails")
    run(lambda stub: outcome_of(stub, (("x-api-key", "secret"),)))
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "the authenticator company-sso failed, the call is refused: RuntimeError" in record.getMessage()
    assert "company_sso.py" in record.getMessage()
    assert "secret" not in caplog.text


def test_the_answer_of_an_authenticator_is_kept_for_a_while_or_as_long_as_it_says(auth, run, sso):
    sso(k1="robot", k2="lasting")

    async def scenario(stub):
        robot, lasting = (("x-api-key", "k1"),), (("x-api-key", "k2"),)
        for _ in range(50):
            await outcome_of(stub, (*robot, ("x-request-id", "other")))
            await outcome_of(stub, lasting)
        sso()
        await until(stub, robot, ("UNAUTHENTICATED", "BAD_IDENTITY"))
        return opened()[-1].asked < 20, await outcome_of(stub, lasting)

    assert run(scenario) == (True, "OK")


def test_a_watch_ends_when_the_authenticator_no_longer_knows_its_caller_and_stays_while_it_is_away(auth, run, sso):
    sso(k1="robot")
    caller = (("x-api-key", "k1"),)

    async def scenario(stub):
        watch = stub.WatchJobs(pb.WatchJobsRequest(), metadata=caller)
        await watch.read()
        sso(k1="away")
        await until(stub, caller, ("UNAVAILABLE", "IDENTITY_UNAVAILABLE"))
        asked = opened()[-1].asked
        while opened()[-1].asked < asked + 2:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.05)
        sso()
        return await end_of(watch)

    assert run(scenario) == ("UNAUTHENTICATED", "BAD_IDENTITY")


def test_a_caller_that_could_not_be_checked_when_the_file_changed_is_checked_again(auth, run, sso):
    sso(k1="lasting")
    caller = (("x-api-key", "k1"),)

    async def scenario(stub):
        watch = stub.WatchJobs(pb.WatchJobsRequest(), metadata=caller)
        await watch.read()
        sso(k1="away")
        auth.admit("new")
        await until(stub, caller, ("UNAVAILABLE", "IDENTITY_UNAVAILABLE"))
        sso()
        return await end_of(watch)

    assert run(scenario) == ("UNAUTHENTICATED", "BAD_IDENTITY")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[authenticators.nothing]", "no installed package has an authenticator of this name; installed are: comp"),
        ("[authenticators.company-sso]", "cannot be used with these settings: keys = FILE is needed"),
        ("[authenticators.company-sso]\ncache = 1", "line 2: authenticators.company-sso.cache: must be a duration"),
    ],
)
def test_an_authenticator_that_cannot_be_opened_is_an_error_with_its_line(auth, sso, text, says):
    auth.add("sso", text)
    with pytest.raises(CannotStartError, match=says):
        AuthFile(str(auth.path), readers())
