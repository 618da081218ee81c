"""Places for open calls of one kind, of which one caller cannot take all."""

from __future__ import annotations

MAX_SHARE = 8
"""The number of places that one caller may have, as a multiple of the free ones."""


class Places:
    """Counts open calls by their caller. For one event loop."""

    def __init__(self, limit: int) -> None:
        self.taken = 0
        self._limit = limit
        self._taken_by: dict[str, int] = {}

    def taken_by(self, caller: str) -> int:
        """Return the number of places of one caller."""
        return self._taken_by.get(caller, 0)

    def has_one(self, caller: str) -> bool:
        """Return whether there is a place for a call.

        One caller gets at most 8 of 9 places, and less the more are taken, so that others always find some.
        """
        free = self._limit - self.taken
        return free > 0 and self.taken_by(caller) < MAX_SHARE * free

    def take(self, caller: str) -> None:
        """Count a call that begins."""
        self.taken += 1
        self._taken_by[caller] = self.taken_by(caller) + 1

    def free(self, caller: str) -> None:
        """Count a call no more."""
        self.taken -= 1
        self._taken_by[caller] -= 1
        if not self._taken_by[caller]:
            del self._taken_by[caller]


def host_of(peer: str) -> str:
    """Return the host of a client's address as gRPC writes it; all clients of Unix sockets are one."""
    return peer.rpartition(":")[0]
