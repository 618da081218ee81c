"""Rows of unary calls: GetJob, UpdateJob and BatchUpdateJobs, each beside the bare handler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks import beside, messages
from benchmarks.beside import Samples
from benchmarks.client import NextRequest
from benchmarks.messages import Updates
from benchmarks.plan import Plan
from benchmarks.report import Figure, Target
from benchmarks.servers import Workplace

CALLERS = 64
BATCH_CALLERS = 8
BATCH = 100
EXACTLY_ONE = Target(at_least=1, at_most=1)


def get_job(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure reading: each caller the same job again and again."""
    job_ids = _job_ids(CALLERS)
    requests = [messages.get_request(job_id) for job_id in job_ids]
    lanes: list[NextRequest] = [lambda request=request: request for request in requests]  # type: ignore[misc]
    ours, bare = beside.reads_beside(workplace, plan, "GetJob", job_ids, lanes)
    yield from _figures("get", "GetJob", ours, bare, Target(of_ratio=True, at_least=0.80))


def update_job(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure durable updates, one a call: each caller is a worker whose job's progress rises with every call."""
    lanes = [Updates([job_id]) for job_id in _job_ids(CALLERS)]
    ours, bare, changes = beside.updates_beside(workplace, plan, "UpdateJob", lanes)
    yield from _figures("update", "UpdateJob", ours, bare, Target(of_ratio=True, at_least=0.55))
    yield Figure(row="update", name="changes per update", ours=[changes], target=EXACTLY_ONE)


def batch_update(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure durable updates, a hundred a call: each caller is a worker with a hundred jobs."""
    job_ids = _job_ids(BATCH_CALLERS * BATCH)
    lanes = [Updates(job_ids[start : start + BATCH], batch=True) for start in range(0, len(job_ids), BATCH)]
    ours, bare, changes = beside.updates_beside(workplace, plan, "BatchUpdateJobs", lanes)
    yield Figure(
        row="batch",
        name=f"updates/s, {BATCH} a call",
        ours=[rate * BATCH for rate in ours.rates],
        bare=[rate * BATCH for rate in bare.rates],
        target=Target(at_least=12_000),
    )
    yield from _figures("batch", "BatchUpdateJobs", ours, bare, None)
    yield Figure(row="batch", name="changes per update", ours=[changes], target=EXACTLY_ONE)


def _job_ids(count: int) -> list[str]:
    return [f"job-{number:03}" for number in range(count)]


def _figures(row: str, method: str, ours: Samples, bare: Samples, target: Target | None) -> Iterator[Figure]:
    most = max(callers for callers, _ in ours.latencies)

    def figure(
        name: str, of: Callable[[Samples], Sequence[float]], scale: float = 1, target: Target | None = None
    ) -> Figure:
        scaled = [[value * scale for value in of(samples)] for samples in (ours, bare)]
        return Figure(row=row, name=name, ours=scaled[0], bare=scaled[1], target=target)

    yield figure(f"{method} calls/s, {most} in flight", lambda samples: samples.rates, target=target)
    yield figure("server CPU, µs a call", lambda samples: samples.server_cpu, 1e6)
    yield figure("server busy, % of its core", lambda samples: samples.server_busy, 100)
    yield figure("load generator busy, % of its core", lambda samples: samples.load_busy, 100)
    for callers, quantile in sorted(ours.latencies):
        name = f"p{quantile * 100:.0f}, ms, {callers} in flight"
        yield figure(name, lambda samples, key=(callers, quantile): samples.latencies[key], 1e3)  # type: ignore[misc]
