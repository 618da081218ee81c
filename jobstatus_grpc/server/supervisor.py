"""`jobstatus serve --workers N`: runs N servers on the same addresses, each in a process of its own.

The supervisor serves nothing itself: it holds the ports, starts the workers, restarts one that ends, and ends them all.
It never loads gRPC. Workers are spawned, not forked.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jobstatus_grpc.errors import CannotStartError, StoreUnreachableError
from jobstatus_grpc.server import systemd
from jobstatus_grpc.server.addresses import CannotListenError, Reservation, private_folder, unix_path
from jobstatus_grpc.server.config import ServerConfig, host_and_port, stop_signals
from jobstatus_grpc.stores import is_shared

log = logging.getLogger("jobstatus_grpc.server")

END_SECONDS = 10.0
"""Time for a worker to end after its grace: its last responses, its store, its interpreter. Then it is killed."""

# Not -m, by which modules of the current directory would shadow installed ones.
_PROGRAM = "import sys; sys.path[:] = filter(None, sys.path); from jobstatus_grpc.server.worker import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The settings of one worker, sent to its stdin."""

    index: int
    """The worker's number, from 0."""
    config: ServerConfig
    private: str
    """A `unix:/path` of this worker alone: see Listener."""
    log_format: str
    log_level: str
    log_calls: bool


def start_report(error: CannotStartError | None) -> bytes:
    """Return the line with which a worker reports that it serves (None), or why it cannot."""
    report = None if error is None else {type(error).__name__: str(error)}
    return json.dumps(report).encode() + b"\n"


def _read_report(line: bytes) -> CannotStartError | None:
    report: dict[str, str] | None = json.loads(line)
    if report is None:
        return None
    ((kind, reason),) = report.items()
    return StoreUnreachableError(reason) if kind == StoreUnreachableError.__name__ else CannotStartError(reason)


class WorkerProcess:
    """Starts the process of an assignment, and again after it has ended."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._process: Process | None = None
        self._silent_checks: int | None = None
        """Checks since its last sign of life; None: it does not serve yet, or has ended."""

    @property
    def index(self) -> int:
        """The worker's number, from 0."""
        return self._assignment.index

    @property
    def pid(self) -> int:
        """The id of the process that was started last."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start a process, and wait until it serves.

        Raises:
            CannotStartError: it reported why it cannot, or ended without a report.
        """
        try:
            process = self._process = await self._spawn()
        except OSError as error:
            raise CannotStartError(f"cannot start a process for worker {self.index}: {error.strerror}") from None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(pickle.dumps(self._assignment))
        line = await process.stdout.readline()
        if not line.endswith(b"\n"):
            raise CannotStartError(f"worker {self.index} {await self.wait()} before it served; the log may say why")
        if (refusal := _read_report(line)) is not None:
            await process.wait()
            raise refusal

    async def wait(self) -> str:
        """Wait for the end of the process, and return how it ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            self._silent_checks = 0
            while await self._process.stdout.read(4096):
                self._silent_checks = 0
        finally:
            self._silent_checks = None
        code = await self._process.wait()
        how = f"exit code {code}" if code >= 0 else _signal_name(-code)
        return f"(process {self.pid}) has ended with {how}"

    def check(self) -> None:
        """Kill the process if it serves, and no sign of life has come since systemd.CHECKS checks."""
        if self._silent_checks is None:
            return
        self._silent_checks += 1
        if self._silent_checks > systemd.CHECKS:
            log.error("the event loop of worker %d (process %d) hangs; it is killed", self.index, self.pid)
            self.kill()

    def kill(self) -> None:
        """End the process at once, if it runs."""
        self._signal(signal.SIGKILL)

    async def end(self) -> None:
        """Make the process drain, and wait for its end; kill it if that takes too long."""
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        longest_seconds = self._assignment.config.drain_grace.total_seconds() + END_SECONDS
        try:
            await asyncio.wait_for(self._process.wait(), longest_seconds)
        except asyncio.TimeoutError:
            log.warning("worker %d has not ended within %g s; it is killed", self.index, longest_seconds)
            self.kill()
            await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                # Process.send_signal() polls the process, and so takes its exit code from asyncio.
                os.kill(self._process.pid, number)

    async def _spawn(self) -> Process:
        # Ctrl-C goes to every process of the terminal. Workers inherit a blocked SIGINT, and drain on our SIGTERM only.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                *(f"-W{each}" for each in sys.warnoptions),
                "-c",
                _PROGRAM,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=2,  # by its number: one that was closed, and is /dev/null now, is not inherited otherwise
                env=_environment_of_workers(),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _environment_of_workers() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in systemd.VARIABLES}
    # As the command line does: gRPC's C core logs malformed requests to stderr, past our log and its format.
    return {"GRPC_VERBOSITY": "NONE", **own, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


Ready = Callable[[Sequence[str]], None]

EXIT_OK = 0

STEADY_SECONDS = 10.0
"""Run time after which a worker that ends is restarted without a pause."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0


def run(config: ServerConfig, *, ready: Ready, log_format: str, log_level: str, log_calls: bool) -> int:
    """Serve with `config.workers` processes until SIGTERM, SIGINT or SIGHUP; return the process's exit code.

    `ready` is called once, with the bound addresses, when all workers serve. A worker that ends later is restarted.

    Raises:
        CannotStartError: a worker cannot start, or the store or an address cannot be shared; no worker is left.
    """
    return asyncio.run(supervise(config, ready=ready, log_format=log_format, log_level=log_level, log_calls=log_calls))


