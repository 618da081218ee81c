"""What the tests of the project itself share: where it is, its floors, and a server run as its users run it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def floors() -> dict[str, str]:
    """The oldest version of each run-time dependency that we say we run with, by its name."""
    needed = [Requirement(line) for line in requires("jobstatus-grpc") or ()]
    return {each.name: spec.version for each in needed if not each.marker for spec in each.specifier}


def _run(*command: object, folder: Path) -> str:
    done = subprocess.run([str(each) for each in command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """`run(*command, folder=…)` returns the command's output, or fails with it."""
    return _run


@contextmanager
def _serving(command: Path, folder: Path) -> Iterator[str]:
    arguments = ["serve", "--listen", "127.0.0.1:0", "--store", "sqlite:///jobstatus.db"]
    with (
        (folder / "serve.log").open("w+") as log,
        subprocess.Popen([command, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on "), line + (folder / "serve.log").read_text()
            yield line.removeprefix("listening on ").strip()
        finally:
            process.terminate()
            process.wait(timeout=20)


@pytest.fixture(scope="session")
def serving() -> Callable[[Path, Path], AbstractContextManager[str]]:
    """`with serving(command, folder) as address`: `jobstatus serve` on a free port, its store in `folder`."""
    return _serving
