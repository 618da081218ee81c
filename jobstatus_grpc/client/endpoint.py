"""The server's address and the caller's credentials: what a client's arguments mean, and the channels they open."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

# gRPC imports it when it opens the first channel. A child that is forked meanwhile could never import it: the lock of
# the module would be held for ever, by a thread that does not run in the child.
import grpc._channel

from jobstatus_grpc.address import parse_address
from jobstatus_grpc.client import values
from jobstatus_grpc.client.token import RenewedToken, Token, TokenCommand
from jobstatus_grpc.files import FollowedFiles, read_file
from jobstatus_grpc.wire.channel import OWN_CONNECTION, WITHOUT_PROXY, ChannelOption

log = logging.getLogger("jobstatus_grpc.client")

USER_AGENT = "jobstatus-grpc"

CHECK_SECONDS = 1.0
"""Interval, at least, at which a client that makes calls looks at its files of TLS."""

CHANNEL_OPTIONS: list[ChannelOption] = [
    ("grpc.primary_user_agent", USER_AGENT),
    # Detect within half a minute that the server's machine is gone, also between calls, so that the next call does not
    # run into its deadline. The server allows a ping every 10 s.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # The timeout of pings, those of the keepalive included: by default 60 s, whatever the option above says.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default the third ping without data in between is not sent: a dead connection with a quiet watch is not found.
    ("grpc.http2.max_pings_without_data", 0),
    # The largest reply: 500 results of a batch, each with all its labels and texts. gRPC's default is 4 MiB.
    ("grpc.max_receive_message_length", 32 * 1024 * 1024),
    # Reconnect soon after a server's restart; by default the pauses grow from 1 s to 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Despite its name also the timeout of one attempt to connect, by default 20 s: for a host that drops packets.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # Resolve the name again soon after a server has moved; by default at most every 30 s.
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    OWN_CONNECTION,
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """How a client uses TLS. The files are PEM; when they change, new connections use the new contents.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: one of `cert_file` and `key_file` lacks the other.
    """

    ca_file: str | os.PathLike[str] | None = None
    """The CAs of servers to trust. None: the public ones, which gRPC has built in."""
    cert_file: str | os.PathLike[str] | None = None
    """The client's certificate, then the CAs between it and a root."""
    key_file: str | os.PathLike[str] | None = None
    server_name: str | None = None
    """The name that the server's certificate must have. None: the host of the address."""

    def __post_init__(self) -> None:
        for name in ("ca_file", "cert_file", "key_file"):
            values.check_text(getattr(self, name), name, os.PathLike)
        values.check_text(self.server_name, "server_name")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file must be given together")


def tls_of(ca_file: str | None, cert_file: str | None, key_file: str | None, server_name: str | None) -> Tls | None:
    """Return what the flags and variables of TLS stand for; None if there are none."""
    if not (ca_file or cert_file or key_file or server_name):
        return None
    return Tls(ca_file=ca_file, cert_file=cert_file, key_file=key_file, server_name=server_name)


@dataclass(frozen=True, slots=True)
class Pems:
    """What was in the files at one time."""

    ca: bytes | None = field(repr=False)
    key: bytes | None = field(repr=False)
    cert: bytes | None = field(repr=False)


def _read(tls: Tls, before: Pems | None = None) -> Pems:
    """Read the files, and check them as far as OpenSSL can: gRPC's own error would not say which file is wrong.

    Raises:
        ValueError: a file has something else in it; the message names it.
        OSError: a file cannot be read.
    """
    ca, key, cert = (None if path is None else read_file(path) for path in (tls.ca_file, tls.key_file, tls.cert_file))
    import ssl  # takes a while to load

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca is not None:
        try:
            context.load_verify_locations(cadata=ca.decode("ascii"))
        except (ssl.SSLError, ValueError):
            raise ValueError(f"{tls.ca_file} is not a file of CA certificates in PEM") from None
    if tls.cert_file is not None:
        try:
            context.load_cert_chain(tls.cert_file, tls.key_file, password="")
        except ssl.SSLError as error:
            if "KEY_VALUES_MISMATCH" in str(error):
                why = f"the key in {tls.key_file} does not fit the first certificate in {tls.cert_file}"
            else:
                why = f"{tls.cert_file} and {tls.key_file} are not a certificate and its key in PEM, not encrypted"
            raise ValueError(why) from None
    return Pems(ca, key, cert)


