"""A disk that fails, and one that loses power: what it may hold at any moment of a recorded run."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from jobstatus_grpc.server.health import NOT_SERVING, SERVING, WRITE

SECTOR_BYTES = 512

_WRITE, _TRUNCATE, _SYNC, _DELETE = 1, 2, 3, 4

_HEAD = struct.Struct("=IIQQ")


def build_shim(directory: Path) -> Path:
    """Compile the shim; skip the test where there is no compiler."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    shim = directory / "disk_shim.so"
    source = Path(__file__).with_name("disk_shim.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    return shim


def failing_environment(directory: Path) -> tuple[dict[str, str], Path]:
    """Return the environment of a process, and the file whose lines, such as `fsync -wal`, name the calls that fail."""
    order = directory / "failures"
    order.touch()
    return os.environ | {"LD_PRELOAD": str(build_shim(directory)), "DISK_FAILURES": str(order)}, order


def recording_environment(directory: Path) -> tuple[dict[str, str], Path]:
    """Return the environment of a process, and the file that gets each change of its store's files."""
    record = directory / "record"
    return os.environ | {"LD_PRELOAD": str(build_shim(directory)), "DISK_RECORD": str(record)}, record


@dataclass(slots=True)
class _File:
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, int, bytes]] = field(default_factory=list)
    """Kind, offset and data of the changes since the last sync."""
    before: bytes | None = None
    """What a file of this name held that was deleted: it may be back until the file system's next sync."""

    def sync(self) -> None:
        for kind, offset, data in self.pending:
            _apply(self.durable, kind, offset, data)
        self.pending.clear()

    def torn(self, chance: random.Random) -> bytes:
        """Return what the disk may hold: of each sector, what it was after any of the changes since the last sync."""
        if self.before is not None and chance.random() < 0.5:
            return self.before
        content = bytearray(self.durable)
        likelihood = chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        stops: dict[int, bool] = {}
        for kind, offset, data in self.pending:
            if kind == _TRUNCATE:
                if chance.random() < likelihood:
                    _apply(content, kind, offset, data)
                continue
            for start in range(offset - offset % SECTOR_BYTES, offset + len(data), SECTOR_BYTES):
                # A sector that has not reached the disk does not get only what was written to it later.
                stops[start] = stops.get(start, False) or chance.random() >= likelihood
                if not stops[start]:
                    first = max(start, offset)
                    _apply(content, kind, first, data[first - offset : start + SECTOR_BYTES - offset])
        return bytes(content)


def _apply(content: bytearray, kind: int, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    if kind == _TRUNCATE:
        del content[offset:]
    else:
        content[offset : offset + len(data)] = data


class Disk:
    """The files of a recorded run, moment by moment."""

    def __init__(self, record: Path) -> None:
        self._record = record.read_bytes()
        self._files: dict[str, _File] = {}

    def moments(self) -> Iterator[str]:
        """Make one change after another, and yield the path of its file after each."""
        place = 0
        while place < len(self._record):
            kind, path_bytes, offset, size = _HEAD.unpack_from(self._record, place)
            place += _HEAD.size
            path = self._record[place : place + path_bytes].decode()
            place += path_bytes
            file = self._files.setdefault(path, _File())
            if kind == _SYNC:
                file.sync()
                for other in self._files.values():
                    other.before = None
            elif kind == _DELETE:
                file.sync()
                self._files[path] = _File(before=bytes(file.durable))
            else:
                data = self._record[place : place + size] if kind == _WRITE else b""
                file.pending.append((kind, offset, data))
                place += len(data)
            yield path

    def written_to(self, path: str) -> bytes:
        """Return all that was written to a file, whether or not it was synced."""
        file = self._files.get(path)
        if file is None:
            return b""
        content = bytearray(file.durable)
        for change in file.pending:
            _apply(content, *change)
        return bytes(content)

    def lose_power(self, directory: Path, chance: random.Random) -> None:
        """Write what the disk may hold if it loses power now to files in `directory`."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for path, file in self._files.items():
            (directory / Path(path).name).write_bytes(file.torn(chance))


@contextlib.contextmanager
def small_disk(directory: Path, *, megabytes: int = 20, room: int = 700_000) -> Iterator[Callable[[], None]]:
    """Let the directory's disk have so many bytes of room until the yielded function is called."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes root")
    ballast = directory / "ballast"
    ballast.write_bytes(bytes(megabytes * 1024 * 1024 - room))
    try:
        yield ballast.unlink
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def until_writable(channel: grpc.Channel, *, is_writable: bool = True) -> None:
    """Wait until the health of a server says that its store is writable, or that it is not."""
    stub: Any = HealthStub(channel)
    status = SERVING if is_writable else NOT_SERVING
    deadline = time.monotonic() + 20
    while stub.Check(health_pb2.HealthCheckRequest(service=WRITE)).status != status:
        assert time.monotonic() < deadline
        time.sleep(0.02)
