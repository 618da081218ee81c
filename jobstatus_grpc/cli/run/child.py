"""The command that `jobstatus run` runs: started in its own process group, sent our signals, stopped, waited for."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import TypeAlias

from jobstatus_grpc.cli.run.streams import Reader, Stream

STDOUT, STDERR = 1, 2

_INTERRUPTS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
"""Forwarded signals that ask the command to end: if it ends with a failure after one, it was interrupted."""

_RESET = (signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that Python ignores; a command expects their default action."""

_NOT_FORWARDED = frozenset(
    {
        *(signal.SIGCHLD, signal.SIGCONT, signal.SIGTSTP),  # are acted on
        *(signal.SIGKILL, signal.SIGSTOP),  # cannot be caught
        *(signal.SIGTTIN, signal.SIGTTOU, signal.SIGURG, signal.SIGWINCH),  # do not end us
        *(signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE),  # a fault of ours would repeat for ever
        *_RESET,
    }
)

_FORWARDED = frozenset(signal.valid_signals()) - _NOT_FORWARDED
"""All signals that would end us alone by their default action."""

_CAUGHT = (*_FORWARDED, signal.SIGTSTP, signal.SIGCONT, signal.SIGCHLD)

_POLL_SECONDS = 0.02
"""How often to check whether a stopped process group has ended: no signal announces processes that are not ours."""

_KILL_WAIT_SECONDS = 2.0
"""How long to wait for the process group after SIGKILL: a process in uninterruptible sleep may not end at all."""

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None


class Child:
    """A running command. A context manager, for the main thread; only `is_running` and `stop` are for any thread."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stdout: Sequence[Reader] = (),
        stderr: Sequence[Reader] = (),
        kill_after_seconds: float = 10.0,
    ) -> None:
        """Prepare to run `command`.

        Args:
            command: the program and its arguments.
            environment: its variables. None: ours.
            stdout, stderr: functions that get a copy of each output.
            kill_after_seconds: time between SIGTERM and SIGKILL in `stop`.
        """
        self._command = list(command)
        self._environment = os.environ if environment is None else environment
        self._readers = {STDOUT: stdout, STDERR: stderr}
        self._kill_after_seconds = kill_after_seconds
        # Held while `stop` sends SIGTERM and while the command is reaped: after that its id may be another process's.
        self._lock = threading.Lock()
        self._group: int | None = None
        self._kill_at: float | None = None
        self._forwarded: set[int] = set()
        self._interrupted_by: int | None = None

    def __enter__(self) -> Child:
        """Start the command.

        Raises:
            OSError: it cannot be started.
        """
        self._terminal = Terminal()
        self._catch_signals()
        try:
            self._start()
        except OSError:
            self._restore_signals_and_terminal()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore_signals_and_terminal()

    def wait(self) -> int:
        """Wait until the command has ended and all its output is passed on; if `stop` was called, for its whole process
        group. Return the exit code, negative if a signal ended it."""
        while True:
            for number in os.read(self._wakeup_read_fd, 256):
                code = self._on_signal(number)
                if code is not None:
                    if self.was_stopped:
                        self._wait_for_group()
                    for stream in self._streams:
                        stream.finish()
                    return code

    def stop(self) -> None:
        """Send SIGTERM to the command's process group, and SIGKILL after `kill_after_seconds`."""
        with self._lock:
            if not self.was_stopped and self._send(signal.SIGTERM):
                self._send(signal.SIGCONT)
                self._kill_at = time.monotonic() + self._kill_after_seconds
                timer = threading.Timer(self._kill_after_seconds, self._send, (signal.SIGKILL,))
                timer.daemon = True
                timer.start()

    @property
    def is_running(self) -> bool:
        """Whether `wait` has not yet seen its end."""
        return self._group is not None

    @property
    def was_stopped(self) -> bool:
        """Whether `stop` sent SIGTERM while it was running."""
        return self._kill_at is not None

    @property
    def lost_output(self) -> str:
        """Why some output could not be passed on: `stdout: No space left on device`; empty if all was."""
        names = {STDOUT: "stdout", STDERR: "stderr"}
        errors = [f"{names[each.target]}: {each.error.strerror}" for each in self._streams if each.error]
        return ", ".join(errors)

    def interrupted_by(self, code: int) -> int | None:
        """Return the forwarded signal that it ended by or after, or SIGINT if Ctrl-C ended it; `code` is what `wait`
        returned."""
        number = -code if code < 0 else code - 128
        # While the command has the terminal, Ctrl-C signals its process group and not ours.
        by_key = self._terminal.was_lent and number == signal.SIGINT
        return self._interrupted_by or (number if by_key or number in self._forwarded else None)

    def _start(self) -> None:
        self._streams = [
            Stream(target, readers=readers, on_resize=lambda: self._send(signal.SIGWINCH))
            for target, readers in self._readers.items()
        ]
        try:
            self._group = self._spawn(self._command)
        except OSError as error:
            program = shutil.which(self._command[0]) if error.errno == errno.ENOEXEC else None
            if program is None:
                raise
            # A script without `#!`, as execvp(3) does; posix_spawnp(3) does not.
            self._group = self._spawn(["/bin/sh", program, *self._command[1:]])
        for stream in self._streams:
            stream.start()

    def _spawn(self, command: list[str]) -> int:
        # Not subprocess: gRPC's threads do not survive its fork.
        return os.posix_spawnp(
            command[0],
            command,
            self._environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, stream.for_command, target)
                for stream, target in zip(self._streams, self._readers, strict=True)
            ],
            setpgroup=0,
            setsigdef=_RESET,
        )

    def _catch_signals(self) -> None:
        """Wake `wait` on every signal. A signal that is ignored now (nohup) stays ignored, also in the command."""
        self._wakeup_read_fd, self._wakeup_write_fd = os.pipe()
        os.set_blocking(self._wakeup_write_fd, False)
        self._wakeup_fd_before = signal.set_wakeup_fd(self._wakeup_write_fd, warn_on_full_buffer=False)
        self._handlers: dict[int, _Handler] = {}
        for number in _CAUGHT:
            # None: a handler that is not Python's, such as faulthandler's, which could not be restored.
            if signal.getsignal(number) not in (signal.SIG_IGN, None) or number == signal.SIGCHLD:
                self._handlers[number] = signal.signal(number, lambda number, frame: None)
        # Ignored or blocked SIGCHLD is inherited too, for example from a daemon, and would hide the command's end.
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})

    def _restore_signals_and_terminal(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup_fd_before)
        os.close(self._wakeup_write_fd)
        os.close(self._wakeup_read_fd)
        self._terminal.close()

    def _on_signal(self, number: int) -> int | None:
        """Act on a signal that we got; return the command's exit code if it has ended."""
        if number == signal.SIGCHLD:
            return self._reap()
        if number == signal.SIGTSTP:
            self._send(number)
            _suspend_ourselves()
            self._continue()
        elif number == signal.SIGCONT:
            self._continue()
        else:
            self._forwarded.add(number)
            self._send(number)
            if number in _INTERRUPTS:
                self._interrupted_by = number
                self._send(signal.SIGCONT)
        return None

    def _reap(self) -> int | None:
        """Return the exit code if the command has ended. If it was suspended, lend it the terminal or suspend too."""
        if os.getpid() == 1:
            self._reap_orphans()
        while True:
            with self._lock:
                assert self._group is not None
                changed, status = os.waitpid(self._group, os.WNOHANG | os.WUNTRACED)
                if not changed:
                    return None
                if not os.WIFSTOPPED(status):
                    if not self.was_stopped:
                        self._group = None
                    return os.waitstatus_to_exitcode(status)
            self._on_suspended(os.WSTOPSIG(status))

    def _reap_orphans(self) -> None:
        """Reap the processes that we inherited as process 1, as the init of a container does."""
        while True:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid == self._group:
                return
            os.waitpid(ended.si_pid, 0)

    def _on_suspended(self, number: int) -> None:
        assert self._group is not None
        wants_terminal = number in (signal.SIGTTIN, signal.SIGTTOU)
        if wants_terminal and self._terminal.lend(self._group):
            self._send(signal.SIGCONT)
        elif wants_terminal or self._terminal.was_lent:
            self._terminal.take_back()
            _suspend_our_group()
            self._continue()

    def _continue(self) -> None:
        """Continue the command as we were continued, with the terminal if it had it and we have it to lend."""
        if self._terminal.was_lent and self._group is not None:
            self._terminal.lend(self._group)
        self._send(signal.SIGCONT)

    def _wait_for_group(self) -> None:
        """Wait until all processes in the command's group have ended, or have been killed."""
        assert self._kill_at is not None
        while time.monotonic() < self._kill_at + _KILL_WAIT_SECONDS and self._group_exists():
            time.sleep(_POLL_SECONDS)
        with self._lock:
            self._group = None

    def _group_exists(self) -> bool:
        assert self._group is not None
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-self._group, os.WNOHANG)  # as process 1 we inherit the command's children
        return self._send(0)

    def _send(self, number: int) -> bool:
        """Send a signal to the command's process group; return whether the group exists."""
        group = self._group
        try:
            if group is not None:
                os.killpg(group, number)
        except (ProcessLookupError, PermissionError):
            return False
        return group is not None


