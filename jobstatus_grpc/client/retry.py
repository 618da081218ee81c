"""When to try again: which errors are worth it, and how long to wait."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable

import grpc

from jobstatus_grpc.client import values
from jobstatus_grpc.errors import (
    DeadlineExceededError,
    DrainingError,
    InternalError,
    JobStatusError,
    RetryableError,
    TooManyRequestsError,
    UnavailableError,
)
from jobstatus_grpc.wire import status

FIRST_PAUSE_SECONDS = 0.1
"""Limit of the first pause: short enough for a restarted server, long enough not to load a busy one."""

LONGEST_PAUSE_SECONDS = 10.0
"""Limit of all pauses: a server that is back after hours is found this soon."""

LONGEST_FINAL_PAUSE_SECONDS = 1.0
"""Limit of the pauses at the end of a tracked job or reporter, which waits a few seconds only."""

SHORTEST_PACE_SECONDS, LONGEST_PACE_SECONDS = 0.05, 5.0
"""Limits of the pause that senders of reports add while their rate is limited."""

PACE_DECREASE = 0.9
"""Factor of that pause after each success: about one call in seven is refused once the pause is right."""

PACE_LOG_SECONDS = 60.0

MAX_RETRY_AFTER_SECONDS = 60.0
"""Limit of the pause that a server may ask for."""

LAST_TRY_SECONDS = 1.0
"""Time before a call's deadline that is kept for its last try."""


PROXY_REFUSAL_SECONDS = 60.0
"""Limit of the time that refusals by a proxy count as an outage: longer than a reload or a rolling update takes."""

FIRST_DEAD_SECONDS = 1.0
"""Time without an answer after which a missed deadline means that the connection is dead; doubled for each dead one."""

LONGEST_DEAD_SECONDS = 16.0
"""Limit of that time: longer than any handshake takes."""

_CODES_OF_PROXIES = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)


class ClientClosedError(UnavailableError):
    """The client is closed."""


class Backoff:
    """Pauses between tries: full jitter, so that clients that lost one server do not return together.

    The n-th pause is random, up to 0.1 s doubled n times, and up to `longest_seconds`.
    """

    def __init__(self, longest_seconds: float = LONGEST_PAUSE_SECONDS) -> None:
        self._longest = longest_seconds
        self._next = FIRST_PAUSE_SECONDS

    def pause_seconds(self, error: Exception | None = None) -> float:
        """Return how long to wait after `error`; the pause in its RetryInfo is added."""
        limit = min(self._next, self._longest)
        self._next = limit * 2
        return retry_after_seconds(error) + random.uniform(0, limit)

    def reset(self) -> None:
        """Begin with short pauses again."""
        self._next = FIRST_PAUSE_SECONDS


