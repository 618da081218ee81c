"""Each RPC with each identity, on each store and transport: one code, one reason, and nothing written by a refusal.

RPCs and their requests come from the descriptors, so that a new RPC is in the matrix. A new kind of credentials is a
function beside `_tokens` that returns rows and adds its stanzas to the file of --auth.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, TypeAlias

import asyncpg
import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from google.longrunning import operations_pb2
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import code_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Role
from jobstatus_grpc.auth.jwt import LEEWAY_SECONDS
from jobstatus_grpc.auth.tokens import make_token
from jobstatus_grpc.server.services import OPERATIONS, SERVICES
from tests.support.auth import TRANSPORTS, AuthText, Callers, bearer
from tests.support.certificates import EXPIRED as EXPIRED_CERTIFICATE
from tests.support.certificates import Authority, Pair
from tests.support.comments import comments_of_rpcs
from tests.support.issuer import AUDIENCE, ISSUER, jwk_of, jwks_of, private_key, sign
from tests.support.postgres import VERSIONS
from tests.support.service import Service, read_refusal
from tests.support.watch_jobs import SYNCED

Metadata: TypeAlias = "tuple[tuple[str, str], ...]"

Outcome: TypeAlias = "tuple[str, str]"
"""Code and reason."""

OK = ("OK", "")
NOT_FOUND, NOT_ALLOWED = ("NOT_FOUND", "JOB_NOT_FOUND"), ("PERMISSION_DENIED", "NOT_ALLOWED")
NO_IDENTITY, BAD_IDENTITY, EXPIRED = (
    ("UNAUTHENTICATED", reason) for reason in ("NO_IDENTITY", "BAD_IDENTITY", "IDENTITY_EXPIRED")
)
INVALID_FIELD = ("INVALID_ARGUMENT", "INVALID_FIELD")

RPCS = {method.name: method for service in SERVICES for method in service.methods}
LEAST = {
    rpc: Role[comment.partition("Least role: ")[2].partition(".")[0].upper()]
    for rpc, comment in comments_of_rpcs().items()
}
"""The least role of each RPC, as its comment names it."""
LEAST |= dict.fromkeys(("GetOperation", "ListOperations", "WaitOperation"), Role.WATCHER)
LEAST |= dict.fromkeys(("CancelOperation", "DeleteOperation"), Role.OPERATOR)

TENANT_KEY = "x-jobstatus-tenant"


@dataclass(frozen=True)
class Identity:
    """A row of the matrix."""

    metadata: Metadata
    expected: Callable[[str], Outcome]
    """From an RPC to how it ends."""
    credentials: grpc.ChannelCredentials | None = None
    """None: without TLS."""


def always(outcome: Outcome) -> Callable[[str], Outcome]:
    return lambda rpc: outcome


def by_role(role: Role) -> Callable[[str], Outcome]:
    return lambda rpc: OK if role >= LEAST[rpc] else NOT_ALLOWED


def unseen(creation: Outcome) -> Callable[[str], Outcome]:
    """What a caller gets that does not see the jobs of the request."""
    return lambda rpc: NOT_FOUND if names_a_job(rpc) else creation if rpc == "CreateJob" else OK


def names_a_job(rpc: str) -> bool:
    names = {"id", "job", "updates", "name"}
    return rpc not in ("CreateJob", "ListOperations") and not names.isdisjoint(RPCS[rpc].input_type.fields_by_name)


def request_for(rpc: str, job_id: str) -> Message:
    """Return a request that would take effect on the job, or would create it."""
    request: Any = GetMessageClass(RPCS[rpc].input_type)()
    fields = RPCS[rpc].input_type.fields_by_name
    if "id" in fields:
        request.id = job_id
    if names_a_job(rpc) and "name" in fields:
        request.name = f"jobs/{job_id}"
    if "timeout" in fields:
        request.timeout.SetInParent()
    if "job" in fields:
        request.job.CopyFrom(pb.JobStatus(id=job_id, reason="x"))
    if "updates" in fields:
        request.updates.add(job=pb.JobStatus(id=job_id, reason="x"))
    return request


def identities(auth: AuthText) -> dict[str, Identity]:
    """Return the rows, and write the file that admits their callers."""
    rows = _tokens(auth) | _jwts(auth) | _callers(auth)
    auth.admit("root", Role.OPERATOR)
    return rows


def _tokens(auth: AuthText) -> dict[str, Identity]:
    ago = datetime.now(timezone.utc) - timedelta(seconds=1)
    good, expired = auth.admit("token"), auth.admit("expired", expires_at=ago)
    headers = {
        "an empty header": "",
        "a token without a scheme": good,
        "another scheme": f"Basic {good}",
        "a scheme without a token": "Bearer",
        "a token that is cut": f"Bearer {good[:-1]}",
        "a token and more": f"Bearer {good} x",
        "an unknown token": f"Bearer {make_token()}",
        "a damaged JWT": "Bearer e30.e30.e30",
    }
    rows = {name: Identity((("authorization", header),), always(BAD_IDENTITY)) for name, header in headers.items()}
    rows["no identity"] = Identity((), always(NO_IDENTITY))
    rows["two tokens"] = Identity(bearer(good) * 2, always(BAD_IDENTITY))
    rows["an expired token"] = Identity(bearer(expired), always(EXPIRED))
    return rows


JWT = f"""
[[jwt]]
issuer = "{ISSUER}"
audience = "{AUDIENCE}"
jwks = "keys.json"
claims = {{ tenant = "unit", role = "groups" }}
roles = {{ workers = "worker" }}
"""


def _jwts(auth: AuthText) -> dict[str, Identity]:
    auth.path.with_name("keys.json").write_text(jwks_of(jwk_of("rsa", "1")))
    auth.add("jwt", JWT)
    now = int(time.time())
    good: dict[str, Any] = {"unit": "default", "groups": ["workers"]}
    bad: dict[str, dict[str, Any]] = {
        "that is not valid yet": {"nbf": now + LEEWAY_SECONDS + 60},
        "of another issuer": {"iss": "https://evil.example"},
        "for another audience": {"aud": "another service"},
        "signed with another key": {"key": private_key("rsa", "another")},
        "of an unknown kid": {"kid": "2"},
        "in what is no tenant": {"unit": "no tenant"},
    }
    forged = {"with the algorithm none": "none", "with the public key as an HMAC secret": "HS256"}
    tokens = {name: sign(**{**good, **how}) for name, how in bad.items()}
    tokens |= {name: _forged(sign(**good), algorithm) for name, algorithm in forged.items()}
    rows = {f"a JWT {name}": Identity(bearer(token), always(BAD_IDENTITY)) for name, token in tokens.items()}
    ends = now - LEEWAY_SECONDS - 1
    rows["an expired JWT"] = Identity(bearer(sign(**good, exp=ends)), always(EXPIRED))
    rows["a JWT"] = Identity(bearer(sign(**good)), by_role(Role.WORKER))
    rows["a JWT without a role"] = Identity(bearer(sign(**good | {"groups": []})), always(NOT_ALLOWED))
    other = {rpc: NOT_ALLOWED if LEAST[rpc] > Role.WORKER else unseen(OK)(rpc) for rpc in RPCS}
    rows["a JWT of another tenant"] = Identity(bearer(sign(**good | {"unit": "third"})), other.__getitem__)
    return rows


def _forged(token: str, algorithm: str) -> str:
    """Return the claims of a token, without a signature or with one made from the public key."""
    header, claims = json.dumps({"alg": algorithm, "kid": "1"}).encode(), token.split(".")[1]
    unsigned = f"{_base64url(header)}.{claims}"
    key = private_key("rsa").public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signature = b"" if algorithm == "none" else hmac.digest(key, unsigned.encode(), "sha256")
    return f"{unsigned}.{_base64url(signature)}"


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _callers(auth: AuthText) -> dict[str, Identity]:
    roles = {role.name.lower(): auth.admit(role.name.lower(), role) for role in Role}
    rows = {name: Identity(bearer(token), by_role(Role[name.upper()])) for name, token in roles.items()}
    for name, token in roles.items():
        chosen = (*bearer(token), (TENANT_KEY, "elsewhere"))
        rows[f"{name} in a tenant of its choice"] = Identity(
            chosen, unseen(OK) if name == "admin" else always(NOT_ALLOWED)
        )
    rows["an admin in what is no tenant"] = Identity(
        (*bearer(roles["admin"]), (TENANT_KEY, "no tenant")), always(INVALID_FIELD)
    )
    rows["another tenant"] = Identity(bearer(auth.admit("other", tenant="other")), unseen(OK))
    for name, only in {"a label": 'labels = { team = "core" }', "a name": 'name_prefix = "core-"'}.items():
        token = auth.admit(name, more=f"only = {{ {only} }}")
        rows[f"limited by {name}"] = Identity(bearer(token), unseen(NOT_ALLOWED))
    return rows


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    """The address of an empty store."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/jobs.db"
        return
    cluster = request.getfixturevalue("postgres_shared")(next(iter(VERSIONS)))
    name = cluster.create_database()
    yield cluster.url(name)
    cluster.drop_database(name)


