"""A command as a child process in our session: our terminal is lent to it while it reads from it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping, Sequence

from jobstatus_grpc.cli.run.leader import RESET
from jobstatus_grpc.cli.run.streams import Reader, Stream

FAULTS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})
"""Signals that a fault of our own would raise again as soon as a handler of Python returns."""

STDIN, STDOUT, STDERR = 0, 1, 2


class Process:
    """A command in a process group of its own. For the main thread."""

    interrupt_key: signal.Signals | None = None
    """The signal of the key that was pressed last, if it was one that interrupts. Our terminal handles such keys."""

    def __init__(self, readers: Mapping[int, Sequence[Reader]]) -> None:
        """Open the output streams that `readers` has the readers of."""
        self.group = 0
        """The command's process group; 0 before `start`."""
        self.streams = [Stream(target, readers=each, on_resize=self._on_resize) for target, each in readers.items()]
        self._was_lent = False
        self._terminal: int | None = None
        with contextlib.suppress(OSError):
            self._terminal = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)

    @property
    def child_pid(self) -> int:
        """Our child process."""
        return self.group

    @property
    def was_lent(self) -> bool:
        """Whether the command ever had the terminal; while all of us are suspended it is taken back."""
        return self._was_lent

    @property
    def fds_to_read(self) -> list[int]:
        """File descriptors for `serve`, when they can be read."""
        return []

    @property
    def fds_to_write(self) -> list[int]:
        """File descriptors for `serve`, when they can be written to."""
        return []

    def serve(self, ready: set[int]) -> None:
        """Do what is to be done for the file descriptors of ours that are ready."""

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the command.

        Raises:
            OSError: it cannot be started.
        """
        # Not subprocess: gRPC's threads do not survive its fork.
        self.group = os.posix_spawnp(
            command[0],
            list(command),
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, each.for_command, each.target) for each in self.streams],
            setpgroup=0,
            setsigdef=RESET,
            setsigmask=mask_of_command(),
        )

    def poll(self) -> int | None:
        """Return the command's new wait status, and reap it if it has ended; None: no change."""
        changed, status = os.waitpid(self.group, os.WNOHANG | os.WUNTRACED)
        return status if changed else None

    def send(self, number: int) -> None:
        """Send a signal to the command's process group.

        Raises:
            OSError: there is none, or it is not ours.
        """
        os.killpg(self.group, number)

    def lend(self) -> bool:
        """Let the command have our terminal; return False if it has it, or if it is not ours to lend."""
        if self._terminal is None or foreground_of(self._terminal) != os.getpgrp():
            return False
        os.tcsetpgrp(self._terminal, self.group)
        self._was_lent = True
        return True

    def take_back(self) -> None:
        """Make our process group the foreground one again, if the command's still is."""
        if self._terminal is None or not self._was_lent or foreground_of(self._terminal) != self.group:
            return
        # tcsetpgrp from a background process group sends SIGTTOU, which suspends us unless it is ignored.
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            os.tcsetpgrp(self._terminal, os.getpgrp())
        signal.signal(signal.SIGTTOU, before)

    def close(self) -> None:
        """Take the terminal back and close it."""
        self.take_back()
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None

    def _on_resize(self) -> None:
        with contextlib.suppress(OSError):
            self.send(signal.SIGWINCH)


def foreground_of(terminal: int) -> int | None:
    """Return the foreground process group of our controlling terminal; None if it is another's, or gone."""
    try:
        return os.tcgetpgrp(terminal)
    except OSError:
        return None


def mask_of_command() -> set[int]:
    """Return the signals that a command is to be started with as blocked."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, ()) - FAULTS
