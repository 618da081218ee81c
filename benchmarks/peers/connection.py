"""The part of a TCP connection that the peers' protocols share."""

from __future__ import annotations

import socket


class TcpConnection:
    """Sends what is queued in `output`, and returns what arrived. See benchmarks.load.client.Connection."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.output: list[bytes] = []
        self.rest = b""
        """The beginning of a reply that is not complete."""

    def flush(self) -> None:
        if self.output:
            output, self.output = b"".join(self.output), []
            self.socket.sendall(output)

    def arrived(self) -> bytes:
        """Return the rest, and what arrived after it."""
        data = self.socket.recv(1 << 18)
        if not data:
            raise ConnectionError("the server closed the connection")
        return self.rest + data
