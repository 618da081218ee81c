"""A process that outlives the tests: when its standard input ends, it ends the servers of a directory and removes it.

However the tests end, by SIGKILL too, no server stays behind.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil


def servers(directory: Path) -> Iterator[psutil.Process]:
    """Yield the processes that work in the directory: all of PostgreSQL's stand in their data directory."""
    for process in psutil.process_iter():
        try:
            if directory in Path(process.cwd()).parents:
                yield process
        except (psutil.Error, OSError):
            continue  # ended, or another user's


def end(directory: Path) -> None:
    for _ in range(1_000):
        for process in servers(directory):
            process.kill()
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.02)
    sys.exit(f"cannot remove {directory}")


if __name__ == "__main__":
    sys.stdin.read()
    end(Path(sys.argv[1]))
