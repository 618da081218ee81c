"""Rows of many watchers of one job: a burst of updates, single changes, watches opened at the end, idle watches."""

from __future__ import annotations

import time
from collections.abc import Mapping

from benchmarks.load.client import CallFailedError, Client
from benchmarks.report import EACH, Table, Target, at_quantile, row
from benchmarks.servers import BARE, BARE_NATIVE, ETCD, GRPCIO, NATIVE, Bench, Server

WATCHES_PER_CONNECTION = 50
SIDES = (GRPCIO, NATIVE, ETCD, BARE, BARE_NATIVE)
END_MARK = "the end of it"
BURST = 50
CHANGES = 10
CHANGES_PER_SIZE = 3
SETTLE_SECONDS = 1.0
PAUSE_SECONDS = 0.25
"""Longer than the interval at which our service sends a watch messages that only report progress."""
MEMORY, CHANGE, IDLE_CPU = "memory of each, kB", "a change until all have it, ms", "CPU while idle, % of a core"


class Watch:
    """One watcher with the messages that it received."""

    def __init__(self, audience: Audience) -> None:
        self.messages: list[bytes] = []
        self.is_ok = False
        self._audience = audience

    def on_message(self, message: bytes) -> None:
        audience = self._audience
        audience.begun += not self.messages
        self.messages.append(message)
        if audience.mark in message:
            audience.reached_at.append(time.perf_counter())

    def on_end(self, is_ok: bool) -> None:
        self.is_ok = is_ok
        self._audience.ended_at.append(time.perf_counter())


