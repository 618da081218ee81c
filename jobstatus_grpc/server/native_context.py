"""What a behaviour knows of its call on the native transport, and what it can do with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import NoReturn

import grpc
from pygrpc_native import STREAM_CLOSED, STREAM_FULL, STREAM_SENT, NativeGrpcFront

from jobstatus_grpc.errors import StreamAgeError

QUICK_TURNS = 4
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.001, 0.25

Metadata = Sequence[tuple[str, "str | bytes"]]
Details = tuple[Metadata, str, "float | None"]
"""Metadata, peer, and the seconds left until the deadline when the call came, as the front tells them."""


class CallEndedError(Exception):
    """The call has been given its status; nothing is left to do."""


class CallContext:
    """A unary call; as much of grpc.aio.ServicerContext as our behaviours use."""

    __slots__ = ("_call_id", "_details", "_front")

    def __init__(self, front: NativeGrpcFront, call_id: int, details: Details) -> None:
        self._front = front
        self._call_id = call_id
        self._details = details

    def invocation_metadata(self) -> Metadata:
        return self._details[0]

    def peer(self) -> str:
        return self._details[1]

    async def write(self, message: bytes) -> None:
        raise TypeError("a unary call returns its reply")

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        self._front.fail(self._call_id, code.value[0], details, trailing_metadata)
        raise CallEndedError


class StreamContext(CallContext):
    """A call that is answered with a stream."""

    __slots__ = ("_ends_at",)

    def __init__(self, front: NativeGrpcFront, call_id: int, details: Details, *, max_seconds: float) -> None:
        super().__init__(front, call_id, details)
        self._ends_at = time.monotonic() + max_seconds

    def try_send(self, message: bytes) -> bool:
        """Send a message if there is room for it, and the client has not left; tell whether it was sent."""
        return self._front.stream_try_send(self._call_id, message) == STREAM_SENT

    async def write(self, message: bytes) -> None:
        """Send a message, or wait until there is room for it.

        Raises:
            CancelledError: the client has left.
            StreamAgeError: there was no room until the stream reached its greatest age.
        """
        sent = self._front.stream_try_send(self._call_id, message)
        if sent == STREAM_FULL:
            sent = await self._write_when_there_is_room(message)
        if sent == STREAM_CLOSED:
            raise asyncio.CancelledError

    async def _write_when_there_is_room(self, message: bytes) -> int:
        # The front has no event that tells of room: a quick reader makes it within microseconds, and a slow one is
        # asked the less often the longer it takes.
        pause_seconds = FIRST_PAUSE_SECONDS
        for _ in range(QUICK_TURNS):
            await asyncio.sleep(0)
            sent = self._front.stream_try_send(self._call_id, message)
            if sent != STREAM_FULL:
                return sent
        while time.monotonic() < self._ends_at:
            await asyncio.sleep(pause_seconds)
            sent = self._front.stream_try_send(self._call_id, message)
            if sent != STREAM_FULL:
                return sent
            pause_seconds = min(pause_seconds * 1.5, LONGEST_PAUSE_SECONDS)
        raise StreamAgeError
