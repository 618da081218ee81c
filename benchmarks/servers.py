"""The processes that are measured."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import machine
from benchmarks.machine import Cores


@dataclass(frozen=True, slots=True)
class Server:
    """A running server, ours or the bare one."""

    name: str
    address: str
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """Return what it has used of its core since it started, the kernel's share included."""
        times = self.process.cpu_times()
        return times.user + times.system

    def memory_bytes(self) -> int:
        """Return how much of it is in memory now."""
        return int(self.process.memory_info().rss)


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where servers run and keep their files."""

    cores: Cores
    directory: Path
    store: str | None = None
    """The URL of a store to measure; None: a new SQLite file each time."""

    @contextlib.contextmanager
    def ours(self) -> Iterator[Server]:
        """Run our server as users do, on an empty database, for the length of a block."""
        with tempfile.TemporaryDirectory(dir=self.directory, prefix="jobstatus-bench-") as directory:
            store = self.store or f"sqlite:///{Path(directory).resolve()}/jobs.db"
            command = ["-m", "jobstatus_grpc", "serve", "--listen", "127.0.0.1:0", "--store", store]
            with self._run("ours", command, Path(directory) / "log") as server:
                yield server

    @contextlib.contextmanager
    def bare(self, replies: dict[str, bytes]) -> Iterator[Server]:
        """Run the bare server, which answers each method with its reply of `replies`, for the length of a block."""
        with tempfile.TemporaryDirectory(dir=self.directory, prefix="jobstatus-bench-") as directory:
            for method, reply in replies.items():
                (Path(directory) / method).write_bytes(reply)
            with self._run("bare", ["-m", "benchmarks.bare", directory], Path(directory) / "log") as server:
                yield server

    @contextlib.contextmanager
    def _run(self, name: str, arguments: Sequence[str], log: Path) -> Iterator[Server]:
        with log.open("wb") as stderr, machine.pinned(self.cores.server, back_to=self.cores.load):
            process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True)
        with process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                if not line.startswith("listening on "):
                    raise RuntimeError(f"the {name} server did not start: {log.read_text()}")
                yield Server(name, line.removeprefix("listening on ").strip(), psutil.Process(process.pid))
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                process.kill()
