"""The row of many idle watchers: what each costs, and how long a change takes to reach them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from benchmarks.audience import END_MARK, Audience, connections_for
from benchmarks.client import Client
from benchmarks.plan import Plan
from benchmarks.report import Figure, Target, growth
from benchmarks.servers import ETCD, GRPCIO, NATIVE, Server, Workplace

ROUNDS = 3
SETTLE_SECONDS = 1.0
PAUSE_SECONDS = 0.25


@dataclass(slots=True)
class Crowd:
    """What one server did; times in seconds."""

    memory: dict[int, list[float]] = field(default_factory=dict)
    """Bytes of each watcher, by how many there were."""
    change: dict[int, list[float]] = field(default_factory=dict)
    """From a change until the last watcher has it."""
    opened: float = 0.0
    busy: float = 0.0
    """The part of a core that it used while nothing happened."""
    heartbeats: int = 0
    end: float = 0.0
    saw_the_end: int = 0


def watchers(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure crowds to whom nothing happens, growing, and then the end. Once: it takes its time."""
    crowds: dict[str, Crowd] = {}
    for side in workplace.among(GRPCIO, NATIVE, ETCD):
        with workplace.run(side) as server:
            crowds[side] = _crowd(server, plan)
    yield from _largest(crowds, plan)
    for name, what in (("memory of each, kB", "memory"), ("a change until all have it, ms", "change")):
        for side, crowd in crowds.items():
            by_size: Mapping[int, list[float]] = getattr(crowd, what)
            scale = 1e-3 if what == "memory" else 1e3
            values = {f"{size:,}": [value * scale for value in of] for size, of in by_size.items()}
            yield Figure(row="watchers", name=f"{side}: {name}", values=values, note=growth(by_size))


def _crowd(server: Server, plan: Plan) -> Crowd:
    crowd = Crowd()
    with Client(server.address, connections=connections_for(plan.crowds[-1])) as client:
        server.api.prepare(client, ["watched"])
        client.run_for(SETTLE_SECONDS)
        empty = server.memory_bytes()
        audience = Audience(client, server.api, "watched")
        for size in plan.crowds:
            started = time.perf_counter()
            audience.open(size - len(audience.watches))
            crowd.opened += time.perf_counter() - started
            client.run_for(SETTLE_SECONDS)
            crowd.memory[size] = [(server.memory_bytes() - empty) / size]
            crowd.change[size] = []
            for number in range(ROUNDS):
                crowd.change[size].append(max(audience.change(f"change {number} of {size}")))
                client.run_for(PAUSE_SECONDS)
        _look_at(server, client, audience, crowd, plan.idle_seconds)
    return crowd


def _look_at(server: Server, client: Client, audience: Audience, crowd: Crowd, seconds: float) -> None:
    """Measure the largest crowd while nothing happens, and its end."""
    used, delivered, started = server.cpu_seconds(), audience.delivered, time.perf_counter()
    client.run_for(seconds)
    crowd.busy = (server.cpu_seconds() - used) / (time.perf_counter() - started)
    crowd.heartbeats = audience.delivered - delivered
    crowd.end = max(audience.change(END_MARK, is_end=True))
    audience.wait_for_ends()
    crowd.saw_the_end = audience.saw_the_end


def _largest(crowds: Mapping[str, Crowd], plan: Plan) -> Iterator[Figure]:
    most = plan.crowds[-1]

    def figure(name: str, values: Mapping[str, float], *targets: Target) -> Figure:
        goal = f"{most:,} idle watchers, {name}"
        return Figure(
            row="watchers", name=name, values={s: [v] for s, v in values.items()}, targets=targets, goal=goal
        )  # fmt: skip

    yield figure(
        "memory of each, kB",
        {side: statistics.median(crowd.memory[most]) / 1000 for side, crowd in crowds.items()},
        Target(column=GRPCIO, at_most=30),
        Target(column=NATIVE, at_most=25),
    )
    yield figure(
        "CPU while idle, % of a core",
        {side: crowd.busy * 100 for side, crowd in crowds.items()},
        Target(column=GRPCIO, at_most=5),
        Target(column=NATIVE, at_most=5),
    )
    yield figure(
        "watchers that saw the end",
        {side: crowd.saw_the_end for side, crowd in crowds.items()},
        *(Target(column=side, at_least=most, at_most=most) for side in crowds),
    )
    yield figure(f"{most:,} opened, s", {side: crowd.opened for side, crowd in crowds.items()})
    yield figure(f"heartbeats in {plan.idle_seconds:.0f} s", {s: crowd.heartbeats for s, crowd in crowds.items()})
    yield figure("final update until all have it, s", {side: crowd.end for side, crowd in crowds.items()})
