"""The output of a command that `jobstatus run` runs: passed on byte for byte, with a copy for readers.

If our own output is a terminal, the command gets a pseudo-terminal, so that it prints as it would without us: colours,
bars, line by line. Otherwise it gets a pipe. stdout and stderr are separate streams, because the error is the last line
of stderr; text written to both at nearly the same time may change its order.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import signal
import struct
import termios
import threading
import time
import tty
from collections.abc import Callable, Sequence

CHUNK_BYTES = 65536

QUIET_SECONDS = 0.2
"""After the command has ended, reading stops if no output arrives for this time."""

LONGEST_DRAIN_SECONDS = 2.0
"""After the command has ended, reading stops after this time in any case: processes that it left in the background may
write to its output for ever."""

Reader = Callable[[bytes], object]


class Stream:
    """One output stream of a command: a thread passes on what is written to `for_command` to `target`."""

    def __init__(self, target: int, *, readers: Sequence[Reader], on_resize: Callable[[], object]) -> None:
        """Create a stream.

        Args:
            target: our file descriptor that gets the output.
            readers: functions that get a copy of each chunk, in the stream's thread.
            on_resize: called after the size of the target's terminal was copied to the command's.
        """
        self.target = target
        self._readers = readers
        self._on_resize = on_resize
        self._size: bytes | None = None
        self.error: OSError | None = None
        """The error of writing to the target; output after it is lost."""
        self._source, self.for_command = self._open()
        self._ended, self._end = os.pipe()
        self._thread = threading.Thread(target=self._pass_on, name=f"output {target}", daemon=True)

    def start(self) -> None:
        """Start to pass on, after the command was started with `for_command`."""
        os.close(self.for_command)
        self._thread.start()

    def finish(self) -> None:
        """Pass on the rest of the output, and stop. For when the command has ended."""
        os.close(self._end)
        self._thread.join()

    def _open(self) -> tuple[int, int]:
        if os.isatty(self.target):
            with contextlib.suppress(OSError):  # without /dev/pts, use a pipe
                ours, theirs = os.openpty()
                tty.setraw(theirs)  # the real terminal turns \n into \r\n, not this one
                self._size = _size_of(self.target)
                _set_size(ours, self._size)
                return ours, theirs
        return os.pipe()

    def _pass_on(self) -> None:
        if self._pass_on_until_quiet():
            self._leave_to_cat()
        # If the target failed, a command that goes on writing gets SIGPIPE, as it would without us.
        os.close(self._source)
        os.close(self._ended)

    def _pass_on_until_quiet(self) -> bool:
        """Pass on what arrives; return whether more may arrive: background processes of the command have it open."""
        stop_at = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._source, selectors.EVENT_READ)
            selector.register(self._ended, selectors.EVENT_READ)
            while stop_at is None or time.monotonic() < stop_at:
                ready = {key.fd for key, _ in selector.select(None if stop_at is None else QUIET_SECONDS)}
                if self._ended in ready:
                    selector.unregister(self._ended)
                    stop_at = time.monotonic() + LONGEST_DRAIN_SECONDS
                elif not ready:
                    break
                if self._source in ready and not self._pass_on_chunk():
                    return False
        return True

    def _leave_to_cat(self) -> None:
        """Let a process that outlives us pass on the rest: a daemon would get SIGPIPE at its next write otherwise."""
        with contextlib.suppress(OSError):
            os.posix_spawnp(
                "cat",
                ["cat"],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, self._source, 0),
                    (os.POSIX_SPAWN_DUP2, self.target, 1),
                    (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                ],
                setsid=True,
                setsigdef=[signal.SIGPIPE],
            )

    def _pass_on_chunk(self) -> bool:
        """Pass on one chunk; return False at the end of the stream, or if the target cannot be written to."""
        try:
            data = os.read(self._source, CHUNK_BYTES)
        except OSError:  # EIO: a pseudo-terminal has no writer left
            return False
        self._copy_size()
        try:
            _write(self.target, data)
        except OSError as error:
            self.error = error
        for reader in self._readers:
            reader(data)
        return bool(data) and self.error is None

    def _copy_size(self) -> None:
        """Give the command's terminal the size of the real one."""
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
