"""The command that `jobstatus run` runs: started in its own process group, sent our signals, stopped, waited for.

In a terminal it gets a TerminalSession. If standard input or output is something else it is a plain Process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import TypeAlias

from jobstatus_grpc.cli.run.leader import RESET
from jobstatus_grpc.cli.run.process import FAULTS, STDERR, STDOUT, Process
from jobstatus_grpc.cli.run.streams import Reader, ready_of
from jobstatus_grpc.cli.run.terminal_session import TerminalSession

_INTERRUPTS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
"""Forwarded signals that ask the command to end: if it ends with a failure after one, it was interrupted."""

_NOT_FORWARDED = frozenset(
    {
        *(signal.SIGCHLD, signal.SIGCONT, signal.SIGTSTP, signal.SIGWINCH),  # are acted on
        *(signal.SIGKILL, signal.SIGSTOP),  # cannot be caught
        *(signal.SIGTTIN, signal.SIGTTOU, signal.SIGURG),  # do not end us
        *FAULTS,  # are forwarded by another way, see `faults_blocked`
        *RESET,
    }
)

_FORWARDED = frozenset(signal.valid_signals()) - _NOT_FORWARDED
"""All signals that would end us alone by their default action."""

_CAUGHT = (*_FORWARDED, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH, signal.SIGCHLD)

_KEPT = frozenset({signal.SIGCHLD, signal.SIGCONT, signal.SIGWINCH})
"""Signals that keep our handler, which does nothing, as their default action. Another thread may still be about to call
it, and for a signal that has no handler of Python any more Python prints a traceback."""

_POLL_SECONDS = 0.02
"""How often to check whether a stopped process group has ended: no signal announces processes that are not ours."""

_KILL_WAIT_SECONDS = 2.0
"""How long to wait for the process group after SIGKILL: a process in uninterruptible sleep may not end at all."""

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None


@contextlib.contextmanager
def faults_blocked() -> Iterator[None]:
    """Block the signals of FAULTS, in this thread and those that it starts, so that a Child in it can forward them.

    A handler would be called again and again after a real fault. If the signal is blocked, a real fault still ends the
    process at once, and only a signal that another process sent stays pending.
    """
    # None: a handler that is not Python's, such as faulthandler's, which shall have them.
    faults = {each for each in FAULTS if signal.getsignal(each) is not None}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, faults)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Child:
    """A running command. A context manager, for the main thread; only `is_running` and `stop` are for any thread."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stdout: Sequence[Reader] = (),
        stderr: Sequence[Reader] = (),
        terminal: Sequence[Reader] = (),
        kill_after_seconds: float = 10.0,
    ) -> None:
        """Prepare to run `command`.

        Args:
            command: the program and its arguments.
            environment: its variables. None: ours.
            stdout, stderr: functions that get a copy of each output.
            terminal: functions that get a copy of the output if both are one terminal.
            kill_after_seconds: time between SIGTERM and SIGKILL in `stop`.
        """
        self._command = list(command)
        self._environment = os.environ if environment is None else environment
        self._readers = {STDOUT: stdout, STDERR: stderr}
        self._terminal_readers = terminal
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
        self._catch_signals()
        try:
            self._process = TerminalSession.open(self._readers, self._terminal_readers) or Process(self._readers)
            try:
                self._start()
            except OSError:
                self._process.close()
                for stream in self._process.streams:
                    stream.close()
                raise
        except OSError:
            self._restore_signals()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.close()
        self._restore_signals()

    def wait(self) -> int:
        """Wait until the command has ended and all its output is passed on; if `stop` was called, for its whole process
        group. Return the exit code, negative if a signal ended it."""
        code = self._reap()
        while code is None:
            for number in self._wait_for_event():
                self._on_signal(number)
            code = self._reap()
        if self.was_stopped:
            self._wait_for_group()
        self._drain()
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
        errors = [f"{names[each.target]}: {each.error.strerror}" for each in self._process.streams if each.error]
        return ", ".join(errors)

    def interrupted_by(self, code: int) -> int | None:
        """Return the signal that it ended by or after, if we forwarded it or a key sent it; `code` is what `wait`
        returned."""
        number = -code if code < 0 else code - 128
        # While the command has the terminal, keys signal its process group and not ours.
        by_key = self._process.was_lent and number in (signal.SIGINT, signal.SIGQUIT)
        ended_by = number if by_key or number in self._forwarded else None
        return self._interrupted_by or self._process.interrupt_key or ended_by

    def _start(self) -> None:
        try:
            self._process.start(self._command, self._environment)
        except OSError as error:
            program = shutil.which(self._command[0]) if error.errno == errno.ENOEXEC else None
            if program is None:
                raise
            # A script without `#!`, as execvp(3) does; posix_spawnp(3) does not.
            self._process.start(["/bin/sh", program, *self._command[1:]], self._environment)
        self._group = self._process.group
        for stream in self._process.streams:
            stream.start()

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
        self._fault_waiter: threading.Thread | None = None
        if self._mask >= FAULTS:
            self._fault_waiter = threading.Thread(target=self._wait_for_faults, name="fault signals", daemon=True)
            self._fault_waiter.start()

    def _wait_for_faults(self) -> None:
        """Report signals of FAULTS from other processes, until `_restore_signals` sends one to this thread."""
        while True:
            number = signal.sigwait(FAULTS)
            if self._fault_waiter is None:
                return
            os.write(self._wakeup_write_fd, bytes([number]))

    def _restore_signals(self) -> None:
        waiter, self._fault_waiter = self._fault_waiter, None
        if waiter is not None and waiter.ident is not None:
            signal.pthread_kill(waiter.ident, signal.SIGSEGV)
            waiter.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number in self._handlers.keys() - _KEPT:
            signal.signal(number, self._handlers[number])
        signal.set_wakeup_fd(self._wakeup_fd_before)
        os.close(self._wakeup_write_fd)
        os.close(self._wakeup_read_fd)

    def _wait_for_event(self) -> bytes:
        """Wait for signals, and return them; serve the terminal, and close streams that have ended, as they need it."""
        process = self._process
        streams = {each.ended: each for each in process.streams if each.is_open}
        ready = ready_of([self._wakeup_read_fd, *process.fds_to_read, *streams], process.fds_to_write)
        process.serve(ready)
        for fd in ready & streams.keys():
            streams[fd].close()
        return os.read(self._wakeup_read_fd, 256) if self._wakeup_read_fd in ready else b""

    def _drain(self) -> None:
        """Wait until all output is passed on, unless a signal asks to end: our own output may be stopped for long."""
        for stream in self._process.streams:
            if stream.is_open:
                stream.end()
        while any(stream.is_open for stream in self._process.streams):
            for number in self._wait_for_event():
                if number in _INTERRUPTS:
                    return
                self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        """Act on a signal that we got."""
        if number == signal.SIGCHLD:
            pass
        elif number == signal.SIGTSTP:
            self._process.take_back()
            self._send(number)
            _suspend_ourselves()
            self._continue()
        elif number == signal.SIGCONT:
            self._continue()
        elif number == signal.SIGWINCH:
            for stream in self._process.streams:
                if stream.is_open:
                    stream.copy_size()
        else:
            self._forwarded.add(number)
            self._send(number)
            if number in _INTERRUPTS:
                self._interrupted_by = number
                self._send(signal.SIGCONT)

    def _reap(self) -> int | None:
        """Return the exit code if the command has ended. If it was suspended, lend it the terminal or suspend too."""
        if os.getpid() == 1:
            self._reap_orphans()
        while True:
            with self._lock:
                status = self._process.poll()
                if status is None:
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
            if ended is None or ended.si_pid == self._process.child_pid:
                return
            os.waitpid(ended.si_pid, 0)

    def _on_suspended(self, number: int) -> None:
        wants_terminal = number in (signal.SIGTTIN, signal.SIGTTOU)
        if wants_terminal and self._process.lend():
            self._send(signal.SIGCONT)
        elif wants_terminal or self._process.was_lent:
            self._process.take_back()
            _suspend_our_group()
            self._continue()

    def _continue(self) -> None:
        """Continue the command as we were continued, with the terminal if it had it and we have it to lend."""
        if self._process.was_lent:
            self._process.lend()
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
        try:
            if self._group is not None:
                self._process.send(number)
        except OSError:
            return False
        return self._group is not None


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
