"""The load generator's end of a connection: as much HTTP/2 and gRPC as a fast client needs, on ready-made bytes.

A client library would cost more a call than the servers measured here do. This one takes some 20 microseconds, so
that the server is the bottleneck, and it drives every side alike.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from typing import Protocol

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
HEADER_TABLE_SIZE, ENABLE_PUSH, INITIAL_WINDOW_SIZE = 1, 2, 4
DEFAULT_WINDOW, MAX_WINDOW, MAX_FRAME = 65_535, 2**31 - 1, 16_384

_FRAME = struct.Struct(">HBBBL")  # a length of 24 bits as 16 + 8
_MESSAGE_FRAME = struct.Struct(">HBBBLBL")  # a frame's head, and that of the only message in it
_MESSAGE = struct.Struct(">BL")
_SETTING = struct.Struct(">HL")

# `grpc-status: 0` as servers spell it where they may index nothing: name and value plain or in Huffman's code.
_NAMES = (b"\x0bgrpc-status", b"\x88\x9a\xca\xc8\xb2\x12\x34\xda\x8f")
_OK_TRAILERS = tuple(name + value for name in _NAMES for value in (b"\x010", b"\x81\x07"))


class Reply(Protocol):
    """What becomes of a call."""

    def on_message(self, message: bytes) -> None:
        """Take a message."""

    def on_end(self, is_ok: bool) -> None:
        """Take the end; `is_ok`: the stream was closed with grpc-status 0."""


class _HeaderTable:
    """Request headers in HPACK: literal the first time, indexed from then on, as any client sends them."""

    def __init__(self, authority: str) -> None:
        self._authority = authority.encode()
        self._inserted: list[tuple[bytes, bytes]] = []
        self._blocks: dict[str, bytes] = {}

    def block(self, path: str) -> bytes:
        """Return the header block of a POST to `path`."""
        known = self._blocks.get(path)
        if known is not None:
            return known
        before = len(self._inserted)
        fields = (
            (b"\x44", path.encode()),
            (b"\x41", self._authority),
            (b"\x5f", b"application/grpc"),
            (b"\x40\x02te", b"trailers"),
        )
        block = b"\x83\x86" + b"".join(self._field(*field) for field in fields)
        if len(self._inserted) > before:
            self._blocks.clear()  # every index has moved
        else:
            self._blocks[path] = block
        return block

    def _field(self, name: bytes, value: bytes) -> bytes:
        if (name, value) in self._inserted:
            return bytes([0x80 | (61 + len(self._inserted) - self._inserted.index((name, value)))])
        self._inserted.append((name, value))
        return name + bytes([len(value)]) + value


class Connection:
    """One connection. Calls are queued by `call` and leave with `flush`; `receive` hands out what came back."""

    def __init__(self, address: str) -> None:
        """Connect to `host:port`."""
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._headers = _HeaderTable(address)
        self._replies: dict[int, Reply] = {}
        self._partial: dict[int, bytes] = {}
        self._ok_trailers: set[bytes] = set()
        self._next_id = 1
        self._input = b""
        self._output: list[bytes] = []
        self._send_window = DEFAULT_WINDOW
        self._blocked: deque[bytes] = deque()
        self._unacknowledged = 0
        # Without a table on our side a status is always spelt out, and we can recognise it.
        settings = ((HEADER_TABLE_SIZE, 0), (ENABLE_PUSH, 0), (INITIAL_WINDOW_SIZE, MAX_WINDOW))
        self._output.append(PREFACE)
        self._frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*setting) for setting in settings))
        self._frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", MAX_WINDOW - DEFAULT_WINDOW))
        self.flush()

    def close(self) -> None:
        """Cut it; open calls are not told."""
        self.socket.close()

    def call(self, path: str, message: bytes, reply: Reply, *, is_last: bool = True) -> None:
        """Queue a call of the method at `path` with its first request; more may follow unless that `is_last`."""
        stream_id, self._next_id = self._next_id, self._next_id + 2
        self._replies[stream_id] = reply
        self._frame(HEADERS, END_HEADERS, stream_id, self._headers.block(path))
        size = len(message)
        framed = size + 5
        if framed > MAX_FRAME:
            raise ValueError(f"a request of {size} bytes does not fit one frame")
        flags = END_STREAM if is_last else 0
        head = _MESSAGE_FRAME.pack(framed >> 8, framed & 255, DATA, flags, stream_id, 0, size)
        # A stream's own window is never smaller than a frame.
        if self._blocked or framed > self._send_window:
            self._blocked.append(head + message)
        else:
            self._send_window -= framed
            self._output += (head, message)

    def flush(self) -> None:
        """Send what is queued."""
        if self._output:
            output, self._output = b"".join(self._output), []
            self.socket.sendall(output)

    def receive(self) -> None:
        """Read what has arrived and hand it to the calls' replies.

        Raises:
            ConnectionError: the server has ended the connection.
        """
        arrived = self.socket.recv(1 << 18)
        if not arrived:
            raise ConnectionError("the server closed the connection")
        data = self._input + arrived if self._input else arrived
        start, end = 0, len(data)
        while end - start >= 9:
            high, low, kind, flags, stream_id = _FRAME.unpack_from(data, start)
            body = start + 9
            start = body + (high << 8 | low)
            if start > end:
                start = body - 9
                break
            if kind == DATA:
                self._take_data(stream_id, data, body, start)
                if flags & END_STREAM:
                    self._end(stream_id, False)
            elif kind != HEADERS:
                self._take_control(kind, flags, stream_id, data[body:start])
            elif not flags & END_HEADERS:
                raise ConnectionError("a header block in several frames is more than this client knows")
            elif flags & END_STREAM:
                self._end(stream_id, self._is_ok(data[body:start]))
        self._input = data[start:]

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._output += (_FRAME.pack(size >> 8, size & 255, kind, flags, stream_id), payload)

    def _take_data(self, stream_id: int, data: bytes, start: int, end: int) -> None:
        self._unacknowledged += end - start
        if self._unacknowledged > MAX_WINDOW // 2:
            self._frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", self._unacknowledged))
            self._unacknowledged = 0
        reply = self._replies.get(stream_id)
        if reply is None:
            return
        if (
            end - start >= 5
            and stream_id not in self._partial
            and _MESSAGE.unpack_from(data, start)[1] == end - start - 5
        ):
            reply.on_message(data[start + 5 : end])
        else:
            self._take_part(stream_id, reply, data[start:end])

    def _take_part(self, stream_id: int, reply: Reply, payload: bytes) -> None:
        """Take what is not one whole message: a piece of one, or several."""
        data = self._partial.pop(stream_id, b"") + payload
        while len(data) >= 5:
            end = 5 + _MESSAGE.unpack_from(data)[1]
            if len(data) < end:
                break
            reply.on_message(data[5:end])
            data = data[end:]
        if data:
            self._partial[stream_id] = data

    def _is_ok(self, trailers: bytes) -> bool:
        if trailers in self._ok_trailers:
            return True
        is_ok = any(spelling in trailers for spelling in _OK_TRAILERS)
        if is_ok:
            self._ok_trailers.add(trailers)
        return is_ok

    def _take_control(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == RST_STREAM:
            self._end(stream_id, False)
        elif kind == GOAWAY:
            raise ConnectionError(f"the server says goodbye: {payload[8:]!r}")
        elif flags & ACK:
            return
        elif kind in (SETTINGS, PING):
            self._frame(kind, ACK, 0, payload if kind == PING else b"")
        elif kind == WINDOW_UPDATE and stream_id == 0:
            self._send_window += int.from_bytes(payload, "big")
            while self._blocked and len(self._blocked[0]) - 9 <= self._send_window:
                self._send_window -= len(self._blocked[0]) - 9
                self._output.append(self._blocked.popleft())

    def _end(self, stream_id: int, is_ok: bool) -> None:
        reply = self._replies.pop(stream_id, None)
        if reply is not None:
            self._partial.pop(stream_id, None)
            reply.on_end(is_ok)
