"""Open watches of callers that may expire, lose their role, or be taken out of the auth file: such a watch ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from jobstatus_grpc.auth import Credentials, Identity
from jobstatus_grpc.errors import IdentityChangedError, JobStatusError, UnavailableError

log = logging.getLogger("jobstatus_grpc.server")

CHECK_SECONDS = 1.0
"""Interval at which callers whose identity no longer holds are identified again."""

UNCHECKED_SECONDS = 60.0
"""How long watches stay open while their caller cannot be identified, because an authenticator is away."""

ENDS_AT_ONCE = 50
"""Watches that end in one turn of the event loop, so that other calls get their turns in between."""

Identify: TypeAlias = Callable[[bytes, Credentials], Awaitable["tuple[Identity, float]"]]
"""From credentials and their digest to the caller, and the time until which that holds."""

Authorize: TypeAlias = Callable[[str, Identity, Collection[str]], Identity]
"""From an RPC, its caller and the tenants that the call selects to the caller in its tenant, or an error."""


class Watch:
    """A stream, and why it is ended."""

    __slots__ = ("caller", "error", "method", "task", "tenants")

    def __init__(self, method: str, caller: Identity, tenants: frozenset[str]) -> None:
        """Take the RPC, its caller in its tenant, and the tenants that the call selects."""
        self.method = method
        self.caller = caller
        self.tenants = tenants
        self.task: asyncio.Task[Any] | None = None
        self.error: JobStatusError | None = None


@dataclass(slots=True)
class _Caller:
    """A caller with open watches."""

    credentials: Credentials
    ends_at: float
    """The time from which it is to be identified again."""
    identity: Identity
    watches: set[Watch] = field(default_factory=set)
    unchecked_since: float | None = None
    is_due: bool = False
    check: asyncio.Task[None] | None = None


class OpenWatches:
    """The open watches by their caller, which is identified again when that is due and when the file has changed."""

    def __init__(self, identify: Identify, authorize: Authorize, *, clock: Callable[[], float] = time.time) -> None:
        self._identify = identify
        self._authorize = authorize
        self._clock = clock
        self._callers: dict[bytes, _Caller] = {}
        self.ended: Counter[str] = Counter()
        """The watches that were ended, by the reason of the error."""

    @contextlib.contextmanager
    def opened(self, watch: Watch, key: bytes, credentials: Credentials, ends_at: float) -> Iterator[None]:
        """End the block, in the current task, with the error for which a new call of its caller would be refused.

        Args:
            watch: the stream.
            key: a digest of `credentials`.
            credentials: those of its caller.
            ends_at: the time from which the caller is to be identified again.
        """
        watch.task = asyncio.current_task()
        caller = self._callers.get(key)
        if caller is None:
            caller = self._callers[key] = _Caller(credentials, ends_at, watch.caller)
        caller.watches.add(watch)
        try:
            yield
        except asyncio.CancelledError:
            if watch.error is None:
                raise
            raise watch.error from None
        finally:
            caller.watches.discard(watch)
            if not caller.watches and self._callers.get(key) is caller:
                del self._callers[key]

    async def follow(self) -> None:
        """Check the callers that are due, for ever."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            now = self._clock()
            for key, caller in list(self._callers.items()):
                if now >= caller.ends_at:
                    self._check(key, caller)

    def check_all(self) -> None:
        """Check all callers now."""
        for key, caller in list(self._callers.items()):
            self._check(key, caller)

    def _check(self, key: bytes, caller: _Caller) -> None:
        caller.is_due = True
        if caller.check is None:
            caller.check = asyncio.create_task(self._run_check(key, caller))

    async def _run_check(self, key: bytes, caller: _Caller) -> None:
        try:
            while caller.is_due:  # again, if the file has changed in between
                caller.is_due = False
                await self._identify_again(key, caller)
        finally:
            caller.check = None

    async def _identify_again(self, key: bytes, caller: _Caller) -> None:
        refusal: JobStatusError
        try:
            identity, ends_at = await self._identify(key, caller.credentials)
        except UnavailableError as error:
            if not self._is_too_long_ago(caller):
                caller.ends_at = self._clock()  # what held before the file changed may no longer
                return
            refusal = error
        except JobStatusError as error:
            refusal = error
        except Exception:
            log.exception("the caller of %d open watches cannot be identified; they end", len(caller.watches))
            refusal = UnavailableError()
        else:
            await self._end(caller, lambda watch: self._refusal_of(watch, identity))
            caller.ends_at, caller.identity, caller.unchecked_since = ends_at, identity, None
            return
        await self._end(caller, lambda watch: refusal)

    def _is_too_long_ago(self, caller: _Caller) -> bool:
        """Return whether the caller has expired, or could not be identified for UNCHECKED_SECONDS."""
        now = self._clock()
        if caller.unchecked_since is None:
            caller.unchecked_since = now
        expires_at, leeway_seconds = caller.identity.expires_at, caller.identity.leeway_seconds
        is_expired = expires_at is not None and now >= expires_at.timestamp() + leeway_seconds
        return is_expired or now - caller.unchecked_since >= UNCHECKED_SECONDS

    def _refusal_of(self, watch: Watch, identity: Identity) -> JobStatusError | None:
        """Return why its caller could not open the watch now, or would see other jobs; None: it goes on."""
        try:
            caller = self._authorize(watch.method, identity, watch.tenants)
        except JobStatusError as error:
            return error
        is_same = (caller.tenant, caller.only) == (watch.caller.tenant, watch.caller.only)
        return None if is_same else IdentityChangedError()

    async def _end(self, caller: _Caller, error_of: Callable[[Watch], JobStatusError | None]) -> None:
        """End the watches of the caller for which there is an error."""
        ended = 0
        for watch in list(caller.watches):
            error = error_of(watch) if watch.error is None and watch in caller.watches else None
            if error is not None and watch.task is not None:
                # One for each: an exception keeps the frames in which it was raised.
                watch.error = type(error)(error.message, **error.metadata)
                watch.task.cancel()
                self.ended[error.reason] += 1
                ended += 1
                if ended % ENDS_AT_ONCE == 0:
                    await asyncio.sleep(0)
