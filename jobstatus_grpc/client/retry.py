"""When to try again: how long to wait, and which errors are worth it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable

import grpc

from jobstatus_grpc.errors import (
    DeadlineExceededError,
    DrainingError,
    JobStatusError,
    TooManyRequestsError,
    UnavailableError,
)
from jobstatus_grpc.wire import status

FIRST_SECONDS = 0.1

LONGEST_SECONDS = 10.0

MAX_RETRY_AFTER_SECONDS = 60.0
"""A server that asks for a longer pause than this is not believed."""

LAST_TRY_SECONDS = 1.0

_REFUSED_AT_THE_DOOR = (DrainingError, TooManyRequestsError)


class Backoff:
    """Pauses between tries: full jitter, so that clients which lost their server together do not return together.

    The n-th pause is random, up to 0.1 s doubled n times, and up to `longest_seconds`.
    """

    def __init__(self, longest_seconds: float = LONGEST_SECONDS) -> None:
        self._longest = longest_seconds
        self._next = FIRST_SECONDS

    def pause_seconds(self, error: Exception | None = None) -> float:
        """Return how long to wait after `error`; what its RetryInfo asks for comes on top."""
        limit = min(self._next, self._longest)
        self._next = limit * 2
        return retry_after_seconds(error) + random.uniform(0, limit)

    def reset(self) -> None:
        """Begin with short pauses again."""
        self._next = FIRST_SECONDS


def retry_after_seconds(error: Exception | None) -> float:
    """Return the pause that the server asked for, 0 where it did not."""
    # On the class it is a default; the server's own RetryInfo stands on the instance.
    asked = vars(error).get("retry_after_seconds", 0.0) if error is not None else 0.0
    return min(max(float(asked), 0.0), MAX_RETRY_AFTER_SECONDS)


class Tries:
    """The tries of one call, within its deadline.

    Tried again are UNAVAILABLE, and a CANCELLED that nobody here asked for, as calls get that a server has received and
    not taken when it ends: neither tells the outcome, but every write carries a request_id. So is TOO_MANY_REQUESTS,
    where the server did nothing and says when it may. All else is for the caller to decide.
    """

    __slots__ = ("_backoff", "_deadline", "_is_last", "_last_error", "_now", "may_have_taken_effect")

    def __init__(self, timeout_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._now = clock
        self._deadline = clock() + timeout_seconds
        self._backoff: Backoff | None = None
        self._last_error: JobStatusError | None = None
        self._is_last = False
        self.may_have_taken_effect = False
        """Whether that can be said of a try before the current one."""

    @property
    def left_seconds(self) -> float:
        """How much of the deadline is left for the next try."""
        return max(self._deadline - self._now(), 0.0)

    def pause_seconds(self, rpc_error: grpc.RpcError) -> float:
        """Return how long to wait before the next try; the last one begins a second before the deadline.

        Raises:
            JobStatusError: what `rpc_error` means, where no other try is allowed or none fits before the deadline.
        """
        error = status.from_rpc_error(rpc_error)
        if self._last_error is not None and isinstance(error, DeadlineExceededError):
            raise DeadlineExceededError(f"{error}; the try before: {self._last_error}") from rpc_error
        left = self.left_seconds
        longest = left - min(LAST_TRY_SECONDS, left / 2)
        is_cancelled = error.metadata.get("code") == "CANCELLED"
        is_worth_it = is_cancelled or isinstance(error, (UnavailableError, TooManyRequestsError))
        if not is_worth_it or self._is_last or retry_after_seconds(error) >= longest:
            raise error from rpc_error
        self._last_error = error
        self.may_have_taken_effect = self.may_have_taken_effect or not isinstance(error, _REFUSED_AT_THE_DOOR)
        self._backoff = self._backoff or Backoff()
        pause = self._backoff.pause_seconds(error)
        self._is_last = pause >= longest
        return min(pause, longest)


async def pause(seconds: float | None, unless: asyncio.Event) -> None:
    """Wait for `seconds`, or until the event is set; None: only for that."""
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(unless.wait(), seconds)
