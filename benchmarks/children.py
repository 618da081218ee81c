"""Processes that use our Python client; they run on the core of the load."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any


class Child:
    """A module of the benchmark as a process. It speaks in lines, and its last is what it found, as JSON."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def wait_for(self, line: str) -> None:
        """Wait until it says `line`.

        Raises:
            RuntimeError: it has ended.
        """
        assert self._process.stdout is not None
        while (said := self._process.stdout.readline()) != f"{line}\n":
            if not said:
                raise RuntimeError(f"a client's process ended before it said {line!r}")

    def go_on(self) -> None:
        """Give it a line."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def finish(self) -> Any:
        """Tell it to end; return what it found."""
        said, _ = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"a client's process ended with {self._process.returncode}")
        return json.loads(said.splitlines()[-1])


@contextlib.contextmanager
def child(module: str, *arguments: object) -> Iterator[Child]:
    """Run `python -m benchmarks.{module}` for the length of a block."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Child(process)
        finally:
            process.kill()
