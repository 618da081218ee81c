"""Each RPC with each identity, on each store and transport: one code, one reason, and nothing written by a refusal.

RPCs and their requests come from the descriptors, so that a new RPC is in the matrix. A new kind of credentials is a
row in IDENTITIES, or a function beside `_tokens` that returns rows and adds its stanzas to the file of --auth.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, TypeAlias

import asyncpg
import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import code_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Role
from jobstatus_grpc.auth.tokens import make_token
from jobstatus_grpc.server.servicer import SERVICE
from tests.support.auth import TRANSPORTS, AuthText, bearer
from tests.support.comments import comments_of_rpcs
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

RPCS = {method.name: method for method in SERVICE.methods}
LEAST = {
    rpc: Role[comment.partition("Least role: ")[2].partition(".")[0].upper()]
    for rpc, comment in comments_of_rpcs().items()
}
"""The least role of each RPC, as its comment names it."""

TENANT_KEY = "x-jobstatus-tenant"


@dataclass(frozen=True)
class Identity:
    """A row of the matrix."""

    metadata: Metadata
    expected: Callable[[str], Outcome]
    """From an RPC to how it ends."""


def always(outcome: Outcome) -> Callable[[str], Outcome]:
    return lambda rpc: outcome


def by_role(role: Role) -> Callable[[str], Outcome]:
    return lambda rpc: OK if role >= LEAST[rpc] else NOT_ALLOWED


def unseen(creation: Outcome) -> Callable[[str], Outcome]:
    """What a caller gets that does not see the jobs of the request."""
    return lambda rpc: NOT_FOUND if names_a_job(rpc) else creation if rpc == "CreateJob" else OK


def names_a_job(rpc: str) -> bool:
    return rpc != "CreateJob" and not {"id", "job", "updates"}.isdisjoint(RPCS[rpc].input_type.fields_by_name)


def request_for(rpc: str, job_id: str) -> Message:
    """Return a request that would take effect on the job, or would create it."""
    request: Any = getattr(pb, RPCS[rpc].input_type.name)()
    fields = RPCS[rpc].input_type.fields_by_name
    if "id" in fields:
        request.id = job_id
    if "job" in fields:
        request.job.CopyFrom(pb.JobStatus(id=job_id, reason="x"))
    if "updates" in fields:
        request.updates.add(job=pb.JobStatus(id=job_id, reason="x"))
    return request


def identities(auth: AuthText) -> dict[str, Identity]:
    """Return the rows, and write the file that admits their callers."""
    rows = _tokens(auth) | _callers(auth)
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
        "a JWT where none is accepted": "Bearer e30.e30.e30",
    }
    rows = {name: Identity((("authorization", header),), always(BAD_IDENTITY)) for name, header in headers.items()}
    rows["no identity"] = Identity((), always(NO_IDENTITY))
    rows["two tokens"] = Identity(bearer(good) * 2, always(BAD_IDENTITY))
    rows["an expired token"] = Identity(bearer(expired), always(EXPIRED))
    return rows


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
        answer = getattr(service.stub, rpc)(request_for(rpc, job_id), timeout=20)
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
        assert refusal.domain == "jobstatus.v1"
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
    values = [value for field, value in message.ListFields() if field.message_type is not None]
    parts = [part for value in values for part in (value if not isinstance(value, Message) else [value])]
    return [job_id for part in parts if isinstance(part, Message) for job_id in _ids_in(part)]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_each_rpc_ends_as_it_should_for_each_identity_and_a_refusal_writes_nothing(url, transport, serve, tmp_path):
    auth = AuthText(tmp_path / "auth.toml")
    rows = identities(auth)
    server = serve("--auth", str(auth.path), "--transport", transport, store=url)
    wrong: dict[tuple[str, str], Any] = {}
    with closing(Service(server.address, metadata=bearer(auth.tokens["root"]))) as root:
        for number, (name, row) in enumerate(rows.items()):
            victims = {rpc: victim_of(root, rpc, f"{number}-{rpc}") for rpc in RPCS}
            with closing(Service(server.address, metadata=row.metadata)) as caller:
                refused = [rpc for rpc in RPCS if row.expected(rpc) != OK]
                before = content(url)
                outcomes = {rpc: outcome_of(caller, rpc, victims[rpc]) for rpc in refused}
                assert content(url) == before, f"a refused call of {name} has written"
                outcomes |= {rpc: outcome_of(caller, rpc, victims[rpc]) for rpc in RPCS if rpc not in refused}
            for rpc, (outcome, ids) in outcomes.items():
                shown = set() if row.expected("GetJob") == OK else {*ids} - {victims["CreateJob"]}
                if outcome != row.expected(rpc) or shown:
                    wrong[name, rpc] = outcome, shown
    assert not wrong


def victim_of(root: Service, rpc: str, job_id: str) -> str:
    """Return the id of a new job on which the RPC takes effect; of none for CreateJob."""
    if rpc != "CreateJob" and names_a_job(rpc):
        root.job_in("SUCCEEDED" if rpc == "DeleteJob" else "IN_PROGRESS", id=job_id)
    return job_id
