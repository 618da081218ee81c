"""Loads the sides' servers in turns, half a second each, so that what else the machine does hits all."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from benchmarks import messages
from benchmarks.client import CallFailedError, Client, path
from benchmarks.load import Load, NextRequest
from benchmarks.plan import Plan
from benchmarks.report import at_quantile
from benchmarks.servers import GRPCIO, Server, Workplace

CONNECTIONS = 8
SLICE_SECONDS = 0.5
WARM_UP_SECONDS = 0.2
QUANTILES = (0.5, 0.99)


@dataclass(slots=True)
class Samples:
    """What one server did, a value per repetition."""

    rates: dict[int, list[float]] = field(default_factory=dict)
    """Calls a second, by callers."""
    latencies: dict[tuple[int, float], list[float]] = field(default_factory=dict)
    """In seconds, by callers and quantile."""
    server_cpu: dict[int, list[float]] = field(default_factory=dict)
    """Seconds a call, by callers."""
    server_busy: dict[int, list[float]] = field(default_factory=dict)
    """The part of its core that the server had; much less than 1 means that something else had it too."""
    load_busy: dict[int, list[float]] = field(default_factory=dict)
    """The part of its core that the load generator used; near 1 it would be what is measured."""
    database_cpu: dict[int, list[float]] = field(default_factory=dict)
    """Seconds a call, by callers; empty where the server's store is its own."""

    def load_cpu(self, callers: int) -> list[float]:
        """Return the load generator's seconds a call."""
        pairs = zip(self.rates[callers], self.load_busy[callers], strict=True)
        return [busy / rate for rate, busy in pairs]

    def capacity(self, callers: int) -> list[float]:
        """Return how many calls a second the load generator could have made with all of its core."""
        pairs = zip(self.rates[callers], self.load_busy[callers], strict=True)
        return [rate / busy for rate, busy in pairs if busy]


@dataclass(slots=True)
class _Total:
    """What came of some slices."""

    seconds: float = 0.0
    server_cpu: float = 0.0
    load_cpu: float = 0.0
    database_cpu: float = 0.0
    latencies: list[float] = field(default_factory=list)


class Subject:
    """One server under the load of one method, each of whose callers has jobs of its own."""

    def __init__(
        self,
        server: Server,
        method: str,
        lanes: Sequence[NextRequest],
        *,
        connections: int = CONNECTIONS,
        database_cpu_seconds: Callable[[], float] | None = None,
    ) -> None:
        """Take at most so many connections, and what tells the CPU time of the server's database, if it has one."""
        self.samples = Samples()
        self._connections = connections
        self._database_cpu_seconds = database_cpu_seconds
        self._server = server
        self._method = method
        self._lanes = lanes

    def measure(self, callers: int, total: _Total) -> None:
        """Let so many callers load the server for a slice."""
        with Client(self._server.address, connections=min(callers, self._connections)) as client:
            load = Load(client, self._method, self._lanes[:callers])
            load.start()
            load.measure(WARM_UP_SECONDS)
            stored = self._stored()  # first and last: to find the database's processes takes milliseconds
            started, served, loaded = time.perf_counter(), self._server.cpu_seconds(), time.process_time()
            tally = load.measure(SLICE_SECONDS)
            total.seconds += time.perf_counter() - started
            total.server_cpu += self._server.cpu_seconds() - served
            total.load_cpu += time.process_time() - loaded
            total.database_cpu += self._stored() - stored
            total.latencies.extend(tally.latencies)
            load.stop()

    def note(self, callers: int, total: _Total) -> None:
        """Add the slices of one repetition to the samples.

        Raises:
            CallFailedError: no call was answered in all of them.
        """
        calls = len(total.latencies)
        if not calls:
            raise CallFailedError(f"the {self._server.name} server answered no call of {self._method}")
        samples = self.samples
        for quantile in QUANTILES:
            value = at_quantile(total.latencies, quantile)
            samples.latencies.setdefault((callers, quantile), []).append(value)
        samples.rates.setdefault(callers, []).append(calls / total.seconds)
        samples.server_cpu.setdefault(callers, []).append(total.server_cpu / calls)
        samples.server_busy.setdefault(callers, []).append(total.server_cpu / total.seconds)
        samples.load_busy.setdefault(callers, []).append(total.load_cpu / total.seconds)
        if self._database_cpu_seconds:
            samples.database_cpu.setdefault(callers, []).append(total.database_cpu / calls)

    def _stored(self) -> float:
        return self._database_cpu_seconds() if self._database_cpu_seconds else 0.0


def take_turns(subjects: Sequence[Subject], plan: Plan, *, callers: Sequence[int], judged: int) -> None:
    """Measure each with each number of callers, longest with the one that is judged."""
    for _ in range(plan.repetitions):
        for count in callers:
            totals = [_Total() for _ in subjects]
            seconds = plan.seconds if count == judged else plan.seconds / 4
            for _ in range(max(1, round(seconds / SLICE_SECONDS))):
                for subject, total in zip(subjects, totals, strict=True):
                    subject.measure(count, total)
            for subject, total in zip(subjects, totals, strict=True):
                subject.note(count, total)


@contextlib.contextmanager
def all_running(workplace: Workplace, sides: Sequence[str], job_ids: Sequence[str]) -> Iterator[list[Server]]:
    """Run the servers of `sides`, with these jobs, for the length of a block."""
    with contextlib.ExitStack() as resources:
        replies = ready_replies(workplace, job_ids)
        servers = [resources.enter_context(workplace.run(side, replies)) for side in sides]
        for server in servers:
            with Client(server.address, connections=1) as client:
                server.api.prepare(client, job_ids)
        yield servers


def ready_replies(workplace: Workplace, job_ids: Sequence[str]) -> Mapping[str, bytes]:
    """Return what our server answers, by method: the bare ones answer with it too."""
    with replace(workplace, store=None).run(GRPCIO) as server, Client(server.address, connections=1) as client:
        api = server.api
        api.prepare(client, job_ids[:100])
        update = client.call(api.update, api.updates(job_ids[:1])())
        reply = client.call(api.read, api.read_request(job_ids[0]))
        batch = client.call(path("BatchUpdateJobs"), api.updates(job_ids[:100], batch=True)())
    return {
        "GetJob": reply,
        "UpdateJob": update,
        "BatchUpdateJobs": batch,
        "WatchJob": messages.watch_message(reply),
    }
