"""Rows of unary calls: reading a job, changing it, changing a hundred at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.beside import Samples, Subject, all_running, take_turns
from benchmarks.client import Client
from benchmarks.load import NextRequest
from benchmarks.messages import Updates
from benchmarks.plan import Plan
from benchmarks.report import Figure, Target
from benchmarks.servers import BARE, BARE_NATIVE, ETCD, GRPCIO, NATIVE, SIDES, Server, Workplace

JUDGED_CALLERS = 64
BATCH_CALLERS = 8
BATCH = 100


def get_job(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure reading: each caller the same job again and again."""
    job_ids = numbered_jobs(max(plan.callers))
    with all_running(workplace, workplace.among(*SIDES), job_ids) as servers:
        subjects = [
            Subject(server, server.api.read, [_repeat(server.api.read_request(job_id)) for job_id in job_ids])
            for server in servers
        ]
        take_turns(subjects, plan, callers=plan.callers, judged=JUDGED_CALLERS)
    samples = {server.name: subject.samples for server, subject in zip(servers, subjects, strict=True)}
    targets = [Target(column=GRPCIO, beside=BARE, at_least=0.90), Target(column=NATIVE, beside=ETCD, at_least=1.1)]
    yield from _figures("get", samples, targets, "GetJob")


def update_job(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure durable updates, one a call: each caller is a worker whose job's progress rises with every call."""
    lanes = [[job_id] for job_id in numbered_jobs(max(plan.callers))]
    samples, changes = _updates(workplace, plan, lanes, callers=plan.callers, judged=JUDGED_CALLERS)
    targets = [Target(column=GRPCIO, beside=BARE, at_least=0.65), Target(column=NATIVE, beside=ETCD, at_least=1.5)]
    yield from _figures("update", samples, targets, "durable UpdateJob, every one a change")
    yield _every_one_a_change("update", changes)


def batch_update(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure durable updates, a hundred a call: each caller is a worker with a hundred jobs."""
    job_ids = numbered_jobs(BATCH_CALLERS * BATCH)
    lanes = [job_ids[start : start + BATCH] for start in range(0, len(job_ids), BATCH)]
    samples, changes = _updates(workplace, plan, lanes, callers=(BATCH_CALLERS,), judged=BATCH_CALLERS)
    yield Figure(
        row="batch",
        name=f"updates/s, {BATCH} a call",
        values={side: [rate * BATCH for rate in of.rates[BATCH_CALLERS]] for side, of in samples.items()},
        targets=[Target(column=GRPCIO, at_least=15_000), Target(column=NATIVE, at_least=20_000)],
        goal=f"BatchUpdateJobs of {BATCH}, updates a second",
    )
    yield from _figures("batch", samples, (), "")
    yield _every_one_a_change("batch", changes)


def _updates(
    workplace: Workplace, plan: Plan, lanes: Sequence[Sequence[str]], *, callers: Sequence[int], judged: int
) -> tuple[Mapping[str, Samples], Mapping[str, list[float]]]:
    """Measure updates, of several jobs a call if a lane has several; return also the changes made of each update."""
    job_ids = [job_id for lane in lanes for job_id in lane]
    is_batch = len(lanes[0]) > 1
    sides = workplace.among(GRPCIO, NATIVE, BARE, BARE_NATIVE) if is_batch else workplace.among(*SIDES)
    with all_running(workplace, sides, job_ids) as servers:
        subjects: list[Subject] = []
        updates: list[list[Updates]] = []
        for server in servers:
            updates.append([server.api.updates(lane, batch=is_batch) for lane in lanes])
            subjects.append(Subject(server, server.api.batch if is_batch else server.api.update, updates[-1]))
        take_turns(subjects, plan, callers=callers, judged=judged)
        changes = {
            server.name: changes_per_update(server, job_ids, of_server)
            for server, of_server in zip(servers, updates, strict=True)
        }
    return {server.name: subject.samples for server, subject in zip(servers, subjects, strict=True)}, changes


def changes_per_update(server: Server, job_ids: Sequence[str], updates: Sequence[Updates]) -> list[float]:
    """Return how many changes the jobs have seen for each update that was sent; nothing where the server cannot say."""
    with Client(server.address, connections=1) as client:
        changes = server.api.changes_of(client, job_ids)
    sent = sum(each.sent * len(each.job_ids) for each in updates)
    return [] if changes is None else [changes / sent]


def _every_one_a_change(row: str, changes: Mapping[str, list[float]]) -> Figure:
    values = {side: each for side, each in changes.items() if each}
    targets = [Target(column=side, at_least=1, at_most=1) for side in values]
    return Figure(row=row, name="changes per update", values=values, targets=targets, goal=f"changes per {row}")


def numbered_jobs(count: int) -> list[str]:
    """Return so many ids."""
    return [f"job-{number:03}" for number in range(count)]


def _repeat(request: bytes) -> NextRequest:
    return lambda: request


def _figures(row: str, samples: Mapping[str, Samples], targets: Sequence[Target], goal: str) -> Iterator[Figure]:
    def figure(name: str, values: Mapping[str, Sequence[float]], scale: float = 1, judged: bool = False) -> Figure:
        scaled = {side: [value * scale for value in of_side] for side, of_side in values.items()}
        return Figure(row=row, name=name, values=scaled, targets=targets if judged else (), goal=goal)

    counts = sorted(next(iter(samples.values())).rates)
    judged = JUDGED_CALLERS if JUDGED_CALLERS in counts else counts[-1]
    for count in counts:
        rates = {side: of.rates[count] for side, of in samples.items()}
        yield figure(f"calls/s, {count} in flight", rates, judged=count == judged)
    for quantile in (0.5, 0.99):
        for count in counts:
            latencies = {side: of.latencies[count, quantile] for side, of in samples.items()}
            yield figure(f"p{quantile * 100:.0f}, ms, {count} in flight", latencies, 1e3)
    in_flight = f"{judged} in flight"
    yield figure(f"server CPU, µs a call, {in_flight}", {s: of.server_cpu[judged] for s, of in samples.items()}, 1e6)
    yield figure(
        f"server busy, % of its core, {in_flight}", {s: of.server_busy[judged] for s, of in samples.items()}, 100
    )
    yield figure(f"load's own capacity, calls/s, {in_flight}", {s: of.capacity(judged) for s, of in samples.items()})
    yield figure(f"load busy, % of its core, {in_flight}", {s: of.load_busy[judged] for s, of in samples.items()}, 100)
