"""HTTP/2 as bytes: frames that no client library sends, or not in this number."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import struct
from collections.abc import Iterable, Iterator

from google.protobuf.message import Message

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4
"""A setting."""
CANCEL = struct.pack(">I", 8)


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """A frame, whatever its kind allows."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def settings(*values: tuple[int, int]) -> bytes:
    return frame(SETTINGS, b"".join(struct.pack(">HI", *value) for value in values))


OPENING = PREFACE + settings()


def field(name: str, value: bytes) -> bytes:
    """A header field for HPACK, without its tables and without Huffman's code."""
    return b"\x00" + _string(name.encode()) + _string(value)


def _string(text: bytes) -> bytes:
    """A length as a prefix of 7 bits, and the text."""
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest, length = len(text) - 127, b"\x7f"
    while rest >= 128:
        length += bytes([rest % 128 + 128])
        rest //= 128
    return length + bytes([rest]) + text


def call_fields(method: str, *others: tuple[str, bytes]) -> bytes:
    """The header block of a call of the service."""
    fields = [
        (":method", b"POST"),
        (":scheme", b"http"),
        (":path", f"/jobstatus.v1.JobStatusService/{method}".encode()),
        (":authority", b"localhost"),
        ("te", b"trailers"),
        ("content-type", b"application/grpc"),
        *others,
    ]
    return b"".join(field(*item) for item in fields)


def message(request: Message | bytes) -> bytes:
    """A message as gRPC sends it in DATA frames."""
    data = request if isinstance(request, bytes) else request.SerializeToString()
    return struct.pack(">BI", 0, len(data)) + data


def call(stream: int, method: str, request: Message | bytes) -> bytes:
    """A whole call of one short message."""
    headers = frame(HEADERS, call_fields(method), flags=END_HEADERS, stream=stream)
    return headers + frame(DATA, message(request), flags=END_STREAM, stream=stream)


def streams() -> Iterator[int]:
    """The numbers of a client's streams."""
    return itertools.count(1, 2)


class RawConnection:
    """A TCP connection on which bytes are sent as they are; what the server sends is discarded."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._received_bytes = 0
        self._received = asyncio.Event()
        self._discarding = asyncio.ensure_future(self._discard(reader))

    @classmethod
    async def open(cls, address: str, *, opening: bytes = OPENING) -> RawConnection:
        host, _, port = address.rpartition(":")
        connection = cls(*await asyncio.open_connection(host, int(port)))
        await connection.send(opening)
        return connection

    @property
    def is_closed(self) -> bool:
        """Whether the server has closed it."""
        return self._discarding.done()

    async def receive(self, count: int) -> None:
        """Wait until the server has sent this number of bytes in all."""
        while self._received_bytes < count:
            self._received.clear()
            await self._received.wait()

    async def send(self, data: bytes) -> None:
        """Send bytes, unless the server has closed the connection."""
        with contextlib.suppress(ConnectionError):
            self._writer.write(data)
            await self._writer.drain()

    async def send_each(self, frames: Iterable[bytes], *, at_once: int = 500) -> int:
        """Send frames, some in one write, until the server closes the connection; return their number."""
        sent = 0
        batch: list[bytes] = []
        for item in frames:
            batch.append(item)
            if len(batch) == at_once:
                if self.is_closed:
                    return sent
                await self.send(b"".join(batch))
                sent += len(batch)
                batch = []
        await self.send(b"".join(batch))
        return sent + len(batch)

    async def close(self) -> None:
        self._discarding.cancel()
        await asyncio.wait([self._discarding])
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _discard(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                self._received_bytes += len(data)
                self._received.set()


def resets(count: int, method: str, request: Message | bytes) -> Iterator[bytes]:
    """Calls that are cancelled at once."""
    for stream in itertools.islice(streams(), count):
        yield call(stream, method, request) + frame(RST_STREAM, CANCEL, stream=stream)
