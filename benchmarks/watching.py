"""Rows of watches: a burst to many watchers of one job, many idle ones, and watches opened as their job ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks import messages
from benchmarks.client import CallFailedError, Client, path
from benchmarks.messages import Updates
from benchmarks.plan import Plan
from benchmarks.report import Figure, Target, at_quantile
from benchmarks.servers import Server, Workplace

WATCHERS = 1_000
BURST = 50
IDLE_WATCHERS = 10_000
SETTLE_SECONDS = 1.0
WATCHES_PER_CONNECTION = 50
FIRST_JOB = "job-0"


class Watch:
    """One watcher: it counts its messages and keeps the last."""

    __slots__ = ("_audience", "is_ok", "last", "messages")

    def __init__(self, audience: Audience) -> None:
        self.messages = 0
        self.last = b""
        self.is_ok = False
        self._audience = audience

    def on_message(self, message: bytes) -> None:
        """Count it."""
        self._audience.begun += not self.messages
        self.messages += 1
        self.last = message

    def on_end(self, is_ok: bool) -> None:
        """Note how the watch ended."""
        self.is_ok = is_ok
        self._audience.ended += 1


class Audience:
    """Watchers of one job. The client's first connection is left to the updates."""

    def __init__(self, client: Client, size: int) -> None:
        self.begun = 0
        """Watchers that have a message."""
        self.ended = 0
        self.watches = [Watch(self) for _ in range(size)]
        self._client = client

    def queue(self, job_id: str, *, part: slice) -> None:
        """Queue the calls of some watchers, spread over the connections."""
        request, method = messages.watch_request(job_id), path("WatchJob")
        connections = self._client.connections[1:]
        for index, watch in enumerate(self.watches[part]):
            connections[index % len(connections)].call(method, request, watch)

    def open(self, job_id: str) -> None:
        """Open all and wait until each has its first message.

        Raises:
            CallFailedError: one was refused.
        """
        self.queue(job_id, part=slice(None))
        self._client.run_until(lambda: self.begun == len(self.watches) or self.ended > 0)
        if self.ended:
            raise CallFailedError(f"{self.ended} watches were refused")

    def wait(self) -> None:
        """Wait until all have ended."""
        self._client.run_until(lambda: self.ended == len(self.watches))

    @property
    def saw_the_end(self) -> int:
        """How many ended with OK, with the done job as their last message."""
        return sum(watch.is_ok and bool(watch.last) and messages.is_end(watch.last) for watch in self.watches)

    @property
    def delivered(self) -> int:
        """How many messages arrived."""
        return sum(watch.messages for watch in self.watches)


@dataclass(slots=True)
class Bursts:
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
    saw_the_end: list[float] = field(default_factory=list)

    def alone_at(self, quantile: float) -> list[float]:
        """Return a quantile of each repetition."""
        return [at_quantile(latencies, quantile) for latencies in self.alone]

    def beside_at(self, quantile: float) -> list[float]:
        """Return a quantile of each repetition."""
        return [at_quantile(latencies, quantile) for latencies in self.beside]

    def slowdown_at(self, quantile: float) -> list[float]:
        """Return how many times as long an update takes beside watchers."""
        return [b / a for a, b in zip(self.alone_at(quantile), self.beside_at(quantile), strict=True)]