class TlsFiles:
    """The newest good contents of the files of `tls`. Any thread may use it. It can be pickled, with the contents."""

    def __init__(self, tls: Tls, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the files.

        Raises:
            ValueError: as of `_read`.
            OSError: a file cannot be read.
        """
        self.tls = tls
        self._now = clock
        self._check_at = clock() + CHECK_SECONDS
        paths = (tls.ca_file, tls.cert_file, tls.key_file)
        self._files: FollowedFiles[Pems] = FollowedFiles(paths, functools.partial(_read, tls), (ValueError, OSError))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _check_at=float("-inf"))  # clocks of two machines differ

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TlsFiles) and (self.tls, self._files.current) == (other.tls, other._files.current)

    def __hash__(self) -> int:
        return hash(self.tls)

    def current(self) -> Pems:
        """Return the contents; the same object until they change. Looks at the files every CHECK_SECONDS at most."""
        if self._now() >= self._check_at:
            self._check_at = self._now() + CHECK_SECONDS
            if (error := self._files.check()) is not None:
                log.warning("the changed TLS files are not used, those from before are: %s", error)
        return self._files.current


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The server's address and the caller's credentials; opens channels. It can be pickled."""

    target: str
    tls: TlsFiles | None = None
    """None: without TLS."""
    token: str | RenewedToken | None = field(default=None, repr=False)
    tenant: str | None = None
    may_use_proxy: bool = False
    """Whether channels heed the variables that name an HTTP proxy, such as http_proxy."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...] | None:
        """What a call that begins now sends; None: nothing."""
        found = []
        if self.token is not None:
            token = self.token if isinstance(self.token, str) else self.token.current()
            found.append(("authorization", f"Bearer {token}"))
        if self.tenant is not None:
            found.append(("x-jobstatus-tenant", self.tenant))
        return tuple(found) or None

    def renew_token(self) -> bool:
        """Make the next call look for a new token; return whether there may be one."""
        if not isinstance(self.token, RenewedToken):
            return False
        self.token.expire()
        return True

    def pems(self) -> Pems | None:
        """Return what a channel that is opened now uses, None without TLS. A channel with another is outdated."""
        return None if self.tls is None else self.tls.current()

    def open(self, pems: Pems | None = None) -> grpc.Channel:
        """Return a new channel, with `pems()` by default; it connects with the first call."""
        channel: grpc.Channel = self._open(grpc, pems)
        return channel

    def open_aio(self, pems: Pems | None = None) -> grpc.aio.Channel:
        """As `open`, for the running event loop."""
        channel: grpc.aio.Channel = self._open(grpc.aio, pems)
        return channel

    def _open(self, kind: Any, pems: Pems | None) -> Any:
        options = [*CHANNEL_OPTIONS, *(() if self.may_use_proxy else WITHOUT_PROXY)]
        if self.tls is None:
            return kind.insecure_channel(self.target, options)
        pems = pems or self.tls.current()
        if (name := self.tls.tls.server_name) is not None:
            options.append(("grpc.ssl_target_name_override", name))
        credentials = grpc.ssl_channel_credentials(pems.ca, pems.key, pems.cert)
        return kind.secure_channel(self.target, credentials, options)


def endpoint(
    address: str,
    *,
    token: Token | None = None,
    tenant: str | None = None,
    tls: Tls | bool | None = None,
    insecure: bool = False,
) -> Endpoint:
    """Return the endpoint that a client's arguments name.

    Raises:
        ValueError: they are not valid together, or the token's command failed; the message says what to write.
        OSError: a file cannot be read.
    """
    server = parse_address(address)
    if server.tls is not None and tls is not None and server.tls != bool(tls):
        raise ValueError(f"{address!r} says {'TLS' if server.tls else 'no TLS'}, and tls={tls!r} the opposite")
    if server.tls or tls is True:
        tls = tls if isinstance(tls, Tls) else Tls()
    if token is not None and not tls and not insecure and not server.is_on_this_machine:
        raise ValueError(
            f"the token would be sent to {address} without encryption; use TLS (grpcs://HOST:PORT, or a CA), or if "
            "the network is trusted insecure=True (--insecure, JOBSTATUS_INSECURE=1)"
        )
    return Endpoint(
        server.target,
        TlsFiles(tls) if tls else None,
        None if token is None else _opened(token),
        None if tenant is None else _word(tenant, "tenant"),
        # A proxy would read a token that is sent without TLS: insecure=True trusts the network, not each proxy.
        may_use_proxy=not server.is_on_this_machine and (bool(tls) or token is None),
    )


def _opened(token: Token) -> str | RenewedToken:
    if isinstance(token, str):
        return _word(token, "token")
    return RenewedToken(token if isinstance(token, TokenCommand) else Path(token))


def _word(text: str, name: str) -> str:
    """Return a value of metadata; raise ValueError if gRPC cannot send it."""
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"the {name} must be printable ASCII without spaces")
    return text
