"""The row of stores with ten thousand to a million jobs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

from benchmarks import growing, many_jobs
from benchmarks.beside import CONNECTIONS
from benchmarks.client import Client, path
from benchmarks.growing import Found, Stock
from benchmarks.load import Load
from benchmarks.many_jobs import RandomJobs
from benchmarks.plan import Plan
from benchmarks.report import Figure, Target, at_quantile
from benchmarks.servers import Workplace

CALLERS = 64
LONE_CALLS = 200
PAGES = 20
# Silent jobs are stalled after a second, and the sweeper finds them within another.
SETTLE_SECONDS = 3.0
SLOWEST = 2.0
"""In seconds for a start-up, as a multiple of the smallest store's for all else."""


def jobs(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Measure stores of several sizes in turns."""
    found = Found("jobs")
    with ExitStack() as folders:
        stocks = [Stock(size, folders.enter_context(workplace.folder())) for size in plan.jobs]
        for stock in stocks:
            _fill(workplace, stock, found)
        for _ in range(plan.repetitions):
            for stock in stocks:
                growing.started(workplace, stock, found, "start-up, s")
        _ask(workplace, stocks, plan, found)
        for stock in stocks:
            growing.started(workplace, stock, found, "start-up after kill -9, s")
    yield from found.figures("jobs", _target)


def _target(name: str, largest: str, smallest: str) -> Target | None:
    if name.startswith("start-up"):
        return Target(column=largest, at_most=SLOWEST)
    if largest == smallest or "p99" in name or not name.startswith(("GetJob", "UpdateJob", "filtered page")):
        return None
    if "calls/s" in name:
        return Target(column=largest, beside=smallest, at_least=1 / SLOWEST)
    return Target(column=largest, beside=smallest, at_most=SLOWEST)


def _fill(workplace: Workplace, stock: Stock, found: Found) -> None:
    with stock.filling(workplace) as server, Client(server.address, connections=CONNECTIONS) as client:
        began = time.perf_counter()
        many_jobs.make(client, stock.size)
        found.note("made with BatchUpdateJobs, jobs/s", stock.size, stock.size / (time.perf_counter() - began))
        client.run_for(SETTLE_SECONDS)
    found.note("file, bytes a job", stock.size, stock.file_bytes() / stock.size)


def _ask(workplace: Workplace, stocks: Sequence[Stock], plan: Plan, found: Found) -> None:
    """Ask all in turns; in the end the servers are killed."""
    with ExitStack() as running:
        servers = [running.enter_context(stock.serving(workplace)) for stock in stocks]
        clients = {
            stock: running.enter_context(Client(server.address, connections=CONNECTIONS))
            for stock, server in zip(stocks, servers, strict=True)
        }
        at_random = {stock: RandomJobs(stock.size) for stock in stocks}
        pages = {stock: many_jobs.pages(client, stock.size) for stock, client in clients.items()}
        for _ in range(plan.repetitions):
            for stock, client in clients.items():
                _calls(client, at_random[stock], stock.size, plan, found)
            _pages(clients, pages, found)
        for stock, server in zip(stocks, servers, strict=True):
            found.note("memory in the end, MB", stock.size, server.memory_bytes() / 1e6)
            server.process.kill()


def _calls(client: Client, of: RandomJobs, size: int, plan: Plan, found: Found) -> None:
    for method, next_request in (("GetJob", of.get), ("UpdateJob", of.update)):
        taken = growing.latencies(client, path(method), [next_request() for _ in range(LONE_CALLS)])
        growing.note_quantiles(found, size, method, taken)
        load = Load(client, path(method), [next_request] * CALLERS)
        load.start()
        began = time.perf_counter()
        calls = len(load.measure(plan.seconds / 2).latencies)
        found.note(f"{method}, calls/s, {CALLERS} in flight", size, calls / (time.perf_counter() - began))
        load.stop()


def _pages(clients: Mapping[Stock, Client], pages: Mapping[Stock, Mapping[str, bytes]], found: Found) -> None:
    """Read the first page of each filter, the stores taking turns."""
    for name in next(iter(pages.values())):
        for stock, client in clients.items():
            taken = growing.latencies(client, path("ListJobs"), [pages[stock][name]] * PAGES)
            found.note(f"filtered page, {name}, p50, ms", stock.size, at_quantile(taken, 0.5))
