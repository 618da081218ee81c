"""`jobstatus` as its users run it: a process of its own, against a real server."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobstatus_grpc.cli import main
from tests.support.pseudo_terminal import PseudoTerminal
from tests.support.servers import TRANSPORT
from tests.support.service import Service

COMMAND = (sys.executable, "-W", "error", "-m", "jobstatus_grpc")
NO_SERVER = "127.0.0.1:9"
"""An address without a server: the `discard` port, below the ephemeral range."""
LONGEST_SECONDS = 30.0


class CommandLine:
    """Runs `jobstatus` with an environment that names the server."""

    def __init__(self, address: str) -> None:
        self.address = address
        # COLUMNS and LINES would override the size of a test's terminal.
        strange = ("JOBSTATUS_", "COLUMNS", "LINES")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
        self.environment = {**clean, "JOBSTATUS_ADDRESS": address, "TERM": "xterm-256color"}
        self.environment["JOBSTATUS_TRANSPORT"] = TRANSPORT
        self.environment.pop("FORCE_COLOR", None)

    def __call__(self, *arguments: str | bytes, text: bool = True, **settings: Any) -> subprocess.CompletedProcess[Any]:
        """Run it to its end; `env` adds variables."""
        environment = {**self.environment, **settings.pop("env", {})}
        if "input" not in settings:
            settings.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run(
            [*COMMAND, *arguments],
            env=environment,
            capture_output=True,
            text=text,
            timeout=LONGEST_SECONDS,
            check=False,
            **settings,
        )

    def json(self, *arguments: str) -> dict[str, Any]:
        """Run it with --json, and return the job that it printed."""
        done = self(*arguments, "--json")
        assert done.stderr == ""
        job: dict[str, Any] = json.loads(done.stdout)
        return job

    def start(self, *arguments: str, **settings: Any) -> subprocess.Popen[str]:
        """Run it, and do not wait."""
        settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
        return subprocess.Popen([*COMMAND, *arguments], env=self.environment, text=True, **settings)


class CommandLineHere(CommandLine):
    """Runs `jobstatus` in this process, without the time that a new process takes."""

    def __init__(self, address: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        super().__init__(address)
        self._monkeypatch = monkeypatch
        self._capfd = capfd

    def __call__(self, *arguments: str | bytes, **settings: Any) -> subprocess.CompletedProcess[Any]:
        texts = [os.fsdecode(each) for each in arguments]
        self._monkeypatch.setattr("sys.argv", ["jobstatus", *texts])
        self._monkeypatch.setattr("os.environ", {**self.environment, **settings.pop("env", {})})
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return subprocess.CompletedProcess(texts, int(caught.value.code or 0), *self._capfd.readouterr())


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str], CommandLineHere]]:
    """`jobstatus` in this process, with the server at an address."""
    log = logging.getLogger("jobstatus_grpc")
    handlers, propagate, umask = list(log.handlers), log.propagate, os.umask(0o022)
    yield lambda address: CommandLineHere(address, monkeypatch, capfd)
    log.handlers[:], log.propagate = handlers, propagate
    os.umask(umask)
    if "GRPC_VERBOSITY" not in os.environ:
        os.unsetenv("GRPC_VERBOSITY")


@pytest.fixture
def here(run_here: Callable[[str], CommandLineHere], service: Service) -> CommandLineHere:
    """`jobstatus` in this process, with a server that all tests share."""
    return run_here(service.address)


@pytest.fixture
def offline(run_here: Callable[[str], CommandLineHere]) -> CommandLineHere:
    """`jobstatus` in this process, without a server."""
    return run_here(NO_SERVER)


@pytest.fixture
def cli(service: Service) -> CommandLine:
    """`jobstatus` with a server that all tests share."""
    return CommandLine(service.address)


@pytest.fixture
def offline_cli() -> CommandLine:
    """`jobstatus` without a server."""
    return CommandLine(NO_SERVER)


@pytest.fixture
def cli_of() -> Callable[[str], CommandLine]:
    """`jobstatus` with the server at an address."""
    return CommandLine


@pytest.fixture
def start(cli: CommandLine) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """As `cli.start`; what still runs at the test's end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start_it(*arguments: str, by: CommandLine = cli, **settings: Any) -> subprocess.Popen[str]:
        started.append(by.start(*arguments, **settings))
        return started[-1]

    yield start_it
    for process in started:
        with process:
            process.kill()


@pytest.fixture
def terminal(cli) -> Iterator[Callable[..., PseudoTerminal]]:
    """A terminal with `jobstatus` in it."""
    opened: list[PseudoTerminal] = []

    def open_it(*arguments: str, **settings: int) -> PseudoTerminal:
        opened.append(PseudoTerminal([*COMMAND, *arguments], environment=cli.environment, **settings))
        return opened[-1]

    yield open_it
    for each in opened:
        each.close()