def content(url: str) -> Mapping[str, Any]:
    """Return all rows of all tables of a store."""
    if not url.startswith("sqlite"):
        return asyncio.run(_postgres_content(url))
    with closing(sqlite3.connect(f"file:{url.removeprefix('sqlite:///')}?mode=ro", uri=True)) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {table: connection.execute(f'SELECT * FROM "{table}"').fetchall() for table in tables}


async def _postgres_content(url: str) -> Mapping[str, Any]:
    connection = await asyncpg.connect(url)
    try:
        tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'jobstatus'")
        return {table: await connection.fetch(f'SELECT * FROM jobstatus."{table}"') for (table,) in tables}
    finally:
        await connection.close()


def outcome_of(service: Service, rpc: str, job_id: str) -> tuple[Outcome, list[str]]:
    """Call an RPC; return how it ended, and the ids of the jobs in the answer. A watch is read until it is synced."""
    try:
        stub = service.operations if RPCS[rpc].containing_service is OPERATIONS else service.stub
        answer = getattr(stub, rpc)(request_for(rpc, job_id), timeout=20)
        if not RPCS[rpc].server_streaming:
            return _outcome_of_answer(answer), _ids_in(answer)
        try:
            ids = []
            for message in answer:
                ids += _ids_in(message)
                if rpc != "WatchJobs" or SYNCED in [event.type for event in message.events]:
                    return OK, ids
        finally:
            answer.cancel()
        raise AssertionError(f"{rpc} ended")
    except grpc.RpcError as error:
        refusal = read_refusal(error)
        assert refusal.domain == ("jobstatus.v1" if refusal.reason else "")
        return refusal.kind, []


