"""A command run in a process group of its own: started, passed our signals, stopped, and its end told.

posix_spawn, because gRPC's threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import TypeAlias

from jobstatus_grpc.cli.run.streams import Reader, Stream


class Terminal:
    """Our terminal, if we have one. For the main thread."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._borrower: int | None = None
        with contextlib.suppress(OSError):
            self._fd = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)

    @property
    def is_lent(self) -> bool:
        """Whether it was lent once; it may be back for the time that all of us are stopped."""
        return self._borrower is not None

    def lend(self, group: int) -> bool:
        """Make `group` the one that reads the terminal; return whether it was ours to lend."""
        if self._fd is None or self._foreground() != os.getpgrp():
            return False
        os.tcsetpgrp(self._fd, group)
        self._borrower = group
        return True

    def take_back(self) -> None:
        """Make our group the one that reads the terminal, unless it is somebody else's by now."""
        if self._fd is None or self._borrower is None or self._foreground() != self._borrower:
            return
        # Whoever asks from the background is stopped, unless it ignores this.
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            os.tcsetpgrp(self._fd, os.getpgrp())
        signal.signal(signal.SIGTTOU, before)

    def close(self) -> None:
        """Take it back and forget it."""
        self.take_back()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _foreground(self) -> int | None:
        try:
            return None if self._fd is None else os.tcgetpgrp(self._fd)
        except OSError:
            return None


STDOUT, STDERR = 1, 2

FORWARDED = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})

_CAUGHT = (*FORWARDED, signal.SIGTSTP, signal.SIGCONT, signal.SIGCHLD)

_RESET = (signal.SIGPIPE, signal.SIGXFSZ)
"""What Python ignores, and a command expects to have its usual effect."""

_POLL_SECONDS = 0.02

_KILLED_WITHIN_SECONDS = 2.0

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None


