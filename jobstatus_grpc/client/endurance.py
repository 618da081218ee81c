"""How a watch goes on: which ends of a stream are survived, how long to wait. No I/O.

Whoever reads the streams of a watch asks this what to do: `begin` a stream, `take` each message and what `more` is in
it, tell that it `ended`.
"""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import grpc

from jobstatus_grpc.client.retry import Backoff
from jobstatus_grpc.errors import InternalError, JobStatusError, UnavailableError
from jobstatus_grpc.wire import status

log = logging.getLogger("jobstatus_grpc.client")

DEFAULT_HEARTBEAT_INTERVAL_SECONDS = 30.0
"""The server's, where a watch names none."""
SHORTEST_HEARTBEAT_INTERVAL_SECONDS = 1.0
SILENT_HEARTBEATS = 3
LAST_TRY_SECONDS = 1.0
WARN_AFTER_ENDS = 3

_SURVIVED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
}

Message = TypeVar("Message", contravariant=True)
News = TypeVar("News", covariant=True)


class Endurance(abc.ABC, Generic[Message, News]):
    """One watch, over as many streams as it takes."""

    is_over = False
    """Nothing more is to come, however the stream ends."""

    def __init__(
        self,
        subject: str,
        *,
        heartbeat_interval_seconds: float | None,
        give_up_seconds: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take what is watched, for people, and the arguments of the clients' watches."""
        self._now = clock
        if heartbeat_interval_seconds is None and give_up_seconds is not None:
            third = max(give_up_seconds / SILENT_HEARTBEATS, SHORTEST_HEARTBEAT_INTERVAL_SECONDS)
            heartbeat_interval_seconds = min(third, DEFAULT_HEARTBEAT_INTERVAL_SECONDS)
        self._subject = subject
        self._heartbeat_interval_seconds = heartbeat_interval_seconds
        self._silence_seconds = SILENT_HEARTBEATS * (heartbeat_interval_seconds or DEFAULT_HEARTBEAT_INTERVAL_SECONDS)
        self._give_up_seconds = give_up_seconds
        self._heard_at = self._now()
        self._was_opened = False
        self._is_open = False
        self._backoff = Backoff()
        self._ends = 0

    @abc.abstractmethod
    def take(self, message: Message | None) -> News | None:
        """Return the first news in `message`, None: there is none; grpc.aio gives None for one that it could not parse.

        Raises:
            InternalError: the message makes no sense; the stream is to be ended with this.
        """

    def more(self) -> News | None:
        """Return what else is news in the message that was taken last; None: nothing."""
        return None

    def begin(self) -> float | None:
        """Begin a stream: return the deadline that its call gets, in seconds from now; None for none."""
        self._is_open = False
        return None

    @property
    def silence_seconds(self) -> float:
        """How long the stream may be silent from now on before it counts as dead."""
        if self._is_open or self._give_up_seconds is None:
            return self._silence_seconds
        return min(self._silence_seconds, max(self._left_seconds, LAST_TRY_SECONDS))

    def ended(self, error: grpc.RpcError | JobStatusError | None) -> float:
        """Return how long to wait before the next stream begins, after one that ended.

        Args:
            error: how it ended: the call's error, one of ours (InternalError for a message that makes no sense,
                UnavailableError for silence), or None for OK, although the watch is not over.

        Raises:
            JobStatusError: the watch is not to go on: the error is not one that passes, or patience is at its end.
        """
        cause = meaning_of(error)
        if cause is not None and not self._survives(error):
            raise cause from error
        pause = self._backoff.pause_seconds(cause)
        if self._give_up_seconds is not None:
            if self._left_seconds <= 0:
                heard = f"nothing was heard from the server for {self._give_up_seconds:g} s"
                raise UnavailableError(f"{heard}; last: {cause or 'the stream ended'}") from error
            pause = min(pause, self._left_seconds)
        self._log_end(cause, pause)
        return pause

    @property
    def _left_seconds(self) -> float:
        """How long until the watch gives up; endless without give_up_seconds."""
        give_up_seconds = float("inf") if self._give_up_seconds is None else self._give_up_seconds
        return self._heard_at + give_up_seconds - self._now()

    def _note_life(self) -> None:
        self._heard_at = self._now()
        if not self._is_open:
            self._is_open = self._was_opened = True
            self._backoff.reset()
            if self._ends >= WARN_AFTER_ENDS:
                log.warning("the watch of %s goes on", self._subject)
            self._ends = 0

    def _survives(self, error: grpc.RpcError | JobStatusError | None) -> bool:
        if not isinstance(error, grpc.RpcError):
            return isinstance(error, (InternalError, UnavailableError))
        code = error.code()
        return code in _SURVIVED or (self._was_opened and code is grpc.StatusCode.RESOURCE_EXHAUSTED)

    def _log_end(self, cause: JobStatusError | None, pause: float) -> None:
        """Say once in each row of failures that something is wrong; a single end is everyday life."""
        self._ends += 1
        level = logging.WARNING if self._ends == WARN_AFTER_ENDS else logging.DEBUG
        log.log(level, "the watch of %s was cut (%s); next try in %.1f s", self._subject, cause or "no reason", pause)


def meaning_of(error: grpc.RpcError | JobStatusError | None) -> JobStatusError | None:
    """Return the end of a stream as an error of our tree; None: it ended with OK."""
    return status.from_rpc_error(error) if isinstance(error, grpc.RpcError) else error
