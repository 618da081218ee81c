"""One process of a server with several: how its supervisor starts it, hears of it, and ends it.

Its settings come through its stdin, where `ps` shows no password; that pipe's end tells it that its supervisor is gone.
Its stdout says once whether it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from dataclasses import dataclass

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.server.config import ServerConfig

log = logging.getLogger("jobstatus_grpc.server")

END_SECONDS = 10.0
"""What a worker may take to end beyond its grace: its last replies, its store, its interpreter."""

# Not -m, which would let modules of the current directory stand in for installed ones.
_PROGRAM = "import sys; sys.path[:] = filter(None, sys.path); from jobstatus_grpc.server.worker import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a worker is told when it starts."""

    index: int
    """Its number, from 0."""
    config: ServerConfig
    private: str
    """A `unix:/path` of its own: see Listener."""
    log_format: str
    log_level: str


def tell_start(error: str | None) -> bytes:
    """Return the line by which a worker says that it serves, or why it cannot."""
    return json.dumps({"error": error}).encode() + b"\n"


class WorkerProcess:
    """Starts the process of an assignment, one after another."""

    def __init__(self, assignment: Assignment) -> None:
        """Start nothing yet."""
        self._assignment = assignment
        self._process: Process | None = None

    @property
    def index(self) -> int:
        """The worker's number, from 0."""
        return self._assignment.index

    @property
    def pid(self) -> int:
        """The process that was started last."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start a process, and wait until it answers.

        Raises:
            CannotStartError: it says why, or has ended without a word.
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
            raise CannotStartError(f"worker {self.index} {await self.wait()} before it answered; the log may say why")
        if (reason := json.loads(line)["error"]) is not None:
            await process.wait()
            raise CannotStartError(reason)

    async def wait(self) -> str:
        """Wait for the end of the process, and return how it ended."""
        assert self._process is not None
        code = await self._process.wait()
        how = f"exit code {code}" if code >= 0 else _signal_name(-code)
        return f"(process {self.pid}) has ended with {how}"

    def kill(self) -> None:
        """End the process at once, if it runs."""
        self._signal(signal.SIGKILL)

    async def end(self) -> None:
        """Have the process drain, and wait for its end; kill it where that takes too long."""
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
                # The process's own send_signal() looks whether it has ended, and so takes its exit code from asyncio.
                os.kill(self._process.pid, number)

    async def _spawn(self) -> Process:
        # Ctrl-C goes to every process of the terminal. A worker inherits that SIGINT is blocked: it drains when we say.
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
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
