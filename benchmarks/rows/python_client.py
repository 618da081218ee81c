"""Rows of our Python client, in processes on the load's core: restart under watches, cost of a call, many reports."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks.report import EACH, Table, Target, row
from benchmarks.rows.calls import JOBS
from benchmarks.servers import GRPCIO, NATIVE, OURS, Bench, free_port, numbered_jobs

FOLLOWERS = 4
REPORTING_JOBS = 1_000
REPORTING_SECONDS = 2.0
MAX_CALLS_PER_SECOND = 21
"""The reporter sends a batch every 50 ms at most, and one at the end."""
BACK = "SIGTERM until every watch has a change made after it, s"
REFUSED = "watches refused, RESOURCE_EXHAUSTED, in all restarts"


def _start(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a program of benchmarks.client_programs."""
    command = [sys.executable, "-m", "benchmarks.client_programs", program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _result(process: subprocess.Popen[str]) -> Any:
    """Close the program's stdin; return its result."""
    printed, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a client program ended with exit code {process.returncode}")
    return json.loads(printed.splitlines()[-1])


@row("restart", "Restart under watches")
def restart(bench: Bench, table: Table) -> None:
    """Watches of 256 jobs with our Python client, in 4 processes that share the core of the load. The server is stopped
    with SIGTERM, drains, and is started again on the same port and store.
    """
    cut = "watches cut, and attempts that failed while no process listened, in all restarts"
    address, watches, job_ids = f"127.0.0.1:{free_port()}", bench.plan.followers // FOLLOWERS, numbered_jobs(JOBS)
    for side in bench.among(*OURS):
        with bench.folder() as folder, ExitStack() as programs, ExitStack() as serving:
            server = serving.enter_context(bench.run(side, folder, "--listen", address))
            server.create(job_ids)
            followers = [programs.enter_context(_start("follow", address, JOBS, watches)) for _ in range(FOLLOWERS)]
            _wait_for(followers, "all 1\n")
            for number in range(bench.plan.repetitions):
                stopped_at = time.perf_counter()
                serving.close()
                server = serving.enter_context(bench.run(side, folder, "--listen", address))
                listening_at = time.perf_counter()
                updates = [server.api.marked_request(job_id, f"restart {number}") for job_id in job_ids]
                with server.client() as client:
                    client.call_all(server.api.update, updates)
                _wait_for(followers, f"all {number + 2}\n")
                table.add(side, {BACK: time.perf_counter() - stopped_at})
                table.add(side, {"SIGTERM until the new process listens, s": listening_at - stopped_at})
            ends = sum((Counter(_result(follower)) for follower in followers), Counter[str]())
        table.add(side, {REFUSED: ends["refused"], cut: ends["cut"]})
    goal = f"restart with {bench.plan.followers:,} watchers reconnecting through the client, all back, s"
    table.expect(BACK, goal, Target(GRPCIO, "≤", 30), Target(NATIVE, "≤", 15))
    table.expect(REFUSED, "refusals in those restarts", Target(EACH, "=", 0))


def _wait_for(followers: Sequence[subprocess.Popen[str]], line: str) -> None:
    for follower in followers:
        if line not in (follower.stdout or ()):
            raise RuntimeError(f"a client program ended before it printed {line!r}")


@row("client", "The Python client beside the raw stub")
def client(bench: Bench, table: Table) -> None:
    """GetJob of 256 jobs with a deadline, in turns of a quarter of a second, from one process on the core of the load.
    The client returns a dataclass and retries; the stub returns a message.
    """
    with bench.run_all(bench.among(*OURS), numbered_jobs(JOBS)) as servers:
        for _ in range(bench.plan.repetitions):
            for side, server in servers.items():
                with _start("call", server.address, JOBS, bench.plan.seconds / 2) as process:
                    table.add(side, _result(process))
    for kind in [name.removesuffix(": client by stub") for name in table if name.endswith(": client by stub")]:
        goal = f"Python client's call by the raw stub's rate, {kind}"
        targets = [Target(side, "≥", 0.93) for side in OURS] if "thread" in kind else [Target(GRPCIO, "≥", 0.9)]
        table.expect(f"{kind}: client by stub", goal, *targets)


@row("reporter", "A worker with a thousand jobs")
def reporter(bench: Bench, table: Table) -> None:
    """A process whose jobs report progress 10 times a second each, through `reporter()` of the sync client."""
    for _ in range(bench.plan.repetitions):
        for side in bench.among(*OURS):
            metrics = f"127.0.0.1:{free_port()}"
            with bench.folder() as folder, bench.run(side, folder, "--metrics", metrics) as server:
                arguments = server.address, metrics, server.process.pid, REPORTING_JOBS, REPORTING_SECONDS
                with _start("report", *arguments) as process:
                    table.add(side, _result(process))
    goal = f"reporter() of {REPORTING_JOBS:,} jobs, "
    table.expect("calls/s", f"{goal}calls/s", Target(EACH, "≤", MAX_CALLS_PER_SECOND))
    table.expect("failed updates", f"{goal}failed updates", Target(EACH, "=", 0))
