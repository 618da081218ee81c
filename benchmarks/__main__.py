"""`python -m benchmarks`: measure and print the tables; without --only, also write benchmarks/results.json.

BENCHMARKS.md, its picture and docs/capacity.md are made of that file; `--render` only makes them again.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

from benchmarks import document
from benchmarks.document import NOT_MEASURED, RESULTS
from benchmarks.report import Figure
from benchmarks.results import Results
from benchmarks.rows import ROWS
from benchmarks.servers import ALL_SIDES, SMALL, Bench, CannotMeasureError, Cores, Plan, missing

CHECKOUT = Path()


def main() -> None:
    """Measure as the command line says. A missed target is marked and is no failure; a failing row stops no other."""
    options = _options()
    if options.render:
        kept = Results.read(CHECKOUT) or sys.exit(f"{RESULTS} is missing: run make bench")
        kept.write(CHECKOUT)
        return
    plan = SMALL if options.small else Plan()
    plan = replace(plan, repetitions=options.repetitions or plan.repetitions, seconds=options.duration or plan.seconds)
    left_out = {side: reason for side in ALL_SIDES if (reason := missing(side))}
    sides = [side for side in options.sides or ALL_SIDES if side not in left_out]
    bench = Bench(Cores.choose(), options.directory, plan, options.store, sides)
    bench.cores.pin(bench.cores.load)
    about = [*document.describe_machine(options.directory), str(bench.cores), f"{plan.repetitions} repetitions"]
    about += [f"left out: {side}, because {reason}" for side, reason in left_out.items()]
    kept = Results.read(CHECKOUT) or Results()
    started = time.monotonic()
    figures: list[Figure] = []
    failed: list[str] = []
    for name in options.only or (name for name, row in ROWS.items() if not row.is_apart):
        print(f"{time.monotonic() - started:5.0f} s: measuring {name} …", file=sys.stderr, flush=True)
        try:
            of_row = ROWS[name].measure(bench)
        except Exception as error:
            failed.append(name)
            is_known = isinstance(error, CannotMeasureError)
            print(f"cannot measure {name}: {error if is_known else traceback.format_exc()}", file=sys.stderr)
            continue
        print(f"{ROWS[name].title}\n\n{document.tables(of_row)}\n", flush=True)
        figures += of_row
    about.append(f"it took {(time.monotonic() - started) / 60:.0f} minutes")
    about += map(NOT_MEASURED.format, failed)
    missed = sum(verdict.badness > 1 for figure in figures for verdict in figure.verdicts())
    print("\n".join([*about, f"targets missed: {missed}" if missed else "every target reached"]))
    if options.only:
        found = Results(kept.about or about, kept.figures)
        found.replace([name for name in options.only if name not in failed], figures)
    else:
        found = Results(about, figures)
        found.keep_apart(kept)
    if options.write or not (options.only or options.sides or options.store or options.small):
        found.write(CHECKOUT)
    if options.json:
        options.json.write_text(Results(about, figures).as_json())
    sys.exit(1 if failed else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    apart = ", ".join(name for name, row in ROWS.items() if row.is_apart)
    parser.add_argument("--only", action="append", choices=ROWS, help=f"a row; may be repeated (all but {apart})")
    parser.add_argument("--sides", action="append", choices=ALL_SIDES, help="a side; may be repeated (all)")
    parser.add_argument("--repetitions", type=int, help=f"number of repetitions ({Plan().repetitions})")
    parser.add_argument("--duration", type=float, metavar="SECONDS", help=f"of each load ({Plan().seconds})")
    parser.add_argument("--small", action="store_true", help="a little of everything, to see that it runs")
    parser.add_argument("--directory", type=Path, default=Path(), help="where to keep the databases for the run (here)")
    store = (
        "an empty store for our server, with one side; the row postgres creates its databases beside a PostgreSQL one"
    )
    parser.add_argument("--store", metavar="URL", help=store)
    write = "write the results even if sides are left out; with --only, put its rows into those that are there"
    parser.add_argument("--write", action="store_true", help=write)
    parser.add_argument("--render", action="store_true", help="measure nothing; make the documents of the results")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures, with every repetition")
    return parser.parse_args()


if __name__ == "__main__":
    main()