class Terminal:
    """Our controlling terminal, if there is one: lent to the command when it reads from it. For the main thread."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._borrower: int | None = None
        with contextlib.suppress(OSError):
            self._fd = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)

    @property
    def was_lent(self) -> bool:
        """Whether it was ever lent; while all of us are suspended it is taken back."""
        return self._borrower is not None

    def lend(self, group: int) -> bool:
        """Make `group` the terminal's foreground process group; return False if that is not ours to do."""
        if self._fd is None or self._foreground() != os.getpgrp():
            return False
        os.tcsetpgrp(self._fd, group)
        self._borrower = group
        return True

    def take_back(self) -> None:
        """Make our process group the foreground one again, if the borrower still is."""
        if self._fd is None or self._borrower is None or self._foreground() != self._borrower:
            return
        # tcsetpgrp from a background process group sends SIGTTOU, which suspends us unless it is ignored.
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            os.tcsetpgrp(self._fd, os.getpgrp())
        signal.signal(signal.SIGTTOU, before)

    def close(self) -> None:
        """Take the terminal back and close it."""
        self.take_back()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _foreground(self) -> int | None:
        try:
            return None if self._fd is None else os.tcgetpgrp(self._fd)
        except OSError:
            return None


def _suspend_ourselves() -> None:
    """Suspend this process as Ctrl-Z does, until SIGCONT. No effect in an orphaned process group."""
    before = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    # To this thread: sent to the process, it might arrive only after its handler is back.
    signal.pthread_kill(threading.get_ident(), signal.SIGTSTP)
    signal.signal(signal.SIGTSTP, before)


def _suspend_our_group() -> None:
    """Suspend our whole process group, such as a script that waits for us: Ctrl-Z went to the command's group only."""
    before = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    os.killpg(os.getpgrp(), signal.SIGTSTP)
    signal.signal(signal.SIGTSTP, before)
    _suspend_ourselves()
