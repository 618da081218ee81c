"""What the rows of growth share: a store's file, figures by size, and questions to servers in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.client import Client
from benchmarks.report import Figure, Target, at_quantile, growth
from benchmarks.servers import GRPCIO, NATIVE, Server, Workplace

MakeTarget = Callable[[str, str, str], "Target | None"]
"""Makes the target of a figure, from its name, the largest column and the smallest."""


@dataclass(slots=True)
class Found:
    """What was measured, by its name and the size of the store; a value per repetition."""

    row: str
    values: dict[str, dict[int, list[float]]] = field(default_factory=dict)

    def note(self, name: str, size: int, value: float) -> None:
        """Add a value."""
        self.values.setdefault(name, {}).setdefault(size, []).append(value)

    def figures(self, unit: str, target_of: MakeTarget | None = None) -> Iterator[Figure]:
        """Return a line for each name, whose first words are its goal; `unit` is what there are so many of."""
        for name, sizes in self.values.items():
            columns = [f"{size:,}" for size in sizes]
            target = target_of(name, columns[-1], columns[0]) if target_of else None
            yield Figure(
                row=self.row,
                name=name,
                values=dict(zip(columns, sizes.values(), strict=True)),
                targets=[target] if target else [],
                goal=f"{columns[-1]} {unit}: {name.partition(',')[0]}",
                note="" if "p99" in name else growth(sizes),
            )


@dataclass(frozen=True, slots=True)
class Stock:
    """A store's file, in a folder of its own."""

    size: int
    folder: Path

    def serving(self, workplace: Workplace, side: str = GRPCIO) -> AbstractContextManager[Server]:
        """Return what serves it for the length of a block."""
        return workplace.ours(side, store=f"sqlite:///{self.folder}/jobs.db", log=self.folder / "log")

    def filling(self, workplace: Workplace) -> AbstractContextManager[Server]:
        """Return what serves it on the faster transport, if that is among those measured."""
        return self.serving(workplace, NATIVE if NATIVE in workplace.sides else GRPCIO)

    def file_bytes(self) -> int:
        """Return how much it takes on the disk."""
        return sum(file.stat().st_size for file in self.folder.glob("jobs.db*"))


def started(workplace: Workplace, stock: Stock, found: Found, name: str) -> None:
    """Start our server on a store, note how long that took, and end it."""
    began = time.perf_counter()
    with stock.serving(workplace) as server:
        found.note(name, stock.size, time.perf_counter() - began)
        found.note("memory after start-up, MB", stock.size, server.memory_bytes() / 1e6)


def latencies(client: Client, method: str, requests: Sequence[bytes]) -> list[float]:
    """Call with one request after the other; return how long each took, in milliseconds."""
    taken: list[float] = []
    for request in requests:
        began = time.perf_counter()
        client.call(method, request)
        taken.append((time.perf_counter() - began) * 1e3)
    return taken


def note_quantiles(found: Found, size: int, name: str, values: Sequence[float]) -> None:
    """Note the median and the ninety-ninth of a hundred."""
    for quantile, word in ((0.5, "p50"), (0.99, "p99")):
        found.note(f"{name}, {word}, ms", size, at_quantile(values, quantile))
