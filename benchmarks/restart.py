"""The row of a restart, with many watches of our Python client open: how long until all go on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from benchmarks.children import Child, child
from benchmarks.client import Client
from benchmarks.plan import Plan
from benchmarks.report import Figure, Target
from benchmarks.servers import GRPCIO, NATIVE, Workplace, free_port

PROCESSES = 4
JOB = "followed"


@dataclass(slots=True)
class Restarts:
    """What happened on one transport; times in seconds, a value per restart."""

    listening: list[float] = field(default_factory=list)
    """From SIGTERM until the new process listens."""
    back: list[float] = field(default_factory=list)
    """From SIGTERM until every watch has told of a change made after it."""
    cuts: Counter[str] = field(default_factory=Counter)
    """How often a watch was cut, or refused, in all restarts."""


def restart(workplace: Workplace, plan: Plan) -> Iterator[Figure]:
    """Restart our server several times under the same watches."""
    of_side = {side: _restarts(workplace, plan, side) for side in workplace.among(GRPCIO, NATIVE)}
    yield Figure(
        row="restart",
        name="SIGTERM until every watch has a change made after it, s",
        values={side: of.back for side, of in of_side.items()},
        targets=[Target(column=GRPCIO, at_most=30), Target(column=NATIVE, at_most=15)],
        goal=f"restart with {plan.followers:,} watchers reconnecting through the client, all back, s",
    )
    yield Figure(
        row="restart",
        name="watches refused, RESOURCE_EXHAUSTED, in all restarts",
        values={side: [of.cuts["refused"]] for side, of in of_side.items()},
        targets=[Target(column=side, at_least=0, at_most=0) for side in of_side],
        goal="refusals in those restarts",
    )
    yield Figure(
        row="restart",
        name="SIGTERM until the new process listens, s",
        values={side: of.listening for side, of in of_side.items()},
    )
    yield Figure(
        row="restart",
        name="watches cut, and tries that failed while nobody listened, in all restarts",
        values={side: [of.cuts["cut"]] for side, of in of_side.items()},
    )


def _restarts(workplace: Workplace, plan: Plan, side: str) -> Restarts:
    restarts = Restarts()
    with workplace.folder() as folder, ExitStack() as resources, ExitStack() as running:
        serve = partial(
            workplace.ours,
            side,
            store=f"sqlite:///{folder}/jobs.db",
            log=folder / "log",
            listen=f"127.0.0.1:{free_port()}",
        )
        server = running.enter_context(serve())
        with Client(server.address, connections=1) as client:
            server.api.prepare(client, [JOB])
        watches = plan.followers // PROCESSES
        followers = [
            resources.enter_context(child("followers", server.address, JOB, watches)) for _ in range(PROCESSES)
        ]
        _wait_for(followers, 1)
        for number in range(plan.repetitions):
            stopped_at = time.perf_counter()
            running.close()
            server = running.enter_context(serve())
            restarts.listening.append(time.perf_counter() - stopped_at)
            with Client(server.address, connections=1) as client:
                client.call(server.api.update, server.api.marked_request(JOB, f"restart {number}"))
            _wait_for(followers, number + 2)
            restarts.back.append(time.perf_counter() - stopped_at)
        for each in followers:
            restarts.cuts.update(each.finish())
    return restarts


def _wait_for(followers: Sequence[Child], revision: int) -> None:
    for each in followers:
        each.wait_for(f"all {revision}")
