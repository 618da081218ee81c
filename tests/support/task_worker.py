"""A worker of a task queue as a process, and the module with its tasks, which the sender imports too."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest


@contextlib.contextmanager
def imported(name: str, **variables: str) -> Iterator[ModuleType]:
    """Set environment variables, also for the workers that start in the block, and import a module."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in variables.items():
            patch.setenv(variable, value)
        yield importlib.import_module(name)


class TaskWorker:
    """A worker in a process group of its own."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        with log.open("w") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    def kill(self) -> None:
        """End it with its processes, as a power cut would; without effect if it has ended."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