async def supervise(config: ServerConfig, *, ready: Ready, log_format: str, log_level: str, log_calls: bool) -> int:
    """As `run`, in a running event loop."""
    _check(config)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in stop_signals():
        loop.add_signal_handler(number, stopping.set)
    shared = [*config.listen, *([config.http] if config.http else [])]
    async with _reserved(shared) as reserved:
        addresses, http = reserved[: len(config.listen)], None if config.http is None else reserved[-1]
        with private_folder() as folder:
            assignments = [
                Assignment(
                    index=index,
                    config=_config_of(config, index, listen=addresses, http=http),
                    private=f"unix:{folder}/{index}",
                    log_format=log_format,
                    log_level=log_level,
                    log_calls=log_calls,
                )
                for index in range(config.workers)
            ]
            workers = [Worker(WorkerProcess(assignment)) for assignment in assignments]
            scheme = "https" if config.tls_cert else "http"
            await _keep(workers, stopping, lambda: ready([*addresses, *([f"{scheme}://{http}"] if http else [])]))
    return EXIT_OK


async def _keep(workers: Sequence[Worker], stopping: asyncio.Event, ready: Callable[[], None]) -> None:
    """Run all workers until `stopping` is set, then end them."""
    keepers = [asyncio.create_task(worker.keep()) for worker in workers]
    stopped: asyncio.Task[Any] = asyncio.create_task(stopping.wait())
    answers = asyncio.create_task(_all_answer(workers))

    def check() -> None:
        for worker in workers:
            worker.process.check()

    try:
        await asyncio.wait((stopped, answers, *keepers), return_when=asyncio.FIRST_COMPLETED)
        if answers.done():
            for worker in workers:
                log.info("worker %d is process %d", worker.process.index, worker.process.pid)
            ready()
            with systemd.announced(check):
                await asyncio.wait((stopped, *keepers), return_when=asyncio.FIRST_COMPLETED)
        for keeper in keepers:
            if keeper.done():
                keeper.result()
        log.info("draining %d workers", len(workers))
    except CannotStartError:
        # None has been announced: there is no client to drain.
        for worker in workers:
            worker.process.kill()
        raise
    finally:
        for task in (stopped, answers, *keepers):
            task.cancel()
        await asyncio.gather(stopped, answers, *keepers, return_exceptions=True)
        await asyncio.gather(*(worker.process.end() for worker in workers))


async def _all_answer(workers: Sequence[Worker]) -> None:
    for worker in workers:
        await worker.answers.wait()


class Worker:
    """One of the N workers: its process, and the processes that replace it."""

    def __init__(self, process: WorkerProcess) -> None:
        self.process = process
        self.answers = asyncio.Event()
        """Set once the first process serves."""

    async def keep(self) -> None:
        """Start the process, and again whenever it ends: at once, or after a rising pause if it ended within seconds.

        Raises:
            CannotStartError: the first process cannot start.
        """
        loop = asyncio.get_running_loop()
        pause_seconds = 0.0
        while True:
            began = loop.time()
            try:
                await self.process.start()
                if self.answers.is_set():
                    log.info("worker %d serves again, as process %d", self.process.index, self.process.pid)
                self.answers.set()
                end = await self.process.wait()
            except CannotStartError as error:
                if not self.answers.is_set():
                    raise
                end = f"cannot start: {error}"
            if loop.time() - began >= STEADY_SECONDS:
                pause_seconds = 0.0
            when = f"in {pause_seconds:g} s" if pause_seconds else "at once"
            log.error("worker %d %s; it is started again %s", self.process.index, end, when)
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(max(2 * pause_seconds, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)


@contextlib.asynccontextmanager
async def _reserved(addresses: Sequence[str]) -> AsyncIterator[tuple[str, ...]]:
    """Hold addresses for the length of a block, and yield them with port 0 resolved."""
    reservation = Reservation()
    try:
        yield tuple([await reservation.add(address) for address in addresses])
    except CannotListenError as error:
        raise CannotStartError(str(error)) from None
    finally:
        reservation.close()


def _check(config: ServerConfig) -> None:
    config.check()
    if not is_shared(config.store):
        raise CannotStartError("--workers needs a store that several processes can share; use --store postgresql://…")
    for address in filter(unix_path, config.listen):
        raise CannotStartError(
            f"--listen {address} cannot be shared by several processes; listen on HOST:PORT, or leave out --workers"
        )
    _config_of(config, config.workers - 1, listen=config.listen, http=config.http)


def _config_of(config: ServerConfig, index: int, *, listen: tuple[str, ...], http: str | None) -> ServerConfig:
    """Return the settings of the worker with this number, from 0: the ports that it has alone rise with the number.

    Raises:
        CannotStartError: a port would be above 65535.
    """

    def own(flag: str, address: str | None) -> str | None:
        if address is None:
            return None
        port = host_and_port(address)[1]
        if port and port + index > 65535:
            raise CannotStartError(
                f"{flag} {address} leaves no port for worker {index}, which is {index} above; "
                f"with --workers {config.workers} choose one up to {65536 - config.workers}"
            )
        return f"{address.rpartition(':')[0]}:{port + index if port else 0}"

    return dataclasses.replace(
        config,
        listen=listen,
        http=http,
        metrics=own("--metrics", config.metrics),
        health=own("--health", config.health),
    )