class Audience(Client):
    """A job and its watchers, 50 to a connection; the first connection carries the updates."""

    def __init__(
        self, server: Server, job_id: str, most: int, *, watches_per_connection: int = WATCHES_PER_CONNECTION
    ) -> None:
        """Create the job, and connect for at most `most` watchers."""
        super().__init__(server.address, tls=server.tls, connections=1 - (-most // watches_per_connection))
        self.watches: list[Watch] = []
        self.begun = 0
        """The number of watchers that have a message."""
        self.mark = b"no mark was sent"
        self.reached_at: list[float] = []
        """When the watchers received the mark."""
        self.ended_at: list[float] = []
        self._api = server.api
        self._job_id = job_id
        self._api.create(self, [job_id])

    def queue(self, count: int) -> None:
        """Queue the calls of `count` more watchers, spread over the connections."""
        request = self._api.watch_request(self._job_id)
        for _ in range(count):
            connection = self.connections[1 + len(self.watches) % (len(self.connections) - 1)]
            self.watches.append(Watch(self))
            connection.call(self._api.watch, request, self.watches[-1], is_last=self._api.ends_watches)

    def open(self, count: int) -> None:
        """Open `count` more, and wait until each has its first message."""
        self.queue(count)
        self.run_until(lambda: self.begun == len(self.watches) or bool(self.ended_at))
        if self.ended_at:
            raise CallFailedError(f"{len(self.ended_at)} watches were refused")

    def update(self, mark: str, *, is_end: bool = False) -> None:
        """Change the job; the watchers' messages then contain `mark`."""
        self.mark, self.reached_at = mark.encode(), []
        self.call(self._api.update, self._api.marked_request(self._job_id, mark, is_end=is_end))

    def change(self, mark: str, *, is_end: bool = False) -> list[float]:
        """Change the job; return the seconds from the call until each watcher received the change."""
        started = time.perf_counter()
        self.update(mark, is_end=is_end)
        self.run_until(lambda: len(self.reached_at) >= len(self.watches))
        return [reached_at - started for reached_at in self.reached_at]

    def saw_the_end(self) -> int:
        """Count the watches whose last message is the end, and, if the server closes watches, that end with OK."""
        closes = self._api.ends_watches
        self.run_until(lambda: len(self.ended_at) == len(self.watches) or not closes)
        last = [message for watch in self.watches if watch.is_ok or not closes for message in watch.messages[-1:]]
        return sum(END_MARK.encode() in message for message in last)

    def delivered(self) -> list[bytes]:
        """Return the messages after the first of each watch."""
        return [message for watch in self.watches for message in watch.messages[1:]]


@row("fanout", "A burst to many watchers")
def fan_out(bench: Bench, table: Table) -> None:
    """Each watcher has its own stream; 50 streams share a connection. The client sends 50 updates of the job, each
    after the reply to the one before, and then the job's end. etcd sends every change, several in a message to a
    watcher that lags; our service skips to the newest.
    """
    watchers = bench.plan.audience
    for _ in range(bench.plan.repetitions):
        for side in bench.among(*SIDES):
            with bench.run(side) as server, Audience(server, "watched", watchers) as audience:
                table.add(side, _burst(server, audience, watchers))
    goal = f"burst of {BURST} updates and the end to {watchers:,} watchers, until the last has it"
    targets = Target(GRPCIO, "≤", 0.6, ETCD), Target(NATIVE, "≤", 0.4, ETCD)
    table.expect("first update until all have the end, ms", goal, *targets)
    table.expect(f"watchers of {watchers:,} that saw the end", "", Target(EACH, "=", watchers), choose=min)
    for name in ("p50", "p99"):
        goal = f"an update's latency during the burst, as a multiple of alone, {name}"
        table.expect(f"times as long as alone, {name}", goal, Target(GRPCIO, "≤", 4), Target(NATIVE, "≤", 3))


def _burst(server: Server, audience: Audience, watchers: int) -> Mapping[str, float]:
    api = server.api
    api.create(audience, ["alone"])
    of_alone, of_watched = api.updates(["alone"]), api.updates(["watched"])
    for _ in range(2):  # the first burst warms the server up
        alone = [audience.timed(api.update, of_alone()) for _ in range(BURST)]
    audience.open(watchers)
    audience.run_for(SETTLE_SECONDS)
    started, used = time.perf_counter(), time.process_time()
    watched = [audience.timed(api.update, of_watched()) for _ in range(BURST)]
    burst_seconds = time.perf_counter() - started
    end_seconds = max(audience.change(END_MARK, is_end=True))
    busy = (time.process_time() - used) / (time.perf_counter() - started)
    saw_the_end, delivered = audience.saw_the_end(), audience.delivered()
    figures = {
        "first update until all have the end, ms": (burst_seconds + end_seconds) * 1e3,
        "final update until all have it, ms": end_seconds * 1e3,
        "messages delivered": len(delivered),
        "changes in them": sum(map(api.changes_in, delivered)),
        "load busy, % of its core": busy * 100,
        f"watchers of {watchers:,} that saw the end": saw_the_end,
    }
    for quantile, name in ((0.5, "p50"), (0.99, "p99")):
        latencies = at_quantile(alone, quantile), at_quantile(watched, quantile)
        figures[f"an update alone, {name}, ms"] = latencies[0] * 1e3
        figures[f"an update of the burst, {name}, ms"] = latencies[1] * 1e3
        figures[f"times as long as alone, {name}"] = latencies[1] / latencies[0]
    return figures


@row("change", "One change to many watchers")
def one_change(bench: Bench, table: Table) -> None:
    """10 single changes, each after a pause of a quarter of a second; the figures are of all watchers of all changes.
    The time starts when the update is sent.
    """
    watchers = bench.plan.audience
    for _ in range(bench.plan.repetitions):
        for side in bench.among(*SIDES):
            with bench.run(side) as server, Audience(server, "watched", watchers) as audience:
                audience.open(watchers)
                table.add(side, single_changes(audience))
    targets = Target(GRPCIO, "≤", 2.5, ETCD), Target(NATIVE, "≤", 1.2, ETCD)
    table.expect("until a watcher has it, p99, ms", f"one change to {watchers:,} watchers, p99", *targets)


def single_changes(audience: Audience) -> Mapping[str, float]:
    """Change the job CHANGES times, and return how long the changes took to the watchers."""
    audience.change("warming up")
    seconds: list[float] = []
    for number in range(CHANGES):
        audience.run_for(PAUSE_SECONDS)
        seconds += audience.change(f"change {number} of this round")
    quantiles = {"p50": 0.5, "p99": 0.99, "the last": 1.0}
    return {f"until a watcher has it, {name}, ms": at_quantile(seconds, each) * 1e3 for name, each in quantiles.items()}


@row("finish", "Watches opened as the job ends")
def finish(bench: Bench, table: Table) -> None:
    """Watches are opened at the same time as their job's final update: half before it, half after."""
    watchers = bench.plan.audience
    seen = f"watchers of {watchers:,} that saw the end"
    with bench.run_all(bench.among(GRPCIO, NATIVE)) as servers:
        for repetition in range(bench.plan.repetitions):
            for side, server in servers.items():
                with Audience(server, f"job-{repetition}", watchers) as audience:
                    audience.queue(watchers // 2)
                    started = time.perf_counter()
                    for connection in audience.connections[1:]:
                        connection.flush()
                    audience.queue(watchers - watchers // 2)
                    audience.update(END_MARK, is_end=True)
                    table.add(side, {seen: audience.saw_the_end()})
                    seconds = audience.ended_at[-1] - started
                    table.add(side, {"final update until all have the end, ms": seconds * 1e3})
    table.expect(seen, "watchers that start as the job ends and saw the end", Target(EACH, "=", watchers), choose=min)


@row("watchers", "Idle watchers")
def idle_watchers(bench: Bench, table: Table) -> None:
    """A growing number of watchers of one job, with three changes at each size. Then nothing happens: a heartbeat every
    30 s. Measured once.
    """
    sides, most = bench.among(GRPCIO, NATIVE, ETCD), bench.plan.crowds[-1]
    for name in (f"{side}: {figure}" for figure in (MEMORY, CHANGE) for side in sides):
        table.expect(name, "")  # without targets, but in this order
    for side in sides:
        with bench.run(side) as server, Audience(server, "watched", most) as audience:
            audience.run_for(SETTLE_SECONDS)
            empty_bytes, opening_seconds = server.memory_bytes(), 0.0
            for size in bench.plan.crowds:
                started = time.perf_counter()
                audience.open(size - len(audience.watches))
                opening_seconds += time.perf_counter() - started
                audience.run_for(SETTLE_SECONDS)
                memory = (server.memory_bytes() - empty_bytes) / size / 1e3
                table.add(size, {f"{side}: {MEMORY}": memory})
                for number in range(CHANGES_PER_SIZE):
                    seconds = max(audience.change(f"change {number} of {size}"))
                    table.add(size, {f"{side}: {CHANGE}": seconds * 1e3})
                    audience.run_for(PAUSE_SECONDS)
            table.add(side, {MEMORY: memory, f"{most:,} opened, s": opening_seconds})
            table.add(side, _idle(server, audience, bench.plan.idle_seconds))
    goal = f"{most:,} idle watchers, "
    table.expect(MEMORY, goal + MEMORY, Target(GRPCIO, "≤", 30), Target(NATIVE, "≤", 25))
    table.expect(IDLE_CPU, goal + IDLE_CPU, Target(GRPCIO, "≤", 5), Target(NATIVE, "≤", 5))
    table.expect("watchers that saw the end", f"{goal}watchers that saw the end", Target(EACH, "=", most))


def _idle(server: Server, audience: Audience, seconds: float) -> Mapping[str, float]:
    """Measure the largest crowd while nothing happens, and its end."""
    used, delivered, started = server.cpu_seconds(), len(audience.delivered()), time.perf_counter()
    audience.run_for(seconds)
    busy = (server.cpu_seconds() - used) / (time.perf_counter() - started)
    heartbeats = len(audience.delivered()) - delivered
    end_seconds = max(audience.change(END_MARK, is_end=True))
    return {
        IDLE_CPU: busy * 100,
        "watchers that saw the end": audience.saw_the_end(),
        f"heartbeats in {seconds:.0f} s": heartbeats,
        "final update until all have it, s": end_seconds,
    }
