"""The load generator's end of a connection: the part of HTTP/2 and gRPC that it needs, on messages already encoded.

A client library would spend more CPU time on a call than the servers measured here. This one spends about 20
microseconds, so that the server is the bottleneck, and it drives every side in the same way.
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.load.client import Reply

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
HEADER_TABLE_SIZE, ENABLE_PUSH, INITIAL_WINDOW_SIZE = 1, 2, 4
DEFAULT_WINDOW = 65_535
MAX_WINDOW = 2**31 - 1
"""The receive window, in bytes, is never renewed: no row receives as much over one connection or stream."""

_FRAME = struct.Struct(">HBBBL")  # the length has 24 bits: 16 + 8
_MESSAGE_FRAME = struct.Struct(">HBBBLBL")  # a frame's header and that of the only message in it
_MESSAGE = struct.Struct(">BL")
# `grpc-status: 0` as servers spell it without a table: name and value are each plain or Huffman-coded.
_OK = re.compile(rb"(?:\x0bgrpc-status|\x88\x9a\xca\xc8\xb2\x12\x34\xda\x8f)(?:\x010|\x81\x07)")


class Connection:
    """One connection of benchmarks.load.client. A call ended well if its stream was closed with grpc-status 0."""

    def __init__(self, address: str, tls: ssl.SSLContext | None = None, token: str = "") -> None:
        """`token` is sent with each call, unless it is empty."""
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname=host)
        self._authority = address.encode()
        self._authorization = f"Bearer {token}".encode() if token else b""
        self._indexed: list[tuple[bytes, bytes]] = []
        self._header_blocks: dict[str, bytes] = {}
        self._replies: dict[int, Reply] = {}
        self._partial: dict[int, bytes] = {}
        self._next_id = 1
        self._input = b""
        self._output: list[bytes] = [PREFACE]
        self._send_window = DEFAULT_WINDOW
        self._blocked: deque[bytes] = deque()
        # With a header table of size 0 the server always spells out the status, so that it can be recognised.
        settings = (HEADER_TABLE_SIZE, 0, ENABLE_PUSH, 0, INITIAL_WINDOW_SIZE, MAX_WINDOW)
        self._frame(SETTINGS, 0, 0, struct.pack(">HLHLHL", *settings))
        self._frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", MAX_WINDOW - DEFAULT_WINDOW))
        self.flush()

    def call(self, path: str, message: bytes, reply: Reply, *, is_last: bool = True) -> None:
        stream_id, self._next_id = self._next_id, self._next_id + 2
        self._replies[stream_id] = reply
        self._frame(HEADERS, END_HEADERS, stream_id, self._header_blocks.get(path) or self._header_block(path))
        framed, flags = len(message) + 5, END_STREAM if is_last else 0
        head = _MESSAGE_FRAME.pack(framed >> 8, framed & 255, DATA, flags, stream_id, 0, len(message))
        # Only the connection's window matters: a request is smaller than a stream's own.
        if self._blocked or framed > self._send_window:
            self._blocked.append(head + message)
        else:
            self._send_window -= framed
            self._output += (head, message)

    def flush(self) -> None:
        if self._output:
            output, self._output = b"".join(self._output), []
            self.socket.sendall(output)

    def receive(self) -> None:
        arrived = self.socket.recv(1 << 18)
        while isinstance(self.socket, ssl.SSLSocket) and (rest := self.socket.pending()):
            arrived += self.socket.recv(rest)  # decrypted already: the selector does not report it
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
                self._receive_data(stream_id, data, body, start)
            elif kind != HEADERS:
                self._receive_control(kind, flags, stream_id, data[body:start])
            elif flags & END_STREAM:
                self._end(stream_id, _OK.search(data, body, start) is not None)
        self._input = data[start:]

    def _header_block(self, path: str) -> bytes:
        """Return the headers of a POST in HPACK: literal the first time, indexed from then on, as in usual clients."""
        known, block = len(self._indexed), b"\x83\x86"
        fields = (b"\x44", path.encode()), (b"\x41", self._authority), (b"\x5f", b"application/grpc")
        authorization = ((b"\x57", self._authorization),) if self._authorization else ()
        for name, value in (*fields, *authorization, (b"\x40\x02te", b"trailers")):
            if (name, value) in self._indexed:
                block += bytes([0x80 | (61 + len(self._indexed) - self._indexed.index((name, value)))])
            else:
                self._indexed.append((name, value))
                block += name + _length(len(value)) + value
        if len(self._indexed) > known:
            self._header_blocks.clear()  # each insertion shifts every index
        else:
            self._header_blocks[path] = block
        return block

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._output += (_FRAME.pack(size >> 8, size & 255, kind, flags, stream_id), payload)

    def _receive_data(self, stream_id: int, data: bytes, start: int, end: int) -> None:
        reply, size = self._replies[stream_id], end - start - 5
        if size >= 0 and stream_id not in self._partial and _MESSAGE.unpack_from(data, start)[1] == size:
            reply.on_message(data[start + 5 : end])
            return
        # The frame does not hold exactly one message.
        rest = self._partial.pop(stream_id, b"") + data[start:end]
        while len(rest) >= 5 and len(rest) >= (end := 5 + _MESSAGE.unpack_from(rest)[1]):
            reply.on_message(rest[5:end])
            rest = rest[end:]
        if rest:
            self._partial[stream_id] = rest

    def _receive_control(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == RST_STREAM and stream_id in self._replies:
            self._end(stream_id, False)
        elif kind == GOAWAY:
            raise ConnectionError(f"the server closes the connection: {payload[8:]!r}")
        elif kind in (SETTINGS, PING) and not flags & ACK:
            self._frame(kind, ACK, 0, payload if kind == PING else b"")
        elif kind == WINDOW_UPDATE and stream_id == 0:
            self._send_window += int.from_bytes(payload, "big")
            while self._blocked and len(self._blocked[0]) - 9 <= self._send_window:
                self._send_window -= len(self._blocked[0]) - 9
                self._output.append(self._blocked.popleft())

    def _end(self, stream_id: int, is_ok: bool) -> None:
        self._partial.pop(stream_id, None)
        self._replies.pop(stream_id).on_end(is_ok)


def _length(number: int) -> bytes:
    """Return the length of a literal string as in HPACK (RFC 7541, 5.1), with a prefix of 7 bits."""
    if number < 0x7F:
        return bytes([number])
    encoded, rest = b"\x7f", number - 0x7F
    while rest >= 0x80:
        encoded += bytes([rest & 0x7F | 0x80])
        rest >>= 7
    return encoded + bytes([rest])
