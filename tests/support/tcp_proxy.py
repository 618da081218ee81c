"""A TCP proxy for connections that a test cuts, delays or freezes."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable

RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class TcpProxy:
    """Passes bytes between its own `address` and a server's; a context manager. `cut` resets all connections.

    `freeze` keeps them open and passes nothing more, as where a router has forgotten them.
    """

    def __init__(self, address: str, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        """A connection on which the server has sent this number of bytes is reset; None: no limit. For new ones."""
        self.max_request_bytes: int | None = None
        """The same for bytes that the client has sent."""
        self.delay_seconds: Callable[[], float] = float
        """Called before bytes are passed on; connections with other delays overtake each other."""
        host, _, port = address.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._frozen: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> TcpProxy:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        # Closing does not wake a thread in accept().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def freeze(self) -> None:
        with self._lock:
            self._frozen.update(self._sockets)

    def cut(self) -> None:
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for end in sockets:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            try:
                server = socket.create_connection(self._server)
            except OSError:  # the server is down
                client.close()
                continue
            with self._lock:
                self._sockets += [client, server]
            for source, target, max_bytes in (
                (client, server, self.max_request_bytes),
                (server, client, self.max_bytes),
            ):
                self._threads.append(threading.Thread(target=self._pass_on, args=(source, target, max_bytes)))
                self._threads[-1].start()

    def _pass_on(self, source: socket.socket, target: socket.socket, max_bytes: int | None) -> None:
        left = max_bytes
        with contextlib.suppress(OSError):
            while data := source.recv(65536 if left is None else min(left, 65536)):
                if source in self._frozen:
                    continue
                time.sleep(self.delay_seconds())
                target.sendall(data)
                left = None if left is None else left - len(data)
                if left == 0:
                    source.shutdown(socket.SHUT_RDWR)
        if source not in self._frozen:
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)
        source.close()
