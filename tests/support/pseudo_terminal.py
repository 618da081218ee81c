"""A pseudo-terminal that runs a program, for tests to type into and to read."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

# In a session of its own, with this terminal as the controlling one: what a terminal emulator does for a shell.
_BECOME_SESSION = """\
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|\x1b[=>]")
LONGEST_SECONDS = 30.0


class PseudoTerminal:
    """Runs `command` in a terminal; a context manager that ends it."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], columns: int = 100) -> None:
        self._ours, theirs = os.openpty()
        self._name = os.ttyname(theirs)
        self.resize(24, columns)
        self._raw = b""
        self.received: list[tuple[float, bytes]] = []
        """The output, and when it came, by time.monotonic()."""
        self._seen = ""
        self._read_to = 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BECOME_SESSION, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            close_fds=True,
        )
        os.close(theirs)

    def __enter__(self) -> PseudoTerminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the program and close the terminal."""
        with self.process:
            self.process.kill()
        self.hang_up()

    def hang_up(self) -> None:
        """Close the terminal, as its window is closed."""
        if self._ours >= 0:
            os.close(self._ours)
            self._ours = -1

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the terminal."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the terminal's output, as Ctrl-S does."""
        with open(os.open(self._name, os.O_RDWR | os.O_NOCTTY), "wb") as terminal:
            termios.tcflow(terminal, termios.TCOOFF)
            yield
            termios.tcflow(terminal, termios.TCOON)

    def type(self, text: str) -> None:
        """Type text; control characters are the keys with Ctrl."""
        os.write(self._ours, text.encode())

    def read_until(self, expected: str) -> str:
        """Return the output since the last call, up to and with `expected`, without escape sequences."""
        deadline = time.monotonic() + LONGEST_SECONDS
        while expected not in self._seen[self._read_to :]:
            if not self._read(deadline):
                raise AssertionError(f"{expected!r} did not appear in {self._seen[self._read_to :]!r}")
        start, self._read_to = self._read_to, self._seen.index(expected, self._read_to) + len(expected)
        return self._seen[start : self._read_to]

    def read_for(self, seconds: float) -> str:
        """Return the output of the next `seconds`."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        start, self._read_to = self._read_to, len(self._seen)
        return self._seen[start:]

    def read_to_end(self) -> str:
        """Return all output until no process has the terminal open."""
        while self._read(time.monotonic() + LONGEST_SECONDS):
            pass
        start, self._read_to = self._read_to, len(self._seen)
        return self._seen[start:]

    def _read(self, deadline: float) -> bool:
        readable, _, _ = select.select([self._ours], [], [], max(deadline - time.monotonic(), 0))
        try:
            data = os.read(self._ours, 65536) if readable else b""
        except OSError:  # no process has it open any more
            data = b""
        self._raw += data
        self.received.append((time.monotonic(), data))
        self._seen = _ESCAPES.sub("", self._raw.decode(errors="ignore"))
        return bool(data)
