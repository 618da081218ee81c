"""Rows of watchers to whom something happens: a burst of updates, single changes, and a watch that meets the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks.audience import END_MARK, Audience, connections_for
from benchmarks.beside import ready_replies
from benchmarks.client import Client
from benchmarks.messages import Updates
from benchmarks.plan import Plan
from benchmarks.report import Figure, Target, at_quantile
from benchmarks.servers import BARE, BARE_NATIVE, ETCD, GRPCIO, NATIVE, Server, Workplace

BURST = 50
ROUNDS = 10
SETTLE_SECONDS = 1.0
# Longer than the pause that our watches make between messages that only tell of progress.
PAUSE_SECONDS = 0.25
SPREAD_SIDES = (GRPCIO, NATIVE, ETCD, BARE, BARE_NATIVE)


@dataclass(slots=True)
class Burst:
    """What one server did, a value per repetition; times in seconds."""

    alone: list[list[float]] = field(default_factory=list)
    """Latencies of updates that nobody watches."""
    beside: list[list[float]] = field(default_factory=list)
    """Latencies of those of the burst."""
    until_end: list[float] = field(default_factory=list)
    """From the burst's first update until the last watcher has the end."""
    end_spread: list[float] = field(default_factory=list)
    """From the final update until the last watcher has it."""
    delivered: list[float] = field(default_factory=list)
    changes_told: list[float] = field(default_factory=list)
    load_busy: list[float] = field(default_factory=list)
    """The part of its core that the load generator used; near 1 it would be what is measured."""
    saw_the_end: list[float] = field(default_factory=list)

    def slowdown_at(self, quantile: float) -> list[float]:
        """Return how many times as long an update takes beside watchers."""
        pairs = zip(self.alone, self.beside, strict=True)
        return [at_quantile(beside, quantile) / at_quantile(alone, quantile) for alone, beside in pairs]