def _outcome_of_answer(answer: Any) -> Outcome:
    """Return that of the only update, if it is the answer to a batch."""
    if not isinstance(answer, pb.BatchUpdateJobsResponse) or not answer.results[0].HasField("error"):
        return OK
    return code_pb2.Code.Name(answer.results[0].error.code), answer.results[0].error.reason


def _ids_in(message: Any) -> list[str]:
    """Return the ids of the jobs in any message."""
    if isinstance(message, pb.JobStatus):
        return [message.id]
    if isinstance(message, operations_pb2.Operation):
        return [message.name.removeprefix("jobs/")]
    values = [value for field, value in message.ListFields() if field.message_type is not None]
    parts = [part for value in values for part in (value if not isinstance(value, Message) else [value])]
    return [job_id for part in parts if isinstance(part, Message) for job_id in _ids_in(part)]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_each_rpc_ends_as_it_should_for_each_identity_and_a_refusal_writes_nothing(url, transport, serve, tmp_path):
    auth = AuthText(tmp_path / "auth.toml")
    rows = identities(auth)
    server = serve("--auth", str(auth.path), "--transport", transport, store=url)
    assert not wrong_ends(rows, server.address, bearer(auth.tokens["root"]), url)


def wrong_ends(
    rows: Mapping[str, Identity],
    address: str,
    root: Metadata,
    url: str,
    credentials: grpc.ChannelCredentials | None = None,
) -> dict[tuple[str, str], Any]:
    """Return how calls ended that should end otherwise, and what they showed of others' jobs, by identity and RPC."""
    wrong: dict[tuple[str, str], Any] = {}
    with closing(Service(address, metadata=root, credentials=credentials)) as others:
        unseen_jobs = victims_of(others, "unseen")
        for number, (name, row) in enumerate(rows.items()):
            sees = row.expected("GetJob") == OK
            victims = victims_of(others, f"{number}") if sees else {**unseen_jobs, "CreateJob": f"{number}-CreateJob"}
            with closing(Service(address, metadata=row.metadata, credentials=row.credentials)) as caller:
                refused = [rpc for rpc in RPCS if row.expected(rpc) != OK]
                before = content(url)
                outcomes = {rpc: outcome_of(caller, rpc, victims[rpc]) for rpc in refused}
                assert content(url) == before, f"a refused call of {name} has written"
                outcomes |= {rpc: outcome_of(caller, rpc, victims[rpc]) for rpc in RPCS if rpc not in refused}
            for rpc, (outcome, ids) in outcomes.items():
                shown = set() if sees else {*ids} - {victims["CreateJob"]}
                if outcome != row.expected(rpc) or shown:
                    wrong[name, rpc] = outcome, shown
    return wrong


def victims_of(root: Service, prefix: str) -> dict[str, str]:
    """Return for each RPC the id of a new job on which it takes effect; of none for CreateJob."""
    ids = {rpc: f"{prefix}-{rpc}" for rpc in RPCS}
    for rpc, job_id in ids.items():
        if rpc != "CreateJob" and names_a_job(rpc):
            root.job_in("SUCCEEDED" if rpc.startswith("Delete") else "IN_PROGRESS", id=job_id)
    return ids


