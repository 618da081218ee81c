"""Rows of many watchers: a burst of updates, single changes, watches opened at the end, idle watches, a resume."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from jobstatus.v1 import job_status_pb2 as pb

from benchmarks.load.apis import batches, path
from benchmarks.load.client import CallFailedError, Client
from benchmarks.report import EACH, Table, Target, at_quantile, row
from benchmarks.rows.calls import JOBS, updating
from benchmarks.servers import (
    BARE,
    ETCD,
    GRPCIO,
    NATIVE,
    NATS,
    OURS,
    POSTGRES,
    REDIS,
    Bench,
    Server,
    numbered_jobs,
)

SIDES = (GRPCIO, NATIVE, ETCD, BARE)
PEERS = (NATS, REDIS, POSTGRES)
END_MARK = "the end of it"
BURST = 50
CHANGES = 10
CHANGES_PER_SIZE = 3
RESUMED_JOBS = 1_000
SETTLE_SECONDS = 0.5
PAUSE_SECONDS = 0.15
"""Longer than the interval at which our service sends a watch messages that only report progress."""
MEMORY, CHANGE, IDLE_CPU = "memory of each, kB", "changes until all have them, ms", "CPU while idle, % of a core"


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
    """Jobs and their watchers, with one job or several; the first connection carries the updates."""

    def __init__(
        self, server: Server, job_ids: Sequence[str], most: int, *, watches_per_connection: int | None = None
    ) -> None:
        """Create the jobs, and connect for at most `most` watchers."""
        connections = 1 - (-most // (watches_per_connection or server.api.watches_per_connection))
        super().__init__(server.address, tls=server.tls, connections=connections, connect=server.api.connect)
        self.watches: list[Watch] = []
        self.begun = 0
        """The number of watchers that have a message."""
        self.mark = b"no mark was sent"
        self.reached_at: list[float] = []
        """When the watchers received the mark."""
        self.ended_at: list[float] = []
        self._api = server.api
        self._job_ids = job_ids
        self._api.create(self, job_ids)

    def queue(self, count: int) -> None:
        """Queue the calls of `count` more watchers, spread over the connections and the jobs."""
        requests = [self._api.watch_request(job_id) for job_id in self._job_ids]
        for _ in range(count):
            request = requests[len(self.watches) % len(requests)]
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
        """Change all jobs at once; the watchers' messages then contain `mark`."""
        self.mark, self.reached_at = mark.encode(), []
        requests = [self._api.marked_request(job_id, mark, is_end=is_end) for job_id in self._job_ids]
        self.call_all(self._api.update, requests)

    def change(self, mark: str, *, is_end: bool = False) -> list[float]:
        """Change all jobs at once; return the seconds from then until each watcher received its job's change."""
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
    after the reply to the one before, and then the job's end. An update alone is one of 256 jobs without watchers, in
    turn. etcd sends every change, several in a message to a watcher that lags; our service skips to the newest.
    """
    watchers = bench.plan.audience
    for _ in range(bench.plan.repetitions):
        for side in bench.among(*SIDES):
            with bench.run(side) as server, Audience(server, ["watched"], watchers) as audience:
                table.add(side, _burst(server, audience, watchers))
    goal = f"burst of {BURST} updates and the end to {watchers:,} watchers, until the last has it"
    targets = Target(GRPCIO, "≤", 0.6, ETCD), Target(NATIVE, "≤", 0.4, ETCD)
    table.expect("first update until all have the end, ms", goal, *targets)
    table.expect(f"watchers of {watchers:,} that saw the end", "", Target(EACH, "=", watchers), choose=min)
    for name in ("p50", "p99"):
        goal = f"an update's latency during the burst, as a multiple of alone, {name}"
        table.expect(f"times as long as alone, {name}", goal, *(Target(side, "≤", 3) for side in OURS))


def _burst(server: Server, audience: Audience, watchers: int) -> Mapping[str, float]:
    api = server.api
    others = numbered_jobs(JOBS)
    api.create(audience, others)
    [of_others], of_watched = updating(server, [[job_id] for job_id in others]).lanes(1), api.updates(["watched"])
    for _ in range(2):  # the first round warms the server up
        alone = [audience.timed(api.update, of_others()) for _ in others]
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
    """10 single changes, each after a pause of 0.15 s; the figures are of all watchers of all changes.
    The time starts when the update is sent. A watcher of NATS is a consumer of the bucket as a client's watch makes it;
    one of Redis or PostgreSQL is a connection with SUBSCRIBE or LISTEN.
    """
    watchers = bench.plan.audience
    for _ in range(bench.plan.repetitions):
        for side in bench.among(*SIDES, *PEERS):
            with bench.run(side) as server, Audience(server, ["watched"], watchers) as audience:
                audience.open(watchers)
                table.add(side, single_changes(audience))
    targets = Target(GRPCIO, "≤", 30, otherwise=Target(GRPCIO, "≤", 0.9, BARE)), Target(NATIVE, "≤", 1, ETCD)
    table.expect("until a watcher has it, p99, ms", f"one change to {watchers:,} watchers, p99", *targets)


def single_changes(audience: Audience) -> Mapping[str, float]:
    """Change the jobs CHANGES times, and return how long the changes took to the watchers."""
    audience.change("warming up")
    seconds: list[float] = []
    for number in range(CHANGES):
        audience.run_for(PAUSE_SECONDS)
        seconds += audience.change(f"change {number} of this round")
    quantiles = {"p50": 0.5, "p99": 0.99, "the last": 1.0}
    return {f"until a watcher has it, {name}, ms": at_quantile(seconds, each) * 1e3 for name, each in quantiles.items()}


@row("finish", "Watches opened as the job ends")
def finish(bench: Bench, table: Table) -> None:
    """Watches of 256 jobs are opened at the same time as the jobs' final updates: half before them, half after."""
    watchers = bench.plan.audience
    seen = f"watchers of {watchers:,} that saw the end"
    with bench.run_all(bench.among(GRPCIO, NATIVE)) as servers:
        for repetition in range(bench.plan.repetitions):
            for side, server in servers.items():
                with Audience(server, numbered_jobs(JOBS, f"job-{repetition}"), watchers) as audience:
                    audience.queue(watchers // 2)
                    started = time.perf_counter()
                    for connection in audience.connections[1:]:
                        connection.flush()
                    audience.queue(watchers - watchers // 2)
                    audience.update(END_MARK, is_end=True)
                    table.add(side, {seen: audience.saw_the_end()})
                    seconds = audience.ended_at[-1] - started
                    table.add(side, {"final updates until all have the end, ms": seconds * 1e3})
    table.expect(seen, "watchers that start as the job ends and saw the end", Target(EACH, "=", watchers), choose=min)


@row("watchers", "Idle watchers")
def idle_watchers(bench: Bench, table: Table) -> None:
    """A growing number of watchers of 256 jobs; at each size, all jobs change at once, three times. Then nothing
    happens: a heartbeat every 30 s. Measured once.
    """
    sides, most = bench.among(GRPCIO, NATIVE, ETCD), bench.plan.crowds[-1]
    for name in (f"{side}: {figure}" for figure in (MEMORY, CHANGE) for side in sides):
        table.expect(name, "")  # without targets, but in this order
    for side in sides:
        # One caller gets at most eight ninths of the places.
        flags = ("--max-watchers", str(2 * most)) if side in OURS else ()
        with bench.run(side, None, *flags) as server, Audience(server, numbered_jobs(JOBS), most) as audience:
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
    table.expect(IDLE_CPU, goal + IDLE_CPU, *(Target(side, "≤", 2) for side in OURS))
    table.expect("watchers that saw the end", f"{goal}watchers that saw the end", Target(EACH, "=", most))


def _idle(server: Server, audience: Audience, seconds: float) -> Mapping[str, float]:
    """Measure the largest crowd while nothing happens, and its end."""
    used, delivered, started = server.cpu_seconds(), len(audience.delivered()), time.perf_counter()
    audience.run_for(seconds)
    busy = (server.cpu_seconds() - used) / (time.perf_counter() - started)
    heartbeats = len(audience.delivered()) - delivered
    return {
        IDLE_CPU: busy * 100,
        "final updates until all have them, s": max(audience.change(END_MARK, is_end=True)),
        "watchers that saw the end": audience.saw_the_end(),
        f"heartbeats in {seconds:.0f} s": heartbeats,
    }


@row("resume", "Resume after many changes")
def resume(bench: Bench, table: Table) -> None:
    """A watch of all jobs, WatchJobs, is closed; 1,000 jobs change 1,000 times each; a new process on the same file
    resumes the watch with its token, and sends the newest state of each job, or RESET and all jobs.
    """
    sides, name = bench.among(*OURS), "until the watch is in step, s"
    if not sides:
        return
    job_ids, watch = numbered_jobs(RESUMED_JOBS), pb.WatchJobsRequest()
    with bench.folder() as folder:
        with bench.run(sides[-1], folder) as server, server.client(connections=8) as client:
            server.create(job_ids)
            watch.resume_token = WatchOfAll(client, watch).resume_token
        with bench.run(sides[-1], folder) as server, server.client(connections=8) as client:
            requests = [server.api.updates(batch) for batch in batches(job_ids)]
            for _ in range(bench.plan.changes // RESUMED_JOBS):
                client.call_all(server.api.batch, [next_request() for next_request in requests])
        for _ in range(bench.plan.repetitions):
            for side in sides:
                with bench.run(side, folder) as server, server.client() as client:
                    started = time.perf_counter()
                    resumed = WatchOfAll(client, watch)
                    table.add(side, {name: time.perf_counter() - started})
                    table.add(side, {"jobs that the resumed watch sent": resumed.sent})
    goal = f"resume after {bench.plan.changes:,} changes of {RESUMED_JOBS:,} jobs, s"
    table.expect(name, goal, *(Target(side, "≤", 1) for side in OURS))
    table.expect("jobs that the resumed watch sent", "", Target(EACH, "=", RESUMED_JOBS), choose=min)


class WatchOfAll:
    """A WatchJobs call, once it is in step with the store: it has sent SYNCED."""

    def __init__(self, client: Client, request: pb.WatchJobsRequest) -> None:
        self.sent = 0
        """The number of jobs sent, as UPDATED or, after RESET, as SNAPSHOT."""
        self.resume_token = ""
        self._is_synced = False
        client.connections[0].call(path("WatchJobs"), request.SerializeToString(), self)
        client.run_until(lambda: self._is_synced)

    def on_message(self, message: bytes) -> None:
        response = pb.WatchJobsResponse.FromString(message)
        types = [event.type for event in response.events]
        self.sent += types.count(pb.JOB_EVENT_TYPE_UPDATED) + types.count(pb.JOB_EVENT_TYPE_SNAPSHOT)
        self._is_synced |= pb.JOB_EVENT_TYPE_SYNCED in types
        self.resume_token = response.resume_token

    def on_end(self, is_ok: bool) -> None:
        raise CallFailedError("the watch of all jobs ended")
