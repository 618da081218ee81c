"""The row of PostgreSQL: what it costs beside SQLite, and what two server processes bring that share it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import database, unary
from benchmarks.beside import CONNECTIONS, Samples, Subject, take_turns
from benchmarks.client import Client
from benchmarks.database import Database
from benchmarks.messages import Updates
from benchmarks.plan import Plan
from benchmarks.report import Figure, Target
from benchmarks.servers import GRPCIO, POSTGRESQL, SQLITE, TWO_WORKERS, Server, Workplace
from benchmarks.unary import BATCH, BATCH_CALLERS, JUDGED_CALLERS

ROW = "postgres"
MANY_CALLERS = 128
# A connection is one worker's for its life: with few, the workers' shares are uneven.
MANY_CONNECTIONS = 16
UPDATE = "UpdateJob"
BATCH_UPDATE = f"BatchUpdateJobs of {BATCH}"


@dataclass(slots=True)
class _Loaded:
    """The servers under one method, by column; each caller has jobs of its own."""

    method: str
    job_ids: Sequence[str]
    updates: Mapping[str, Sequence[Updates]]
    subjects: Mapping[str, Subject]

    @property
    def samples(self) -> Mapping[str, Samples]:
        return {column: subject.samples for column, subject in self.subjects.items()}


def postgres(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure updates, one a call and a hundred a call, on SQLite, on PostgreSQL, and there by two workers."""
    if GRPCIO not in workplace.sides:
        return
    job_ids = unary.numbered_jobs(MANY_CALLERS + BATCH_CALLERS * BATCH)
    single, batches = job_ids[:MANY_CALLERS], job_ids[MANY_CALLERS:]
    with database.running(workplace, 2) as store, _all_running(workplace, store, job_ids) as servers:
        one_a_call = _load(UPDATE, servers, store, [[job_id] for job_id in single])
        of_one = {column: server for column, server in servers.items() if column != TWO_WORKERS}
        lanes = [batches[start : start + BATCH] for start in range(0, len(batches), BATCH)]
        many_a_call = _load(BATCH_UPDATE, of_one, store, lanes)
        for callers in (JUDGED_CALLERS, MANY_CALLERS):
            take_turns(list(one_a_call.subjects.values()), plan, callers=(callers,), judged=callers)
        take_turns(list(many_a_call.subjects.values()), plan, callers=(BATCH_CALLERS,), judged=BATCH_CALLERS)
        changes = [_changes(loaded, servers) for loaded in (one_a_call, many_a_call)]
    yield from _of_updates(one_a_call.samples)
    yield from _of_batches(many_a_call.samples)
    yield from changes


@contextlib.contextmanager
def _all_running(workplace: Workplace, store: Database, job_ids: Sequence[str]) -> Iterator[dict[str, Server]]:
    """Run a server for each column, with these jobs, for the length of a block."""
    one, two = store.urls
    with workplace.folder() as folder, contextlib.ExitStack() as stack:

        def run(name: str, url: str, workers: int = 1) -> Server:
            log = folder / f"{name}.log"
            return stack.enter_context(workplace.ours(GRPCIO, store=url, log=log, workers=workers))

        servers = {
            SQLITE: run("sqlite", f"sqlite:///{folder}/jobs.db"),
            POSTGRESQL: run("postgresql", one),
            TWO_WORKERS: run("workers", two, workers=2),
        }
        for server in servers.values():
            with Client(server.address, connections=1) as client:
                server.api.prepare(client, job_ids)
        yield servers


def _load(method: str, servers: Mapping[str, Server], store: Database, lanes: Sequence[Sequence[str]]) -> _Loaded:
    is_batch = method == BATCH_UPDATE
    updates: dict[str, list[Updates]] = {}
    subjects: dict[str, Subject] = {}
    for column, server in servers.items():
        updates[column] = [server.api.updates(lane, batch=is_batch) for lane in lanes]
        subjects[column] = Subject(
            server,
            server.api.batch if is_batch else server.api.update,
            updates[column],
            connections=CONNECTIONS if is_batch else MANY_CONNECTIONS,
            database_cpu_seconds=store.cpu_seconds if store.process and column != SQLITE else None,
        )
    return _Loaded(method, [job_id for lane in lanes for job_id in lane], updates, subjects)


