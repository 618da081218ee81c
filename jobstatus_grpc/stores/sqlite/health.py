"""Whether the SQLite store's file can be written, can be trusted, and is open."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable

from jobstatus_grpc.errors import StoreUnavailableError
from jobstatus_grpc.stores.sqlite.database import as_store_error, describe, is_fatal

logger = logging.getLogger(__name__)

Done = Callable[[None, BaseException | None], None]


class Condition:
    """Learns from each error and success. A store that refused a write is probed until it takes one."""

    def __init__(
        self, path: str, probe: Callable[[Done], None], recovered: Callable[[], None], *, interval_seconds: float
    ) -> None:
        """Begin well.

        Args:
            path: of the file, for messages.
            probe: writes something small, then calls its argument with None and the error, if any.
            recovered: called when the store can be written again.
            interval_seconds: how often to probe.
        """
        self._path = path
        self._probe = probe
        self._recovered = recovered
        self._interval_seconds = interval_seconds
        self._is_full = False
        self._is_probing = False
        self._timer: asyncio.TimerHandle | None = None
        self._refusal = ""
        self._cause: BaseException | None = None
        self.end: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        """What broke the store, None once it is closed."""

    @property
    def writable(self) -> bool:
        """Whether the last write went through."""
        return not self._is_full and not self._refusal

    @property
    def is_broken(self) -> bool:
        """Whether the file can be trusted no longer."""
        return self._cause is not None

    def check(self) -> None:
        """Raise StoreUnavailableError if the store is closed or broken."""
        if self._refusal:
            raise StoreUnavailableError(self._refusal)

    def wrote(self) -> None:
        """Note that a write went through."""
        if self._is_full:
            self._is_full = False
            self._recovered()
            logger.warning("%s can be written again", self._path)

    def judge(self, error: BaseException, *, is_write: bool) -> BaseException:
        """Note what `error` says, and return what the caller is told."""
        if not isinstance(error, sqlite3.Error):
            return error
        if is_fatal(error):
            self._break(error)
            return StoreUnavailableError(self._refusal)
        if not isinstance(error, sqlite3.OperationalError):
            return error  # a mistake of ours
        if is_write:
            self._begin_probing(error)
        return as_store_error(error)

    def refuse(self, why: str) -> None:
        """Refuse all calls from now on, for the first reason given."""
        self._refusal = self._refusal or why
        if self._timer is not None:
            self._timer.cancel()

    def finish(self) -> None:
        """Tell that the store is closed, if it did not break before."""
        if not self.end.done():
            self.end.set_result(None)

    def _break(self, error: sqlite3.Error) -> None:
        if self._cause is None:
            self._cause = error
            self.refuse(f"the store {self._path} is broken: {describe(error)}")
            logger.critical("%s", self._refusal)
        if not self.end.done():
            broken = StoreUnavailableError(self._refusal)
            broken.__cause__ = error
            self.end.set_result(broken)

    def _begin_probing(self, error: sqlite3.Error) -> None:
        if not self._is_full:
            self._is_full = True
            logger.error("%s cannot be written: %s", self._path, describe(error))
        if not self._is_probing and not self._refusal:
            self._is_probing = True
            self._timer = asyncio.get_running_loop().call_later(self._interval_seconds, self._probe, self._probed)

    def _probed(self, _: None, error: BaseException | None) -> None:
        self._is_probing = False
        if error is None:
            self.wrote()
        else:
            self.judge(error, is_write=True)
