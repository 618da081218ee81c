"""What a service manager such as systemd is sent: READY=1, WATCHDOG=1 and STOPPING=1, as sd_notify(3) describes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator

log = logging.getLogger("jobstatus_grpc.server")

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
"""What systemd sets for the process that it starts. Worker processes must not get them."""

CHECKS = 3
"""Checks within the time of the watchdog: one or two may be late."""

SEND_SECONDS = 1.0
"""Time for a message to be taken, in which the event loop waits: systemd's queue is hardly ever full."""


@contextlib.contextmanager
def announced(check: Callable[[], None] | None = None) -> Iterator[None]:
    """Send that the process serves, and at the end of the block that it stops; between and after, signs of life.

    The signs come from the running event loop, until it ends: a drain may take longer than the watchdog's time. With a
    watchdog, `check` is called before each. Without a service manager nothing is sent, without a watchdog nothing is
    checked.
    """
    _send("READY=1")
    if (seconds := _watchdog_seconds()) is not None:
        _send_signs_of_life(seconds / CHECKS, check)
    try:
        yield
    finally:
        _send("STOPPING=1")


def _send_signs_of_life(pause_seconds: float, check: Callable[[], None] | None) -> None:
    if check is not None:
        check()
    _send("WATCHDOG=1")
    asyncio.get_running_loop().call_later(pause_seconds, _send_signs_of_life, pause_seconds, check)


def _watchdog_seconds() -> float | None:
    """Return the time without a sign of life after which the process is killed. None: it is not watched."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isdecimal() and int(microseconds) else None


def _send(state: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # the abstract namespace
        address = f"\0{address[1:]}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(SEND_SECONDS)
            sender.connect(address)
            sender.send(state.encode())
    except OSError as error:
        log.warning("cannot send %s to the service manager, which may end this process: %s", state, error)
