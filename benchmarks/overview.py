"""What BENCHMARKS.md begins with: the systems, four figures of each, and what each guarantees."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.peers import ETCD_GUARANTEES, OUR_GUARANTEES, Guarantees
from benchmarks.report import Figure, number
from benchmarks.servers import CELERY, ETCD, GRPCIO, NATIVE, NATS, OURS, PEERS, POSTGRES, REDIS

SYSTEMS: Mapping[str, str] = {
    NATIVE: "this service, native",
    GRPCIO: "this service, grpcio",
    ETCD: "etcd",
    NATS: "NATS JetStream KV",
    REDIS: "Redis",
    POSTGRES: "PostgreSQL alone",
    CELERY: "Celery on PostgreSQL",
}
"""The names that the reader sees, by side, in the order of the picture and the table."""


class Question(NamedTuple):
    """A figure that decides."""

    title: str
    row: str
    figure: str
    is_rate: bool


QUESTIONS = (
    Question("one durable update, p50, ms", "peers", "update: p50, ms, 1 in flight", False),
    Question("durable updates a second, 64 in flight", "peers", "update: calls/s, 64 in flight", True),
    Question("reads a second, 64 in flight", "peers", "read: calls/s, 64 in flight", True),
    Question("one change to 1,000 watchers, p99, ms", "change", "until a watcher has it, p99, ms", False),
)
PROMISES = Guarantees("durable before acknowledged", "watch misses nothing", "replaced worker is fenced", "end stays")


def answers(figures: Iterable[Figure]) -> dict[str, list[float | None]]:
    """Return the figures of each system that was measured, in the order of QUESTIONS; None: not measured."""
    found = {(figure.row, figure.name): figure for figure in figures}
    asked = [found.get((question.row, question.figure)) for question in QUESTIONS]
    of_systems = {side: [figure.value(side) if figure else None for figure in asked] for side in SYSTEMS}
    return {side: values for side, values in of_systems.items() if any(values)}


def guarantees(side: str) -> Guarantees:
    """Return what a system guarantees."""
    if side in OURS:
        return OUR_GUARANTEES
    promised: Guarantees = importlib.import_module(PEERS[side]).GUARANTEES if side in PEERS else ETCD_GUARANTEES
    return promised


def lines(figures: Sequence[Figure]) -> list[list[str]]:
    """Return the lines of the table, its head first."""
    head = ["", *(question.title for question in QUESTIONS), *PROMISES]
    rows = [
        [SYSTEMS[side], *(number(value) or "–" for value in values), *guarantees(side)]
        for side, values in answers(figures).items()
    ]
    return [head, *rows]
