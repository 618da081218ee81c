"""What the tests of deploy/ share: its folder, and the programs that read its files."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the project."""
    return ROOT


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """Return the path of a program, of this environment or of the machine; skip the test if there is none."""

    def path_of(name: str) -> str:
        places = [str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"]
        found = shutil.which(name, path=os.pathsep.join(places))
        if found is None:
            pytest.skip(f"needs {name}: make setup, make check or make interop installs it")
        return found

    return path_of


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Return a port that nothing listens on now."""

    def port() -> int:
        with socket.create_server(("127.0.0.1", 0)) as free:
            number: int = free.getsockname()[1]
            return number

    return port
