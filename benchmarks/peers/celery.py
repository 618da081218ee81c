"""Celery's result backend on PostgreSQL: `python -m benchmarks.peers.celery URL JOBS CALLERS SECONDS`.

Callers are threads of a few forked processes, as Celery's workers are, on the load's core: Celery is a library, and has
no server of its own. The last line printed is the figures as JSON: of store_result, and of reading an AsyncResult.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count, cycle, repeat
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.peers import Guarantees
from benchmarks.report import at_quantile

GUARANTEES = Guarantees("yes", "none: you poll", "no", "only SUCCESS")
PACKAGES = ("celery", "sqlalchemy", "psycopg")
PROCESSES = 8


def requirement() -> str:
    missing = [package for package in PACKAGES if not importlib.util.find_spec(package)]
    return f"{', '.join(missing)} missing: pip install --group bench" if missing else ""


def main(url: str, jobs: str, callers: str, seconds: str) -> None:
    """Update and read this number of jobs with this number of callers, each for `seconds`."""
    from celery import Celery
    from celery.result import AsyncResult

    app = Celery("benchmark", backend=url.replace("postgresql://", "db+postgresql+psycopg://"))
    app.conf.database_engine_options = {"pool_size": int(callers)}
    app.conf.result_backend_thread_safe = True  # one pool for all threads
    job_ids, numbers = [f"job-{number:03}" for number in range(int(jobs))], count()

    def update(job_id: str) -> None:
        meta = {"name": "nightly-backup", "reason": "copying /srv/data", "progress": 10 + next(numbers) * 0.0001}
        app.backend.store_result(job_id, meta, "PROGRESS")

    def read(job_id: str) -> Any:
        return AsyncResult(job_id, app=app).info["progress"]

    figures = _figures("update", update, job_ids, int(callers), float(seconds))
    print(json.dumps(figures | _figures("read", read, job_ids, int(callers), float(seconds))))


def _figures(
    name: str, call: Callable[[str], object], job_ids: list[str], callers: int, seconds: float
) -> dict[str, float]:
    """Call once for each job, which creates it and connects; then measure."""
    processes = min(callers, PROCESSES)
    fork, latencies = multiprocessing.get_context("fork"), list[float]()
    barrier, pipes = fork.Barrier(processes), [fork.Pipe() for _ in range(processes)]

    def one_caller(caller: int, ends_at: float) -> list[float]:
        own: list[float] = []
        for job_id in cycle(job_ids[caller::callers]):
            started = time.perf_counter()
            call(job_id)
            ended = time.perf_counter()
            if ended > ends_at and own:
                break
            own.append(ended - started)
        return own

    def one_process(number: int, pipe: Connection) -> None:
        own = range(number, callers, processes)
        with ThreadPoolExecutor(len(own)) as threads:
            list(threads.map(call, (job_id for caller in own for job_id in job_ids[caller::callers])))
            barrier.wait()
            ends_at = time.perf_counter() + seconds
            pipe.send([each for taken in threads.map(one_caller, own, repeat(ends_at)) for each in taken])

    for number, (_, theirs) in enumerate(pipes):
        fork.Process(target=one_process, args=(number, theirs)).start()
    for ours, _ in pipes:
        latencies += ours.recv()
    figures = {"calls/s": len(latencies) / seconds}
    for kind, quantile in (("p50, ms", 0.5), ("p99, ms", 0.99), ("p99.9, ms", 0.999)):
        figures[kind] = at_quantile(latencies, quantile) * 1e3
    return {f"{name}: {kind}, {callers} in flight": value for kind, value in figures.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
