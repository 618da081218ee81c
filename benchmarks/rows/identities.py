"""The row of identities: what it costs to check who calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.report import Table, Target, row
from benchmarks.rows.calls import CALL_CPU, CALLERS, read_and_update
from benchmarks.servers import OURS, Bench, Server
from jobstatus_grpc.auth import Role
from jobstatus_grpc.auth.tokens import make_token, stanza_of
from tests.support.issuer import AUDIENCE, ISSUER, jwk_of, jwks_of, sign

WAYS = NOBODY, IGNORED, TOKEN, JWT = "no identity", "token not checked", "token", "JWT"
LEAST = {TOKEN: 0.95, JWT: 0.90}
"""The rate of calls beside that without identities."""
RATE = "calls/s"


@row("identities", "Callers with an identity")
def identities(bench: Bench, table: Table) -> None:
    """GetJob and UpdateJob of 256 jobs with 64 calls in flight, where callers send nothing to be known by, a token, or
    a signed JWT (RS256). A token that a server without `--auth` does not check shows what the header itself costs.
    """
    once = replace(bench.plan, repetitions=1)
    sides = bench.among(*OURS)
    for _ in range(bench.plan.repetitions):
        # New servers each time: the rates of two processes of one program differ by up to a tenth.
        with bench.folder() as folder, contextlib.ExitStack() as stack:
            servers = {
                f"{side}, {way}": stack.enter_context(_run(bench, side, way, folder / f"{side} {way}"))
                for side in sides
                for way in WAYS
            }
            read_and_update(once, table, servers, [(RATE, CALLERS), (CALL_CPU, CALLERS)])
    targets = [
        Target(f"{side}, {way}", "≥", least, f"{side}, {NOBODY}") for side in sides for way, least in LEAST.items()
    ]
    for method in ("GetJob", "UpdateJob"):
        table.expect(f"{method}: {RATE}, {CALLERS} in flight", f"{method} of callers with an identity", *targets)


@contextlib.contextmanager
def _run(bench: Bench, side: str, way: str, home: Path) -> Iterator[Server]:
    """Run a server that admits one caller, or anyone."""
    home.mkdir()
    token = {NOBODY: "", JWT: sign()}.get(way, make_token())
    if way in (NOBODY, IGNORED):
        with bench.run(side, home) as server:
            yield replace(server, token=token)
        return
    stanza = stanza_of(token, "worker", Role.WORKER, tenant="default", expires_at=None)
    if way == JWT:
        (home / "jwks.json").write_text(jwks_of(jwk_of("rsa", "1")))
        given = {"issuer": ISSUER, "audience": AUDIENCE, "jwks": "jwks.json", "role": "worker", "tenant": "default"}
        stanza = "\n".join(["[[jwt]]", *(f'{name} = "{value}"' for name, value in given.items())])
    (home / "auth.toml").write_text(stanza)
    with bench.run(side, home, "--auth", str(home / "auth.toml")) as server:
        yield replace(server, token=token)
