"""Places for open calls of one kind, or bytes that calls hold, of which one caller cannot take all."""

from __future__ import annotations

MAX_SHARE = 8
"""The number of places that one caller may have, as a multiple of the free ones."""


class Places:
    """Counts places taken by callers: one for each open call, or one for each byte. For one event loop."""

    def __init__(self, limit: int) -> None:
        self.taken = 0
        self._limit = limit
        self._taken_by: dict[str, int] = {}

    def taken_by(self, caller: str) -> int:
        """Return the number of places of one caller."""
        return self._taken_by.get(caller, 0)

    def has(self, caller: str, count: int = 1) -> bool:
        """Return whether there are `count` places for a call.

        One caller gets at most 8 of 9 places, and less the more are taken, so that others always find some.
        """
        free = self._limit - self.taken
        return count <= free and self.taken_by(caller) + count <= MAX_SHARE * (free - count + 1)

    def take(self, caller: str, count: int = 1) -> None:
        """Count places as taken."""
        self.taken += count
        self._taken_by[caller] = self.taken_by(caller) + count

    def free(self, caller: str, count: int = 1) -> None:
        """Count places as taken no more."""
        self.taken -= count
        left = self._taken_by.get(caller, 0) - count
        if left:
            self._taken_by[caller] = left
        else:
            self._taken_by.pop(caller, None)


def host_of(peer: str) -> str:
    """Return the host of a client's address as gRPC writes it; all clients of Unix sockets are one."""
    return peer.rpartition(":")[0]
