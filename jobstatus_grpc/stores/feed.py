"""A store's change feed within its process: the newest change of each job, and the bell that rings for more."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping

from jobstatus_grpc.errors import StoreChangedError, StoreUnavailableError
from jobstatus_grpc.stores.found import Key, is_large
from jobstatus_grpc.stores.interface import Change, ChangeBatch, Position

MAX_BATCH_CHANGES = 1000
MAX_LARGE_CHANGES = 100
TOO_OLD = "the position is older than the store's history"


class Feed:
    """Numbers the changes of one incarnation, and keeps each job's newest: a reader that is behind skips the others.

    For one event loop.
    """

    def __init__(self, incarnation: str, *, sequence: int = 0, max_jobs: int | None = None) -> None:
        """Begin after the change number `sequence`, to keep at most `max_jobs` changes (None: all of them)."""
        self.sequence = sequence
        """The number of the newest change."""
        self.forgotten_sequence = 0
        """The number of the newest removal that was dropped: who stands before it would miss that."""
        self._incarnation = incarnation
        self._max_jobs = max_jobs
        self._complete_after = sequence
        self._newest: OrderedDict[Key, tuple[int, Change]] = OrderedDict()
        self._large: set[Key] = set()
        self._bell = asyncio.Event()
        self._is_ended = False

    def publish(self, changes: Mapping[Key, Change]) -> None:
        """Append `changes`, in their order, and wake whoever waits."""
        newest = self._newest
        for number, (key, change) in enumerate(changes.items(), start=self.sequence + 1):
            newest[key] = (number, change)
            newest.move_to_end(key)
            self._note_size(key, change)
        self.sequence += len(changes)
        while self._max_jobs is not None and (len(newest) > self._max_jobs or len(self._large) > MAX_LARGE_CHANGES):
            key, (self._complete_after, _) = newest.popitem(last=False)
            self._large.discard(key)
        self._ring()

    def _note_size(self, key: Key, change: Change) -> None:
        if self._max_jobs is not None and change.job is not None and is_large(change.job):
            self._large.add(key)
        else:
            self._large.discard(key)

    def end(self) -> None:
        """Refuse to go on: whoever waits, now or later, gets StoreUnavailableError."""
        self._is_ended = True
        self._ring()

    def position(self, sequence: int | None = None) -> Position:
        """Return the position after the change number `sequence` (None: the newest)."""
        return f"{self._incarnation}-{self.sequence if sequence is None else sequence}"

    def sequence_of(self, position: Position) -> int:
        """Return the number of the change that `position` stands after.

        Raises:
            StoreChangedError: this feed has never been there, or has forgotten what follows.
        """
        incarnation, _, digits = position.rpartition("-")
        is_number = digits.isascii() and digits.isdigit() and len(digits) < 20
        if incarnation != self._incarnation or not is_number or int(digits) > self.sequence:
            raise StoreChangedError
        if int(digits) < self.forgotten_sequence:
            raise StoreChangedError(TOO_OLD)
        return int(digits)

    async def wait_beyond(self, sequence: int) -> None:
        """Wait until there is a change after the number `sequence`.

        Raises:
            StoreUnavailableError: the feed has ended.
        """
        while self.sequence <= sequence and not self._is_ended:
            await self._bell.wait()
        if self._is_ended:
            raise StoreUnavailableError("the store is closed")

    def since(self, sequence: int, up_to: int | None = None) -> ChangeBatch | None:
        """Return the first changes after the number `sequence`; None where older ones are wanted than are kept.

        Args:
            up_to: the number of the last change that is wanted; None: the newest.
        """
        if sequence < self._complete_after:
            return None
        end = self.sequence if up_to is None else max(up_to, sequence)
        newer: list[tuple[int, Change]] = []
        for entry in reversed(self._newest.values()):
            if entry[0] <= sequence:
                break
            if entry[0] <= end:
                newer.append(entry)
        newer.reverse()
        last = end if len(newer) <= MAX_BATCH_CHANGES else newer[MAX_BATCH_CHANGES - 1][0]
        return ChangeBatch(self.position(last), [change for _, change in newer[:MAX_BATCH_CHANGES]])

    def forget(self, key: Key) -> None:
        """Drop the newest change of a job that is gone: who stands before it is told to begin again."""
        entry = self._newest.get(key)
        if entry is not None and entry[1].job is None:
            self.forgotten_sequence = max(self.forgotten_sequence, entry[0])
            del self._newest[key]

    def _ring(self) -> None:
        self._bell.set()
        self._bell.clear()
