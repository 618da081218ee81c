"""Rows of our Python client: what it costs beside the raw stub, and what a worker with many jobs costs."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks.calling import Rates
from benchmarks.children import child
from benchmarks.client import Client
from benchmarks.plan import Plan
from benchmarks.report import Figure, Target
from benchmarks.servers import GRPCIO, NATIVE, Workplace, free_port

JOB = "read"
REPORTING_JOBS = 1_000
REPORTING_SECONDS = 5.0
SLOWEST_FLUSH_SECONDS = 0.05


def client(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure GetJob through our clients and through the raw stubs, sync and asyncio, in turns."""
    sides = workplace.among(GRPCIO, NATIVE)
    found: dict[str, list[dict[str, Rates]]] = {side: [] for side in sides}
    with ExitStack() as resources:
        servers = [resources.enter_context(workplace.run(side)) for side in sides]
        for server in servers:
            with Client(server.address, connections=1) as preparing:
                server.api.prepare(preparing, [JOB])
        for _ in range(plan.repetitions):
            for server in servers:
                with child("calling", server.address, JOB, plan.seconds / 2) as caller:
                    found[server.name].append(caller.finish())
    for kind in found[sides[0]][0] if sides else ():
        for who in ("stub", "client"):
            values = {side: [each[kind][who] for each in of] for side, of in found.items()}
            yield Figure(row="client", name=f"{kind}: {who}, calls/s", values=values)
        yield Figure(
            row="client",
            name=f"{kind}: client by stub",
            values={side: [each[kind]["client"] / each[kind]["stub"] for each in of] for side, of in found.items()},
            targets=[Target(column=GRPCIO, at_least=0.9)],
            goal=f"Python client's call by the raw stub's rate, {kind}",
        )


def reporter(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure a worker process with a thousand jobs that report ten times a second each."""
    sides = workplace.among(GRPCIO, NATIVE)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(plan.repetitions):
        for side in sides:
            found[side].append(_reported(workplace, side))

    def figure(name: str, key: str, scale: float = 1, *targets: Target) -> Figure:
        values = {side: [each[key] * scale for each in of] for side, of in found.items()}
        goal = f"reporter() of {REPORTING_JOBS:,} jobs, {name}"
        return Figure(row="reporter", name=name, values=values, targets=targets, goal=goal)

    most = 1 / SLOWEST_FLUSH_SECONDS
    yield figure("calls/s", "calls", 1, *(Target(column=side, at_most=most) for side in sides))
    yield figure("updates given/s", "given")
    yield figure("updates sent/s, the newest of each job that waits", "updates")
    yield figure("failed updates", "failures", 1, *(Target(column=side, at_least=0, at_most=0) for side in sides))
    yield figure("worker's CPU, % of a core", "cpu", 100)
    yield figure("of that, the loop that reports, %", "loop_cpu", 100)
    yield figure("server's CPU, % of a core", "server_cpu", 100)


def _reported(workplace: Workplace, side: str) -> dict[str, float]:
    with workplace.folder() as folder, ExitStack() as resources:
        metrics = f"127.0.0.1:{free_port()}"
        store = f"sqlite:///{folder}/jobs.db"
        serving = workplace.ours(side, store=store, log=folder / "log", flags=["--metrics", metrics])
        server = resources.enter_context(serving)
        worker = resources.enter_context(child("reporting", server.address, REPORTING_SECONDS, REPORTING_JOBS))
        worker.wait_for("ready")
        before, used = _counted(metrics), server.cpu_seconds()
        worker.go_on()
        worker.wait_for("done")
        after, used = _counted(metrics), server.cpu_seconds() - used
        found: dict[str, float] = worker.finish()
    rates = {key: found[key] / found["seconds"] for key in ("given", "cpu", "loop_cpu")}
    return {
        **rates,
        **{key: (after[key] - before[key]) / found["seconds"] for key in before},
        "failures": found["failures"],
        "server_cpu": used / found["seconds"],
    }


def _counted(metrics: str) -> dict[str, float]:
    """Return how many calls of BatchUpdateJobs the server has begun, and how many updates it has committed."""
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()

    def total(*parts: str) -> float:
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(part in line for part in parts))

    return {
        "calls": total("grpc_server_started_total{", 'grpc_method="BatchUpdateJobs"'),
        "updates": total("jobstatus_commit_commands_sum "),
    }
