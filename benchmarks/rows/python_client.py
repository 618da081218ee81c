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

from benchmarks.load.client import Client
from benchmarks.report import EACH, Table, Target, row
from benchmarks.servers import GRPCIO, NATIVE, OURS, Bench, free_port

JOB = "followed"
FOLLOWERS = 4
REPORTING_JOBS = 1_000
REPORTING_SECONDS = 5.0
MAX_CALLS_PER_SECOND = 20
"""The reporter sends a batch every 50 ms at most."""
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
    """Watches of our Python client in 4 processes that share the core of the load. The server is stopped with SIGTERM,
    drains, and is started again on the same port and store.
    """
    cut = "watches cut, and attempts that failed while no process listened, in all restarts"
    address, watches = f"127.0.0.1:{free_port()}", bench.plan.followers // FOLLOWERS
    for side in bench.among(*OURS):
        with bench.folder() as folder, ExitStack() as programs, ExitStack() as serving:
            server = serving.enter_context(bench.run(side, folder, "--listen", address))
            server.create([JOB])
            followers = [programs.enter_context(_start("follow", address, JOB, watches)) for _ in range(FOLLOWERS)]
            _wait_for(followers, "all 1\n")
            for number in range(bench.plan.repetitions):
                stopped_at = time.perf_counter()
                serving.close()
                serving.enter_context(bench.run(side, folder, "--listen", address))
                listening_at = time.perf_counter()
                with Client(address) as client:
                    client.call(server.api.update, server.api.marked_request(JOB, f"restart {number}"))
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
    """GetJob with a deadline, in turns of a quarter of a second, from one process on the core of the load. The client
    returns a dataclass and retries; the stub returns a message.
    """
    with bench.run_all(bench.among(*OURS), [JOB]) as servers:
        for _ in range(bench.plan.repetitions):
            for side, server in servers.items():
                with _start("call", server.address, JOB, bench.plan.seconds / 2) as process:
                    table.add(side, _result(process))
    for kind in [name.removesuffix(": client by stub") for name in table if name.endswith(": client by stub")]:
        goal = f"Python client's call by the raw stub's rate, {kind}"
        table.expect(f"{kind}: client by stub", goal, Target(GRPCIO, "≥", 0.9))


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
