"""The picture of BENCHMARKS.md: rate and latency against the number of callers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import Figure
from benchmarks.servers import BARE, ETCD, GRPCIO, NATIVE

COLOURS = {GRPCIO: "#1f77b4", NATIVE: "#2ca02c", ETCD: "#d62728", BARE: "#7f7f7f"}
ROWS = {"get": "GetJob, etcd: Range", "update": "UpdateJob, etcd: Put"}
KINDS = {"calls/s, ": "calls a second", "p50, ms, ": "p50, ms", "p99, ms, ": "p99, ms"}

Points = Mapping[str, Mapping[int, Sequence[float]]]


def draw(figures: Sequence[Figure], file: Path) -> bool:
    """Write the picture as SVG; return False, and write none, where the rows that it shows were not measured."""
    if not {figure.row for figure in figures} >= set(ROWS):
        return False
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "jobstatus"  # the same figures make the same file
    canvas, places = pyplot.subplots(len(ROWS), len(KINDS), figsize=(13, 7), layout="constrained")
    for line, (row, title) in zip(places, ROWS.items(), strict=True):
        for axes, (prefix, label) in zip(line, KINDS.items(), strict=True):
            points = _points(figures, row, prefix)
            for side, colour in COLOURS.items():
                if side in points:
                    callers = sorted(points[side])
                    values = [statistics.median(points[side][count]) for count in callers]
                    axes.plot(callers, values, marker="o", markersize=4, color=colour, label=side)
            axes.set_xscale("log", base=4)
            axes.set_xticks(sorted({count for of in points.values() for count in of}))
            axes.xaxis.set_major_formatter("{x:.0f}")
            if label != "calls a second":
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
            axes.set(
                title=f"{title}: {label}", xlabel="callers", ylim=None if axes.get_yscale() == "log" else (0, None)
            )
            axes.grid(alpha=0.3)
    places[0][0].legend()
    file.parent.mkdir(exist_ok=True)
    canvas.savefig(file, metadata={"Date": None})
    return True


def _points(figures: Sequence[Figure], row: str, prefix: str) -> Points:
    """Return the values of a kind by side and callers."""
    points: dict[str, dict[int, Sequence[float]]] = {}
    for figure in figures:
        if figure.row == row and figure.name.startswith(prefix) and figure.name.endswith(" in flight"):
            callers = int(figure.name.removeprefix(prefix).removesuffix(" in flight"))
            for side, values in figure.values.items():
                points.setdefault(side, {})[callers] = values
    return points
