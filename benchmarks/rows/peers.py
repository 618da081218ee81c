"""The row of what a team would otherwise use; see benchmarks.peers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

from benchmarks.peers import postgresql
from benchmarks.report import Table, row
from benchmarks.rows.calls import ALONE, CALL_CPU, CALLERS, JOBS, SPEED, reading, record_changes, take_turns, updating
from benchmarks.servers import CELERY, ETCD, NATS, OURS, POSTGRES, REDIS, Bench, numbered_jobs

UPDATE, READ = "update: ", "read: "


@row("peers", "What a team would otherwise use")
def peers(bench: Bench, table: Table) -> None:
    """Updates and reads of 256 jobs by a lone caller and by 64, with the setting with which an acknowledged update is
    durable. NATS: a key of a KV bucket, with `sync_interval: always`. Redis: HSET, HINCRBY and PUBLISH in a MULTI, with
    `appendfsync always`. PostgreSQL: UPDATE and pg_notify in one prepared statement, a connection for each caller.
    Celery: store_result and AsyncResult on the same PostgreSQL, with a pool of connections; its callers are forked
    processes with threads, measured after the others, and the library is most of what a call costs. How watchers
    receive a change is measured in the row `change`.
    """
    job_ids, cost = numbered_jobs(JOBS), (CALL_CPU, CALLERS)
    figures = [(kind, callers) for kind in SPEED for callers in (ALONE, CALLERS)]
    brief = replace(bench.plan, seconds=bench.plan.seconds / 2)
    with bench.run_all(bench.among(*OURS, ETCD, NATS, REDIS, POSTGRES), job_ids) as servers:
        updates = {side: updating(server, [[job_id] for job_id in job_ids]) for side, server in servers.items()}
        take_turns(bench.plan, table, updates, [*figures, cost], UPDATE)
        reads = {side: reading(server, job_ids) for side, server in servers.items()}
        take_turns(brief, table, reads, [*figures, cost], READ)
        record_changes(table, updates, "changes per update", "changes per update of every system")
    if bench.among(CELERY):
        with bench.folder() as folder, postgresql.run(bench, folder) as server:
            for _ in range(bench.plan.repetitions):
                for callers in (ALONE, CALLERS):
                    table.add(CELERY, celery_figures(server.address, callers, brief.seconds))


def celery_figures(address: str, callers: int, seconds: float, *, jobs: int = JOBS) -> dict[str, float]:
    """Run benchmarks.peers.celery on the database at `address`, and return its figures."""
    arguments = f"postgresql://{address}", jobs, callers, seconds
    command = [sys.executable, "-m", "benchmarks.peers.celery", *map(str, arguments)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    figures: dict[str, float] = json.loads(printed.splitlines()[-1])
    return figures
