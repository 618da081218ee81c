"""Loads our server and the bare one in turns, half a second each, so that what else the machine does hits both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks import messages
from benchmarks.client import CallFailedError, Client, Load, NextRequest
from benchmarks.messages import Updates
from benchmarks.plan import Plan
from benchmarks.report import at_quantile
from benchmarks.servers import Server, Workplace

CONNECTIONS = 8
SLICE_SECONDS = 0.5
WARM_UP_SECONDS = 0.2
FEW_CALLERS = (1, 16)
QUANTILES = (0.5, 0.99)


@dataclass(slots=True)
class Samples:
    """What one server did, a value per repetition; at full load where nothing else is said."""

    rates: list[float] = field(default_factory=list)
    """Calls a second."""
    server_cpu: list[float] = field(default_factory=list)
    """Seconds a call."""
    server_busy: list[float] = field(default_factory=list)
    """The part of its core that the server had; much less than 1 means that something else had it too."""
    load_busy: list[float] = field(default_factory=list)
    """The part of its core that the load generator used; near 1 it would be what is measured."""
    latencies: dict[tuple[int, float], list[float]] = field(default_factory=dict)
    """In seconds, by callers and quantile."""


@dataclass(slots=True)
class _Total:
    """What came of some slices."""

    seconds: float = 0.0
    server_cpu: float = 0.0
    load_cpu: float = 0.0
    latencies: list[float] = field(default_factory=list)


class Subject:
    """One server under the load of one method, each of whose callers has jobs of its own."""

    def __init__(self, server: Server, method: str, lanes: Sequence[NextRequest]) -> None:
        self.samples = Samples()
        self.callers = len(lanes)
        self._server = server
        self._method = method
        self._lanes = lanes

    def measure(self, callers: int, total: _Total) -> None:
        """Let so many callers load the server for a slice."""
        with Client(self._server.address, connections=CONNECTIONS) as client:
            load = Load(client, self._method, self._lanes[:callers])
            load.start()
            load.measure(WARM_UP_SECONDS)
            started, served, loaded = time.perf_counter(), self._server.cpu_seconds(), time.process_time()
            tally = load.measure(SLICE_SECONDS)
            total.seconds += time.perf_counter() - started
            total.server_cpu += self._server.cpu_seconds() - served
            total.load_cpu += time.process_time() - loaded
            total.latencies.extend(tally.latencies)
            load.stop()

    def note(self, callers: int, total: _Total) -> None:
        """Add the slices of one repetition to the samples.

        Raises:
            CallFailedError: no call was answered in all of them.
        """
        if not total.latencies:
            raise CallFailedError(f"the {self._server.name} server answered no call of {self._method}")
        for quantile in QUANTILES:
            values = self.samples.latencies.setdefault((callers, quantile), [])
            values.append(at_quantile(total.latencies, quantile))
        if callers == self.callers:
            self.samples.rates.append(len(total.latencies) / total.seconds)
            self.samples.server_cpu.append(total.server_cpu / len(total.latencies))
            self.samples.server_busy.append(total.server_cpu / total.seconds)
            self.samples.load_busy.append(total.load_cpu / total.seconds)


def _repeat(subjects: Sequence[Subject], plan: Plan) -> None:
    full = subjects[0].callers
    for _ in range(plan.repetitions):
        for callers in (*(few for few in FEW_CALLERS if few < full), full):
            totals = [_Total() for _ in subjects]
            seconds = plan.seconds if callers == full else plan.seconds / 4
            for _ in range(max(1, round(seconds / SLICE_SECONDS))):
                for subject, total in zip(subjects, totals, strict=True):
                    subject.measure(callers, total)
            for subject, total in zip(subjects, totals, strict=True):
                subject.note(callers, total)


def reads_beside(
    workplace: Workplace, plan: Plan, method: str, job_ids: Sequence[str], lanes: Sequence[NextRequest]
) -> tuple[Samples, Samples]:
    """Measure a method that changes nothing; return what our server did, and the bare one."""
    with ExitStack() as resources:
        ours = resources.enter_context(workplace.ours())
        reply = _prepare(ours, method, job_ids, lanes[0]())
        bare = resources.enter_context(workplace.bare({method: reply}))
        subjects = [Subject(server, method, lanes) for server in (ours, bare)]
        _repeat(subjects, plan)
        return subjects[0].samples, subjects[1].samples


def updates_beside(
    workplace: Workplace, plan: Plan, method: str, lanes: Sequence[Updates]
) -> tuple[Samples, Samples, float]:
    """Measure a method that changes jobs; return also how many changes our server made of each update."""
    job_ids = [job_id for lane in lanes for job_id in lane.job_ids]
    with ExitStack() as resources:
        ours = resources.enter_context(workplace.ours())
        reply = _prepare(ours, method, job_ids, lanes[0]())
        bare = resources.enter_context(workplace.bare({method: reply}))
        subjects = [Subject(ours, method, lanes), Subject(bare, method, [lane.copy() for lane in lanes])]
        _repeat(subjects, plan)
        sent = sum(lane.sent * len(lane.job_ids) for lane in lanes)
        with Client(ours.address, connections=1) as client:
            replies = client.call_all("GetJob", [messages.get_request(job_id) for job_id in job_ids])
        changes = sum(messages.revision_of(reply) - 1 for reply in replies)
        return subjects[0].samples, subjects[1].samples, changes / sent


def _prepare(ours: Server, method: str, job_ids: Sequence[str], request: bytes) -> bytes:
    """Create the jobs; return our reply to `request`, which the bare server is to answer with too."""
    with Client(ours.address, connections=1) as client:
        client.call_all("CreateJob", [messages.create_request(job_id) for job_id in job_ids])
        return client.call(method, request)
