"""The output of a command that `jobstatus run` runs: passed on byte for byte, with a copy for readers.

If our own output is a terminal, the command gets a pseudo-terminal, so that it prints as it would without us: colours,
bars, line by line. Otherwise it gets a pipe. stdout and stderr are separate streams, because the error is the last line
of stderr; text written to both at nearly the same time may change its order. In a TerminalSession they are one stream.
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
from collections.abc import Callable, Iterable, Sequence

CHUNK_BYTES = 65536

QUIET_SECONDS = 0.2
"""After the command has ended, reading stops if no output arrives for this time."""

LONGEST_DRAIN_SECONDS = 2.0
"""After the command has ended, reading stops after waiting for output for this time in total: processes that it left in
the background may write for ever. Time in which our own output is stopped does not count."""

LONGEST_DRAIN_BYTES = 4 * 1024 * 1024
"""After the command has ended, reading stops after this number of bytes: more than a pipe or a pseudo-terminal holds,
so that all that the command wrote has been read."""

Reader = Callable[[bytes], object]


class Stream:
    """One output stream of a command: a thread passes on what is written to `for_command` to `target`."""

    def __init__(
        self,
        target: int,
        *,
        readers: Sequence[Reader],
        on_resize: Callable[[], object] = lambda: None,
        pseudo_terminal: tuple[int, int] | None = None,
    ) -> None:
        """Create a stream.

        Args:
            target: our file descriptor that gets the output.
            readers: functions that get a copy of each chunk, in the stream's thread.
            on_resize: called after the size of the target's terminal was copied to the command's, for one that the
                kernel sends no SIGWINCH for: it is not the command's controlling terminal.
            pseudo_terminal: our end and the command's, for a target that is a terminal. None: open what is needed.
        """
        self.target = target
        self._readers = readers
        self._on_resize = on_resize
        self._size: bytes | None = None
        self.error: OSError | None = None
        """The error of writing to the target; output after it is lost."""
        self.source, self.for_command = pseudo_terminal or self._open()
        if os.isatty(self.source):
            self._size = _size_of(target)
            _set_size(self.source, self._size)
        self.is_open = True
        """Whether `close` was not called yet."""
        self._is_abandoned = False
        self._is_passing = threading.Lock()
        self._end_requested, self._end_request = os.pipe()
        self.ended, self._end = os.pipe()
        """`ended` becomes readable when the stream has ended."""
        self._thread = threading.Thread(target=self._pass_on, name=f"output {target}", daemon=True)

    def start(self) -> None:
        """Start to pass on, after the command was started with `for_command`."""
        os.close(self.for_command)
        self._thread.start()

    def end(self, *, abandon: bool = False) -> None:
        """Let the stream end when it has passed on the rest of the output of a command that has ended.

        Args:
            abandon: end at once.
        """
        self._is_abandoned = abandon
        if self._end_request >= 0:
            os.close(self._end_request)
            self._end_request = -1

    def close(self) -> None:
        """Close the stream, which has ended or was not started. A command that goes on writing gets SIGPIPE, or its
        terminal hangs up."""
        self.is_open = False
        self.end()
        if self._thread.ident is None:
            os.close(self.for_command)
            os.close(self._end)
        else:
            self._thread.join()
        for each in (self.source, self.ended, self._end_requested):
            os.close(each)

    def flush(self) -> None:
        """Wait until the output so far is passed on, LONGEST_DRAIN_SECONDS at most."""
        deadline = time.monotonic() + LONGEST_DRAIN_SECONDS
        while self._thread.is_alive() and self._is_passing.acquire(timeout=max(deadline - time.monotonic(), 0)):
            rest = ready_of([self.source], timeout_seconds=0)
            self._is_passing.release()
            if not rest:
                return
            time.sleep(0.001)

    def copy_size(self) -> None:
        """Give the command's terminal the size of the real one."""
        if self._size is None:
            return
        with contextlib.suppress(OSError):  # a terminal that is gone
            size = _size_of(self.target)
            if size != self._size:
                self._size = size
                _set_size(self.source, size)
                self._on_resize()

    def _open(self) -> tuple[int, int]:
        if os.isatty(self.target):
            with contextlib.suppress(OSError):  # without /dev/pts, use a pipe
                ours, theirs = os.openpty()
                tty.setraw(theirs)  # the real terminal turns \n into \r\n, not this one
                return ours, theirs
        return os.pipe()

    def _pass_on(self) -> None:
        if self._pass_on_until_quiet():
            self._leave_to_cat()
        os.close(self._end)

    def _pass_on_until_quiet(self) -> bool:
        """Pass on what arrives; return whether more may arrive: background processes of the command have it open."""
        is_ending, waited_seconds, passed_bytes = False, 0.0, 0
        with selectors.DefaultSelector() as selector:
            selector.register(self.source, selectors.EVENT_READ)
            selector.register(self._end_requested, selectors.EVENT_READ)
            while waited_seconds < LONGEST_DRAIN_SECONDS and passed_bytes < LONGEST_DRAIN_BYTES:
                started_at = time.monotonic()
                ready = {key.fd for key, _ in selector.select(QUIET_SECONDS if is_ending else None)}
                if is_ending:
                    # At most: we may have been suspended.
                    waited_seconds += min(time.monotonic() - started_at, QUIET_SECONDS)
                    if not ready:
                        break
                if self._end_requested in ready:
                    if self._is_abandoned:
                        return False
                    selector.unregister(self._end_requested)
                    is_ending = True
                if self.source in ready:
                    with self._is_passing:
                        size = self._pass_on_chunk()
                    if not size:
                        return False
                    passed_bytes += size if is_ending else 0
        return True

    def _leave_to_cat(self) -> None:
        """Let a process that outlives us pass on the rest: a daemon would get SIGPIPE at its next write otherwise."""
        os.set_blocking(self.source, True)
        with contextlib.suppress(OSError):
            os.posix_spawnp(
                "cat",
                ["cat"],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, self.source, 0),
                    (os.POSIX_SPAWN_DUP2, self.target, 1),
                    (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                ],
                setsid=True,
                setsigdef=[signal.SIGPIPE],
            )

    def _pass_on_chunk(self) -> int:
        """Pass on one chunk; return its size, 0 at the end of the stream, or if the target cannot be written to."""
        try:
            data = os.read(self.source, CHUNK_BYTES)
        except OSError:  # EIO: a pseudo-terminal has no writer left
            return 0
        self.copy_size()
        try:
            _write(self.target, data)
        except OSError as error:
            self.error = error
        for reader in self._readers:
            reader(data)
        return 0 if self.error else len(data)


def ready_of(to_read: Iterable[int], to_write: Iterable[int] = (), *, timeout_seconds: float | None = None) -> set[int]:
    """Return the file descriptors that can be read from or written to; wait until there is one, None: for ever."""
    with selectors.DefaultSelector() as selector:
        for each in to_read:
            selector.register(each, selectors.EVENT_READ)
        for each in to_write:
            selector.register(each, selectors.EVENT_WRITE)
        return {key.fd for key, _ in selector.select(timeout_seconds)}


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
            ready_of([], [target])
