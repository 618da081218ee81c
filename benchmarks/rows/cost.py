"""The row of what a job costs, of which benchmarks.capacity computes what a number of jobs a day costs."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from jobstatus.v1 import job_status_pb2 as pb

from benchmarks.capacity import CREATION, END, MESSAGE, READ, UPDATE, of_bytes, of_cpu
from benchmarks.load.client import Client
from benchmarks.report import Table, row
from benchmarks.rows.watching import Audience
from benchmarks.servers import OURS, Bench, Server, numbered_jobs

UPDATES_PER_JOB = 10
ROUNDS = 5
"""Of changes to watchers."""
WATCHERS_PER_JOB = 4
MESSAGES_MARK = "a change that is sent, number"


@row("cost", "What a job costs")
def cost(bench: Bench, table: Table) -> None:
    """The server's CPU time, the kernel's share included, and the growth of its SQLite file: of creating jobs, of ten
    updates of each, of reading them, of their ends, and of messages to watchers, each with 256 calls in flight. A
    change is a row of the change feed, which is kept for 24 hours.
    """
    for _ in range(bench.plan.repetitions):
        for side in bench.among(*OURS):
            with bench.folder() as folder, bench.run(side, folder) as server:
                run_jobs(server, folder, bench.plan.cost_jobs // 5, UPDATES_PER_JOB, prefix="warm-up")
                table.add(side, measure(server, folder, bench.plan.cost_jobs, UPDATES_PER_JOB))


def measure(
    server: Server, folder: Path, jobs: int, updates_per_job: int, *, prefix: str = "measured"
) -> Mapping[str, float]:
    """Return the costs of one call of each kind, in µs and in bytes, by the names in benchmarks.capacity."""
    spent = run_jobs(server, folder, jobs, updates_per_job, prefix=prefix)
    counts = {CREATION: jobs, UPDATE: jobs * updates_per_job, READ: jobs, END: jobs}
    costs = {of_cpu(kind): spent[kind][0] / count * 1e6 for kind, count in counts.items()}
    costs |= {of_bytes(kind): spent[kind][1] / count for kind, count in counts.items() if kind != READ}
    return costs | {
        of_cpu(MESSAGE): _message_cpu(server, numbered_jobs(jobs // 10, f"watched-{prefix}"), costs[of_cpu(UPDATE)])
    }


def run_jobs(
    server: Server, folder: Path, jobs: int, updates_per_job: int, *, prefix: str
) -> Mapping[str, tuple[float, float]]:
    """Create jobs, update, read and end them; return the CPU seconds and bytes of the file that each step took."""
    api, job_ids = server.api, numbered_jobs(jobs, prefix)
    with server.client(connections=api.connections) as client:
        sources = [api.updates([job_id]) for job_id in job_ids]
        updates = [source() for _ in range(updates_per_job) for source in sources]
        steps: Mapping[str, Callable[[], object]] = {
            CREATION: lambda: api.create(client, job_ids),
            UPDATE: lambda: client.call_all(api.update, updates),
            READ: lambda: client.call_all(api.read, [api.read_request(job_id) for job_id in job_ids]),
            END: lambda: _end(client, api.update, job_ids),
        }
        spent: dict[str, tuple[float, float]] = {}
        for kind, step in steps.items():
            cpu, size = server.cpu_seconds(), size_of_database(folder)
            step()
            spent[kind] = server.cpu_seconds() - cpu, size_of_database(folder) - size
        return spent


def _end(client: Client, update: str, job_ids: Sequence[str]) -> None:
    jobs = (pb.JobStatus(id=job_id, state=pb.JOB_STATE_SUCCEEDED, reason="copied 4,096 files") for job_id in job_ids)
    client.call_all(update, [pb.UpdateJobRequest(job=job, attempt=1).SerializeToString() for job in jobs])


def size_of_database(folder: Path) -> float:
    """Return the bytes of the SQLite file in use, with what is still in its write-ahead log."""
    with closing(sqlite3.connect(f"file:{folder}/jobs.db?mode=ro", uri=True)) as database:
        pages, free, page_bytes = (
            database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
    return float((pages - free) * page_bytes)


def _message_cpu(server: Server, job_ids: Sequence[str], update_cpu: float) -> float:
    """Return the CPU µs of one message to a watcher: of changes of watched jobs, less what the updates take."""
    watchers = len(job_ids) * WATCHERS_PER_JOB
    with Audience(server, job_ids, watchers) as audience:
        audience.open(watchers)
        audience.change(f"{MESSAGES_MARK} {ROUNDS}")
        before = server.cpu_seconds()
        for number in range(ROUNDS):
            audience.change(f"{MESSAGES_MARK} {number}")
        used = (server.cpu_seconds() - before) * 1e6 - ROUNDS * len(job_ids) * update_cpu
    return max(0.0, used / (ROUNDS * watchers))
