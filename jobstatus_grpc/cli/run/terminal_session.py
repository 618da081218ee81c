"""A command in a session of its own, on a pseudo-terminal that stands for our terminal, as script(1) and ssh have it.

Our terminal is in raw mode while the command has it: keys go to the pseudo-terminal, which turns Ctrl-C into SIGINT, or
does not if the command has set it so. The command sees one terminal in all places: standard input, output, error and
/dev/tty.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
import termios
import tty
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobstatus_grpc.cli.run import leader
from jobstatus_grpc.cli.run.process import STDERR, STDIN, STDOUT, foreground_of, mask_of_command
from jobstatus_grpc.cli.run.streams import Reader, Stream, ready_of

KEYS_BYTES = 4096

_ABOVE_STANDARD = 10
"""File descriptors from here on are not overwritten by those that the leader is started with."""

_CONTROL_CHARACTERS, _LOCAL_MODES = 6, 3
"""Indices of what termios.tcgetattr returns."""


class TerminalSession:
    """A command on a pseudo-terminal, with the interface of Process. For the main thread."""

    @classmethod
    def open(cls, readers: Mapping[int, Sequence[Reader]], readers_of_both: Sequence[Reader]) -> TerminalSession | None:
        """Return a session if standard input and output are our terminal, else None.

        Args:
            readers: the readers of stdout and of stderr, if stderr is no terminal.
            readers_of_both: the readers of the output if stdout and stderr are one.
        """
        # Not a terminal of another session: its keys are not for us.
        if foreground_of(STDIN) is None or not os.isatty(STDOUT) or not sys.executable:
            return None
        try:
            ends = os.openpty()
        except OSError:  # no /dev/pts
            return None
        return cls(ends, readers, readers_of_both)

    def __init__(
        self, ends: tuple[int, int], readers: Mapping[int, Sequence[Reader]], readers_of_both: Sequence[Reader]
    ) -> None:
        self.group = 0
        """The command's process group; 0 before `start`."""
        self.child_pid = 0
        """Our child process, the session's leader."""
        self.was_lent = False
        """Whether the command ever had the terminal; while all of us are suspended it is taken back."""
        self.interrupt_key: signal.Signals | None = None
        """The signal of the key that was pressed last, if it was one that interrupts."""
        self._is_lent = False
        self._modes = termios.tcgetattr(STDIN)
        self._pseudo_terminal, theirs = ends
        self._name = os.ttyname(theirs)
        os.set_blocking(self._pseudo_terminal, False)
        has_error_file = not os.isatty(STDERR)
        self._output = Stream(
            STDOUT,
            readers=readers[STDOUT] if has_error_file else readers_of_both,
            pseudo_terminal=ends,
        )
        self.streams = [self._output]
        if has_error_file:
            self.streams.append(Stream(STDERR, readers=readers[STDERR]))
        self._has_ended = False
        self._control: socket.socket | None = None
        self._changes: list[int] = []
        self._keys = b""

    @property
    def fds_to_read(self) -> list[int]:
        """File descriptors for `serve`, when they can be read."""
        if self._control is None or self._has_ended:
            return []
        takes_keys = self._is_lent and self._output.is_open and not self._keys
        return [self._control.fileno(), *([STDIN] if takes_keys else [])]

    @property
    def fds_to_write(self) -> list[int]:
        """File descriptors for `serve`, when they can be written to."""
        is_busy = self._keys and self._output.is_open and not self._has_ended
        return [self._pseudo_terminal] if is_busy else []

    def serve(self, ready: set[int]) -> None:
        """Pass keys on to the command, and a hang-up of our terminal."""
        if STDIN in ready:
            try:
                self._keys = os.read(STDIN, KEYS_BYTES)
            except BlockingIOError:
                return
            except OSError:
                self._keys = b""
            if not self._keys:
                self._output.end(abandon=True)
                return
            self._note_interrupt(self._keys[-1:])
        if self._keys:
            try:
                self._keys = self._keys[os.write(self._pseudo_terminal, self._keys) :]
            except BlockingIOError:
                pass
            except OSError:
                self._keys = b""

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the command.

        Raises:
            OSError: it cannot be started.
        """
        self._control, theirs = socket.socketpair()
        real_terminal = fcntl.fcntl(STDIN, fcntl.F_DUPFD_CLOEXEC, _ABOVE_STANDARD)
        control = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, _ABOVE_STANDARD)
        try:
            self.child_pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", str(Path(leader.__file__)), *command],
                environment,
                file_actions=[
                    # A session leader that opens a terminal gets it as its controlling terminal.
                    (os.POSIX_SPAWN_OPEN, STDIN, self._name, os.O_RDWR, 0),
                    (os.POSIX_SPAWN_DUP2, STDIN, STDOUT),
                    (os.POSIX_SPAWN_DUP2, STDIN, STDERR),
                    *((os.POSIX_SPAWN_DUP2, each.for_command, each.target) for each in self.streams[1:]),
                    (os.POSIX_SPAWN_DUP2, control, leader.CONTROL),
                    (os.POSIX_SPAWN_DUP2, real_terminal, leader.REAL_TERMINAL),
                ],
                setsid=True,
                setsigdef=leader.RESET,
                setsigmask=mask_of_command(),
            )
        finally:
            theirs.close()
            os.close(control)
            os.close(real_terminal)
        answer = self._ask(leader.FOREGROUND if self._make_raw() else leader.BACKGROUND)
        if answer is None or answer < 0:
            self._restore()
            self._end_leader()
            number = errno.EIO if answer is None else -answer
            raise OSError(number, os.strerror(number))
        self.group = answer

    def poll(self) -> int | None:
        """Return the command's new wait status; None: no change."""
        if self._control is None or not (self._changes or ready_of([self._control.fileno()], timeout_seconds=0)):
            return None
        status = self._changes.pop(0) if self._changes else self._receive()
        if status is None:  # the leader was killed, and its end sent SIGHUP to the command
            status = self._end_leader()
        self._has_ended = not os.WIFSTOPPED(status)
        return status

    def send(self, number: int) -> None:
        """Send a signal to the command's process group.

        Raises:
            OSError: there is none.
        """
        if self._control is None or self._has_ended:
            os.killpg(self.group, number)
        else:
            # Not to the group: the leader has reaped the command perhaps, and the id may be another's.
            self._control.send(bytes([number]))

    def lend(self) -> bool:
        """Let the command have our terminal; return False if it has it, or if it is not ours to lend."""
        had_it = self._is_lent
        if not self._make_raw():
            if had_it:  # we were suspended without notice
                self._is_lent = False
                self._ask(leader.BACKGROUND)
            return False
        if not had_it:
            self._ask(leader.FOREGROUND)
        self._output.copy_size()
        return not had_it

    def take_back(self) -> None:
        """Restore our terminal's modes, after all that the command has written to it."""
        if self._is_lent:
            if not self._has_ended:
                self._output.flush()
            self._restore()
            self._ask(leader.BACKGROUND)

    def close(self) -> None:
        """End the session, and restore our terminal's modes."""
        self.take_back()
        if self._control is not None:
            self._end_leader()

    def _end_leader(self) -> int:
        """End the leader, and return its wait status."""
        assert self._control is not None
        self._control.close()
        self._control = None
        _, status = os.waitpid(self.child_pid, 0)
        return status

    def _make_raw(self) -> bool:
        """Let all keys come through; return False if our terminal is another process group's."""
        if foreground_of(STDIN) != os.getpgrp():
            return False
        with contextlib.suppress(termios.error):  # a terminal that is gone
            if not self._is_lent:
                self._ask(leader.NOTE_MODES)
                self._modes = termios.tcgetattr(STDIN)
            if not self.was_lent and self._output.is_open:
                # Not before: while we are in the background, our terminal has the modes of a shell's line editor.
                termios.tcsetattr(self._pseudo_terminal, termios.TCSANOW, self._modes)
            tty.setraw(STDIN, termios.TCSANOW)
            self._is_lent = self.was_lent = True
        return self._is_lent

    def _restore(self) -> None:
        if self._is_lent and foreground_of(STDIN) == os.getpgrp():
            with contextlib.suppress(termios.error):
                # Not TCSADRAIN: it waits while our terminal is stopped.
                termios.tcsetattr(STDIN, termios.TCSANOW, self._modes)
        self._is_lent = False

    def _note_interrupt(self, key: bytes) -> None:
        """Note whether a key interrupts the command, and let it interrupt our own process group as our terminal would:
        a script that waits for us, for example."""
        self.interrupt_key = None
        try:
            modes = termios.tcgetattr(self._pseudo_terminal)
            is_for_command = modes[_LOCAL_MODES] & termios.ISIG and os.tcgetpgrp(self._pseudo_terminal) == self.group
        except (termios.error, OSError):
            return
        characters = modes[_CONTROL_CHARACTERS]
        signals = {characters[termios.VINTR]: signal.SIGINT, characters[termios.VQUIT]: signal.SIGQUIT}
        if is_for_command and key in signals:
            self.interrupt_key = signals[key]
            before = signal.signal(self.interrupt_key, signal.SIG_IGN)  # the command gets it from its terminal
            os.killpg(os.getpgrp(), self.interrupt_key)
            signal.signal(self.interrupt_key, before)

    def _ask(self, request: bytes) -> int | None:
        """Send a request to the leader; return its answer, None if it has ended.

        Suspensions of the command before the answer are over, or ours too: they are dropped.
        """
        if self._control is None:
            return None
        with contextlib.suppress(OSError):
            self._control.send(request)
        while True:
            message = self._receive()
            if not self.group or message in (None, leader.DONE):
                return message
            if not os.WIFSTOPPED(message):
                self._changes.append(message)

    def _receive(self) -> int | None:
        assert self._control is not None
        try:
            message = self._control.recv(leader.MESSAGE.size, socket.MSG_WAITALL)
        except OSError:
            message = b""
        return leader.MESSAGE.unpack(message)[0] if len(message) == leader.MESSAGE.size else None
