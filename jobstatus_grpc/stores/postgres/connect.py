"""Opens sessions to PostgreSQL: reads the store's URL, and tries its hosts in turn."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import asyncpg

from jobstatus_grpc.errors import CannotStartError

CONNECT_SECONDS = 2.0
"""Longest time to open a session, in seconds, all hosts together."""

DEFAULT_PORT = 5432

TRANSIENT_ERRORS = (
    OSError,
    asyncio.TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InternalClientError,
    asyncpg.TargetServerAttributeNotMatched,
)
"""Errors of a server that is starting, stopping, unreachable, failing over or too busy: they may pass."""

_SESSION = """
    -- A suspended process, or a machine that is gone, must not keep jobs locked.
    SET idle_in_transaction_session_timeout = '5s';
    SET lock_timeout = '30s';
    SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3;
    -- The statement of a process that was killed must not wait on; a server on Windows cannot notice that.
    SELECT set_config('client_connection_check_interval', '1s', false)
    WHERE current_setting('dynamic_shared_memory_type') <> 'windows';
"""

_NAME = {"application_name": "jobstatus"}

_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%-]+)(?::(?P<port>[0-9]{1,5}))?")

_PARAMETER = re.compile(r"[a-z_.]{1,63}")

_PASSWORD = "password"

_FILES = {
    "passfile": _PASSWORD,
    "sslrootcert": "CA",
    "sslcert": "certificate",
    "sslkey": "key",
    "sslcrl": "revocation list",
}
"""Parameters of the URL whose values are files, and what is in them."""

_ENCODE = (
    "write postgresql://USER@HOST:PORT/DATABASE?sslmode=…, and in the user and the password %40 for @, %2F for /, %3A "
    "for :, %3F for ?, %23 for # and %25 for %"
)


@dataclass(frozen=True, slots=True)
class Address:
    """A URL that asyncpg can parse without repeating the password in an error, and its hosts."""

    url: str = field(repr=False)
    """Without the hosts: newer versions of Python cannot split a URL with several that has one in brackets."""
    hosts: tuple[tuple[str, int], ...]
    """Hosts and ports from after `//`; empty: asyncpg takes them from the URL's parameters or PGHOST."""

    @property
    def name(self) -> str:
        """The hosts, for log lines and errors: no user, no password."""
        return ", ".join(f"{host}:{port}" for host, port in self.hosts) or "the host in its parameters or PGHOST"


class Connector:
    """Opens sessions, first on the host that accepted the last one. For one event loop."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._first = 0

    async def connect(self, *, seconds: float = CONNECT_SECONDS, **settings: Any) -> asyncpg.Connection[Any]:
        """Return a new session, which the caller closes.

        Args:
            seconds: timeout for all hosts together.
            settings: keyword arguments of asyncpg.connect.

        Raises:
            OSError, asyncio.TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError: no host accepted; the error
                is the last host's.
        """
        hosts = self.address.hosts
        if not hosts:
            return await self._connect(timeout=seconds, **settings)
        # asyncpg tries several hosts too, but one that does not answer would use up the time of the next.
        for turn in range(len(hosts)):
            number = (self._first + turn) % len(hosts)
            host, port = hosts[number]
            try:
                connection = await self._connect(host=host, port=port, timeout=seconds / len(hosts), **settings)
            except TRANSIENT_ERRORS as error:
                failure = error
            else:
                self._first = number
                return connection
        raise failure

    async def _connect(self, *, timeout: float, **settings: Any) -> asyncpg.Connection[Any]:
        connection = await asyncpg.connect(self.address.url, timeout=timeout, server_settings=_NAME, **settings)
        try:
            await connection.execute(_SESSION, timeout=timeout)
        except BaseException:
            connection.terminate()
            raise
        return connection


def read_address(url: str) -> Address:
    """Parse the store's URL.

    Raises:
        CannotStartError: it is malformed, or a file that it names cannot be read. The message repeats nothing of the
            URL but that file's path.
    """
    scheme, slashes, rest = url.partition("://")
    place, mark, query = rest.partition("?")
    authority, slash, path = place.partition("/")
    user, at, hosts = authority.rpartition("@")
    is_odd = not slashes or "@" in user or "@" in path + query or "#" in rest or not url.isprintable()
    without_hosts = f"{scheme}://{user}{at}{slash}{path}{mark}{query}"
    if is_odd or not _can_split(without_hosts):
        raise CannotStartError(f"the store's URL cannot be understood; {_ENCODE}")
    for name, value in _read_parameters(query):
        if name in _FILES:
            _check_file(value, _FILES[name])
    if passfile := os.environ.get("PGPASSFILE"):
        _check_file(passfile, _PASSWORD)
    return Address(without_hosts, tuple(_read_host(text) for text in hosts.split(",")) if hosts else ())


def _can_split(url: str) -> bool:
    try:
        urlsplit(url)
    except ValueError:  # asyncpg would raise the same, with the URL in its text
        return False
    return True


def _read_parameters(query: str) -> list[tuple[str, str]]:
    try:
        parameters = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        parameters = [("", "")]
    if not all(_PARAMETER.fullmatch(name) for name, _ in parameters):
        raise CannotStartError(f"a parameter of the store's URL cannot be understood; {_ENCODE}")
    return parameters


def _check_file(path: str, what: str) -> None:
    """Refuse a file that asyncpg would ignore without a word, or name no path of in its error."""
    try:
        mode = os.stat(path).st_mode
        with open(path, "rb"):
            pass
    except OSError as error:
        raise CannotStartError(f"cannot read the {what} file {path}: {error.strerror}") from None
    # The server would then only report a failed login.
    if what == _PASSWORD and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise CannotStartError(f"the {what} file {path} can be read by others; chmod 600 it")


def _read_host(text: str) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    port = int(found["port"] or os.environ.get("PGPORT", "") or DEFAULT_PORT) if found else 0
    if found is None or not 0 < port < 65536:
        raise CannotStartError(f"a host of the store's URL cannot be understood; {_ENCODE}")
    return unquote(found["host"]).strip("[]"), port
