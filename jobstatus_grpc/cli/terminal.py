"""The controlling terminal, lent to a command that reads it, as a shell does with its jobs.

The command is a process group of its own, in the background. Until it touches the terminal Ctrl-C and Ctrl-Z come to
us; when it does, the kernel stops it, and it gets the terminal for the rest of its life.
"""

from __future__ import annotations

import contextlib
import os
import signal


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