WORKER, NO_CALLER = "spiffe://acme.example/worker", "spiffe://acme.example/stranger"
CERTIFICATES = f"""
[[certificates]]
uri = "{WORKER}"
role = "worker"
"""
NO_CONNECTION = ("UNAVAILABLE", "")
"""The handshake fails: the call does not reach the service, so that there is no reason."""


def test_each_rpc_ends_as_it_should_for_each_certificate(url, serve, tmp_path):
    ours, theirs = Authority(), Authority("another CA")
    cert, key = ours.issue().write(tmp_path, "server")
    auth = AuthText(tmp_path / "auth.toml")
    auth.add("certificates", CERTIFICATES)
    root = bearer(auth.admit("root"))

    def credentials(pair: Pair | None) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(ours.pem, *((pair.key, pair.cert) if pair else ()))

    worker, stranger = (credentials(ours.issue(uris=[uri])) for uri in (WORKER, NO_CALLER))
    rows = {
        "a certificate": Identity((), by_role(Role.WORKER), worker),
        "a certificate of no caller": Identity((), always(BAD_IDENTITY), stranger),
        "a certificate of no caller and a token": Identity(root, by_role(Role.OPERATOR), stranger),
        "a certificate and a bad token": Identity(bearer("jst_x"), always(BAD_IDENTITY), worker),
        "no certificate": Identity(root, always(NO_CONNECTION), credentials(None)),
        "an expired certificate": Identity(
            root, always(NO_CONNECTION), credentials(ours.issue(uris=[WORKER], ends=EXPIRED_CERTIFICATE))
        ),
        "a certificate of another CA": Identity(root, always(NO_CONNECTION), credentials(theirs.issue(uris=[WORKER]))),
    }
    flags = ("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", ours.write(tmp_path), "--tls-require-client-cert")
    server = serve("--auth", str(auth.path), "--transport", "grpcio", *flags, store=url)
    assert not wrong_ends(rows, server.address, root, url, stranger)


CHANGED = ("UNAVAILABLE", "IDENTITY_CHANGED")
CHANGES: dict[str, tuple[Callable[[AuthText, str], object], Outcome]] = {
    "revoked": (lambda auth, name: auth.remove(name), BAD_IDENTITY),
    "expired": (lambda auth, name: auth.admit(name, expires_at=datetime.now(timezone.utc)), EXPIRED),
    "no longer an admin": (lambda auth, name: auth.admit(name, Role.OPERATOR), NOT_ALLOWED),
    "limited": (lambda auth, name: auth.admit(name, more='only = { name_prefix = "x" }'), CHANGED),
    "in another tenant": (lambda auth, name: auth.admit(name, tenant="other"), CHANGED),
    "renewed": (lambda auth, name: auth.admit(name, expires_at=datetime(2199, 1, 1, tzinfo=timezone.utc)), OK),
}
"""What becomes of a caller while its watches are open, and how these end; OK: they go on."""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_each_open_watch_ends_as_it_should_when_its_caller_changes(url, transport, serve, tmp_path):
    auth = AuthText(tmp_path / "auth.toml")
    for name in ("root", *CHANGES):
        auth.admit(name, Role.ADMIN if name in ("root", "no longer an admin") else Role.OPERATOR)
    callers = Callers(serve("--auth", str(auth.path), "--transport", transport, store=url), auth)
    opened = {}
    for name in CHANGES:
        tenants = ("elsewhere",) if name == "no longer an admin" else ()
        callers.in_tenant("root", *tenants).create(id=name.replace(" ", "-"))
        for rpc in (rpc for rpc, method in RPCS.items() if method.server_streaming):
            stub = callers.in_tenant(name, *tenants).stub
            opened[name, rpc] = getattr(stub, rpc)(request_for(rpc, name.replace(" ", "-")), timeout=20)
            next(opened[name, rpc])
    before = content(url)
    for name, (change, _) in CHANGES.items():
        change(auth, name)
    ends = {key: end_of(stream) for key, stream in opened.items() if CHANGES[key[0]][1] != OK}
    assert ends == {key: CHANGES[key[0]][1] for key in ends}
    assert content(url) == before
    callers["root"].cancel("renewed")
    for (name, _), stream in opened.items():
        assert CHANGES[name][1] != OK or next(stream)
        stream.cancel()
    callers.close()


def end_of(stream: Any) -> Outcome:
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    return read_refusal(caught.value).kind
