"""The row of callers that take more than their share, and of more calls than a server can answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.load.client import Client, NextRequest
from benchmarks.load.hog import hog
from benchmarks.report import EACH, Table, Target, at_quantile, row
from benchmarks.rows.calls import JOBS, updating
from benchmarks.servers import OURS, Bench, Server, numbered_jobs
from jobstatus_grpc.auth import Role
from jobstatus_grpc.auth.tokens import make_token, stanza_of

LIMIT = 100
"""Calls a second of the caller that is limited."""
HOG_CALLERS = 1_000
PEAK_CALLERS, OVERLOAD_CALLERS = 256, 2_560
PAUSE_SECONDS = 0.004
"""Between two calls of the caller that is measured."""
HEALTH = "/grpc.health.v1.Health/Check"
ALONE, BESIDE = "p99 of another caller alone, ms", "p99 of another caller beside it, ms"
TIMES = "p99 of another caller, times of alone"
PEAK, OVERLOAD = (f"answered updates/s, {callers:,} in flight" for callers in (PEAK_CALLERS, OVERLOAD_CALLERS))
GOODPUT = "answered updates/s at 10 times the calls in flight, part of the peak"
HEALTH_SECONDS, RECOVERY_SECONDS = "slowest health check during the load, s", "until calls are as quick as before, s"
QUICK_IN_A_ROW = 10
LONGEST_RECOVERY_SECONDS = 60.0


@row("share", "Callers that take too much")
def share(bench: Bench, table: Table) -> None:
    """One caller may make 100 calls a second, and has 1,000 in flight all the time, each repeated as soon as it is
    refused; another one updates one of 256 jobs of its own every 4 ms. Then, without limits, 2,560 callers update
    2,560 jobs where 256 callers already get what the server can do.
    """
    for name in (ALONE, BESIDE, TIMES, PEAK, OVERLOAD, GOODPUT, HEALTH_SECONDS, RECOVERY_SECONDS):
        table.expect(name, "")
    seconds = bench.plan.seconds
    for _ in range(bench.plan.repetitions):
        for side in bench.among(*OURS):
            with limited(bench, side) as (server, tokens):
                beside_a_hog(server, tokens, seconds, table, side)
            with bench.run(side) as server:
                overloaded(server, seconds, table, side)
    table.expect(TIMES, "p99 beside a caller at far more than its limit, times of alone", Target(EACH, "≤", 2))
    table.expect(GOODPUT, "answered updates at 10 times the calls in flight", Target(EACH, "≥", 0.7))
    table.expect(HEALTH_SECONDS, "health check at 10 times the calls in flight, s", Target(EACH, "≤", 0.5))
    table.expect(RECOVERY_SECONDS, "recovery, s", Target(EACH, "≤", 5))


@contextmanager
def limited(bench: Bench, side: str) -> Iterator[tuple[Server, tuple[str, str]]]:
    """Run a server that admits two callers, the first of them limited; yield their tokens too."""
    tokens = make_token(), make_token()
    stanzas = [
        stanza_of(token, name, Role.OPERATOR, tenant="default", expires_at=None)
        for token, name in zip(tokens, ("hog", "other"), strict=True)
    ]
    with bench.folder() as folder:
        file = folder / "auth.toml"
        file.write_text("\n".join([*stanzas, f"[limits.principals.hog]\ncalls_per_second = {LIMIT}"]))
        with bench.run(side, None, "--auth", str(file)) as server:
            yield server, tokens


def beside_a_hog(server: Server, tokens: tuple[str, str], seconds: float, table: Table, side: str) -> None:
    """Measure another caller alone, and beside the one that is limited."""
    job_ids = numbered_jobs(PEAK_CALLERS)
    with server.client(token=tokens[1]) as client:
        server.api.create(client, job_ids)
        next_request = other_updates(server, client)
        alone = latencies(client, server.api.update, next_request, seconds)
        with hog(server.address, job_ids, callers=HOG_CALLERS, seconds=seconds, token=tokens[0]):
            beside = latencies(client, server.api.update, next_request, seconds)
    before, during = at_quantile(alone, 0.99), at_quantile(beside, 0.99)
    table.add(side, {ALONE: before * 1e3, BESIDE: during * 1e3, TIMES: during / before})


def overloaded(server: Server, seconds: float, table: Table, side: str) -> None:
    """Measure what is answered at the peak and at 10 times the calls in flight, and what follows."""
    job_ids = numbered_jobs(OVERLOAD_CALLERS)
    with server.client() as client:
        server.api.create(client, job_ids)
        next_request = other_updates(server, client)
        before = at_quantile(latencies(client, server.api.update, next_request, seconds / 4), 0.9)
        with hog(server.address, job_ids, callers=PEAK_CALLERS, seconds=seconds) as peak:
            at_peak, _ = peak.wait()
        with hog(server.address, job_ids, callers=OVERLOAD_CALLERS, seconds=seconds) as overload:
            health = latencies(client, HEALTH, bytes, seconds)
            answered, _ = overload.wait()
        ended_at, quick = time.perf_counter(), 0
        while quick < QUICK_IN_A_ROW and time.perf_counter() - ended_at < LONGEST_RECOVERY_SECONDS:
            is_quick = client.timed(server.api.update, next_request()) <= 3 * before
            quick = quick + 1 if is_quick else 0
        recovery_seconds = time.perf_counter() - ended_at
    table.add(
        side,
        {
            PEAK: at_peak,
            OVERLOAD: answered,
            GOODPUT: answered / at_peak,
            HEALTH_SECONDS: max(health),
            RECOVERY_SECONDS: recovery_seconds,
        },
    )


def other_updates(server: Server, client: Client) -> NextRequest:
    """Create the jobs of the caller that is measured; return its updates, of each in turn."""
    job_ids = numbered_jobs(JOBS, "other")
    server.api.create(client, job_ids)
    [next_request] = updating(server, [[job_id] for job_id in job_ids]).lanes(1)
    return next_request


def latencies(client: Client, path: str, next_request: NextRequest, seconds: float) -> list[float]:
    """Call every PAUSE_SECONDS, and return how long each call took."""
    taken: list[float] = []
    ends_at = time.perf_counter() + seconds
    while not taken or time.perf_counter() < ends_at:
        taken.append(client.timed(path, next_request()))
        time.sleep(PAUSE_SECONDS)
    return taken
