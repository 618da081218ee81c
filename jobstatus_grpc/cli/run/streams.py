"""The output of a command on its way through us: passed on byte for byte, and shown to readers.

A stream that goes to a terminal is a pseudo-terminal for the command, so that it behaves as it would without us:
colours, bars, output line by line. Anything else is a pipe. The two streams are apart, since an error is looked for in
stderr; what is written to both within a moment may change its order.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import struct
import termios
import threading
import time
import tty
from collections.abc import Callable, Sequence

CHUNK_BYTES = 65536

QUIET_SECONDS = 0.2

LONGEST_DRAIN_SECONDS = 2.0
"""Processes that a command leaves behind may hold its output open: this long after its end we stop reading."""

Reader = Callable[[bytes], object]


class Stream:
    """One output stream of a command: what it writes to `for_command` arrives at `target`."""

    def __init__(self, target: int, *, readers: Sequence[Reader], on_resize: Callable[[], object]) -> None:
        """Take the file descriptor to pass everything on to, and who else wants to see it."""
        self.target = target
        self._readers = readers
        self._on_resize = on_resize
        self._size: bytes | None = None
        self.error: OSError | None = None
        """Why some of what the command wrote is lost: the target took no more."""
        self._source, self.for_command = self._open()
        self._ended, self._end = os.pipe()
        self._thread = threading.Thread(target=self._pass_on, name=f"output {target}", daemon=True)

    def start(self) -> None:
        """Begin to pass on, once the command has its end of the stream."""
        os.close(self.for_command)
        self._thread.start()

    def finish(self) -> None:
        """Pass on what the command has written until now, and stop. The command has ended."""
        os.close(self._end)
        self._thread.join()

    def _open(self) -> tuple[int, int]:
        if os.isatty(self.target):
            with contextlib.suppress(OSError):  # without /dev/pts a pipe must do
                ours, theirs = os.openpty()
                tty.setraw(theirs)  # the real terminal turns \n into \r\n, not this one
                self._size = _size_of(self.target)
                _set_size(ours, self._size)
                return ours, theirs
        return os.pipe()

    def _pass_on(self) -> None:
        stop_at = None
        with selectors.DefaultSelector() as selector, contextlib.suppress(OSError):
            selector.register(self._source, selectors.EVENT_READ)
            selector.register(self._ended, selectors.EVENT_READ)
            while stop_at is None or time.monotonic() < stop_at:
                ready = {key.fd for key, _ in selector.select(None if stop_at is None else QUIET_SECONDS)}
                if self._ended in ready:
                    selector.unregister(self._ended)
                    stop_at = time.monotonic() + LONGEST_DRAIN_SECONDS
                elif not ready:
                    break
                # Raises EIO where a pseudo-terminal has no writer left.
                if self._source in ready and not self._pass_on_chunk():
                    break
        # A command that writes on although nobody reads gets SIGPIPE, as it would without us.
        os.close(self._source)
        os.close(self._ended)

    def _pass_on_chunk(self) -> bool:
        """Pass on what is there; return False at the end of the stream, or where the target takes no more."""
        data = os.read(self._source, CHUNK_BYTES)
        self._follow_resize()
        try:
            _write(self.target, data)
        except OSError as error:
            self.error = error
        for reader in self._readers:
            reader(data)
        return bool(data) and self.error is None

    def _follow_resize(self) -> None:
        """Give the command's terminal the size that the real one has now."""
        if self._size is None:
            return
        size = _size_of(self.target)
        if size != self._size:
            self._size = size
            _set_size(self._source, size)
            self._on_resize()


def _size_of(terminal: int) -> bytes:
    return fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(struct.calcsize("4H")))


def _set_size(terminal: int, size: bytes) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)


def _write(target: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(target, rest) :]
        except BlockingIOError:
            with selectors.DefaultSelector() as selector:
                selector.register(target, selectors.EVENT_WRITE)
                selector.select()