def fan_out(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure a burst of updates, sent one after another, to a job with many watchers."""
    sides = workplace.among(*SPREAD_SIDES)
    replies = ready_replies(workplace, ["watched"])
    bursts = {side: Burst() for side in sides}
    for _ in range(plan.repetitions):
        for side in sides:
            with workplace.run(side, replies) as server:
                _burst(server, plan.audience, bursts[side])
    yield _figure(
        bursts,
        "first update until all have the end, ms",
        lambda of: of.until_end,
        1e3,
        targets=[Target(column=GRPCIO, beside=ETCD, at_most=0.6), Target(column=NATIVE, beside=ETCD, at_most=0.4)],
        goal=f"burst of {BURST} updates and the end to {plan.audience:,} watchers, until the last has it",
    )
    yield _figure(bursts, "final update until all have it, ms", lambda of: of.end_spread, 1e3)
    yield _figure(bursts, "messages delivered", lambda of: of.delivered)
    yield _figure(bursts, "changes told in them", lambda of: of.changes_told)
    yield _figure(bursts, "load busy, % of its core", lambda of: of.load_busy, 100)
    yield Figure(
        row="fanout",
        name=f"watchers of {plan.audience:,} that saw the end",
        values={side: of.saw_the_end for side, of in bursts.items()},
        targets=[Target(column=side, at_least=plan.audience, at_most=plan.audience) for side in sides],
        choose=min,
    )
    yield from _latencies(bursts)


def _latencies(bursts: Mapping[str, Burst]) -> Iterator[Figure]:
    targets = [Target(column=GRPCIO, at_most=4), Target(column=NATIVE, at_most=3)]
    for quantile, name in ((0.5, "p50"), (0.99, "p99")):
        yield _figure(bursts, f"an update alone, {name}, ms", _at(quantile, lambda of: of.alone), 1e3)
        yield _figure(bursts, f"an update of the burst, {name}, ms", _at(quantile, lambda of: of.beside), 1e3)
        yield _figure(
            bursts,
            f"times as long as alone, {name}",
            lambda of, quantile=quantile: of.slowdown_at(quantile),  # type: ignore[misc]
            targets=targets,
            goal=f"an update's latency meanwhile, as a multiple of alone, {name}",
        )


def _at(quantile: float, latencies: Callable[[Burst], Sequence[Sequence[float]]]) -> Callable[[Burst], list[float]]:
    return lambda of: [at_quantile(of_repetition, quantile) for of_repetition in latencies(of)]


def _figure(
    bursts: Mapping[str, Burst],
    name: str,
    of: Callable[[Burst], Sequence[float]],
    scale: float = 1,
    *,
    targets: Sequence[Target] = (),
    goal: str = "",
) -> Figure:
    values = {side: [value * scale for value in of(burst)] for side, burst in bursts.items()}
    return Figure(row="fanout", name=name, values=values, targets=targets, goal=goal)


def _burst(server: Server, watchers: int, burst: Burst) -> None:
    """Add a repetition."""
    api = server.api
    with Client(server.address, connections=connections_for(watchers)) as client:
        api.prepare(client, ["alone", "watched"])
        alone = api.updates(["alone"])
        _send(server, client, alone)  # warms the server up
        burst.alone.append(_send(server, client, alone))
        audience = Audience(client, api, "watched")
        audience.open(watchers)
        client.run_for(SETTLE_SECONDS)
        audience.expect(END_MARK)
        started, used = time.perf_counter(), time.process_time()
        burst.beside.append(_send(server, client, api.updates(["watched"])))
        end_sent = time.perf_counter()
        client.call(api.update, api.marked_request("watched", END_MARK, is_end=True))
        audience.wait()
        burst.until_end.append(audience.reached_at[-1] - started)
        burst.end_spread.append(audience.reached_at[-1] - end_sent)
        burst.load_busy.append((time.process_time() - used) / (time.perf_counter() - started))
        audience.wait_for_ends()
    burst.delivered.append(audience.delivered)
    burst.changes_told.append(audience.changes_told)
    burst.saw_the_end.append(audience.saw_the_end)


def _send(server: Server, client: Client, updates: Updates) -> list[float]:
    """Send a burst, each update when the one before is answered; return their latencies."""
    latencies: list[float] = []
    for _ in range(BURST):
        request = updates()
        started = time.perf_counter()
        client.call(server.api.update, request)
        latencies.append(time.perf_counter() - started)
    return latencies


def one_change(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure single changes, each after a pause, to a job with many watchers."""
    sides = workplace.among(*SPREAD_SIDES)
    replies = ready_replies(workplace, ["watched"])
    samples: dict[str, list[list[float]]] = {side: [] for side in sides}
    for _ in range(plan.repetitions):
        for side in sides:
            with workplace.run(side, replies) as server:
                samples[side].append(_changes(server, plan.audience))
    for quantile, name in ((0.5, "p50"), (0.99, "p99"), (1.0, "the last")):
        targets = [Target(column=GRPCIO, beside=ETCD, at_most=2.5), Target(column=NATIVE, beside=ETCD, at_most=1.2)]
        yield Figure(
            row="change",
            name=f"until a watcher has it, {name}, ms",
            values={side: [at_quantile(each, quantile) * 1e3 for each in of] for side, of in samples.items()},
            targets=targets if name == "p99" else (),
            goal=f"one change to {plan.audience:,} watchers, p99",
        )


def _changes(server: Server, watchers: int) -> list[float]:
    with Client(server.address, connections=connections_for(watchers)) as client:
        server.api.prepare(client, ["watched"])
        audience = Audience(client, server.api, "watched")
        audience.open(watchers)
        audience.change("warming up")
        seconds: list[float] = []
        for number in range(ROUNDS):
            client.run_for(PAUSE_SECONDS)
            seconds += audience.change(f"change {number} of this round")
        return seconds


def finish(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Open watches in the same instant as their job's final update: half before it, half after."""
    sides = workplace.among(GRPCIO, NATIVE)
    times: dict[str, list[float]] = {side: [] for side in sides}
    seen: dict[str, list[float]] = {side: [] for side in sides}
    with ExitStack() as resources:
        servers = [resources.enter_context(workplace.run(side)) for side in sides]
        for repetition in range(plan.repetitions):
            for server in servers:
                seconds, saw_it = _meet_the_end(server, f"job-{repetition}", plan.audience)
                times[server.name].append(seconds * 1e3)
                seen[server.name].append(saw_it)
    yield Figure(row="finish", name="final update until all have the end, ms", values=times)
    yield Figure(
        row="finish",
        name=f"watchers of {plan.audience:,} that saw the end",
        values=seen,
        targets=[Target(column=side, at_least=plan.audience, at_most=plan.audience) for side in sides],
        goal="watchers that meet the end and saw it",
        choose=min,
    )


def _meet_the_end(server: Server, job_id: str, watchers: int) -> tuple[float, int]:
    with Client(server.address, connections=connections_for(watchers)) as client:
        server.api.prepare(client, [job_id])
        audience = Audience(client, server.api, job_id)
        audience.queue(watchers // 2)
        started = time.perf_counter()
        for connection in client.connections[1:]:
            connection.flush()
        audience.queue(watchers - watchers // 2)
        audience.expect(END_MARK)
        client.call(server.api.update, server.api.marked_request(job_id, END_MARK, is_end=True))
        audience.wait_for_ends()
        return time.perf_counter() - started, audience.saw_the_end
