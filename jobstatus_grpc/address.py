"""The addresses of servers that clients and the command line take."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote

DEFAULT_PORT = 50051
"""Of `grpc://HOST` and `grpcs://HOST`: the port of `jobstatus serve`, with TLS and without."""

_IPV6 = r"\[[0-9A-Fa-f:.]+(?:%25[\w.-]+)?\]"  # with the zone of a link-local address, as gRPC takes it
_HOST = rf"(?:[\w.-]+|{_IPV6})"
_PORT = r"(?:[1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"
_PLACE = rf"{_HOST}:{_PORT}"

_URL = re.compile(rf"(grpcs?)://({_HOST})(?::({_PORT}))?/?", re.ASCII)

_FORMS = {
    "": re.compile(rf"(?P<places>{_PLACE})", re.ASCII),
    "dns": re.compile(rf"dns:(?://(?P<authority>{_HOST}(?::{_PORT})?)?/)?(?P<places>{_HOST}(?::{_PORT})?)", re.ASCII),
    "ipv4": re.compile(rf"ipv4:(?P<places>[\d.]+:{_PORT}(?:,[\d.]+:{_PORT})*)", re.ASCII),
    "ipv6": re.compile(rf"ipv6:(?P<places>{_IPV6}:{_PORT}(?:,{_IPV6}:{_PORT})*)", re.ASCII),
    "vsock": re.compile(rf"vsock:\d+:{_PORT}", re.ASCII),
    "xds": re.compile(r"xds:(?://[\w.-]*/)?[\w.:/-]+", re.ASCII),
}
"""gRPC reads a target as a URI, with a path, a query, a fragment and escapes, and connects to what it finds in the
path. What these do not match could be another host to gRPC than to the check for this machine."""


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a server."""

    target: str
    """As gRPC has to get it."""
    tls: bool | None
    """What the scheme says: `grpcs` yes, `grpc` no, any other nothing."""
    is_on_this_machine: bool
    """Calls do not leave the machine: a Unix socket, or loopback alone."""


def parse_address(text: str) -> Address:
    """Return the address that a text means.

    Raises:
        ValueError: the text is not an address; the message says what to write.
    """
    scheme, _, path = text.partition(":")
    if scheme in ("unix", "unix-abstract"):
        # gRPC decodes a path, which may hold a "%" or "?". It refuses a host before the path.
        if path.strip("/") and (path.startswith("///") or not path.startswith("//")):
            return Address(f"{scheme}:{quote(path)}", None, True)
    elif url := _URL.fullmatch(text):
        target = f"{url[2]}:{url[3] or DEFAULT_PORT}"
        return Address(target, url[1] == "grpcs", _is_here(target))
    elif found := _FORMS.get(scheme, _FORMS[""]).fullmatch(text):
        parts = found.groupdict("")
        # A DNS server that is named may give another host for "localhost".
        is_here = all(map(_is_here, parts.get("places", "").split(","))) and not parts.get("authority")
        return Address(text, None, is_here)
    raise ValueError(
        f"{text!r} is not an address; write HOST:PORT, grpcs://HOST:PORT (TLS), dns:///HOST:PORT or unix:/path"
    )


def _is_here(place: str) -> bool:
    """Return whether HOST or HOST:PORT is loopback."""
    return is_loopback(place[1:].partition("]")[0] if place.startswith("[") else place.partition(":")[0])


def is_loopback(host: str) -> bool:
    """Return whether a host, an IPv6 address without brackets, is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
