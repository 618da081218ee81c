"""Where jobs are kept. `interface` is the contract; `open_store` finds the store that a URL names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from importlib.metadata import EntryPoint, entry_points

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.stores.clock import utc_now
from jobstatus_grpc.stores.interface import DEFAULT_RETENTION, Clock, JobStore

ENTRY_POINT_GROUP = "jobstatus_grpc.stores"
"""A store is a function `open_store(url, *, clock, retention)` that returns an awaitable JobStore, named by scheme."""

_EXTRAS = {"postgresql": "postgres"}

Opener = Callable[..., Awaitable[JobStore]]


async def open_store(url: str, *, clock: Clock = utc_now, retention: timedelta = DEFAULT_RETENTION) -> JobStore:
    """Return the store that `url` names, open.

    Raises:
        CannotStartError: no store is installed for the URL's scheme, or it cannot be opened. The message never holds
            the URL, which may hold a password.
    """
    return await _opener(url.partition(":")[0])(url, clock=clock, retention=retention)


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