class Pace:
    """The pause that a sender of reports adds between two calls while the service limits their rate.

    Otherwise every second call would be refused. What is reported in the pause is merged into the next call.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._logged_at = float("-inf")

    def slow_down(self, now: float) -> bool:
        """Take a TOO_MANY_REQUESTS; return whether to log it: not more often than once a minute."""
        self.seconds = min(max(2 * self.seconds, SHORTEST_PACE_SECONDS), LONGEST_PACE_SECONDS)
        is_logged = now - self._logged_at >= PACE_LOG_SECONDS
        if is_logged:
            self._logged_at = now
        return is_logged

    def speed_up(self) -> None:
        """Take a success."""
        self.seconds = self.seconds * PACE_DECREASE if self.seconds > SHORTEST_PACE_SECONDS / 2 else 0.0


def retry_after_seconds(error: Exception | None) -> float:
    """Return the pause that the server asked for; 0: none."""
    # On the class it is a default; the server's own RetryInfo is on the instance.
    asked = vars(error).get("retry_after_seconds", 0.0) if error is not None else 0.0
    return min(max(float(asked), 0.0), MAX_RETRY_AFTER_SECONDS)


class RetryBudget:
    """The tries of one call within its deadline.

    Retried are UNAVAILABLE, and a CANCELLED that this client did not request, which calls get that a server has
    received and not processed when it ends: neither says whether the call took effect, but every write carries a
    request_id. TOO_MANY_REQUESTS is retried after the pause that the server asks for. All other errors are raised.
    """

    __slots__ = ("_backoff", "_deadline", "_is_last", "_last_error", "_now", "may_have_taken_effect")

    def __init__(self, timeout_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._now = clock
        self._deadline = clock() + values.seconds(timeout_seconds, "timeout_seconds")
        self._backoff: Backoff | None = None
        self._last_error: JobStatusError | None = None
        self._is_last = False
        self.may_have_taken_effect = False
        """Whether a try before the current one may have taken effect."""

    @property
    def left_seconds(self) -> float:
        """Time until the deadline, for the next try."""
        return max(self._deadline - self._now(), 0.0)

    def pause_seconds(self, rpc_error: grpc.RpcError) -> float:
        """Return how long to wait before the next try; the last one begins LAST_TRY_SECONDS before the deadline.

        Raises:
            JobStatusError: the meaning of `rpc_error`, if it is not retried or no try fits before the deadline.
        """
        error = status.better_explained(status.from_rpc_error(rpc_error), self._last_error)
        if self._last_error is not None and isinstance(error, DeadlineExceededError):
            raise DeadlineExceededError(f"{error}; the try before: {self._last_error}") from rpc_error
        left = self.left_seconds
        longest = left - min(LAST_TRY_SECONDS, left / 2)
        is_cancelled = error.metadata.get("code") == "CANCELLED"
        is_retried = is_cancelled or isinstance(error, (UnavailableError, TooManyRequestsError))
        if not is_retried or self._is_last or retry_after_seconds(error) >= longest:
            raise error from rpc_error
        self._last_error = error
        was_refused = isinstance(error, (DrainingError, TooManyRequestsError))
        self.may_have_taken_effect = self.may_have_taken_effect or not was_refused
        self._backoff = self._backoff or Backoff()
        pause = self._backoff.pause_seconds(error)
        self._is_last = pause >= longest
        return min(pause, longest)


class ProxyRefusals:
    """Counts refusals by a proxy as an outage, for a while, if the service has answered before.

    While a proxy is reloaded or its backend moves, it may answer HTTP 401, 403 or 404, or end streams, for which gRPC
    makes UNAUTHENTICATED, PERMISSION_DENIED, UNIMPLEMENTED or DEADLINE_EXCEEDED. The service's own refusals have
    details.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._now = clock
        self._was_answered = False
        self._refused_since: float | None = None

    def service_answered(self) -> None:
        """Note an answer of the service."""
        self._was_answered = True
        self._refused_since = None

    def is_outage(self, error: grpc.RpcError) -> bool:
        """Return whether to try again after `error`, rather than raise it."""
        if not self._was_answered or error.code() not in _CODES_OF_PROXIES or status.has_details(error):
            return False
        now = self._now()
        self._refused_since = now if self._refused_since is None else self._refused_since
        return now - self._refused_since < PROXY_REFUSAL_SECONDS


class Liveness:
    """Decides when a connection counts as dead: calls after that use a new one.

    gRPC keeps a connection until its keepalive fails, which takes 25 seconds. If a call has missed its deadline, or a
    watch its heartbeats, and nothing else was received on the connection, a new one may work at once.

    Any thread may use it.
    """

    def __init__(self, before: Liveness | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with a connection that takes the place of `before`; None: there is none."""
        self.is_dead = False
        self._now = clock
        self._calls: set[object] = set()
        self._received_at = clock()
        self._waiting_since: float | None = None
        # Otherwise calls with short deadlines would open connections faster than a slow network lets them.
        self._patience_seconds: float = FIRST_DEAD_SECONDS
        if before is not None and before.is_dead:
            self._patience_seconds = min(2 * before._patience_seconds, LONGEST_DEAD_SECONDS)

    @property
    def is_idle(self) -> bool:
        """Whether no call is in flight."""
        return not self._calls

    def begin(self, call: object) -> None:
        """Note a call that begins."""
        self._calls.add(call)
        if self._waiting_since is None:
            self._waiting_since = self._now()

    def end(self, call: object) -> None:
        """Note a call that has ended."""
        self._calls.discard(call)

    def received(self) -> None:
        """Note a message or the status of a call."""
        self._received_at = self._now()
        self._waiting_since = None
        self._patience_seconds = FIRST_DEAD_SECONDS

    def failed(self, error: grpc.RpcError) -> None:
        """Note a call that failed."""
        code = error.code()
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            since = self._waiting_since
            self.is_dead = self.is_dead or (since is not None and self._now() - since >= self._patience_seconds)
        elif code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            self.received()

    def was_silent(self, seconds: float) -> None:
        """Note a stream on which nothing was received for `seconds`."""
        self.is_dead = self.is_dead or self._now() - self._received_at >= seconds * 0.9


def is_transient(error: Exception) -> bool:
    """Return whether a report that failed with `error` may succeed later: reports are retried after more than calls."""
    if isinstance(error, ClientClosedError):
        return False
    transient = (RetryableError, DeadlineExceededError, InternalError)
    return isinstance(error, transient) or type(error) is JobStatusError


async def pause(seconds: float | None, unless: asyncio.Event) -> None:
    """Wait for `seconds` (None: no limit), or until the event is set."""
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(unless.wait(), seconds)
