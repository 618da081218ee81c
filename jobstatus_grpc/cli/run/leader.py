"""The leader of the session in which TerminalSession runs a command: a program of its own, `python leader.py COMMAND`.

Only a process of the session can choose the foreground process group of its terminal. And without a parent in its
session a command could not be suspended: the kernel ignores Ctrl-Z in an orphaned process group.

Started with the pseudo-terminal as standard input, and as controlling terminal. On CONTROL it gets requests of one byte
each: NOTE_MODES, FOREGROUND, BACKGROUND (the first of these two decides how the command is started), or then the
number of a signal for the command. It sends MESSAGEs: the command's process id, or its error as a negative errno, after
the first FOREGROUND or BACKGROUND; DONE after each other request except signals; and each wait status of the command.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import sys
import termios

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes a third of the time of the start
    from collections.abc import Sequence
    from typing import Any, NoReturn

TERMINAL, CONTROL, REAL_TERMINAL = 0, 3, 4

FOREGROUND, BACKGROUND = b"f", b"b"
"""Requests: let the command have the pseudo-terminal, or suspend it as soon as it reads from it."""

NOTE_MODES = b"m"
"""Request: note the modes of the real terminal, which is in raw mode from now until BACKGROUND."""

MESSAGE = struct.Struct("=i")

DONE = -(2**31)

RESET = (signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that Python ignores; a command expects their default action."""


class Leader:
    """Starts the command, and serves requests."""

    def __init__(self) -> None:
        self._wakeup, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, lambda number, frame: None)
        # SIGTTOU among them: tcsetpgrp from a background process group would suspend us.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {signal.SIGCHLD, signal.SIGHUP})
        self._has_ended = self._is_hung_up = False
        self._real_modes: list[Any] | None = None
        while (request := os.read(CONTROL, 1)) == NOTE_MODES:
            self._note_modes()
        self._request = request

    def run(self, command: Sequence[str]) -> None:
        """Run the command, and serve requests until the process that started us has closed CONTROL."""
        if not self._request:  # it was killed already
            self._restore_modes()
            return
        self._group = self._foreground = self._start(command)
        _send(self._group)
        while True:
            readable, _, _ = select.select([CONTROL, self._wakeup], [], [])
            if self._wakeup in readable and signal.SIGHUP in os.read(self._wakeup, 256):
                self._hang_up()
            self._send_changes()
            if CONTROL in readable:
                request = os.read(CONTROL, 1)
                if not request:
                    break
                if request == NOTE_MODES:
                    self._note_modes()
                elif request in (FOREGROUND, BACKGROUND):
                    self._move(request)
                    _send(DONE)
                else:
                    self._send_signal(request[0])
        self._restore_modes()
        self._hang_up()
        if not self._has_ended:
            # The kernel sends another SIGHUP when we end, which would kill what the command's handler of SIGHUP starts.
            os.waitpid(self._group, 0)

    def _note_modes(self) -> None:
        with contextlib.suppress(termios.error):  # the terminal is gone
            self._real_modes = termios.tcgetattr(REAL_TERMINAL)
        _send(DONE)

    def _restore_modes(self) -> None:
        if self._real_modes:  # the process that started us was killed
            with contextlib.suppress(termios.error):
                termios.tcsetattr(REAL_TERMINAL, termios.TCSANOW, self._real_modes)

    def _start(self, command: Sequence[str]) -> int:
        """Fork the command; exit if it cannot be executed."""
        errors, report = os.pipe()
        group = os.fork()
        if group == 0:
            try:
                self._execute(command)
            except OSError as error:
                os.write(report, MESSAGE.pack(-(error.errno or 1)))
            finally:
                os._exit(1)
        os.close(report)
        reported = os.read(errors, MESSAGE.size)
        os.close(errors)
        if reported:
            os.write(CONTROL, reported)
            os._exit(1)
        return group

    def _execute(self, command: Sequence[str]) -> NoReturn:
        os.setpgid(0, 0)
        if self._request == FOREGROUND:
            os.tcsetpgrp(TERMINAL, os.getpid())
        for number in RESET:
            signal.signal(number, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        for number in (signal.SIGCHLD, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        os.closerange(CONTROL, REAL_TERMINAL + 1)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        os.execvp(command[0], list(command))

    def _send_changes(self) -> None:
        """Send how the command's state changed; leave the terminal once it has ended."""
        while not self._has_ended:
            changed, status = os.waitpid(self._group, os.WNOHANG | os.WUNTRACED)
            if not changed:
                return
            if not os.WIFSTOPPED(status):
                self._has_ended = True
                # The kernel sends SIGHUP to the foreground group when we end: background processes shall survive.
                self._set_foreground(os.getpgrp())
                os.closerange(TERMINAL, CONTROL)
            _send(status)

    def _move(self, request: bytes) -> None:
        if request == BACKGROUND:
            self._real_modes = None
        with contextlib.suppress(OSError):  # the terminal is hung up
            current, ours = os.tcgetpgrp(TERMINAL), os.getpgrp()
            if request == FOREGROUND and current == ours:
                # A shell may have given the terminal to one of its jobs.
                self._set_foreground(self._foreground) or self._set_foreground(self._group)
            elif request == BACKGROUND and current != ours:
                self._foreground = current
                self._set_foreground(ours)

    def _set_foreground(self, group: int) -> bool:
        try:
            os.tcsetpgrp(TERMINAL, group)
        except OSError:
            return False
        return True

    def _hang_up(self) -> None:
        """Pass a hang-up of the pseudo-terminal on, once: the kernel sends it to the leader only."""
        if not self._is_hung_up:
            self._is_hung_up = True
            self._send_signal(signal.SIGHUP)
            self._send_signal(signal.SIGCONT)

    def _send_signal(self, number: int) -> None:
        if not self._has_ended:
            with contextlib.suppress(OSError):
                os.killpg(self._group, number)


def _send(message: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the next read says so too
        os.write(CONTROL, MESSAGE.pack(message))


if __name__ == "__main__":
    Leader().run(sys.argv[1:])
    os._exit(0)
