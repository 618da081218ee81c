"""Where a PostgreSQL database is: a URL, read before the driver reads it. No error repeats what may be a password."""

from __future__ import annotations

import os
import re
import stat
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from jobstatus_grpc.errors import CannotStartError

DEFAULT_PORT = 5432
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%-]+)(?::(?P<port>[0-9]{1,5}))?")
_PARAMETER = re.compile(r"[a-z_.]{1,63}")
_ENCODE = (
    "write postgresql://USER@HOST:PORT/DATABASE?sslmode=…, and in the user and the password %40 for @, %2F for /, %3A "
    "for :, %3F for ?, %23 for # and %25 for %"
)


class Address(NamedTuple):
    """A URL that the driver can read."""

    url: str
    hosts: tuple[tuple[str, int], ...]
    """With their ports, where the URL names any after `//`; else the driver finds them in its parameters and PGHOST."""

    @property
    def name(self) -> str:
        """What people may read of it."""
        return ", ".join(f"{host}:{port}" for host, port in self.hosts) or "the host that PGHOST names"


def read_address(url: str) -> Address:
    """Return the address in `url`.

    Raises:
        CannotStartError: it is none. The message holds nothing of it but parameters' names and a password file's.
    """
    _, slashes, rest = url.partition("://")
    authority, path, query = _parts(rest)
    user, _, hosts = authority.rpartition("@")
    is_odd = not slashes or "@" in user or "@" in path + query or "#" in rest or not url.isprintable()
    if is_odd or not _is_readable(url):
        raise CannotStartError(f"the store's URL cannot be understood; {_ENCODE}")
    for name, value in _parameters(query):
        if name == "passfile":
            _check_password_file(value)
    return Address(url, tuple(_host(text) for text in hosts.split(",")) if hosts else ())


def _is_readable(url: str) -> bool:
    try:
        urlsplit(url)
    except ValueError:  # the driver's error would repeat it
        return False
    return True


def _parts(rest: str) -> tuple[str, str, str]:
    place, _, query = rest.partition("?")
    authority, _, path = place.partition("/")
    return authority, path, query


def _host(text: str) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    port = int(found["port"] or os.environ.get("PGPORT", "") or DEFAULT_PORT) if found else 0
    if found is None or not 0 < port < 65536:
        raise CannotStartError(f"a host of the store's URL cannot be understood; {_ENCODE}")
    return unquote(found["host"]).strip("[]"), port


def _parameters(query: str) -> list[tuple[str, str]]:
    try:
        parameters = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        parameters = [("", "")]
    if not all(_PARAMETER.fullmatch(name) for name, _ in parameters):
        raise CannotStartError(f"a parameter of the store's URL cannot be understood; {_ENCODE}")
    return parameters


def _check_password_file(path: str) -> None:
    """The driver would go on without it, and not say why nobody lets it in."""
    try:
        mode = os.stat(path).st_mode
        with open(path, "rb"):
            pass
    except OSError as error:
        raise CannotStartError(f"cannot read the password file {path}: {error.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise CannotStartError(f"the password file {path} can be read by others; chmod 600 it")
