"""Where jobs are kept. `interface` is the contract; `open_store` finds the store that a URL names."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from datetime import timedelta
from importlib.metadata import EntryPoint, entry_points

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.stores.interface import DEFAULT_RETENTION, Clock, JobStore, utc_now

ENTRY_POINT_GROUP = "jobstatus_grpc.stores"
"""A store is a function `open_store(url, *, clock, retention)` that returns an awaitable JobStore, named by scheme.

Its module has a constant `IS_SHARED = True` if any number of processes may have the same store open at once, and may
have a function `migrate(url)` that returns an awaitable number: the version of the schema, which it brought up to date.
"""

_EXTRAS = {"postgresql": "postgres"}

Opener = Callable[..., Awaitable[JobStore]]


async def open_store(url: str, *, clock: Clock = utc_now, retention: timedelta = DEFAULT_RETENTION) -> JobStore:
    """Return the store that `url` names, open.

    Raises:
        CannotStartError: no store is installed for the URL's scheme, or it cannot be opened. The message never holds
            the URL, which may hold a password.
    """
    return await _opener(url.partition(":")[0])(url, clock=clock, retention=retention)


async def migrate_store(url: str) -> int:
    """Create what `url` names, or bring it up to date, and return the version of its schema; 0: it tells none.

    Raises:
        CannotStartError: as `open_store`.
    """
    opener = _opener(url.partition(":")[0])
    migrate: Callable[[str], Awaitable[int]] | None = getattr(sys.modules[opener.__module__], "migrate", None)
    if migrate is not None:
        return await migrate(url)
    store = await opener(url)
    await store.close()
    return 0


def is_shared(url: str) -> bool:
    """Tell whether any number of processes may have the store open at once.

    Raises:
        CannotStartError: as `open_store`, of the scheme.
    """
    opener = _opener(url.partition(":")[0])
    return bool(getattr(sys.modules[opener.__module__], "IS_SHARED", False))


def _opener(scheme: str) -> Opener:
    stores: dict[str, EntryPoint] = {store.name: store for store in entry_points(group=ENTRY_POINT_GROUP)}
    if scheme in stores:
        try:
            opener: Opener = stores[scheme].load()
        except ModuleNotFoundError as error:
            raise CannotStartError(f"the store {scheme}: needs {error.name}; {_advice(scheme)}") from error
        return opener
    if scheme in _EXTRAS:
        raise CannotStartError(f"the store {scheme}: is not installed; {_advice(scheme)}")
    known = ", ".join(f"{name}:" for name in sorted(stores)) or "none"
    raise CannotStartError(f"no store has the scheme {scheme!r}; known are {known}")


def _advice(scheme: str) -> str:
    extra = _EXTRAS.get(scheme)
    return f"pip install 'jobstatus-grpc[{extra}]'" if extra else "install it"
