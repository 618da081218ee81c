"""A rate with a burst, and the bucket of tokens that enforces it."""

from __future__ import annotations

from dataclasses import dataclass

MAX_SPREAD_SECONDS = 5.0
"""Callers that are refused together are asked to return one by one, spread over this time at most."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A number a second, and how many may come at once after a quiet time."""

    per_second: float
    burst: float


ROUNDING = 1e-6
"""Of a token: a caller that waits as long as it was asked to is not refused for a rounding error."""


class TokenBucket:
    """Fills by `rate.per_second`, up to `rate.burst`. One token is enough to take any number: the rest is a debt."""

    __slots__ = ("_filled_at", "_promised_at", "_tokens", "rate")

    def __init__(self, rate: Rate, now: float) -> None:
        self.rate = rate
        self._tokens = rate.burst
        self._filled_at = now
        self._promised_at = now

    def change(self, rate: Rate, now: float) -> None:
        """Take another rate, and keep what is used."""
        self._fill(now)
        self.rate = rate
        self._tokens = min(self._tokens, rate.burst)

    def is_full(self, now: float) -> bool:
        """Return whether nothing would be lost by a new bucket."""
        self._fill(now)
        return self._tokens >= self.rate.burst

    def seconds_until_room(self, now: float) -> float:
        """Return the time until there is a token; 0: there is one."""
        self._fill(now)
        missing = 1 - self._tokens
        return missing / self.rate.per_second if missing > ROUNDING else 0.0

    def take(self, count: int) -> None:
        """Take tokens."""
        self._tokens -= count

    def promise(self, count: int, now: float) -> float:
        """Return the time after which a refused caller should return: each refusal gets a later one than the last."""
        free_at = now + self.seconds_until_room(now)
        at = min(max(free_at, self._promised_at), free_at + MAX_SPREAD_SECONDS)
        self._promised_at = at + count / self.rate.per_second
        return at - now

    def _fill(self, now: float) -> None:
        self._tokens = min(self._tokens + (now - self._filled_at) * self.rate.per_second, self.rate.burst)
        self._filled_at = now
