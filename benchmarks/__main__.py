"""`python -m benchmarks`: measure, and print one table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import machine, unary, watching
from benchmarks.plan import Plan
from benchmarks.report import Figure, table
from benchmarks.servers import Workplace

ROWS: dict[str, Callable[[Workplace, Plan], Iterator[Figure]]] = {
    "get": unary.get_job,
    "update": unary.update_job,
    "batch": unary.batch_update,
    "fanout": watching.fan_out,
    "idle": watching.idle,
    "finish": watching.finish,
}


def main() -> None:
    """Run what the command line asks for. A missed target is marked, and is no failure."""
    options = _options()
    cores = machine.choose_cores()
    machine.pin(cores.load)
    about = [*machine.describe(options.directory), cores.describe]
    plan = Plan(repetitions=options.repetitions, seconds=options.duration)
    figures: list[Figure] = []
    for name in options.only or ROWS:
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        figures.extend(ROWS[name](Workplace(cores, options.directory, options.store), plan))
    print("\n".join([*about, "", table(figures), ""]))
    missed = sum(figure.is_missed for figure in figures)
    print(f"targets missed: {missed}" if missed else "every target reached")
    if options.json:
        document = {"about": about, "figures": [figure.as_json() for figure in figures]}
        options.json.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=ROWS, help="a row; may be repeated (all)")
    parser.add_argument("--repetitions", type=int, default=3, help="medians are of so many (%(default)s)")
    parser.add_argument("--duration", type=float, default=5.0, metavar="SECONDS", help="of each load (%(default)s)")
    parser.add_argument("--directory", type=Path, default=Path(), help="where the databases go, briefly (here)")
    parser.add_argument(
        "--store", metavar="URL", help="what our server keeps its jobs in (a new SQLite file each time)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures, with every repetition")
    return parser.parse_args()


if __name__ == "__main__":
    main()
