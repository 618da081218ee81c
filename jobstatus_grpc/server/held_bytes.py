"""The memory that calls hold while they are open, limited in bytes: in all, and so that one caller cannot take all."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from jobstatus_grpc.errors import ResourceExhaustedError
from jobstatus_grpc.server.config import MIN_HELD_MIB
from jobstatus_grpc.server.places import Places

MIB = 1024 * 1024

REQUEST_FACTOR = 8
"""Bytes held for a byte of a request: the request twice, as a message, as Python objects, and for the store."""

UNCOUNTED_REQUEST_BYTES = 4096
"""Of a unary request: smaller ones are bounded by the number of calls, and counting costs each call time."""

WATCH_BYTES = 25_000
"""Held for an idle watch."""

UNCOUNTED_MESSAGE_BYTES = 16 * 1024
"""Of a stream's message that waits for its reader: smaller ones are part of WATCH_BYTES."""

RESPONSE_FACTOR = 2
"""Bytes held for a byte of a response until it is sent: the transport has a copy."""

UNCOUNTED_RESPONSE_BYTES = 4096
"""Of a response: smaller ones take little more than their call."""

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(slots=True)
class OpenCall:
    """A call that was admitted."""

    caller: str
    """What calls are counted by."""
    error: type[ResourceExhaustedError]
    """What is raised if it holds too much."""
    held_bytes: int = 0


class HeldBytes:
    """Counts what open calls hold. For one event loop."""

    def __init__(self, limit: int) -> None:
        """`limit` is in bytes."""
        self.limit = limit
        self.refusals = 0
        """Calls and messages that were refused."""
        self._places = Places(limit)

    @property
    def total(self) -> int:
        """The bytes that are held now."""
        return self._places.taken

    def add(self, call: OpenCall, size: int, *, is_refusable: bool = True) -> None:
        """Count `size` bytes more for a call; fewer if it is negative. If it is not refusable, in any case.

        Raises:
            ResourceExhaustedError: they are more than the caller, or all callers, may hold; nothing more is counted.
        """
        if size < 0:
            self._places.free(call.caller, -size)
        elif not is_refusable or self._places.has(call.caller, size):
            self._places.take(call.caller, size)
        else:
            self.refusals += 1
            text = "the server holds as much memory for open calls as it may; end some, or try again later"
            raise call.error(text, limit="held_bytes", value=str(self.limit))
        call.held_bytes += size

    def free(self, call: OpenCall) -> None:
        """Count nothing more for a call: it has ended."""
        if call.held_bytes:
            self._places.free(call.caller, call.held_bytes)
            call.held_bytes = 0


def default_limit(workers: int) -> int:
    """Return the limit of one of `workers` processes: together half of the memory of this machine or its cgroup."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not Linux, or "max"
            memory = min(memory, int(Path(path).read_text(encoding="ascii")))
    return max(memory // 2 // workers, MIN_HELD_MIB * MIB)
