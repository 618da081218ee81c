"""Where jobs are kept. `interface` is the contract of all stores; `open_store` opens the one that a URL names.

A package adds a kind of store with an entry point of the group `jobstatus_grpc.stores`: its name is the scheme of the
store's URLs, its object a `StoreType`.
"""

from __future__ import annotations

import re
from datetime import timedelta
from importlib.metadata import entry_points

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.stores.interface import DEFAULT_RETENTION, Clock, JobStore, StoreType, utc_now

ENTRY_POINT_GROUP = "jobstatus_grpc.stores"

_EXTRAS = {"postgresql": "postgres"}

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:", re.ASCII)


async def open_store(url: str, *, clock: Clock = utc_now, retention: timedelta = DEFAULT_RETENTION) -> JobStore:
    """Return the store that `url` names, open.

    Raises:
        CannotStartError: no store is installed for the URL's scheme, or it cannot be opened. The message never holds
            the URL, which may hold a password.
    """
    return await _store_type(url).open(url, clock=clock, retention=retention)


async def migrate_store(url: str) -> int:
    """Create the store that `url` names or bring it up to date, and return the version of its schema; 0 if it has none.

    Raises:
        CannotStartError: as `open_store`.
    """
    return await _store_type(url).prepare(url)


def back_up_store(url: str, file: str) -> int:
    """Write a verified copy of the store that `url` names to `file`, and return the number of jobs in it.

    Raises:
        CannotStartError: the store has no backups of its own, or the copy cannot be made; the message says what to do.
    """
    back_up = _store_type(url).back_up
    if back_up is None:
        raise CannotStartError(_no_backups(url))
    return back_up(url, file)


def restore_store(url: str, file: str) -> int:
    """Replace the store that `url` names with the copy in `file`, and return the number of jobs in it.

    Raises:
        CannotStartError: the store has no backups of its own, is in use, or `file` is no copy of a store.
    """
    restore = _store_type(url).restore
    if restore is None:
        raise CannotStartError(_no_backups(url))
    return restore(url, file)


def _no_backups(url: str) -> str:
    scheme = url.partition(":")[0]
    advice = "use pg_dump and pg_restore" if scheme == "postgresql" else "only a sqlite: store has"
    return f"the store {scheme}: has no backups of its own; {advice}"


def store_name(url: str) -> str:
    """Return what log lines call the store that `url` names: with an absolute path or its hosts, without a password.

    Raises:
        CannotStartError: no store is installed for the URL's scheme, or the URL cannot be parsed.
    """
    name = _store_type(url).name
    return f"{url.partition(':')[0]}:" if name is None else name(url)


def is_shared(url: str) -> bool:
    """Return whether several processes may have the store open at once.

    Raises:
        CannotStartError: no store is installed for the URL's scheme.
    """
    return _store_type(url).is_shared


def _store_type(url: str) -> StoreType:
    scheme = url.partition(":")[0]
    stores = {entry_point.name: entry_point for entry_point in entry_points(group=ENTRY_POINT_GROUP)}
    if scheme in stores:
        try:
            store_type = stores[scheme].load()
        except ModuleNotFoundError as error:
            raise CannotStartError(f"the store {scheme}: needs {error.name}; {_advice(scheme)}") from error
        if not isinstance(store_type, StoreType):
            raise CannotStartError(f"the store {scheme}: its entry point {stores[scheme].value} is not a StoreType")
        return store_type
    if scheme in _EXTRAS:
        raise CannotStartError(f"the store {scheme}: is not installed; {_advice(scheme)}")
    known = ", ".join(f"{name}:" for name in sorted(stores)) or "none"
    # Other text is not repeated: libpq's other form, "host=db password=…", has no scheme.
    what = (
        f"no store has the scheme {scheme!r}"
        if _SCHEME.match(url)
        else "the store is not a URL such as sqlite:///jobs.db"
    )
    raise CannotStartError(f"{what}; known are {known}")


def _advice(scheme: str) -> str:
    extra = _EXTRAS.get(scheme)
    return f"pip install 'jobstatus-grpc[{extra}]'" if extra else "install it"