def fan_out(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure a burst of updates, sent one after another, to a job with a thousand watchers."""
    ours, bare = Bursts(), Bursts()
    for _ in range(plan.repetitions):
        with workplace.ours() as server:
            replies = _burst(server, ours)
        with workplace.bare(replies) as server:
            _burst(server, bare)
    for quantile, name in ((0.5, "p50"), (0.99, "p99")):
        yield _figure("an update alone, " + name + ", ms", ours.alone_at(quantile), bare.alone_at(quantile), 1e3)
        yield _figure(
            "an update beside them, " + name + ", ms", ours.beside_at(quantile), bare.beside_at(quantile), 1e3
        )
        yield _figure(
            f"times as long as alone, {name}",
            ours.slowdown_at(quantile),
            bare.slowdown_at(quantile),
            target=Target(at_most=4),
        )
    yield _figure("first update until all have the end, ms", ours.until_end, bare.until_end, 1e3)
    yield _figure("final update until all have the end, ms", ours.end_spread, bare.end_spread, 1e3)
    yield _figure("messages delivered", ours.delivered, bare.delivered)
    yield Figure(
        row="fanout",
        name=f"watchers of {WATCHERS:,} that saw the end",
        ours=ours.saw_the_end,
        bare=bare.saw_the_end,
        target=Target(at_least=WATCHERS, at_most=WATCHERS),
        choose=min,
    )


def _figure(
    name: str, ours: Sequence[float], bare: Sequence[float], scale: float = 1, target: Target | None = None
) -> Figure:
    return Figure(
        row="fanout", name=name, ours=[v * scale for v in ours], bare=[v * scale for v in bare], target=target
    )  # fmt: skip


def _burst(server: Server, bursts: Bursts) -> dict[str, bytes]:
    """Add a repetition to `bursts`; return what the server answered, by method."""
    with Client(server.address, connections=1 + WATCHERS // WATCHES_PER_CONNECTION) as client:
        if server.name == "ours":
            client.call_all("CreateJob", [messages.create_request("alone"), messages.create_request("watched")])
        alone = Updates(["alone"])
        _send(client, alone)  # warms the server up
        bursts.alone.append(_send(client, alone)[0])
        audience = Audience(client, WATCHERS)
        audience.open("watched")
        client.run_for(SETTLE_SECONDS)
        message = audience.watches[0].last
        started = time.perf_counter()
        latencies, reply = _send(client, Updates(["watched"]))
        end_sent = time.perf_counter()
        client.call("UpdateJob", messages.end_request("watched"))
        audience.wait()
        ended = time.perf_counter()
    bursts.beside.append(latencies)
    bursts.until_end.append(ended - started)
    bursts.end_spread.append(ended - end_sent)
    bursts.delivered.append(audience.delivered)
    bursts.saw_the_end.append(audience.saw_the_end)
    return {"WatchJob": message, "UpdateJob": reply}


def _send(client: Client, updates: Updates) -> tuple[list[float], bytes]:
    """Send a burst, each update when the one before is answered; return their latencies and the last reply."""
    latencies: list[float] = []
    for _ in range(BURST):
        request = updates()
        started = time.perf_counter()
        reply = client.call("UpdateJob", request)
        latencies.append(time.perf_counter() - started)
    return latencies, reply


def idle(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure ten thousand watchers to whom nothing happens, and then the end. Once: it takes its time."""
    with ExitStack() as resources:
        server = resources.enter_context(workplace.ours())
        connections = 1 + IDLE_WATCHERS // WATCHES_PER_CONNECTION
        client = resources.enter_context(Client(server.address, connections=connections))
        client.call("CreateJob", messages.create_request(FIRST_JOB))
        client.run_for(SETTLE_SECONDS)
        before = server.memory_bytes()
        started = time.perf_counter()
        audience = Audience(client, IDLE_WATCHERS)
        audience.open(FIRST_JOB)
        opened = time.perf_counter() - started
        client.run_for(SETTLE_SECONDS)
        each = (server.memory_bytes() - before) / IDLE_WATCHERS
        used, delivered, started = server.cpu_seconds(), audience.delivered, time.perf_counter()
        client.run_for(plan.idle_seconds)
        busy = (server.cpu_seconds() - used) / (time.perf_counter() - started)
        beats = audience.delivered - delivered
        started = time.perf_counter()
        client.call("UpdateJob", messages.end_request(FIRST_JOB))
        audience.wait()
        ended = time.perf_counter() - started

    def figure(name: str, value: float, target: Target | None = None) -> Figure:
        return Figure(row="idle", name=name, ours=[value], target=target)

    yield figure(f"{IDLE_WATCHERS:,} watches opened at once, s", opened)
    yield figure("memory of each, kB", each / 1000, Target(at_most=30))
    yield figure("CPU while idle, % of a core", busy * 100, Target(at_most=5))
    yield figure(f"heartbeats in those {plan.idle_seconds:.0f} s", beats)
    yield figure("final update until all have the end, s", ended)
    yield figure(
        "watchers that saw the end", audience.saw_the_end, Target(at_least=IDLE_WATCHERS, at_most=IDLE_WATCHERS)
    )


def finish(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Open a thousand watches in the same instant as their job's final update: half before it, half after."""
    times: list[float] = []
    seen: list[float] = []
    with ExitStack() as resources:
        server = resources.enter_context(workplace.ours())
        client = resources.enter_context(Client(server.address, connections=1 + WATCHERS // WATCHES_PER_CONNECTION))
        for repetition in range(plan.repetitions):
            job_id = f"job-{repetition}"
            client.call("CreateJob", messages.create_request(job_id))
            audience = Audience(client, WATCHERS)
            audience.queue(job_id, part=slice(0, WATCHERS // 2))
            started = time.perf_counter()
            for connection in client.connections[1:]:
                connection.flush()
            audience.queue(job_id, part=slice(WATCHERS // 2, None))
            client.call("UpdateJob", messages.end_request(job_id))
            audience.wait()
            times.append(time.perf_counter() - started)
            seen.append(audience.saw_the_end)
    yield Figure(row="finish", name="final update until all have the end, ms", ours=[t * 1e3 for t in times])
    yield Figure(
        row="finish",
        name=f"watchers of {WATCHERS:,} that saw the end",
        ours=seen,
        target=Target(at_least=WATCHERS, at_most=WATCHERS),
        choose=min,
    )
