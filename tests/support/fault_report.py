"""docs/reliability.md, made by `make faults` from the rows that tests record: python -m tests.support.fault_report FILE

The rows of all runs are kept in tests/faults/results.jsonl. A run replaces the rows of the tests that it has run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "faults" / "results.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
TESTED = ("jobstatus_grpc", "generated")
"""What a row is true of: the last commit that has changed these is written in the row."""

Row = dict[str, Any]
"""`test` is the test's node id, `at` the date of its run, and `commit` what it tested.

A fault has fault, count, checked and result; a seeded bug has bug and seen_by; a test that failed has failed."""

HEAD = """\
# Reliability

What the fault tests did in their last run at full length, and what they found. `make faults` writes this page: do not
edit it. A row is written only by a test that has passed, so a fault without a row was not tested. The last column is
the number of a run in the list at the end: when it was measured, and on which commit of the service.

"No violation" means that the checker of `jobstatus verify` has judged all calls and streams of the load: no
acknowledged write was lost, no read was older than an acknowledged write before it, each race had one winner, each
request took effect once, no done job changed, and each watch got the newest state and the end of its job.

## Faults

| fault | times | checked | result | test | run |
| --- | ---: | --- | --- | --- | --- |
"""

BUGS = """
## The checker is checked

Each of these bugs was put into a server process, and `jobstatus verify` had to find it. The second column names the
rules and checks that did.

| seeded bug | seen by | run |
| --- | --- | --- |
"""

RUNS = """
## Runs

"""

TAIL = """
## Run it yourself

* `make faults` runs all of it, in one to two hours, and writes this page.
* `make faults ARGS="-k disk"` runs the tests whose name or file contains `disk`, and replaces their rows only.
* `make faults ARGS="--soak 60 -k at_random"` loads a server for an hour with a random fault every 20 seconds.
* `make check` runs each of these tests with few faults, in a few seconds.
* `jobstatus verify --address HOST:PORT` judges a running deployment: see
  [Verify a deployment](verify.md).

The tests are in `tests/faults`, the servers with a bug in `tests/verify/faulty_server.py`, and the rules in
`jobstatus_grpc/verify/checker.py`. Faults of the clock need the Debian package `faketime`, which `make faults` installs
if it is run as root.
"""


def append(config: pytest.Config, row: Row) -> None:
    """Write a row to the file of --fault-report, if there is one."""
    if path := config.getoption("--fault-report"):
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "at": date, "commit": _commit()}) + "\n")


@cache
def _commit() -> str:
    """Return the commit that last changed the service; its subject lasts, also when it is rebased."""
    commit, changes = (
        subprocess.run(["git", *arguments, "--", *TESTED], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for arguments in (["log", "-1", "--abbrev=9", "--format=`%h` %s"], ["status", "--porcelain"])
    )
    return commit.strip() + (", with changes" if changes else "")


def read(path: Path) -> list[Row]:
    """Return the rows in a file, none if it does not exist."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def merge(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """Return `old` with the rows of the tests of `new` replaced, without tests that failed or do not exist any more."""
    failed = {row["test"] for row in new if "failed" in row}
    ran = {row["test"] for row in new}
    kept = [row for row in old if row["test"] not in ran and _exists(row["test"])]
    return sorted((*kept, *(row for row in new if row["test"] not in failed)), key=lambda row: str(row["test"]))


def _exists(test: str) -> bool:
    file, _, name = test.partition("::")
    path = ROOT / file
    return path.exists() and f"def {name.partition('[')[0]}(" in path.read_text("utf-8")


def page_of(rows: Iterable[Row]) -> str:
    """Return the text of docs/reliability.md."""
    rows = list(rows)
    runs = sorted({(row["at"], row["commit"]) for row in rows})
    number_of = {run: number for number, run in enumerate(runs, 1)}
    faults = bugs = ""
    for row in rows:
        end = f" | {number_of[row['at'], row['commit']]} |\n"
        if "fault" in row:
            what = (row["fault"], f"{row['count']:,}", row["checked"], row["result"], _link(row["test"]))
            faults += "| " + " | ".join(what) + end
        if "bug" in row:
            seen_by = ", ".join(f"`{name}`" for name in row["seen_by"])
            bugs += f"| {row['bug'].replace('-', ' ')} | {seen_by}{end}"
    listed = "".join(f"{number}. {date}, {commit}\n" for number, (date, commit) in enumerate(runs, 1))
    return HEAD + faults + (BUGS + bugs if bugs else "") + RUNS + listed + TAIL


def _link(test: str) -> str:
    file = test.partition("::")[0]
    return f"[{Path(file).stem}](../{file})"


def main(path: Path) -> None:
    """Merge a run's rows into the results, and write the page."""
    rows = merge(read(RESULTS), read(path))
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    PAGE.write_text(page_of(rows), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