def _changes(loaded: _Loaded, servers: Mapping[str, Server]) -> Figure:
    changes = {
        column: unary.changes_per_update(servers[column], loaded.job_ids, updates)
        for column, updates in loaded.updates.items()
    }
    targets = [Target(column=column, at_least=1, at_most=1) for column in changes]
    return _figure(f"{loaded.method}, changes per update", changes, 1, targets, "changes per update on PostgreSQL")


def _of_updates(samples: Mapping[str, Samples]) -> Iterator[Figure]:
    for callers in (JUDGED_CALLERS, MANY_CALLERS):
        in_flight = f"{callers} in flight"
        judged = [Target(column=POSTGRESQL, beside=SQLITE, at_least=0.5)] if callers == JUDGED_CALLERS else []
        rates = {column: of.rates[callers] for column, of in samples.items()}
        goal = "durable UpdateJob on PostgreSQL"
        yield _figure(f"{UPDATE}, calls/s, {in_flight}", rates, 1, judged, goal)
        yield from _latencies(UPDATE, samples, callers)
        yield from _costs(UPDATE, samples, callers)
        yield from _workers(samples, callers)


def _of_batches(samples: Mapping[str, Samples]) -> Iterator[Figure]:
    rates = {column: of.rates[BATCH_CALLERS] for column, of in samples.items()}
    goal = f"{BATCH_UPDATE} on PostgreSQL, updates a second"
    target = Target(column=POSTGRESQL, at_least=8_000)
    yield _figure(f"{BATCH_UPDATE}, updates/s, {BATCH_CALLERS} in flight", rates, BATCH, [target], goal)
    yield from _latencies(BATCH_UPDATE, samples, BATCH_CALLERS)
    yield from _costs(BATCH_UPDATE, samples, BATCH_CALLERS)


def _latencies(method: str, samples: Mapping[str, Samples], callers: int) -> Iterator[Figure]:
    for quantile in (0.5, 0.99):
        values = {column: of.latencies[callers, quantile] for column, of in samples.items()}
        yield _figure(f"{method}, p{quantile * 100:.0f}, ms, {callers} in flight", values, 1e3)


def _costs(method: str, samples: Mapping[str, Samples], callers: int) -> Iterator[Figure]:
    """Tell where the time of the cores went."""
    costs = {
        "server CPU, µs a call": {column: of.server_cpu[callers] for column, of in samples.items()},
        "PostgreSQL's CPU, µs a call": {
            column: of.database_cpu[callers] for column, of in samples.items() if of.database_cpu
        },
        "load's CPU, µs a call": {column: of.load_cpu(callers) for column, of in samples.items()},
    }
    for name, values in costs.items():
        if values:
            yield _figure(f"{method}, {name}, {callers} in flight", values, 1e6)
    busy = {column: of.server_busy[callers] for column, of in samples.items()}
    yield _figure(f"{method}, server busy, % of a core, {callers} in flight", busy, 100)


def _workers(samples: Mapping[str, Samples], callers: int) -> Iterator[Figure]:
    """Compare two workers with one, and with what two cores allow."""
    one, two = samples[POSTGRESQL], samples[TWO_WORKERS]

    def figure(name: str, values: Sequence[float], *targets: Target) -> Figure:
        goal = "UpdateJob by two workers on PostgreSQL, as a multiple of one"
        return _figure(f"{UPDATE}, {name}, {callers} in flight", {TWO_WORKERS: values}, 1, targets, goal)

    rates = zip(two.rates[callers], one.rates[callers], strict=True)
    target = Target(column=TWO_WORKERS, at_least=1.5)
    yield figure("calls/s as a multiple of one worker's", [of_two / of_one for of_two, of_one in rates], target)
    if one.database_cpu:
        costs = zip(one.server_cpu[callers], one.database_cpu[callers], one.load_cpu(callers), strict=True)
        yield figure("at most, 2·S / (S + P + L)", [2 * s / (s + p + load) for s, p, load in costs])
    costs_of_two = zip(two.server_cpu[callers], one.server_cpu[callers], strict=True)
    yield figure(
        "server CPU a call as a multiple of one worker's", [of_two / of_one for of_two, of_one in costs_of_two]
    )


def _figure(
    name: str,
    values: Mapping[str, Sequence[float]],
    scale: float = 1,
    targets: Sequence[Target] = (),
    goal: str = "",
) -> Figure:
    scaled = {column: [value * scale for value in of] for column, of in values.items()}
    return Figure(row=ROW, name=name, values=scaled, targets=targets, goal=goal)
