"""Many watchers of one job, and when each of them has what it waits for."""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.api import Api
from benchmarks.client import CallFailedError, Client

WATCHES_PER_CONNECTION = 50
END_MARK = "the end of it"


class Watch:
    """One watcher; it keeps its messages."""

    __slots__ = ("_audience", "is_ok", "messages")

    def __init__(self, audience: Audience) -> None:
        self.messages: list[bytes] = []
        self.is_ok = False
        self._audience = audience

    def on_message(self, message: bytes) -> None:
        """Keep it, and tell the audience if it is what that waits for."""
        audience = self._audience
        audience.begun += not self.messages
        self.messages.append(message)
        if audience.mark in message:
            audience.reached_at.append(time.perf_counter())

    def on_end(self, is_ok: bool) -> None:
        """Note how the watch ended."""
        self.is_ok = is_ok
        self._audience.ended += 1


class Audience:
    """Watchers of one job. The client's first connection is left to the updates."""

    def __init__(self, client: Client, api: Api, job_id: str) -> None:
        self.begun = 0
        """Watchers that have a message."""
        self.ended = 0
        self.reached_at: list[float] = []
        """When each watcher that has the mark had it."""
        self.mark = b"nothing is waited for"
        self.watches: list[Watch] = []
        self._client = client
        self._api = api
        self._job_id = job_id

    def queue(self, count: int) -> None:
        """Queue the calls of so many more watchers, spread over the connections."""
        request = self._api.watch_request(self._job_id)
        connections = self._client.connections[1:]
        for _ in range(count):
            connection = connections[len(self.watches) % len(connections)]
            self.watches.append(Watch(self))
            connection.call(self._api.watch, request, self.watches[-1], is_last=self._api.ends_watches)

    def open(self, count: int) -> None:
        """Open so many more, and wait until each has its first message.

        Raises:
            CallFailedError: one was refused.
        """
        self.queue(count)
        self._wait(lambda: self.begun == len(self.watches) or self.ended > 0)
        if self.ended:
            raise CallFailedError(f"{self.ended} watches were refused")

    def change(self, mark: str, *, is_end: bool = False) -> list[float]:
        """Change the job, and return how long after the call each watcher had it, in seconds."""
        self.expect(mark)
        started = time.perf_counter()
        self._client.call(self._api.update, self._api.marked_request(self._job_id, mark, is_end=is_end))
        self.wait()
        return [reached - started for reached in self.reached_at]

    def expect(self, mark: str) -> None:
        """Wait from now on for messages that hold `mark`."""
        self.mark = mark.encode()
        self.reached_at = []

    def wait(self) -> None:
        """Wait until all have what they wait for."""
        self._wait(lambda: len(self.reached_at) >= len(self.watches))

    def wait_for_ends(self) -> None:
        """Wait until the server has closed all watches, if it does so."""
        if self._api.ends_watches:
            self._wait(lambda: self.ended == len(self.watches))

    @property
    def saw_the_end(self) -> int:
        """How many have the end as their last message, and were closed with OK if the server closes watches."""
        mark = END_MARK.encode()
        return sum(
            bool(watch.messages) and mark in watch.messages[-1] and (watch.is_ok or not self._api.ends_watches)
            for watch in self.watches
        )

    @property
    def delivered(self) -> int:
        """How many messages arrived after the first of each."""
        return sum(len(watch.messages) - 1 for watch in self.watches)

    @property
    def changes_told(self) -> int:
        """How many changes those messages told."""
        return sum(self._api.changes_in(message) for watch in self.watches for message in watch.messages[1:])

    def _wait(self, is_over: Callable[[], bool]) -> None:
        self._client.run_until(is_over)


def connections_for(watchers: int) -> int:
    """Return how many connections a client needs for so many watchers, and one for updates."""
    return 1 + -(-watchers // WATCHES_PER_CONNECTION)