class Child:
    """A running command; a context manager, in the main thread. `stop` may be called from any."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdout: Sequence[Reader] = (),
        stderr: Sequence[Reader] = (),
        kill_after_seconds: float = 10.0,
    ) -> None:
        """Take the command, who wants to see its output, and how long after SIGTERM `stop` waits before SIGKILL."""
        self._command = list(command)
        self._readers = {STDOUT: stdout, STDERR: stderr}
        self._kill_after_seconds = kill_after_seconds
        self._lock = threading.Lock()
        self._group: int | None = None
        self._stop_asked = False
        self._kill_at: float | None = None
        self._interrupted_by: signal.Signals | None = None

    def __enter__(self) -> Child:
        """Start it.

        Raises:
            OSError: it cannot be run.
        """
        self._terminal = Terminal()
        self._catch_signals()
        try:
            self._start()
        except OSError:
            self._let_go()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()

    @property
    def was_stopped(self) -> bool:
        """Whether `stop` reached it while it ran."""
        return self._kill_at is not None

    def interrupted_by(self, code: int) -> signal.Signals | None:
        """Return the signal by which a person or the system ended it before its time; `code` is what `wait` said.

        While it has the terminal, Ctrl-C goes to it and not to us.
        """
        if self._interrupted_by is None and self._terminal.is_lent and code in (-signal.SIGINT, 128 + signal.SIGINT):
            return signal.SIGINT
        return self._interrupted_by

    @property
    def lost_output(self) -> str:
        """Why some of its output could not be passed on; empty where all was."""
        names = {STDOUT: "stdout", STDERR: "stderr"}
        errors = [f"{names[each.target]}: {each.error.strerror}" for each in self._streams if each.error]
        return ", ".join(errors)

    def wait(self) -> int:
        """Wait for its end and for all of its output; return its exit code, negative where a signal ended it."""
        while True:
            for number in os.read(self._woken, 256):
                code = self._heed(signal.Signals(number))
                if code is not None:
                    if self.was_stopped:
                        self._wait_for_group()
                    for stream in self._streams:
                        stream.finish()
                    return code

    def stop(self) -> None:
        """Ask its whole process group to end, now or as soon as it has started; kill it where that takes too long."""
        with self._lock:
            if not self._stop_asked:
                self._stop_asked = True
                self._begin_stop()

    def _start(self) -> None:
        self._streams = [
            Stream(target, readers=readers, on_resize=lambda: self._send(signal.SIGWINCH))
            for target, readers in self._readers.items()
        ]
        # While the lock is held, `stop` waits for the command to be there.
        with self._lock:
            self._group = os.posix_spawnp(
                self._command[0],
                self._command,
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, stream.for_command, target)
                    for stream, target in zip(self._streams, self._readers, strict=True)
                ],
                setpgroup=0,
                setsigdef=_RESET,
            )
            if self._stop_asked:
                self._begin_stop()
        for stream in self._streams:
            stream.start()

    def _catch_signals(self) -> None:
        """Have every signal wake `wait`; what was ignored when we started (nohup) stays so, for the command too."""
        self._woken, wake = os.pipe()
        os.set_blocking(wake, False)
        self._wake_before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._wake = wake
        self._handlers: dict[signal.Signals, _Handler] = {}
        for number in _CAUGHT:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, lambda number, frame: None)

    def _let_go(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wake_before)
        os.close(self._wake)
        os.close(self._woken)
        self._terminal.close()

    def _heed(self, number: signal.Signals) -> int | None:
        """Act on a signal that came to us; return the command's exit code once it has ended."""
        if number == signal.SIGCHLD:
            return self._look()
        if number == signal.SIGTSTP:
            self._send(number)
            _stop_ourselves()
            self._continue()
        elif number == signal.SIGCONT:
            self._continue()
        elif number in FORWARDED:
            self._interrupted_by = number
            self._send(number)
            self._send(signal.SIGCONT)
        return None

    def _look(self) -> int | None:
        """Return the exit code if the command has ended. Where it was stopped, give it the terminal or stop too."""
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
            self._on_stopped(os.WSTOPSIG(status))

    def _on_stopped(self, number: int) -> None:
        assert self._group is not None
        wants_terminal = number in (signal.SIGTTIN, signal.SIGTTOU)
        if wants_terminal and self._terminal.lend(self._group):
            self._send(signal.SIGCONT)
        elif wants_terminal or self._terminal.is_lent:
            self._terminal.take_back()
            _stop_our_group()
            self._continue()

    def _continue(self) -> None:
        """Let the command go on as we do, with the terminal if it had that and it is ours to lend."""
        if self._terminal.is_lent and self._group is not None:
            self._terminal.lend(self._group)
        self._send(signal.SIGCONT)

    def _begin_stop(self) -> None:
        """Send SIGTERM, and SIGKILL later; with the lock held."""
        if self._group is not None and self._send(signal.SIGTERM):
            self._send(signal.SIGCONT)
            self._kill_at = time.monotonic() + self._kill_after_seconds
            timer = threading.Timer(self._kill_after_seconds, self._send, (signal.SIGKILL,))
            timer.daemon = True
            timer.start()

    def _wait_for_group(self) -> None:
        """Wait until all that the command started has ended too, or is killed."""
        assert self._kill_at is not None
        while time.monotonic() < self._kill_at + _KILLED_WITHIN_SECONDS and self._group_lives():
            time.sleep(_POLL_SECONDS)
        with self._lock:
            self._group = None

    def _group_lives(self) -> bool:
        assert self._group is not None
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-self._group, os.WNOHANG)  # as process 1 we inherit the command's children
        return self._send(0)

    def _send(self, number: int) -> bool:
        """Signal the group, if it is there; return whether it was reached."""
        group = self._group
        try:
            if group is not None:
                os.killpg(group, number)
        except (ProcessLookupError, PermissionError):
            return False
        return group is not None


def _stop_ourselves() -> None:
    """Stop as Ctrl-Z does, until somebody continues us; nothing happens where nobody could."""
    before = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    # To this thread: sent to the process, it might arrive only after its handler is back.
    signal.pthread_kill(threading.get_ident(), signal.SIGTSTP)
    signal.signal(signal.SIGTSTP, before)


def _stop_our_group() -> None:
    """Stop with the rest of our process group, such as a script that waits for us: the terminal has not told it."""
    before = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    os.killpg(os.getpgrp(), signal.SIGTSTP)
    signal.signal(signal.SIGTSTP, before)
    _stop_ourselves()
