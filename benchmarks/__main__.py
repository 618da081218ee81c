"""`python -m benchmarks`: measure, and print the tables; all of them are also written to BENCHMARKS.md."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

from benchmarks import document, machine, plot
from benchmarks.plan import SMALL, Plan
from benchmarks.report import Figure
from benchmarks.rows import ROWS
from benchmarks.servers import CannotMeasureError, Workplace, known_sides

DOCUMENT = Path("BENCHMARKS.md")
PICTURE = Path("docs/benchmarks.svg")


def main() -> None:
    """Run what the command line says. A missed target is marked, and is no failure; a row that fails stops no other."""
    options = _options()
    cores = machine.choose_cores()
    machine.pin(cores.load)
    plan = _plan(options)
    about = [*machine.describe(options.directory), cores.describe, f"{plan.repetitions} repetitions"]
    workplace = Workplace(cores, options.directory, options.store, options.sides or known_sides())
    started = time.monotonic()
    figures: list[Figure] = []
    failed: list[str] = []
    for name in options.only or ROWS:
        print(f"{time.monotonic() - started:5.0f} s: measuring {name} …", file=sys.stderr, flush=True)
        try:
            of_row = list(ROWS[name].measure(workplace, plan))
        except CannotMeasureError as error:
            print(f"cannot measure {name}: {error}", file=sys.stderr)
            failed.append(name)
            continue
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        print(f"{ROWS[name].title}\n\n{document.tables(of_row)}\n", flush=True)
        figures += of_row
    about.append(f"it took {(time.monotonic() - started) / 60:.0f} minutes")
    about += [f"NOT MEASURED, it failed: {name}" for name in failed]
    missed = document.missed(figures)
    print("\n".join([*about, f"targets missed: {missed}" if missed else "every target reached"]))
    is_everything = not (options.only or options.sides or options.store or options.small)
    if is_everything or options.write:
        picture = str(PICTURE) if plot.draw(figures, PICTURE) else None
        DOCUMENT.write_text(document.whole(about, figures, picture))
    if options.json:
        document_of_all = {"about": about, "figures": [figure.as_json() for figure in figures]}
        options.json.write_text(json.dumps(document_of_all, indent=2, ensure_ascii=False) + "\n")
    sys.exit(1 if failed else 0)


def _plan(options: argparse.Namespace) -> Plan:
    plan = SMALL if options.small else Plan()
    if options.repetitions:
        plan = replace(plan, repetitions=options.repetitions)
    return replace(plan, seconds=options.duration) if options.duration else plan


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=ROWS, help="a row; may be repeated (all)")
    parser.add_argument("--sides", action="append", choices=known_sides(), help="a server; may be repeated (all)")
    parser.add_argument("--repetitions", type=int, help=f"medians are of so many ({Plan().repetitions})")
    parser.add_argument("--duration", type=float, metavar="SECONDS", help=f"of each load ({Plan().seconds})")
    parser.add_argument("--small", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--directory", type=Path, default=Path(), help="where the databases go, briefly (here)")
    parser.add_argument(
        "--store",
        metavar="URL",
        help="an empty store for ours instead of a new SQLite file; with --sides grpcio and a row without growth. "
        "The row postgres makes databases beside it where it is one of PostgreSQL",
    )
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT} even if that is not everything")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures, with every repetition")
    return parser.parse_args()


if __name__ == "__main__":
    main()
