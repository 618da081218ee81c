"""The addresses that a server listens on: whether they are free, and how several processes share them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from typing import TypeAlias
from urllib.parse import quote

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.server.config import MAX_UNIX_PATH_BYTES, host_and_port

_Place: TypeAlias = tuple[socket.AddressFamily, tuple[object, ...]]
"""A socket's family, and its address: host, port and, for IPv6, two more values."""

_PORT_TRIES = 20
"""Ports to try for port 0: one that is free on the first of a name's hosts may be taken on another."""


class CannotListenError(OSError):
    """An address cannot be listened on: it is taken, forbidden, or not of this machine, by `errno`."""

    def __init__(self, address: str, number: int | None, why: str) -> None:
        super().__init__(number, f"cannot listen on {address}: {why}")

    def __str__(self) -> str:
        return str(self.strerror)


def unix_path(address: str) -> str:
    """Return the path of `unix:/path`; empty for `host:port`."""
    return address.removeprefix("unix:") if address.startswith("unix:") else ""


def grpc_target(address: str) -> str:
    """Return the address as grpcio has to get it: the path of a Unix socket is part of a URI there, and decoded."""
    path = unix_path(address)
    return f"unix:{quote(path)}" if path else address


@contextlib.contextmanager
def held(addresses: Sequence[str]) -> Iterator[None]:
    """Hold the Unix sockets among `addresses` for the length of a block, by a lock on a file beside each.

    Binding replaces a socket that exists, so that of two servers that start at once each would find the path free, and
    one would lose its socket to the other.

    Raises:
        CannotListenError: another server holds one of them.
    """
    with contextlib.ExitStack() as stack:
        for address in filter(unix_path, addresses):
            stack.enter_context(_lock(address))
        yield


@contextlib.contextmanager
def _lock(address: str) -> Iterator[None]:
    path = f"{unix_path(address)}.lock"
    while True:
        try:
            # In a folder that others may write to, a link would make this create or lock any file of the server's user.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise CannotListenError(address, error.errno, f"cannot create {path}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The server before this one may have removed the file between the two calls.
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        except BlockingIOError:
            os.close(descriptor)
            raise CannotListenError(address, errno.EADDRINUSE, "another server listens there") from None
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(descriptor)


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """Make a folder for sockets of this process, and remove it at the end of the block.

    Raises:
        CannotStartError: there is no place for it.
    """
    try:
        place = tempfile.gettempdir()
        if len(os.fsencode(place)) > MAX_UNIX_PATH_BYTES - 40:  # the path of a socket must have room for its name
            place = "/tmp"
        folder = tempfile.TemporaryDirectory(prefix="jobstatus-", dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        raise CannotStartError(
            f"cannot make a folder for the server's own sockets: {error.strerror or error}; "
            "set TMPDIR to a folder that can be written, with a short path"
        ) from None
    with folder as name:
        yield name


async def reach(address: str) -> bool | None:
    """Return whether a connection is accepted; None if it cannot be tried (no file descriptors, no route)."""
    path = unix_path(address)
    opening = asyncio.open_unix_connection(path) if path else asyncio.open_connection(*host_and_port(address))
    try:
        _, writer = await asyncio.wait_for(opening, timeout=1.0)
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except (OSError, asyncio.TimeoutError):
        return None
    writer.close()
    return True


async def require_free(address: str) -> None:
    """Raise CannotListenError if the address is in use: grpcio takes over a Unix socket that is, and names no cause."""
    if unix_path(address):
        if await reach(address) is not False:
            raise CannotListenError(address, errno.EADDRINUSE, "another server listens there")
        return
    for trial in await bind(address):
        trial.close()


class Reservation:
    """Holds `host:port` addresses for the processes of one user that listen there with SO_REUSEPORT.

    Its sockets accept no connections. They are bound exclusively, which detects any other listener, and shared only
    then. Not detected are a program that binds in the same few microseconds, and one that the same user starts later
    with SO_REUSEPORT: it gets a part of the connections.
    """

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    async def add(self, address: str) -> str:
        """Hold `address`, and return it with port 0 resolved.

        Raises:
            CannotListenError: another program has it, or it is not of this machine.
        """
        sockets = await bind(address)
        self._sockets += sockets
        for each in sockets:
            # Binding with SO_REUSEADDR succeeds on addresses that are bound but not listened on, such as these.
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return f"{address.rpartition(':')[0]}:{sockets[0].getsockname()[1]}"

    def close(self) -> None:
        """Release all addresses."""
        for each in self._sockets:
            each.close()
        self._sockets.clear()


async def bind(address: str, *, is_shared: bool = False) -> list[socket.socket]:
    """Return sockets bound to all addresses that `address` resolves to, with one port; they do not listen.

    With `is_shared` other processes of this user may bind the same port so.

    Raises:
        CannotListenError: another program has it, or it is not of this machine.
    """
    host, port = host_and_port(address)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "no host has this name"
        raise CannotListenError(address, getattr(error, "errno", None), str(why)) from None
    places = [(family, place) for family, _, _, _, place in found]
    for _ in range(0 if port else _PORT_TRIES):
        try:
            return _bind_all(address, places, is_shared)
        except CannotListenError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    return _bind_all(address, places, is_shared)


def _bind_all(address: str, places: Sequence[_Place], is_shared: bool) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, (host, port, *more) in places:
            try:
                sockets.append(_bind_one(family, (host, port or _port_of(sockets), *more), is_shared))
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    raise
                missing = error  # one of several may fail, such as ::1 of localhost on a machine without IPv6
        if missing is not None and not sockets:
            raise missing
    except OSError as error:
        for each in sockets:
            each.close()
        why = "another server listens there" if error.errno == errno.EADDRINUSE else str(error.strerror)
        raise CannotListenError(address, error.errno, why) from None
    return sockets


def _bind_one(family: socket.AddressFamily, place: tuple[object, ...], is_shared: bool) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(place)
    except OSError:
        made.close()
        raise
    return made


def _port_of(sockets: Sequence[socket.socket]) -> int:
    """Return the port of the first socket, 0 before there is one."""
    return int(sockets[0].getsockname()[1]) if sockets else 0
