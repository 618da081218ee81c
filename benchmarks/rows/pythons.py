"""The row of the versions of Python. It is measured only if it is asked for: it installs the package for each."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.report import Table, row
from benchmarks.rows.calls import ALONE, CALL_CPU, CALLERS, read_and_update
from benchmarks.servers import OURS, Bench, CannotMeasureError
from tests.support.pythons import VERSIONS, find_python

FIGURES = [("calls/s", CALLERS), ("p50, ms", ALONE), (CALL_CPU, CALLERS)]


@row("pythons", "Versions of Python", is_apart=True)
def pythons(bench: Bench, table: Table) -> None:
    """GetJob and UpdateJob of 256 jobs by a lone caller and by 64, on each version of Python that is installed, with
    the newest release of each dependency. All servers take turns.
    """
    programs = {version: program for version in VERSIONS if (program := find_python(version))}
    if len(programs) < 2:
        raise CannotMeasureError("there is only one version of Python; install another, in PATH or with pyenv")
    with bench.folder() as folder, contextlib.ExitStack() as stack:
        pythons = {version: _install(program, folder / version) for version, program in programs.items()}
        servers = {
            f"{side}, {version}": stack.enter_context(replace(bench, python=python, store=None).run(side))
            for side in bench.among(*OURS)
            for version, python in pythons.items()
        }
        read_and_update(bench.plan, table, servers, FIGURES)


def _install(program: str, folder: Path) -> str:
    """Install what this checkout needs for a Python in a folder, and return that environment's Python."""
    python = str(folder / "bin/python")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", python]
    subprocess.run([program, "-m", "venv", "--without-pip", folder], check=True)
    subprocess.run([*pip, "install", ".[native,uvloop]"], check=True)
    return python
